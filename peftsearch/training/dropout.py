"""Dropout on the CPU, where torch draws one random number for each element and keeps one float for it.

Dropout takes a tenth of a training step of a small encoder there. Ours draws 64 random bits for four elements, and is
the same function of the same distribution (a rate is rounded to 1/65536, and the scale follows from the rate as it then
is). For the backward pass it keeps a byte for each element; of small tensors a float, which is faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_LEVELS = 2**16

_MOST_FACTORS = 2**20
"""Elements up to which their factors are kept as floats: a product with a boolean mask copies it to floats first, in
both passes. That is 3 MiB more for each mask at most. Where there are more elements memory counts for more, and a byte
for each is what the estimates expect (`training.activations`)."""


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` (Srivastava et al. 2014), faster on the CPU; drawn from torch's global generator."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The input with some elements set to 0 and the others scaled up, in training; else the input itself."""
        if torch.compiler.is_compiling():
            # A compiler draws in the kernel that drops.
            return super().forward(input)
        return dropout(input, self.p) if self.training else input


def use_fast_dropout(model: nn.Module) -> None:
    """Let a trial's own modules drop as `Dropout` does."""
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = Dropout


def dropout(values: torch.Tensor, rate: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Each element set to 0 with probability ``rate``, and divided by ``1 - rate`` otherwise.

    Args:
        values: Floating-point, of any shape.
        rate: From 0 to 1.
        generator: What is drawn from, on the values' device; torch's global generator where absent.
    """
    threshold = round(rate * _LEVELS)
    if threshold == 0:
        return values
    if threshold == _LEVELS:
        return values * 0.0
    if values.device.type != "cpu" and generator is None:
        return nn.functional.dropout(values, rate)
    scale = _LEVELS / (_LEVELS - threshold)
    dropped: torch.Tensor
    if values.dtype == torch.float32 and values.device.type == "cpu" and values.numel() <= _MOST_FACTORS:
        factors = _kept(values.shape, threshold, generator, values.device, torch.float32).mul_(scale)
        dropped = _Multiplied.apply(values, factors)  # type: ignore[no-untyped-call]
        return dropped
    keep = _kept(values.shape, threshold, generator, values.device, torch.bool)
    dropped = _Dropped.apply(values, keep, scale)  # type: ignore[no-untyped-call]
    return dropped


def _kept(
    shape: Sequence[int],
    threshold: int,
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """1 for what is kept, 0 for what is dropped."""
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    kept = torch.empty(count, dtype=dtype, device=device)
    return torch.ge(bits.view(torch.int16)[:count], threshold - _LEVELS // 2, out=kept).view(shape)


class _Multiplied(torch.autograd.Function):
    """Autograd would keep the values too, for a gradient that nobody asks for."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factors)
        return values * factors

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (factors,) = ctx.saved_tensors
        return gradients[0] * factors, None


class _Dropped(torch.autograd.Function):
    """As `_Multiplied`, with less to keep."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return torch.mul(values, keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return torch.mul(gradients[0], keep).mul_(ctx.scale), None, None
