"""Tiny models with task heads, and what every method must do on each of them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import SAMPLES, tiny_decoder, tiny_encoder, tiny_encoder_decoder
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from peftsearch.methods import METHODS, AttachContext
from peftsearch.training.base_model import count_exported, count_trainable, fresh_modules, quiet_loading, trainable

_BUILDERS = {"encoder": tiny_encoder, "encoder-decoder": tiny_encoder_decoder, "decoder": tiny_decoder}
_FOLDERS = tempfile.TemporaryDirectory()

AUTO: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "classify": ("AutoModelForSequenceClassification", "SEQ_CLS", {"num_labels": 3}),
    "tag": ("AutoModelForTokenClassification", "TOKEN_CLS", {"num_labels": 3}),
    "answer": ("AutoModelForQuestionAnswering", "QUESTION_ANS", {}),
    "fill": ("AutoModelForMaskedLM", None, {}),
    "rewrite": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", {}),
    "continue": ("AutoModelForCausalLM", "CAUSAL_LM", {}),
}
"""Task -> auto class, PEFT's name of the task, and what the configuration must know."""

CASES = [
    *(("encoder", task) for task in ("classify", "tag", "answer", "fill")),
    *(("encoder-decoder", task) for task in ("classify", "tag", "answer", "rewrite")),
    *(("decoder", task) for task in ("classify", "tag", "answer", "continue")),
]
TEXTS = ["the dog and the cat see a bird", "a good tree"]


@cache
def folder(architecture: str) -> Path:
    """Where the tiny base model is, made at the first call."""
    return _BUILDERS[architecture](Path(_FOLDERS.name) / architecture)


def build(architecture: str, task: str, **kwargs: Any) -> tuple[PreTrainedModel, AttachContext]:
    """A frozen model with a task head drawn from torch's generator, seeded here, and its context."""
    auto, peft_task, head = AUTO[task]
    if (architecture, task) == ("decoder", "answer"):
        # transformers 5.23 calls this one backbone "transformer", and loads none of the checkpoint's "model" without:
        kwargs["key_mapping"] = {r"^model\.": "transformer."}
    # Made at the first call, from random numbers: before the seed.
    where = folder(architecture)
    torch.manual_seed(1)
    with quiet_loading():
        model, info = getattr(transformers, auto).from_pretrained(where, output_loading_info=True, **head, **kwargs)
    roots = fresh_modules(model, info["missing_keys"])
    return model.requires_grad_(False).eval(), AttachContext(peft_task, str(where), (), roots)


def batch(architecture: str, task: str = "classify", side: str = "right") -> dict[str, Tensor]:
    """Two texts of different length."""
    tokenizer = AutoTokenizer.from_pretrained(folder(architecture), padding_side=side)
    encoded = dict(tokenizer(TEXTS, return_tensors="pt", padding=True))
    if architecture != "encoder":
        encoded.pop("token_type_ids", None)
    if task == "rewrite":
        encoded["decoder_input_ids"] = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 1]])
    return encoded


def attach(method: str, model: PreTrainedModel, context: AttachContext, **changes: Any) -> nn.Module:
    """The method's sample configuration on a model."""
    torch.manual_seed(2)
    return METHODS[method].attach(model, SAMPLES[method] | changes, context)


def scores(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Whatever the head puts out."""
    output = model(**inputs)
    return torch.stack([output.start_logits, output.end_logits]) if "start_logits" in output else output.logits


def train(model: nn.Module, inputs: Mapping[str, Tensor], steps: int = 3) -> None:
    """A few steps of AdamW in bf16 autocast; every trainable parameter must get a gradient."""
    model.train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-2)
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = scores(model, inputs)
        output.float()[..., 1].square().mean().backward()
        without = [name for name, parameter in trainable(model).items() if parameter.grad is None]
        assert not without
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def assert_same_scores(found: Tensor, expected: Tensor) -> None:
    """Two models are the same, but for the kernel: torch multiplies by a weight that requires a gradient as one large
    matrix, and by one that does not as a batch of small ones, and some CPUs round these differently
    (https://github.com/pytorch/pytorch/blob/v2.9.0/aten/src/ATen/native/LinearAlgebra.cpp, should_fold)."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@dataclass
class Checked:
    """What came out of `check`."""

    model: Any
    inputs: dict[str, Tensor]
    scores: Tensor
    counts: tuple[int, int]
    saved: dict[str, Tensor] = field(default_factory=dict)


def check(method: str, architecture: str, task: str, target: Path, **changes: Any) -> Checked:
    """Attach, train, save and reload; counting needs no weights; the base's tensors stay as they are.

    Raises:
        ValueError: The method refuses the model.
    """
    model, context = build(architecture, task)
    tensors = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    inputs = batch(architecture, task)
    before = scores(model, inputs)
    attached: Any = attach(method, model, context, **changes)
    train(attached, inputs)
    after = scores(attached, inputs).detach()

    assert (after[:, -before.shape[1] :] - before).abs().max() > 1e-3
    for name, (tensor, copy) in tensors.items():
        assert torch.equal(tensor, copy), name

    counts = count_trainable(attached), count_exported(attached)
    with torch.device("meta"):
        bare = getattr(transformers, AUTO[task][0]).from_config(model.config).requires_grad_(False)
        counted = attach(method, bare, context, **changes)
        assert (count_trainable(counted), count_exported(counted)) == counts

    attached.save_pretrained(str(target), save_embedding_layers=False)
    saved = load_file(target / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == counts[1]
    again, _ = build(architecture, task)
    reloaded = PeftModel.from_pretrained(again, str(target)).eval()
    assert_same_scores(scores(reloaded, inputs), after)
    return Checked(attached, inputs, after, counts, saved)


def generate(model: Any, inputs: Mapping[str, Tensor], **kwargs: Any) -> Tensor:
    """Six greedy tokens for each text, without what was given."""
    produced: Tensor = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **kwargs)
    return produced[:, -6:]


def check_generation(method: str, architecture: str) -> None:
    """A trained model writes the same with and without a key-value cache, and alone as in a padded batch."""
    task, side = ("rewrite", "right") if architecture == "encoder-decoder" else ("continue", "left")
    model, context = build(architecture, task)
    attached = attach(method, model, context)
    with torch.no_grad():
        for parameter in trainable(attached).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    attached.eval()
    inputs = batch(architecture, "classify", side)
    produced = generate(attached, inputs)
    assert torch.equal(produced, generate(attached, inputs, use_cache=False))
    for index in range(len(TEXTS)):
        real = inputs["attention_mask"][index].bool()
        alone = {name: tensor[index : index + 1, real] for name, tensor in inputs.items()}
        assert torch.equal(produced[index : index + 1], generate(attached, alone))
    if method != "prompt":
        assert not torch.equal(produced, generate(build(architecture, task)[0], inputs))
