"""The bottleneck adapter behaves as any PEFT method does, on tiny models built from their configurations."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from peftsearch.methods.bottleneck import (
    PEFT_TYPE,
    BottleneckConfig,
    BottleneckLayer,
    BottleneckModel,
    register,
    target_pattern,
)
from peftsearch.methods.sublayers import features, feed_forward_input, find_sublayers

register()

ROOT = Path(__file__).parents[2]
VOCABULARY = 64
HIDDEN = 64
LAYERS = 2
BOTTLENECK = 5
PLACEMENTS = ("pfeiffer", "houlsby", "parallel")


def bert() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=8,
        initializer_factor=2.0,
        d_ff=128,
        num_layers=LAYERS,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=2,
        n_positions=32,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {"bert": bert, "t5": t5, "llama": llama, "gpt2": gpt2}
TASKS = {
    "bert": TaskType.SEQ_CLS,
    "t5": TaskType.SEQ_2_SEQ_LM,
    "llama": TaskType.CAUSAL_LM,
    "gpt2": TaskType.CAUSAL_LM,
}
# Sublayers of the whole model by placement; a T5 decoder block has two attention sublayers.
ADAPTED = {
    "bert": {"pfeiffer": LAYERS, "houlsby": 2 * LAYERS, "parallel": LAYERS},
    "t5": {"pfeiffer": 2 * LAYERS, "houlsby": 5 * LAYERS, "parallel": 2 * LAYERS},
    "llama": {"pfeiffer": LAYERS, "houlsby": 2 * LAYERS, "parallel": LAYERS},
    "gpt2": {"pfeiffer": LAYERS, "houlsby": 2 * LAYERS, "parallel": LAYERS},
}

every_case = pytest.mark.parametrize(
    ("architecture", "placement"), [(architecture, placement) for architecture in BUILDERS for placement in PLACEMENTS]
)
every_architecture = pytest.mark.parametrize("architecture", BUILDERS)


def build(architecture: str) -> PreTrainedModel:
    """The same base model on every call."""
    torch.manual_seed(0)
    return BUILDERS[architecture]().eval()


def configure(architecture: str, **fields: Any) -> BottleneckConfig:
    return BottleneckConfig(task_type=TASKS[architecture], **{"bottleneck_size": BOTTLENECK, **fields})


def batch(architecture: str) -> dict[str, Tensor]:
    """Eight sequences, with labels that can be learnt."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (8, 12), generator=generator)
    if architecture == "bert":
        return {"input_ids": ids, "labels": ids[:, 0] % 3}
    if architecture == "t5":
        return {"input_ids": ids, "labels": ids[:, :6].contiguous()}
    return {"input_ids": ids, "labels": ids}


def logits(model: nn.Module, architecture: str) -> Tensor:
    model.eval()
    with torch.no_grad():
        result = model(**batch(architecture)).logits
    assert isinstance(result, Tensor)
    return result


