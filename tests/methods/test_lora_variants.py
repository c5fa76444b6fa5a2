"""LoRA, DoRA and rsLoRA, and where they attach in architectures that PEFT does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import MODELS, load, logits, train
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from tiny_models import SAMPLES
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PretrainedConfig

from peftsearch.methods import METHODS, AttachContext
from peftsearch.methods.lora import ATTENTION, target_modules
from peftsearch.methods.sublayers import find_sublayers
from peftsearch.training.base_model import count_trainable

VARIANTS = ("lora", "dora", "rslora")


def configuration(**values: Any) -> dict[str, Any]:
    return {**SAMPLES["lora"], **values}


def attach(model: nn.Module, context: AttachContext, **values: Any) -> PeftModel:
    attached = METHODS["lora"].attach(model, configuration(**values), context)
    assert isinstance(attached, PeftModel)
    return attached


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def meta(model_type: str) -> nn.Module:
    config = AutoConfig.for_model(model_type)
    for field in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
        if hasattr(config, field):
            setattr(config, field, 1)
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(config)
    return model


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", MODELS)
def test_learns_leaves_the_base_alone_and_survives_its_export(
    kind: str, variant: str, targets: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    model, context = load(bases[kind], kind)
    pretrained = {id(parameter): parameter.clone() for parameter in model.parameters()}
    parameters = list(model.parameters())
    start = logits(model, kind)
    attached = attach(model, context, variant=variant, targets=targets)
    torch.testing.assert_close(logits(attached, kind), start)
    losses = train(attached, kind, steps=8, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    assert [name for name, p in attached.named_parameters() if p.requires_grad and p.grad is not None] == []
    assert all(torch.equal(parameter, pretrained[id(parameter)]) for parameter in parameters)

    expected = logits(attached, kind)
    attached.save_pretrained(tmp_path)
    again, _ = load(bases[kind], kind)
    with torch.no_grad():
        for path in context.modules_to_save:
            for parameter in again.get_submodule(path).parameters():
                parameter.zero_()
    # The head comes from the adapter's folder, whatever the base drew.
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path), kind), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", MODELS)
def test_counts_the_same_without_weights(kind: str, variant: str, bases: dict[str, Path]) -> None:
    model, context = load(bases[kind], kind)
    real = count_trainable(attach(model, context, variant=variant))
    model, _ = load(bases[kind], kind)
    with torch.device("meta"):
        assert count_trainable(attach(model.to("meta"), context, variant=variant)) == real


def test_variants_scale_as_their_papers_say(bases: dict[str, Path]) -> None:
    scaling = {}
    for variant in VARIANTS:
        attached = attach(*load(bases["decoder"], "decoder"), variant=variant, rank=16, alpha=8.0)
        layer = attached.get_submodule(adapted(attached)[0])
        scaling[variant] = layer.scaling["default"]
        magnitude = dict(layer.lora_magnitude_vector)
        assert bool(magnitude) == (variant == "dora")
    assert scaling == {"lora": 8 / 16, "dora": 8 / 16, "rslora": 8 / 4}


def test_dora_starts_from_the_lengths_of_the_rows(bases: dict[str, Path]) -> None:
    attached = attach(*load(bases["decoder"], "decoder"), variant="dora")
    layer = attached.get_submodule(adapted(attached)[0])
    expected = layer.get_base_layer().weight.norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.data, expected)


def test_what_the_checkpoint_lacks_is_trained_and_saved(bases: dict[str, Path], tmp_path: Path) -> None:
    model, context = load(bases["encoder"], "encoder")
    assert set(context.modules_to_save) == {"bert.pooler", "classifier"}
    attached = attach(model, context, targets="all-linear")
    assert not any("pooler" in name or "classifier" in name for name in adapted(attached))
    trained = {name for name, p in attached.named_parameters() if p.requires_grad}
    assert any("pooler.modules_to_save" in name for name in trained)
    assert any("classifier.modules_to_save" in name for name in trained)


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("distilbert", ["attention.q_lin", "attention.v_lin"]),
        ("mpnet", ["attention.attn.q", "attention.attn.v"]),
        ("modernbert", ["attn.Wqkv"]),
        ("umt5", ["SelfAttention.q", "SelfAttention.v"] * 2 + ["EncDecAttention.q", "EncDecAttention.v"]),
        ("mbart", ["self_attn.v_proj", "self_attn.q_proj"] * 2 + ["encoder_attn.v_proj", "encoder_attn.q_proj"]),
        ("phi3", ["self_attn.qkv_proj"]),
        ("glm4", ["self_attn.q_proj", "self_attn.v_proj"]),
        ("smollm3", ["self_attn.q_proj", "self_attn.v_proj"]),
    ],
)
def test_finds_query_and_value_in_architectures_that_peft_does_not_know(model_type: str, expected: list[str]) -> None:
    assert model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    with torch.device("meta"):
        attached = attach(meta(model_type), AttachContext(None, "unused"))
    found = adapted(attached)
    assert len(found) == len(expected)
    assert all(any(name.endswith(f".{end}") for name in found) for end in expected)


@pytest.mark.parametrize(
    "model_type", ["bert", "xlm-roberta", "deberta-v2", "t5", "bart", "llama", "qwen3", "mistral", "gpt2", "gpt_neox"]
)
def test_what_the_model_shows_is_what_peft_knows(model_type: str) -> None:
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type]
    model = meta(model_type)
    linears = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    by_peft = {name for name in linears if any(name.endswith(f".{end}") for end in known)}
    assert set(find_sublayers(model).query_and_value) == by_peft


def test_the_feed_forward_is_no_attention_whatever_peft_says_of_the_architecture() -> None:
    assert "fc1" in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["phi"]
    assert target_modules(meta("phi"), ATTENTION) == ["q_proj", "v_proj"]
    assert target_modules(meta("phi"), ATTENTION) == target_modules(meta("llama"), ATTENTION)
    # RWKV's feed-forward has a "value", too.
    assert target_modules(meta("rwkv"), ATTENTION) == r"(.*\.)?(blocks\.\d+\.attention\.value)"


def test_all_of_an_attention_whose_layers_have_other_names() -> None:
    model = nn.Module()
    model.config = PretrainedConfig(hidden_size=8)
    attention = nn.ModuleDict({"alpha": nn.Linear(8, 8), "omega": nn.Linear(8, 8)})
    model.layers = nn.ModuleList([nn.ModuleDict({"attn": attention, "mlp": nn.Linear(8, 8)})])
    assert target_modules(model, ATTENTION) == r"(.*\.)?(layers\.\d+\.attn\.alpha|layers\.\d+\.attn\.omega)"


def test_says_so_where_there_is_no_attention_and_where_a_name_is_unknown() -> None:
    with pytest.raises(ValueError, match="No attention was found in MambaModel: let targets be all-linear"):
        attach(meta("mamba"), AttachContext(None, "unused"))
    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match="BertModel has no linear layer named 'no_such_layer'"):
        attach(model, AttachContext(None, "unused"), targets="no_such_layer")
    # One of several: PEFT would adapt the others without a word.
    with pytest.raises(ValueError, match="BertModel has no linear layer named 'quary'; did you mean 'query'"):
        attach(model, AttachContext(None, "unused"), targets="quary, value")
    with pytest.raises(ValueError, match=r"^targets 'LayerNorm' do not fit BertModel: Target module LayerNorm[^\n]*$"):
        attach(model, AttachContext(None, "unused"), targets="LayerNorm")
