"""Prompt tuning, P-tuning, prefix tuning and P-tuning v2 do what their papers say, on every architecture and task."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import (
    AUTO,
    CASES,
    assert_same_scores,
    attach,
    batch,
    build,
    check,
    check_generation,
    folder,
    scores,
    train,
)
from peft import PeftModel, PromptTuningConfig, get_peft_model
from tiny_models import HIDDEN, LAYERS, SAMPLES
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DynamicCache,
    LlamaConfig,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
)

from peftsearch.methods import METHODS, AttachContext
from peftsearch.methods.prompt import _default_text
from peftsearch.methods.soft_prompt.layer import SoftPromptLayer
from peftsearch.training.base_model import count_exported, count_trainable, trainable

SHALLOW = ("prompt", "p_tuning")
DEEP = ("prefix", "p_tuning_v2")
TOKENS = 3


def given(model: Any, *parts: str) -> dict[str, Tensor]:
    """The parameters whose names contain one of the parts."""
    return {name: p for name, p in model.named_parameters() if any(part in name for part in parts)}


def randomise(model: torch.nn.Module) -> None:
    """Trained parameters away from where they started."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize(("architecture", "task"), CASES)
@pytest.mark.parametrize("method", [*SHALLOW, *DEEP])
def test_trains_saves_and_reloads(method: str, architecture: str, task: str, tmp_path: Path) -> None:
    found = check(method, architecture, task, tmp_path)
    # One output for each token of the text.
    plain = scores(build(architecture, task)[0], found.inputs)
    assert found.scores.shape == plain.shape


@pytest.mark.parametrize("architecture", ["encoder-decoder", "decoder"])
@pytest.mark.parametrize("method", [*SHALLOW, *DEEP])
def test_generates(method: str, architecture: str) -> None:
    check_generation(method, architecture)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.parametrize("architecture", ["encoder", "encoder-decoder"])
def test_p_tuning_exports_what_its_network_computes(encoder: str, architecture: str, tmp_path: Path) -> None:
    found = check("p_tuning", architecture, "tag", tmp_path, encoder=encoder)
    prompts = [tensor for name, tensor in found.saved.items() if "soft_prompt" in name]
    assert [prompt.shape for prompt in prompts] == [(TOKENS, HIDDEN)]
    assert found.counts[0] > found.counts[1]


def test_prefix_tuning_exports_keys_and_values_alone(tmp_path: Path) -> None:
    found = check("prefix", "decoder", "continue", tmp_path)
    # Two key-value heads of size eight (of four heads).
    assert {tensor.shape for tensor in found.saved.values()} == {(2, TOKENS, HIDDEN // 4)}
    assert len(found.saved) == 2 * LAYERS
    assert json.loads((tmp_path / "adapter_config.json").read_text())["folded"] is True
    direct = check("prefix", "decoder", "continue", tmp_path / "direct", projection=False)
    assert direct.counts == (found.counts[1], found.counts[1])


def test_deep_prompt_is_a_cache_that_takes_no_position() -> None:
    model, context = build("decoder", "continue")
    inputs = batch("decoder", side="right")
    plain = copy.deepcopy(model)
    attached = attach("p_tuning_v2", model, context)
    randomise(attached)
    keys = [p for name, p in attached.named_parameters() if "deep_prompt_key" in name]
    values = [p for name, p in attached.named_parameters() if "deep_prompt_value" in name]
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), layer)
    length = inputs["input_ids"].shape[1]
    expected = plain(
        input_ids=inputs["input_ids"],
        attention_mask=torch.cat([torch.ones(2, TOKENS, dtype=torch.long), inputs["attention_mask"]], dim=1),
        position_ids=torch.arange(length)[None],
        past_key_values=cache,
    ).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(attached(**inputs).logits[real], expected[real], rtol=1e-4, atol=1e-5)
    # The same without a mask, where SDPA would make the causal one itself.
    torch.testing.assert_close(attached(input_ids=inputs["input_ids"][:1]).logits, expected[:1], rtol=1e-4, atol=1e-5)