def train(model: nn.Module, architecture: str, steps: int, learning_rate: float = 1e-2) -> list[float]:
    """AdamW on one batch; returns the losses."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch(architecture)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def bottleneck_layers(model: nn.Module) -> dict[str, BottleneckLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}


# --- what is adapted -------------------------------------------------------------------------------------------------


@every_case
def test_trains_two_projections_with_biases_per_adapted_sublayer(architecture: str, placement: str) -> None:
    model = get_peft_model(BUILDERS[architecture](), configure(architecture, placement=placement))

    layers = bottleneck_layers(model)
    assert len(layers) == ADAPTED[architecture][placement]
    for layer in layers.values():
        assert isinstance(layer.base_layer, Conv1D if architecture == "gpt2" else nn.Linear)
        trained = [p.numel() for p in layer.parameters() if p.requires_grad]
        assert sum(trained) == 2 * HIDDEN * BOTTLENECK + BOTTLENECK + HIDDEN
    head = 3 * HIDDEN + 3 if architecture == "bert" else 0
    expected = len(layers) * (2 * HIDDEN * BOTTLENECK + BOTTLENECK + HIDDEN) + head
    assert model.get_nb_trainable_parameters()[0] == expected


def test_pfeiffer_adapts_the_feed_forward_output_only() -> None:
    model = get_peft_model(bert(), configure("bert"))
    assert model.base_model.targeted_module_names == [f"bert.encoder.layer.{i}.output.dense" for i in range(LAYERS)]


def test_houlsby_adapts_cross_attention_too() -> None:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        is_decoder=True,
        add_cross_attention=True,
    )
    model = get_peft_model(BertModel(config), BottleneckConfig(placement="houlsby"))
    assert model.base_model.targeted_module_names == [
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.crossattention.output.dense",
        "encoder.layer.0.output.dense",
    ]


ARCHITECTURES = """
    bert roberta xlm-roberta xlm-roberta-xl camembert electra deberta deberta-v2 mpnet distilbert modernbert albert
    longformer t5 mt5 umt5 bart mbart pegasus llama mistral qwen2 qwen3 gemma gemma2 gemma3_text smollm3 phi phi3 glm
    glm4 gpt2 gpt_neo gpt_neox gptj opt falcon bloom mpt
""".split()  # noqa: SIM905


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_finds_the_sublayers_of_an_architecture(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    for field in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
        if hasattr(config, field):
            setattr(config, field, 1)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    blocks, attentions = (2, 3) if config.is_encoder_decoder else (1, 1)

    found = {}
    for placement in PLACEMENTS:
        pattern = target_pattern(model, placement)
        adapted = BottleneckConfig(placement=placement, target_modules=pattern)
        found[placement] = {
            name for name, _ in model.named_modules() if BottleneckModel._check_target_module_exists(adapted, name)
        }

    assert len(found["pfeiffer"]) == blocks
    assert found["parallel"] == found["pfeiffer"]
    for end in found["parallel"]:
        begin = model.get_submodule(feed_forward_input(model, end))
        assert features(begin)[0] == features(model.get_submodule(end))[1]
    assert not any("attn" in name.lower() or "attention" in name.lower() for name in found["pfeiffer"])
    assert len(found["houlsby"]) == blocks + attentions
    assert found["pfeiffer"] < found["houlsby"]
    assert all(isinstance(model.get_submodule(name), nn.Linear | Conv1D) for name in found["houlsby"])


class GlmBlock(nn.Module):
    """The names of ChatGLM4, whose code comes with its checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.ModuleDict({"query_key_value": nn.Linear(16, 24), "dense": nn.Linear(16, 16)})
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(16, 96), "dense_4h_to_h": nn.Linear(48, 16)})


def test_finds_the_sublayers_of_code_that_it_does_not_know() -> None:
    model = nn.Module()
    model.config = PretrainedConfig(hidden_size=16)
    model.encoder = nn.ModuleDict({"layers": nn.ModuleList([GlmBlock(), GlmBlock()])})
    config = BottleneckConfig(target_modules=target_pattern(model, "houlsby"))
    found = [name for name, _ in model.named_modules() if BottleneckModel._check_target_module_exists(config, name)]
    block = "encoder.layers.{}."
    ends = [block + end for end in ("self_attention.dense", "mlp.dense_4h_to_h")]
    assert found == [end.format(index) for index in range(2) for end in ends]
    assert feed_forward_input(model, found[1]) == "encoder.layers.0.mlp.dense_h_to_4h"
    assert find_sublayers(model).query_and_value[0] == "encoder.layers.0.self_attention.query_key_value"


@pytest.mark.parametrize("model_type", ["mixtral", "mamba", "xlnet", "mobilebert"])
def test_says_so_where_the_sublayers_are_not_clear(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, num_hidden_layers=1)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    with pytest.raises(ValueError, match=r"feed-forward sublayers of .* end is not clear\. Set `target_modules`"):
        target_pattern(model, "pfeiffer")


