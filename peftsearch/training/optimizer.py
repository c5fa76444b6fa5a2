"""AdamW, its parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftsearch.spec import TrainingSpec
from peftsearch.training.base_model import trainable
from peftsearch.training.sharding import is_part, part_like

_NUMBER = "number:"
# What eight bits stand for, shared by all parameters: by the name of an entry, what bitsandbytes calls it.
_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}


def learning_rate_factor(step: int, total_steps: int, training: TrainingSpec) -> float:
    """Share of the peak learning rate at step ``step`` (from 0): linear warm-up, then the schedule."""
    warmup = round(total_steps * training.warmup)
    if step < warmup:
        return (step + 1) / warmup
    if training.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    if training.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress


def master_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """A float32 copy of each trainable parameter that is stored in half precision, by name (Micikevicius et al. 2018,
    arXiv:1710.03740, section 3.1).

    These are what the optimiser steps on: bf16 has eight bits of precision, so that a step of less than 1/512 of a
    weight, as most of fine-tuning's are, would leave the weight as it was.
    """
    return {
        name: nn.Parameter(parameter.detach().float())
        for name, parameter in trainable(model).items()
        if parameter.dtype in (torch.bfloat16, torch.float16)
    }


def make_optimizer(
    model: nn.Module,
    head: frozenset[int],
    learning_rate: float,
    training: TrainingSpec,
    device: torch.device,
    masters: Mapping[str, nn.Parameter] | None = None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the trainable parameters; with 8-bit moments where the study says so
    (Dettmers et al. 2022, arXiv:2110.02861).

    Biases and norms (vectors) are not decayed. The task head has a learning rate of its own where the study says so:
    it starts from random weights for every method, however small a rate the method itself wants.

    Args:
        model: The model to train.
        head: ``id`` of each parameter of the task head.
        learning_rate: Peak rate of the method's parameters.
        training: Weight decay and the head's rate.
        device: Decides whether the fused kernel is used.
        masters: What is optimised in place of parameters, see `master_weights`.
    """
    masters = masters or {}
    head_rate = training.head_learning_rate or learning_rate
    # Kernels that step on many parameters at once take either parts or whole ones.
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable(model).items():
        rate = head_rate if id(parameter) in head else learning_rate
        # IA3's factors are vectors with a second dimension; decay would draw them to 0, and with them what they scale.
        decay = training.weight_decay if parameter.ndim > 1 and ".ia3_l." not in name else 0.0
        groups.setdefault((rate, decay, is_part(parameter)), []).append(masters.get(name, parameter))
    options: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "weight_decay": decay, "peak": rate}
        for (rate, decay, _), parameters in groups.items()
    ]
    if training.optimizer == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(options, lr=learning_rate)  # type: ignore[no-any-return]
    return torch.optim.AdamW(options, lr=learning_rate, fused=device.type in ("cuda", "cpu"))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def step_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], masters: Mapping[str, nn.Parameter]
) -> None:
    """One step, by way of the `master_weights`; the gradients are gone afterwards."""
    for name, master in masters.items():
        gradient, parameters[name].grad = parameters[name].grad, None
        master.grad = None if gradient is None else gradient.float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, master in masters.items():
            parameters[name].copy_(master)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """The optimiser's state as flat tensors named ``<entry>/<parameter>``.

    Args:
        optimizer: The optimiser.
        names: Parameter name by ``id`` of the parameter.
    """
    tensors: dict[str, torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        for entry, value in state.items():
            if entry in _TABLES:
                continue
            if isinstance(value, torch.Tensor):
                tensors[f"{entry}/{names[id(parameter)]}"] = value
            elif isinstance(value, int):
                # bitsandbytes counts steps in a plain number.
                tensors[f"{_NUMBER}{entry}/{names[id(parameter)]}"] = torch.tensor(value)
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor]
) -> None:
    """The reverse of `optimizer_tensors`."""
    for key, tensor in tensors.items():
        entry, _, name = key.partition("/")
        parameter = parameters[name]
        if entry.startswith(_NUMBER):
            optimizer.state[parameter][entry.removeprefix(_NUMBER)] = int(tensor.item())
            continue
        # AdamW's step counter lives with the parameters only for the fused kernels.
        device = parameter.device if entry != "step" or optimizer.defaults.get("fused") else torch.device("cpu")
        moved = tensor.to(device)
        optimizer.state[parameter][entry] = part_like(moved, parameter) if moved.shape == parameter.shape else moved
        if tensor.dtype == torch.uint8:
            _add_tables(optimizer, parameter)


def _add_tables(optimizer: Any, parameter: nn.Parameter) -> None:
    """What bitsandbytes adds to a parameter's state where it makes it itself."""
    if not optimizer.name2qmap:
        optimizer.fill_qmap()
    for entry, name in _TABLES.items():
        optimizer.name2qmap[name] = optimizer.name2qmap[name].to(parameter.device)
        optimizer.state[parameter][entry] = optimizer.name2qmap[name]