def test_deep_prompt_beside_relative_positions() -> None:
    model, context = build("encoder-decoder", "rewrite")
    attention = model.encoder.block[0].layer[0].SelfAttention
    hidden = torch.randn(2, 5, HIDDEN)
    mask = torch.zeros(2, 1, 5, 5)
    mask[1, :, :, 3:] = torch.finfo(torch.float32).min
    randomise(attach("p_tuning_v2", model, context))
    found = attention(hidden, mask=mask)[0]
    key, value = attention.deep_prompt.prompt("default")

    def heads(projection: torch.nn.Module) -> Tensor:
        return projection(hidden).view(2, 5, 4, HIDDEN // 4).transpose(1, 2)

    query = heads(attention.q)
    text = query @ heads(attention.k).transpose(2, 3) + attention.compute_bias(5, 5) + mask
    weights = torch.cat([query @ key.transpose(1, 2), text], dim=-1).softmax(dim=-1)
    expected = weights[..., :TOKENS] @ value + weights[..., TOKENS:] @ heads(attention.v)
    expected = attention.o(expected.transpose(1, 2).reshape(2, 5, HIDDEN))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "task"), [("encoder", "tag"), ("encoder-decoder", "rewrite"), ("decoder", "tag")]
)
def test_deep_prompts_under_every_attention_implementation(architecture: str, task: str) -> None:
    found = []
    for implementation in ("sdpa", "eager"):
        model, context = build(architecture, task, attn_implementation=implementation, dtype=torch.float64)
        attached = attach("prefix", model, context)
        randomise(attached)
        inputs = batch(architecture, task)
        found.append(torch.cat([scores(attached, inputs), scores(attached, {**inputs, "attention_mask": None})]))
    # Llama's eager attention takes its softmax in single precision.
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_soft_tokens_in_front_of_both_texts_of_an_encoder_decoder() -> None:
    model, context = build("encoder-decoder", "rewrite")
    plain, inputs = copy.deepcopy(model), batch("encoder-decoder", "rewrite")
    attached: Any = attach("prompt", model, context, init="random")
    source, target = given(attached, "soft_prompt").values()
    words = plain.get_input_embeddings()
    expected = plain(
        inputs_embeds=torch.cat([source.expand(2, -1, -1), words(inputs["input_ids"])], dim=1),
        attention_mask=torch.cat([torch.ones(2, TOKENS), inputs["attention_mask"]], dim=1),
        decoder_inputs_embeds=torch.cat([target.expand(2, -1, -1), words(inputs["decoder_input_ids"])], dim=1),
    ).logits[:, TOKENS:]
    torch.testing.assert_close(attached(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_soft_tokens_are_those_of_peft() -> None:
    model, context = build("decoder", "continue")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    plain, inputs = get_peft_model(copy.deepcopy(model), config), batch("decoder")
    attached = attach("prompt", model, context, init="random")
    (prompt,) = given(attached, "soft_prompt").values()
    plain.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
    torch.testing.assert_close(scores(attached, inputs), plain(**inputs).logits[:, TOKENS:], rtol=1e-4, atol=1e-5)


def test_a_classifier_with_soft_tokens_reads_what_it_was_trained_to_read() -> None:
    # An encoder's pooler reads the text's first token, not a soft one.
    model, context = build("encoder", "classify")
    plain, inputs = copy.deepcopy(model), batch("encoder")
    attached: Any = attach("prompt", model, context, init="random")
    (prompt,) = given(attached, "soft_prompt_embedding").values()
    words = plain.get_input_embeddings()(inputs["input_ids"])
    hidden = plain.bert(
        inputs_embeds=torch.cat([prompt.expand(2, -1, -1), words], dim=1),
        attention_mask=torch.cat([torch.ones(2, TOKENS), inputs["attention_mask"]], dim=1),
        token_type_ids=torch.zeros(2, TOKENS + words.shape[1], dtype=torch.long),
    ).last_hidden_state[:, TOKENS:]
    expected = plain.classifier(plain.bert.pooler(hidden))
    torch.testing.assert_close(attached(**inputs).logits, expected, rtol=1e-4, atol=1e-5)

    # A decoder's head reads the last real token, whatever the padding.
    model, context = build("decoder", "classify")
    attached, inputs = attach("prompt", model, context), batch("decoder")
    alone = {name: tensor[1:, : inputs["attention_mask"][1].sum()] for name, tensor in inputs.items()}
    torch.testing.assert_close(scores(attached, inputs)[1:], scores(attached, alone), rtol=1e-4, atol=1e-5)


def test_a_head_on_the_first_token_reads_the_texts() -> None:
    """PEFT's prompt tuning would hand RoBERTa's classifier the first soft token's output."""
    config = RobertaConfig(
        vocab_size=99, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=HIDDEN,
        max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(config).requires_grad_(False).eval()
    plain, ids = copy.deepcopy(model), torch.randint(5, 90, (2, 7))
    for method in SHALLOW:
        changes = {"init": "random"} if method == "prompt" else {}
        attached: Any = attach(
            method, copy.deepcopy(model), AttachContext("SEQ_CLS", "", (), ("classifier",)), **changes
        )
        prompt = next(m for m in attached.modules() if isinstance(m, SoftPromptLayer)).prompt("default")
        words = plain.get_input_embeddings()(ids)
        hidden = plain.roberta(inputs_embeds=torch.cat([prompt.expand(2, -1, -1), words], dim=1)).last_hidden_state
        head = attached.base_model.classifier.modules_to_save["default"]
        expected = head(hidden[:, TOKENS:])
        torch.testing.assert_close(attached(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, head(hidden), rtol=1e-3, atol=1e-4)


def test_bare_models_have_pefts_own_soft_tokens(tmp_path: Path) -> None:
    """Such a folder loads where this package is not installed."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=99, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, intermediate_size=HIDDEN,
        max_position_embeddings=40,
    )  # fmt: skip
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    inputs = {"input_ids": torch.randint(5, 90, (2, 7))}
    expected = []
    for method in SHALLOW:
        model = RobertaModel.from_pretrained(tmp_path / "base", add_pooling_layer=False).requires_grad_(False).eval()
        changes = {"init": "vocabulary"} if method == "prompt" else {}
        attached: Any = attach(method, model, AttachContext("FEATURE_EXTRACTION", ""), **changes)
        randomise(attached)
        attached.save_pretrained(str(tmp_path / method))
        assert count_exported(attached) == TOKENS * HIDDEN
        expected.append(attached(**inputs).last_hidden_state.tolist())
    program = """
import json, sys, torch
from peft import PeftModel
from transformers import RobertaModel
base, ids, *adapters = sys.argv[1:]
for adapter in adapters:
    model = PeftModel.from_pretrained(RobertaModel.from_pretrained(base, add_pooling_layer=False), adapter).eval()
    assert "peftsearch" not in sys.modules
    print(json.dumps(model(input_ids=torch.tensor(json.loads(ids))).last_hidden_state.tolist()))
"""
    paths = [str(tmp_path / "base"), json.dumps(inputs["input_ids"].tolist()), *(str(tmp_path / m) for m in SHALLOW)]
    answer = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in answer.stdout.splitlines()[-2:]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


@pytest.mark.parametrize("architecture", ["encoder-decoder", "decoder"])
def test_soft_tokens_start_as_words(architecture: str) -> None:
    task = "rewrite" if architecture == "encoder-decoder" else "continue"
    model, context = build(architecture, task)
    words = model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(folder(architecture))
    ids = tokenizer("good dog", add_special_tokens=False)["input_ids"]
    attached = attach("prompt", model, context, tokens=5, init_text="good dog")
    for prompt in given(attached, "soft_prompt").values():
        assert torch.equal(prompt, words[[ids[0], ids[1], ids[0], ids[1], ids[0]]])
    model, context = build(architecture, task)
    for prompt in given(attach("prompt", model, context, init="vocabulary"), "soft_prompt").values():
        assert all((words == row).all(dim=1).any() for row in prompt)


@pytest.mark.parametrize("method", [*SHALLOW, *DEEP])
@pytest.mark.parametrize("architecture", ["encoder-decoder", "decoder"])
def test_can_be_switched_off_and_taken_out(method: str, architecture: str) -> None:
    model, context = build(architecture, "tag")
    inputs = batch(architecture)
    before = scores(model, inputs)
    attached: Any = attach(method, model, context)
    randomise(attached)
    with attached.disable_adapter():
        assert torch.equal(scores(attached, inputs), before)
    assert not torch.equal(scores(attached, inputs), before)
    assert torch.equal(scores(copy.deepcopy(attached), inputs), scores(attached, inputs))
    with pytest.raises(ValueError, match="cannot be merged"):
        attached.merge_and_unload()
    bare = attached.unload()
    assert not [name for name in bare.state_dict() if "prompt" in name]
    hidden, expected = (m.base_model(**inputs)[0] for m in (bare, build(architecture, "tag")[0]))
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("method", [*SHALLOW, *DEEP])
def test_training_goes_on_from_the_saved_folder(method: str, tmp_path: Path) -> None:
    found = check(method, "encoder-decoder", "tag", tmp_path)
    model, _ = build("encoder-decoder", "tag")
    loaded = PeftModel.from_pretrained(model, str(tmp_path), is_trainable=True)
    assert count_trainable(loaded) == found.counts[1]
    train(loaded, found.inputs, steps=1)
    assert not torch.equal(scores(loaded, found.inputs), found.scores)


@pytest.mark.parametrize("method", [*SHALLOW, *DEEP])
@pytest.mark.parametrize(
    ("architecture", "task"), [("encoder", "tag"), ("encoder-decoder", "rewrite"), ("decoder", "tag")]
)
def test_gradient_checkpointing_changes_nothing(method: str, architecture: str, task: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, context = build(architecture, task)
        attached: Any = attach(method, model, context)
        if checkpointing:
            attached.get_base_model().gradient_checkpointing_enable()
        attached.train()
        for module in attached.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        for config in {id(m.config): m.config for m in attached.modules() if hasattr(m, "config")}.values():
            config.use_cache = False
        scores(attached, batch(architecture, task)).square().mean().backward()
        gradients.append([parameter.grad for parameter in trainable(attached).values()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_positions_that_do_not_suffice_are_said() -> None:
    model, context = build("encoder", "tag")
    with pytest.raises(ValueError, match="128 soft tokens leave no room for text: the model has 128 positions"):
        attach("prompt", model, context, tokens=128, init="random")
    attached = attach("prompt", model, context, tokens=120, init="random")
    with pytest.raises(ValueError, match="120 soft tokens and a text of 10 tokens exceed the model's 128 positions"):
        scores(attached, batch("encoder"))


@pytest.mark.parametrize("method", SHALLOW)
def test_positions_that_do_not_suffice_are_said_of_pefts_own_soft_tokens(method: str) -> None:
    # Of 40 rows of the table, RoBERTa's padding takes two.
    config = RobertaConfig(
        vocab_size=99, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, intermediate_size=HIDDEN,
        max_position_embeddings=40,
    )  # fmt: skip
    model = RobertaModel(config).requires_grad_(False).eval()
    changes = {"init": "random"} if method == "prompt" else {}
    attached = attach(method, model, AttachContext("FEATURE_EXTRACTION", ""), **changes)
    assert attached(input_ids=torch.full((1, 38 - TOKENS), 5)).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="3 soft tokens and a text of 36 tokens exceed the model's 38 positions"):
        attached(input_ids=torch.full((1, 39 - TOKENS), 5))


def test_attention_that_cannot_be_reached_is_said() -> None:
    config = MPNetConfig(hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, intermediate_size=HIDDEN)
    with torch.device("meta"):
        model = MPNetForSequenceClassification(config)
    with pytest.raises(ValueError, match="MPNetForSequenceClassification cannot have deep prompts"):
        attach("prefix", model, AttachContext("SEQ_CLS", ""))


def test_embeddings_narrower_than_the_model() -> None:
    config = AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=HIDDEN,
    )  # fmt: skip
    model = AlbertForSequenceClassification(config).requires_grad_(False).eval()
    attached = attach("prompt", model, AttachContext("SEQ_CLS", "", (), ("classifier",)), init="random")
    assert scores(attached, {"input_ids": torch.randint(5, 40, (2, 7))}).shape == (2, 2)
    assert [p.shape for p in given(attached, "soft_prompt").values()] == [(TOKENS, 8)]


FLAN_T5 = {"small": (512, 64, 6, 8), "base": (768, 64, 12, 12), "large": (1024, 64, 16, 24)}


@pytest.mark.parametrize(("size", "golden"), [("small", 20_480), ("base", 30_720), ("large", 40_960)])
def test_golden_soft_tokens(size: str, golden: int) -> None:
    width, head, heads, layers = FLAN_T5[size]
    config = T5Config(d_model=width, d_kv=head, num_heads=heads, num_layers=layers, d_ff=8)
    context = AttachContext("SEQ_2_SEQ_LM", "")
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config).requires_grad_(False)
        attached = attach("prompt", model, context, tokens=20, init="random")
        assert (count_trainable(attached), count_exported(attached)) == (golden, golden)
        # Self-attention on either side and cross-attention, keys and values of each.
        model = AutoModelForSeq2SeqLM.from_config(config).requires_grad_(False)
        attached = attach("p_tuning_v2", model, context, tokens=20)
        assert count_trainable(attached) == count_exported(attached) == 3 * layers * 2 * 20 * heads * head


def test_golden_prefixes() -> None:
    with torch.device("meta"):
        bert = AutoModelForSequenceClassification.from_config(BertConfig()).requires_grad_(False)
        attached = attach("p_tuning_v2", bert, AttachContext("SEQ_CLS", "", (), ("classifier",)), tokens=20)
        assert count_trainable(attached) == 12 * 2 * 20 * 768 + 768 * 2 + 2
        # As PEFT counts prefix tuning with projection: the matrix, one hidden layer, one layer for all keys and values.
        llama = AutoModelForCausalLM.from_config(
            LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=8)
        ).requires_grad_(False)
        attached = attach("prefix", llama, AttachContext("CAUSAL_LM", ""), tokens=10, hidden=16)
    assert count_trainable(attached) == 10 * 64 + (64 * 16 + 16) + (16 * 3 * 2 * 64 + 3 * 2 * 64)
    assert count_exported(attached) == 10 * 3 * 2 * 64


def test_a_regression_has_no_labels_to_begin_with() -> None:
    _, context = build("encoder", "classify")
    texts = [
        _default_text(replace(context, label_names=labels))
        for labels in (("yes", "no"), ("score = 2.4 + 1.1 * output",), ())
    ]
    assert texts == ["Classify the text as one of: yes, no.", *2 * ["Answer for the following text:"]]


def test_a_fresh_process_reloads_every_method(tmp_path: Path) -> None:
    jobs, expected = [], []
    for method in (*SHALLOW, *DEEP, "ia3", "bitfit", "layer_norm"):
        for architecture, task in CASES:
            if method == "bitfit" and architecture != "encoder":
                continue
            if task not in ("tag", "fill", "rewrite", "continue"):
                continue
            target = tmp_path / f"{method}-{architecture}-{task}"
            model, context = build(architecture, task)
            attached: Any = attach(method, model, context)
            randomise(attached)
            attached.save_pretrained(str(target), save_embedding_layers=False)
            inputs = batch(architecture, task)
            expected.append(scores(attached, inputs).detach())
            torch.save(inputs, target / "inputs.pt")
            auto, _, kwargs = AUTO[task]
            jobs.append((auto, kwargs, str(folder(architecture)), str(target)))
    program = """
import json, sys
import torch, transformers
import peftsearch
from peft import PeftModel
torch.set_num_threads(1)
for auto, kwargs, base, target in json.loads(sys.argv[1]):
    model = PeftModel.from_pretrained(getattr(transformers, auto).from_pretrained(base, **kwargs), target).eval()
    torch.save(model(**torch.load(target + "/inputs.pt")).logits.detach(), target + "/scores.pt")
"""
    subprocess.run([sys.executable, "-c", program, json.dumps(jobs)], check=True, capture_output=True)
    for (*_, target), scored in zip(jobs, expected, strict=True):
        assert_same_scores(torch.load(f"{target}/scores.pt"), scored)


def test_priors_are_whole_configurations_within_bounds() -> None:
    for name in (*SHALLOW, *DEEP, "ia3", "bitfit", "layer_norm"):
        method = METHODS[name]
        assert SAMPLES[name].keys() == method.hyperparameters.keys()
        for prior in method.priors:
            for key, value in prior.items():
                method.hyperparameters[key].check(value, ("methods", name, key))