def test_target_modules_override_placement() -> None:
    config = configure("bert", placement="houlsby", target_modules=["intermediate.dense"], exclude_modules=r".*\.0\..*")
    model = get_peft_model(bert(), config)
    assert model.base_model.targeted_module_names == ["bert.encoder.layer.1.intermediate.dense"]
    (layer,) = bottleneck_layers(model).values()
    assert layer.out_features == 128


def test_an_unknown_architecture_needs_target_modules() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.second = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            result = self.second(self.first(x))
            assert isinstance(result, Tensor)
            return result

    with pytest.raises(ValueError, match="Set `target_modules`"):
        get_peft_model(Custom(), BottleneckConfig())
    model = get_peft_model(Custom(), BottleneckConfig(bottleneck_size=3, target_modules=["first"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 6 * 3 + 3 + 6


def test_refuses_layers_it_cannot_adapt() -> None:
    with pytest.raises(ValueError, match=r"bert\.embeddings\.word_embeddings cannot be adapted.*Embedding"):
        get_peft_model(bert(), configure("bert", target_modules=["word_embeddings"]))
    with pytest.raises(ValueError, match="MultiheadAttention"):
        get_peft_model(nn.TransformerEncoderLayer(8, 2), BottleneckConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_counts_parameters_on_the_meta_device(placement: str) -> None:
    with torch.device("meta"):
        model = bert()
    adapted = get_peft_model(model, configure("bert", placement=placement))
    assert {p.device.type for p in adapted.parameters()} == {"meta"}
    real = get_peft_model(bert(), configure("bert", placement=placement))
    assert adapted.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
    assert adapted(input_ids=torch.zeros(2, 4, dtype=torch.long, device="meta")).logits.shape == (2, 3)


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "function"),
    [("relu", torch.relu), ("gelu", nn.functional.gelu), ("silu", nn.functional.silu), ("tanh", torch.tanh)],
)
def test_computes_the_formula_of_the_papers(activation: str, function: Callable[[Tensor], Tensor]) -> None:
    config = BottleneckConfig(bottleneck_size=3, activation=activation, init_weights=False)
    layer = BottleneckLayer(nn.Linear(4, 6), "default", config)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    x = torch.randn(2, 5, 4)
    y = x @ layer.base_layer.weight.T + layer.base_layer.bias
    expected = y + function(y @ down.weight.T + down.bias) @ up.weight.T + up.bias
    torch.testing.assert_close(layer(x), expected)


@every_architecture
def test_a_parallel_adapter_adds_to_the_sublayer_what_it_makes_of_its_input(architecture: str) -> None:
    config = configure(architecture, placement="parallel", scale=2.5, init_weights=False)
    model = get_peft_model(build(architecture), config).eval()
    name, layer = next(iter(bottleneck_layers(model).items()))
    begin = feed_forward_input(model, name)
    seen: dict[str, Tensor] = {}

    def record(key: str, take_input: bool) -> Callable[..., None]:
        return lambda _, inputs, output: seen.__setitem__(key, inputs[0] if take_input else output)

    model.get_submodule(begin).register_forward_hook(record("x", True))
    layer.base_layer.register_forward_hook(record("y", False))
    layer.register_forward_hook(record("result", False))
    logits(model, architecture)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    torch.testing.assert_close(seen["result"], seen["y"] + 2.5 * up(nn.functional.gelu(down(seen["x"]))))


def test_parallel_adapters_beside_others_come_and_go() -> None:
    base = logits(build("llama"), "llama")
    model = get_peft_model(build("llama"), configure("llama", init_weights=False), adapter_name="after")
    after = logits(model, "llama")
    model.add_adapter("beside", configure("llama", placement="parallel", init_weights=False))
    model.set_adapter("beside")
    beside = logits(model, "llama")
    assert not torch.allclose(beside, after)
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), base)
    copied = copy.deepcopy(model)
    begin = model.get_submodule(feed_forward_input(model, next(iter(bottleneck_layers(model)))))
    assert begin._forward_pre_hooks
    model.delete_adapter("beside")
    assert not begin._forward_pre_hooks
    assert torch.equal(logits(model, "llama"), after)
    # A copy has hooks of its own.
    assert torch.equal(logits(copied, "llama"), beside)
    assert not any(module._forward_pre_hooks for module in copied.unload().modules())


