"""In which number format a worker computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch


def computes_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices itself; elsewhere bf16 is emulated and slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def trains_bf16(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> bool:
    """Whether `training_autocast` computes in bf16."""
    return precision == "bf16" or (precision == "auto" and computes_bf16(device))


def training_autocast(
    precision: Literal["auto", "fp32", "bf16"], device: torch.device
) -> AbstractContextManager[object]:
    """The context for a training step's forward pass.

    The evaluation at the full budget runs outside of it, in the weights' own format, so that a recorded score is what
    plain `transformers` gives for the exported adapter.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if trains_bf16(precision, device) else nullcontext()
