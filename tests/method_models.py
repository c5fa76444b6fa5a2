"""A tiny model of each architecture with a task of its own, and a batch to learn: for the tests of methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tiny_models import tiny_decoder, tiny_encoder, tiny_encoder_decoder
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftsearch.domains import Head
from peftsearch.methods import AttachContext, Quantization
from peftsearch.training.base_model import fresh_modules, load_model
from peftsearch.training.quantised import left_unquantised, quantization_config, settle

MODELS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "encoder": (tiny_encoder, "AutoModelForSequenceClassification", "SEQ_CLS"),
    "encoder-decoder": (tiny_encoder_decoder, "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "decoder": (tiny_decoder, "AutoModelForCausalLM", "CAUSAL_LM"),
}
"""Kind of model -> who writes it, the class that loads it for a task, PEFT's name of the task."""


def load(folder: Path, kind: str, quantization: Quantization | None = None) -> tuple[PreTrainedModel, AttachContext]:
    """The base as a trial gets it (the head is the same every time), and what a method is told of it."""
    _, auto_model, task = MODELS[kind]
    head, labels = Head(auto_model, task), {"num_labels": 3} if kind == "encoder" else {}
    bare, fresh = load_model(str(folder), None, head, dict(labels), device_map="meta")
    modules = fresh_modules(bare, fresh)
    torch.manual_seed(0)
    if quantization is None:
        model, _ = load_model(str(folder), None, head, dict(labels))
    else:
        options = quantization_config(quantization, torch.device("cpu"), left_unquantised(bare, modules))
        model, _ = load_model(
            str(folder), None, head, dict(labels), device_map={"": "cpu"}, quantization_config=options
        )
        settle(model)
    model.requires_grad_(False)
    return model, AttachContext(task, str(folder), ("a", "b", "c") if labels else (), modules)


def batch(kind: str) -> dict[str, Tensor]:
    """Eight sequences of twelve tokens, with labels that can be learnt."""
    ids = torch.randint(5, 100, (8, 12), generator=torch.Generator().manual_seed(1))
    if kind == "encoder":
        return {"input_ids": ids, "labels": ids[:, 1] % 3}
    if kind == "encoder-decoder":
        return {"input_ids": ids, "labels": ids[:, :6].contiguous()}
    return {"input_ids": ids, "labels": ids}


def logits(model: nn.Module, kind: str) -> Tensor:
    """What the model says, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        result = model(**batch(kind)).logits
    assert isinstance(result, Tensor)
    return result


def train(model: nn.Module, kind: str, steps: int, learning_rate: float = 5e-3) -> list[float]:
    """AdamW on the one batch; returns the losses."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch(kind)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