def test_dropout_acts_on_the_adapter_alone_and_in_training_only() -> None:
    layer = BottleneckLayer(nn.Linear(4, 6), "default", BottleneckConfig(dropout=0.5, init_weights=False))
    x = torch.randn(64, 4)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    # With the up-projection at zero nothing of the adapter is left to drop.
    layer.train().reset_bottleneck_parameters("default")
    assert torch.equal(layer(x), layer.base_layer(x))


@every_case
def test_starts_as_the_base_model(architecture: str, placement: str) -> None:
    base = logits(build(architecture), architecture)
    for init_std in (None, 0.01):
        model = get_peft_model(build(architecture), configure(architecture, placement=placement, init_std=init_std))
        assert torch.equal(logits(model, architecture), base)
    random = get_peft_model(build(architecture), configure(architecture, placement=placement, init_weights=False))
    assert not torch.allclose(logits(random, architecture), base)


def test_init_std_is_the_spread_of_the_down_projection() -> None:
    layer = BottleneckLayer(nn.Linear(8, 512), "default", BottleneckConfig(bottleneck_size=256, init_std=0.01))
    assert layer.bottleneck_down["default"].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not layer.bottleneck_down["default"].bias.any()
    assert not layer.bottleneck_up["default"].weight.any()


@every_case
def test_learns_and_leaves_the_base_alone(architecture: str, placement: str) -> None:
    base = build(architecture)
    before = snapshot(base)
    model = get_peft_model(base, configure(architecture, placement=placement, dropout=0.1))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("bottleneck_" in name or "modules_to_save" in name for name in trained)

    model.train()
    model(**batch(architecture)).loss.backward()
    # A trainable parameter without a gradient would stop DistributedDataParallel.
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []
    model.zero_grad()

    losses = train(model, architecture, steps=30)
    assert losses[-1] < 0.9 * losses[0]
    assert_same(snapshot(model.unload()), before)


