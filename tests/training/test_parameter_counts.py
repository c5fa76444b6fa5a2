"""Golden numbers of trainable parameters, on models built from their configuration on the meta device."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SAMPLES
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    T5Config,
)

from peftsearch.methods import METHODS, AttachContext
from peftsearch.training.base_model import count_exported, count_trainable

FLAN_T5 = {
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
}
LLAMA_32_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def flan_t5(size: str) -> torch.nn.Module:
    config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **FLAN_T5[size])
    with torch.device("meta"):
        return AutoModelForSeq2SeqLM.from_config(config).requires_grad_(False)


def counts(model: torch.nn.Module, method: str, task: str, **hyperparameters: object) -> tuple[int, int]:
    with torch.device("meta"):
        attached = METHODS[method].attach(model, hyperparameters, AttachContext(task, "unused"))
    return count_trainable(attached), count_exported(attached)


@pytest.mark.parametrize(("size", "golden"), [("small", 688_128), ("base", 1_769_472), ("large", 4_718_592)])
def test_lora_on_flan_t5(size: str, golden: int) -> None:
    found = counts(
        flan_t5(size), "lora", "SEQ_2_SEQ_LM", rank=16, alpha=32.0, dropout=0.0, targets="attention", variant="lora"
    )
    assert found == (golden, golden)


@pytest.mark.parametrize(("size", "golden"), [("small", 20_480), ("base", 30_720), ("large", 40_960)])
def test_twenty_soft_tokens_on_flan_t5(size: str, golden: int) -> None:
    found = counts(flan_t5(size), "prompt", "SEQ_2_SEQ_LM", tokens=20, init="random", init_text="")
    # Twice 20 tokens: PEFT gives an encoder-decoder a prompt for each of its halves.
    assert found == (golden, golden)


@pytest.mark.parametrize(("rank", "golden"), [(32, 9_175_040), (64, 18_350_080)])
def test_lora_on_llama(rank: int, golden: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_32_3B)).requires_grad_(False)
    found = counts(
        model, "lora", "CAUSAL_LM", rank=rank, alpha=32.0, dropout=0.0, targets="q_proj,v_proj", variant="lora"
    )
    assert found == (golden, golden)


@pytest.mark.parametrize(
    ("method", "hyperparameters", "adapter"),
    [
        ("lora", {"rank": 4, "targets": "attention"}, 6 * 2 * 2 * 384 * 4),
        ("lora", {"rank": 4, "targets": "attention", "variant": "rslora"}, 6 * 2 * 2 * 384 * 4),
        # DoRA trains a magnitude for each output besides.
        ("lora", {"rank": 4, "targets": "attention", "variant": "dora"}, 6 * 2 * (2 * 384 * 4 + 384)),
        # Query, key, value and output, the feed-forward pair, and the pooler; not the head.
        (
            "qlora",
            {"rank": 4, "targets": "all-linear"},
            6 * (4 * 2 * 384 * 4 + 2 * (384 + 1536) * 4) + 2 * 384 * 4,
        ),
        (
            "adapter",
            {"bottleneck": 16, "placement": "pfeiffer"},
            6 * (2 * 384 * 16 + 16 + 384),
        ),
        (
            "adapter",
            {"bottleneck": 16, "placement": "houlsby"},
            12 * (2 * 384 * 16 + 16 + 384),
        ),
        (
            "adapter",
            {"bottleneck": 16, "placement": "parallel"},
            6 * (2 * 384 * 16 + 16 + 384),
        ),
        (
            "hybrid",
            {"rank": 4, "targets": "attention", "bottleneck": 16, "placement": "houlsby"},
            6 * 2 * 2 * 384 * 4 + 12 * (2 * 384 * 16 + 16 + 384),
        ),
        ("prompt", {"tokens": 10, "init": "random", "init_text": ""}, 10 * 384),
    ],
)
def test_a_classifier_counts_its_head(method: str, hyperparameters: dict[str, object], adapter: int) -> None:
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    config.num_labels = 5
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config).requires_grad_(False)
    head = 384 * 5 + 5
    hyperparameters = {**SAMPLES.get(method, {}), **hyperparameters}
    assert counts(model, method, "SEQ_CLS", **hyperparameters) == (adapter + head, adapter + head)
