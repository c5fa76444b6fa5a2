"""Gradient checkpointing: a layer's activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from peftsearch.training.activations import activation_bytes
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.memory import free_bytes

log = logging.getLogger(__name__)

ROOM = 0.8
"""Share of the free memory that activations may take before they are recomputed; the estimate is a rough one."""


def recompute(model: nn.Module, wanted: bool | Literal["auto"], tokens: int, half: bool, group: WorkerGroup) -> bool:
    """Let a trial's model compute its activations twice where the study file says so, or memory asks for it.

    Numbers are the same either way: dropout draws the same masks again. (In an encoder-decoder up to rounding: the
    gradients of what all layers of the decoder attend to are added up in another order.)

    Args:
        model: A trial's model, on its device.
        wanted: The study file's ``training.gradient_checkpointing``.
        tokens: Padded tokens of the largest batch at most.
        half: Whether it is trained under bf16 autocast.
        group: The workers that train it: what one of them needs, all do, for layers in parts are gathered again too.

    Returns:
        Whether it does.

    Raises:
        ValueError: It was asked for, and the model cannot.
    """
    from peft import PeftModel

    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if wanted is False or (wanted == "auto" and not group.any(_crowded(inner, tokens, half, group.device))):
        return False
    refused = _refusal(inner)
    if refused is not None:
        if wanted == "auto":
            log.warning("activations may not fit into memory, and are kept all the same: %s", refused)
            return False
        raise ValueError(f"{refused}: write gradient_checkpointing: false, or auto")
    enable(inner)
    return True


def enable(model: Any) -> None:
    """Let a model of `transformers` compute its activations twice."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # It lets embeddings require gradients, for the sake of another kind of checkpoints: graphs of frozen layers.
    model.disable_input_require_grads()


def _refusal(inner: Any) -> str | None:
    if not getattr(inner, "supports_gradient_checkpointing", False):
        return f"{type(inner).__name__} does not support gradient checkpointing"
    return None


def _crowded(model: Any, tokens: int, half: bool, device: torch.device) -> bool:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    layers, hidden = (int(getattr(config, name, 0) or 0) for name in ("num_hidden_layers", "hidden_size"))
    if getattr(model.config, "is_encoder_decoder", False):
        layers += int(getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None) or layers)
    needed = activation_bytes(layers, hidden, tokens, 2 if half or model.dtype != torch.float32 else 4)
    return needed > ROOM * free_bytes(device)