@every_architecture
def test_gradient_checkpointing_gives_the_same_gradients(architecture: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        base = build(architecture)
        if checkpointing:
            base.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model = get_peft_model(base, configure(architecture, placement="houlsby", init_weights=False))
        model.train()
        torch.manual_seed(4)
        model(**batch(architecture)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@every_architecture
def test_half_precision_base_and_autocast(architecture: str) -> None:
    model = get_peft_model(build(architecture).to(torch.bfloat16), configure(architecture, placement="houlsby"))
    assert {p.dtype for name, p in model.named_parameters() if "bottleneck_" in name} == {torch.float32}
    for layer in bottleneck_layers(model).values():
        x = torch.randn(2, layer.base_layer.weight.shape[0 if architecture == "gpt2" else 1], dtype=layer.weight.dtype)
        assert layer(x).dtype == layer.weight.dtype
    assert train(model, architecture, steps=1)

    model = get_peft_model(build(architecture), configure(architecture, placement="houlsby", init_weights=False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layer in bottleneck_layers(model).values():
            x = torch.randn(2, layer.base_layer.weight.shape[0 if architecture == "gpt2" else 1])
            assert layer(x).dtype == torch.bfloat16
        model(**batch(architecture)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- saving and loading ----------------------------------------------------------------------------------------------


@every_case
def test_round_trip_in_this_process(architecture: str, placement: str, tmp_path: Path) -> None:
    config = configure(architecture, placement=placement, activation="tanh", dropout=0.1, init_std=0.02)
    model = get_peft_model(build(architecture), config)
    train(model, architecture, steps=3)
    expected = logits(model, architecture)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(build(architecture), tmp_path)
    assert torch.equal(logits(loaded, architecture), expected)
    assert isinstance(loaded.peft_config["default"], BottleneckConfig)
    for field in ("bottleneck_size", "activation", "placement", "dropout", "target_modules", "init_std"):
        assert getattr(loaded.peft_config["default"], field) == getattr(model.peft_config["default"], field)
    assert not any(p.requires_grad for p in loaded.parameters())

    for options in ({"is_trainable": True}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(build(architecture), tmp_path, **options)
        assert torch.equal(logits(loaded, architecture), expected)


RELOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from peftsearch.methods.bottleneck import register
from peft import PeftModel

register()
torch.set_num_threads(1)
classes = {"bert": AutoModelForSequenceClassification, "t5": AutoModelForSeq2SeqLM}
for case in json.loads(sys.argv[1]):
    base = classes.get(case["architecture"], AutoModelForCausalLM).from_pretrained(case["base"])
    model = PeftModel.from_pretrained(base, case["adapter"]).eval()
    with torch.no_grad():
        torch.save(model(**torch.load(case["batch"])).logits, case["logits"])
"""


def fresh_process(code: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_round_trip_in_a_fresh_process(tmp_path: Path) -> None:
    cases, expected = [], []
    for architecture in BUILDERS:
        base, inputs = tmp_path / architecture, tmp_path / f"{architecture}.pt"
        build(architecture).save_pretrained(base)
        torch.save(batch(architecture), inputs)
        for placement in PLACEMENTS:
            model = get_peft_model(build(architecture), configure(architecture, placement=placement))
            train(model, architecture, steps=3)
            adapter = tmp_path / f"{architecture}-{placement}"
            model.save_pretrained(adapter)
            expected.append(logits(model, architecture))
            paths = {"base": base, "batch": inputs, "adapter": adapter, "logits": adapter / "logits.pt"}
            cases.append({"architecture": architecture} | {key: str(path) for key, path in paths.items()})

    fresh_process(RELOAD, json.dumps(cases))
    for case, want in zip(cases, expected, strict=True):
        assert torch.equal(torch.load(case["logits"]), want), case["adapter"]


@pytest.mark.parametrize(
    "imports",
    [
        "import peft, peftsearch",
        "import peftsearch, peft",
        "from peftsearch.methods.bottleneck.model import BottleneckModel; import peft",
    ],
)
def test_is_registered_whatever_is_imported_first(imports: str) -> None:
    code = f"{imports}; print(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING['{PEFT_TYPE}'].__name__)"
    assert fresh_process(code).strip().endswith("BottleneckModel")


def test_registering_twice_changes_nothing() -> None:
    register()
    register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is BottleneckConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] is BottleneckModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] == BottleneckModel.prefix


def test_the_task_head_is_trained_and_saved(tmp_path: Path) -> None:
    base = build("bert")
    head = base.classifier.weight.clone()
    model = get_peft_model(base, configure("bert", modules_to_save=["classifier"]))
    train(model, "bert", steps=3)
    trained = model.base_model.model.classifier.modules_to_save["default"].weight
    assert not torch.equal(trained, head)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, trained)
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))
    with model.disable_adapter():
        assert torch.equal(logits(model, "bert"), logits(build("bert"), "bert"))


def test_transformers_loads_it_without_peft_model(tmp_path: Path) -> None:
    model = build("bert")
    model.add_adapter(configure("bert", init_weights=False))
    model.save_pretrained(tmp_path)
    loaded = build("bert")
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))


def test_layer_norms_can_be_trained_too(tmp_path: Path) -> None:
    model = get_peft_model(build("bert"), configure("bert", modules_to_save=["LayerNorm", "classifier"]))
    train(model, "bert", steps=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert any("LayerNorm.modules_to_save" in name for name, _ in loaded.named_parameters())
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))


# --- switching -------------------------------------------------------------------------------------------------------


@every_case
def test_disabling_gives_the_base_model(architecture: str, placement: str) -> None:
    base = logits(build(architecture), architecture)
    config = configure(architecture, placement=placement, init_weights=False)
    model = get_peft_model(build(architecture), config)
    adapted = logits(model, architecture)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}

    with model.disable_adapter():
        assert torch.equal(logits(model, architecture), base)
    assert torch.equal(logits(model, architecture), adapted)
    model.disable_adapter_layers()
    assert torch.equal(logits(model, architecture), base)
    model.enable_adapter_layers()
    assert torch.equal(logits(model, architecture), adapted)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


@every_architecture
def test_several_named_adapters(architecture: str, tmp_path: Path) -> None:
    base = logits(build(architecture), architecture)
    first = configure(architecture, init_weights=False)
    second = configure(architecture, init_weights=False, placement="houlsby", bottleneck_size=7, activation="relu")
    model = get_peft_model(build(architecture), first, adapter_name="first")
    one = logits(model, architecture)

    model.add_adapter("second", second)
    assert model.active_adapters == ["first"]
    assert torch.equal(logits(model, architecture), one)
    model.set_adapter("second")
    two = logits(model, architecture)
    assert not torch.allclose(one, two)
    assert not torch.allclose(two, base)
    assert not any("first" in name for name, p in model.named_parameters() if p.requires_grad)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(architecture), tmp_path / "first", adapter_name="left")
    loaded.load_adapter(tmp_path / "second", adapter_name="right")
    assert torch.equal(logits(loaded, architecture), one)
    loaded.set_adapter("right")
    assert torch.equal(logits(loaded, architecture), two)

    with pytest.warns(UserWarning, match="right was active which is now deleted"):
        loaded.delete_adapter("right")
    assert loaded.active_adapters == ["left"]
    assert torch.equal(logits(loaded, architecture), one)
    assert not any(".right." in name for name in loaded.state_dict())
    model.delete_adapter("first")
    assert torch.equal(logits(model, architecture), two)


def test_deleting_the_active_adapter_activates_the_same_one_in_every_layer() -> None:
    model = get_peft_model(build("bert"), configure("bert", init_weights=False), adapter_name="left")
    model.add_adapter("middle", configure("bert", init_weights=False, placement="houlsby"))
    model.add_adapter("right", configure("bert", init_weights=False, target_modules=["intermediate.dense"]))
    expected = logits(model, "bert")
    model.set_adapter("right")
    with pytest.warns(UserWarning, match="right was active which is now deleted"):
        model.delete_adapter("right")
    assert model.active_adapter == "left"
    assert {tuple(layer.active_adapters) for layer in bottleneck_layers(model).values()} == {("left",)}
    assert torch.equal(logits(model, "bert"), expected)
    assert model.base_model.model.classifier.active_adapters == ["left"]

    model.delete_adapter("middle")
    assert model.active_adapter == "left"
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("middle")


def test_active_adapters_act_one_after_another() -> None:
    layer = BottleneckLayer(nn.Linear(4, 6), "first", BottleneckConfig(init_weights=False))
    layer.update_layer("second", BottleneckConfig(init_weights=False))
    x = torch.randn(3, 4)
    outputs = {}
    for order in (["first", "second"], ["second", "first"]):
        layer.set_adapter(order)
        outputs[order[0]] = layer(x)
        y = layer.base_layer(x)
        for name in order:
            y = y + layer.bottleneck_up[name](nn.functional.gelu(layer.bottleneck_down[name](y)))
        torch.testing.assert_close(outputs[order[0]], y)
    assert not torch.allclose(outputs["first"], outputs["second"])


def test_both_adapters_of_a_model_may_be_active() -> None:
    model = get_peft_model(build("llama"), configure("llama", init_weights=False), adapter_name="first")
    model.add_adapter("second", configure("llama", init_weights=False, placement="houlsby"))
    alone = logits(model, "llama")
    model.base_model.set_adapter(["first", "second"])
    assert not torch.allclose(logits(model, "llama"), alone)
    assert train(model, "llama", steps=1)


@every_case
def test_unload_gives_the_base_back_bit_by_bit(architecture: str, placement: str) -> None:
    base = build(architecture)
    before, modules = snapshot(base), [(name, type(module)) for name, module in base.named_modules()]
    model = get_peft_model(base, configure(architecture, placement=placement))
    train(model, architecture, steps=2)
    unloaded = model.unload()
    assert_same(snapshot(unloaded), before)
    assert [(name, type(module)) for name, module in unloaded.named_modules()] == modules
    assert torch.equal(logits(unloaded, architecture), logits(build(architecture), architecture))


def test_merging_is_refused() -> None:
    model = get_peft_model(build("llama"), configure("llama"))
    for merge in (model.merge_and_unload, model.merge_adapter, next(iter(bottleneck_layers(model).values())).merge):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert bottleneck_layers(model)
    assert not model.supports_lora_conversion()


def test_a_batch_with_several_adapters_is_refused() -> None:
    model = get_peft_model(build("bert"), configure("bert")).eval()
    with pytest.raises(ValueError, match="adapter_names"):
        model(**batch("bert"), adapter_names=["default"] * 8)
    model = get_peft_model(build("llama"), configure("llama")).eval()
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(input_ids=batch("llama")["input_ids"], adapter_names=["default"] * 8, max_new_tokens=1)


@pytest.mark.parametrize("architecture", ["t5", "llama", "gpt2"])
def test_generates(architecture: str) -> None:
    model = get_peft_model(build(architecture), configure(architecture, init_weights=False)).eval()
    ids = batch(architecture)["input_ids"][:2]
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[0] == 2


# --- quantised bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_trains_over_a_quantised_base(architecture: str, quantisation: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    if quantisation == "nf4":
        options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    else:
        options = BitsAndBytesConfig(load_in_8bit=True)
    options.llm_int8_skip_modules = ["classifier", "lm_head"]
    base = build(architecture)
    base.save_pretrained(tmp_path / "base")

    def quantised() -> PreTrainedModel:
        model = type(base).from_pretrained(tmp_path / "base", quantization_config=options, device_map="cpu")
        for module in model.modules():
            # On CPUs with AVX512-bf16, bitsandbytes 0.50 repacks 4-bit weights at the first evaluation into a form
            # that passes no gradients back from then on.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    before = logits(quantised(), architecture)
    model = get_peft_model(quantised(), configure(architecture, placement="houlsby"))
    for layer in bottleneck_layers(model).values():
        assert layer.out_features == HIDDEN
        assert type(layer.base_layer).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantisation]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(logits(model, architecture), before)

    losses = train(model, architecture, steps=10)
    assert losses[-1] < losses[0]
    after = logits(model, architecture)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantised(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, architecture), after)
    torch.testing.assert_close(logits(model.unload(), architecture), before)


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size must be at least 1, not 0"),
        ({"bottleneck_size": 2.5}, r"bottleneck_size must be a whole number, not 2\.5"),
        ({"bottleneck_size": True}, "bottleneck_size must be a whole number"),
        ({"activation": "swoosh"}, "activation must be one of relu, gelu, silu, tanh, not 'swoosh'"),
        ({"placement": "sideways"}, "placement must be one of pfeiffer, houlsby, parallel, not 'sideways'"),
        ({"scale": 0.0}, "scale must be a positive number"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, not 1\.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"init_std": 0.0}, "init_std must be a positive number"),
        ({"init_std": float("nan")}, "init_std must be a positive number"),
        ({"task_type": "POETRY"}, "Invalid task type"),
    ],
)
def test_a_wrong_configuration_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**fields)


def test_the_configuration_survives_its_file(tmp_path: Path) -> None:
    config = BottleneckConfig(
        task_type="SEQ_CLS",
        bottleneck_size=9,
        activation="relu",
        placement="houlsby",
        dropout=0.2,
        target_modules={"b", "a"},
        exclude_modules=("c",),
        modules_to_save=["classifier"],
        init_std=0.05,
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a", "b"]
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_every_field_says_what_it_does() -> None:
    fields = BottleneckConfig.__dataclass_fields__
    assert [name for name in BottleneckConfig.__annotations__ if not fields[name].metadata.get("help")] == []
