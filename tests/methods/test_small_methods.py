"""IA3, BitFit and layer-norm tuning train what they say, on copies, and nothing else."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import CASES, attach, batch, build, check, check_generation, scores
from tiny_models import HIDDEN, LAYERS
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    T5Config,
    XLMRobertaConfig,
)

from peftsearch.methods import AttachContext
from peftsearch.training.base_model import count_exported, count_trainable, trainable

SMALL = ("ia3", "bitfit", "layer_norm")
BIASED = "encoder"


@pytest.mark.parametrize(("architecture", "task"), CASES)
@pytest.mark.parametrize("method", SMALL)
def test_trains_saves_and_reloads(method: str, architecture: str, task: str, tmp_path: Path) -> None:
    if method == "bitfit" and architecture != BIASED:
        with pytest.raises(ValueError, match=r"^\w+ has no biases to train; use another method, such as layer_norm$"):
            check(method, architecture, task, tmp_path)
        return
    found = check(method, architecture, task, tmp_path)
    assert found.counts[0] == found.counts[1]


@pytest.mark.parametrize("architecture", ["encoder-decoder", "decoder"])
@pytest.mark.parametrize("method", ["ia3", "layer_norm"])
def test_generates(method: str, architecture: str) -> None:
    check_generation(method, architecture)


@pytest.mark.parametrize(("method", "kinds"), [("bitfit", ("bias",)), ("layer_norm", ("norm",))])
def test_is_training_those_parameters_in_place(method: str, kinds: tuple[str, ...]) -> None:
    """Gradient descent on the adapter and on the model's own parameters give the same model."""
    model, context = build("encoder", "tag")
    plain, inputs = copy.deepcopy(model), batch("encoder")
    attached = attach(method, model, context)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.startswith("classifier") or any(kind in name.lower() for kind in kinds))
    assert count_trainable(attached) == count_trainable(plain)
    for trained in (attached, plain):
        optimizer = torch.optim.SGD(trainable(trained).values(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (scores(trained, inputs) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(scores(attached, inputs), scores(plain, inputs), rtol=1e-4, atol=1e-5)
    assert (scores(attached, inputs) - scores(build("encoder", "tag")[0], inputs)).abs().max() > 0.01


def test_bitfit_leaves_the_vocabulary_alone() -> None:
    model, context = build("encoder", "fill")
    block = 4 * HIDDEN + HIDDEN + 2 * HIDDEN + HIDDEN + HIDDEN
    # Embeddings' layer norm, the blocks, and the head's dense layer and layer norm.
    assert count_trainable(attach("bitfit", model, context)) == HIDDEN + LAYERS * block + 2 * HIDDEN


def meta(config: PretrainedConfig, auto: Any = AutoModelForSequenceClassification) -> Any:
    with torch.device("meta"):
        return auto.from_config(config).requires_grad_(False)


@pytest.mark.parametrize(
    ("method", "golden"),
    [
        # The paper's three vectors per block. PEFT's table has one more: its "output.dense" is attention's, too.
        ("ia3", 12 * (2 * 768 + 3072)),
        # Published for BERT-base without its head: 0.1 million biases.
        ("bitfit", 768 + 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 768),
        ("layer_norm", (1 + 2 * 12) * 2 * 768),
    ],
)
def test_golden_counts_on_bert_base(method: str, golden: int) -> None:
    attached = attach(method, meta(BertConfig()), AttachContext("SEQ_CLS", "", (), ("classifier",)))
    golden += 768 * 2 + 2
    assert (count_trainable(attached), count_exported(attached)) == (golden, golden)


def test_golden_ia3_on_t5() -> None:
    # The paper's three vectors per block (and two for cross-attention): T5 base.
    config = T5Config(d_model=768, d_kv=64, num_heads=12, num_layers=12, d_ff=3072)
    attached = attach("ia3", meta(config), AttachContext("SEQ_CLS", "", (), ("classification_head",)))
    head = 768 * 768 + 768 + 768 * 2 + 2
    assert count_trainable(attached) == 12 * (2 * 768 + 3072) + 12 * (4 * 768 + 3072) + head


@pytest.mark.parametrize(
    ("config", "auto", "head", "golden"),
    [
        (
            DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48),
            AutoModelForSequenceClassification,
            ("pre_classifier", "classifier"),
            2 * (32 + 32 + 48) + 32 * 32 + 32 + 32 * 2 + 2,
        ),
        (
            XLMRobertaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
            AutoModelForTokenClassification,
            ("classifier",),
            2 * (32 + 32 + 48) + 32 * 2 + 2,
        ),
        (
            # Queries, keys and values come from one layer, and so do the feed-forward's gate and input.
            Phi3Config(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=0,
                num_key_value_heads=4,
            ),
            AutoModelForCausalLM,
            (),
            2 * (3 * 32 + 48),
        ),
        (
            LlamaConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=0,
                num_key_value_heads=2,
            ),
            AutoModelForCausalLM,
            (),
            2 * (2 * 16 + 48),
        ),
        (
            GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=48),
            AutoModelForCausalLM,
            (),
            2 * (3 * 32 + 48),
        ),
    ],
)  # fmt: skip
def test_ia3_finds_its_layers(config: PretrainedConfig, auto: Any, head: tuple[str, ...], golden: int) -> None:
    attached = attach("ia3", meta(config, auto), AttachContext(None, "", (), head))
    assert count_trainable(attached) == golden


@pytest.mark.parametrize("method", SMALL)
def test_the_head_is_trained_in_full_and_only_once(method: str) -> None:
    # DistilBERT's classification head has two parts, of which PEFT knows one.
    config = DistilBertConfig(vocab_size=50, dim=HIDDEN, n_layers=1, n_heads=4, hidden_dim=HIDDEN)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).requires_grad_(False)
    attached = attach(method, model, AttachContext("SEQ_CLS", "", (), ("pre_classifier", "classifier")))
    names = [name for name in trainable(attached) if "classifier" in name]
    assert len(names) == 4
    assert all("modules_to_save" in name for name in names)


@pytest.mark.parametrize("method", SMALL)
def test_warns_of_nothing_and_names_its_layers_shortly(method: str, tmp_path: Path) -> None:
    model, context = build("encoder", "tag")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attached: Any = attach(method, model, context)
    attached.save_pretrained(str(tmp_path), save_embedding_layers=False)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(written["target_modules"]) <= 6


@pytest.mark.parametrize("method", SMALL)
def test_can_be_switched_off(method: str) -> None:
    model, context = build("encoder", "fill")
    before = scores(model, batch("encoder"))
    attached: Any = attach(method, model, context)
    with torch.no_grad():
        for parameter in trainable(attached).values():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(scores(attached, batch("encoder")), before)
    with attached.disable_adapter():
        assert torch.equal(scores(attached, batch("encoder")), before)


def test_a_model_without_layer_norms_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="Bare has no normalisation layers"):
        attach("layer_norm", Bare(), AttachContext(None, ""))  # type: ignore[arg-type]
