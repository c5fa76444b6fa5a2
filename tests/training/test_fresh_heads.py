"""Fresh heads are drawn as the architecture's own initialisation has them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, tiny_encoder, tiny_encoder_decoder
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
)

from peftsearch.domains import get_task
from peftsearch.domains.tasks import Head
from peftsearch.training.base_model import FrozenBase, _draw_anew, load_model, meta_model, share_tensors


def test_a_t5_head_is_scaled_to_its_width(tmp_path: Path) -> None:
    """T5 draws its heads with factor / sqrt(width) in the module around them; by itself a linear layer gets the whole
    factor, and the first losses are tens of nats."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_encoder_decoder(tmp_path), num_labels=3)
    kept = {name: tensor.clone() for name, tensor in model.named_parameters() if "classification_head" not in name}
    fresh = frozenset(name for name, _ in model.named_parameters() if name not in kept)
    marked = {name for name in kept if hasattr(model.get_parameter(name), "_is_hf_initialized")}
    torch.manual_seed(0)
    _draw_anew(model, fresh)
    for layer in (model.classification_head.dense, model.classification_head.out_proj):
        assert float(layer.weight.std()) == pytest.approx(model.config.initializer_factor / HIDDEN**0.5, rel=0.25)
        assert not layer.bias.any()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in kept.items())
    # The shared tensors bear no mark that they did not bear before.
    assert {name for name, tensor in after.items() if hasattr(tensor, "_is_hf_initialized")} == marked


def test_weights_beside_fresh_ones_stay(tmp_path: Path) -> None:
    """A module with a pretrained and a fresh parameter keeps the pretrained one, which every trial shares."""
    model = T5ForConditionalGeneration.from_pretrained(tiny_encoder_decoder(tmp_path))
    model.lm_head.bias = torch.nn.Parameter(torch.ones(model.config.vocab_size))
    before = model.lm_head.weight.clone()
    _draw_anew(model, frozenset({"lm_head.bias"}))
    assert torch.equal(model.lm_head.weight, before)
    assert not model.lm_head.bias.any()


def test_tied_parameters_of_a_fresh_head_stay_tied(tmp_path: Path) -> None:
    """BERT saves one of the two names of its head's bias: a second parameter would be trained, counted, and lost."""
    AutoModel.from_pretrained(tiny_encoder(tmp_path / "whole")).save_pretrained(tmp_path / "bare")
    template, fresh = load_model(str(tmp_path / "bare"), None, Head("AutoModelForMaskedLM", None), {})
    model = share_tensors(template)
    _draw_anew(model, fresh)
    head = model.cls.predictions
    assert head.bias is head.decoder.bias
    assert head.bias is not template.cls.predictions.bias
    assert head.decoder.weight is template.get_input_embeddings().weight
    # Embedding and head share a tensor of the checkpoint's: only the head's own parameters are drawn.
    assert head.transform.dense.weight is not template.cls.predictions.transform.dense.weight


def test_embeddings_train_no_pooler(tmp_path: Path) -> None:
    """RoBERTa's checkpoints have none, and mean-pooled embeddings do not read it: it would count and never learn."""
    config = RobertaConfig(
        vocab_size=99, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, intermediate_size=HIDDEN
    )
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "base")
    domain: Any = SimpleNamespace(
        task=get_task("similarity", options={"encoding": "separate", "range": [0, 1]}),
        labels=("score = 0 + 1 * output",),
        head=Head("AutoModel", "FEATURE_EXTRACTION"),
        pad_token_id=1,
    )
    base = FrozenBase(str(tmp_path / "base"))
    model: Any = base.trial_model(domain, seed=0, copy_weights=False)
    assert model.pooler is not None
    assert base.template(domain).modules_to_save == ()
    _, modules = meta_model(base.location, None, domain.task, domain.head, domain.labels)
    assert modules == ()
