"""Configuration of the bottleneck adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import torch
import torch.nn.functional as F
from peft.config import PeftConfig


class BottleneckType(StrEnum):
    """The method's name in PEFT's mappings and in ``adapter_config.json``.

    PEFT takes any string, but `transformers`, loading an adapter by itself, asks for the ``value`` of an enumeration.
    """

    BOTTLENECK_ADAPTER = "BOTTLENECK_ADAPTER"


PEFT_TYPE = BottleneckType.BOTTLENECK_ADAPTER

Sublayer = Literal["attention", "feed_forward"]

PLACEMENTS: dict[str, tuple[Sublayer, ...]] = {
    "pfeiffer": ("feed_forward",),
    "houlsby": ("attention", "feed_forward"),
    "parallel": ("feed_forward",),
}
"""Placement -> the sublayers of a block whose output is adapted."""

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
"""Name -> the nonlinearity between the down- and the up-projection."""


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of bottleneck adapters: where they sit and how they look.

    An adapter takes the output ``y`` of a sublayer's last linear projection and returns
    ``y + up(activation(down(dropout(y))))``, where ``down`` projects to `bottleneck_size` dimensions and ``up`` back.
    With output dimension ``d`` and bottleneck ``b`` it trains ``2*d*b + b + d`` parameters.

    It acts before the block adds the residual and applies its layer norm: the position of Houlsby et al. 2019
    (arXiv:1902.00751), which adapt both sublayers of a block. Pfeiffer et al. 2021 (arXiv:2005.00247) find one adapter
    per block, after the feed-forward sublayer, to do as well; ``placement="pfeiffer"`` takes that choice of sublayer,
    at the same position. Layer norms stay frozen (Houlsby et al. train them): name them in `modules_to_save` to
    train them too.

    ``placement="parallel"`` is the scaled parallel adapter of He et al. 2022 (arXiv:2110.04366): beside the
    feed-forward sublayer instead of after it. It takes the sublayer's input ``x`` (what the sublayer's first projection
    reads: after the layer norm in a pre-norm model) and returns ``y + scale * up(activation(down(dropout(x))))``.

    Raises:
        ValueError: A field has a value that cannot work.
    """

    bottleneck_size: int = field(
        default=64,
        metadata={"help": "Dimension of the bottleneck, at least 1. The number of parameters grows linearly with it."},
    )
    activation: str = field(
        default="gelu",
        metadata={"help": f"Nonlinearity between the two projections: {', '.join(ACTIVATIONS)}."},
    )
    placement: str = field(
        default="pfeiffer",
        metadata={
            "help": (
                "Which sublayers are adapted where `target_modules` is not set. 'pfeiffer': the feed-forward sublayer "
                "of every block. 'houlsby': every attention sublayer (cross-attention included) and the feed-forward "
                "sublayer, which costs at least twice as many parameters. 'parallel': beside the feed-forward sublayer "
                "of every block, from its input to its output."
            )
        },
    )
    scale: float = field(
        default=4.0,
        metadata={
            "help": (
                "Factor of a parallel adapter's change (He et al. 2022: 4). It has no effect on the other placements."
            )
        },
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "Probability of dropping an entry of the adapter's input during training, in [0, 1)."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": (
                "Names (or ends of names) of the linear layers to adapt, or one regular expression for their full "
                "names. Overrides `placement`. None: the layers that `placement` means in the model's architecture."
            )
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or ends of names) of layers to leave alone, or one regular expression for their full names."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Modules of the base model to train in full and save with the adapter, for example a new task head. "
                "PEFT adds 'classifier' and 'score' itself for sequence and token classification."
            )
        },
    )
    init_std: float | None = field(
        default=None,
        metadata={
            "help": (
                "Standard deviation of the normal initialisation of the down-projection (Houlsby et al.: 0.01). "
                "None: Kaiming-uniform, which scales with the model's width."
            )
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": (
                "True: the up-projection starts at zero, so that the adapted model starts as the base model. "
                "False: both projections start at random, and `init_std` has no effect; useful in tests only."
            )
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        # Lists rather than PEFT's sets: their order, hence the saved file, does not change from run to run.
        self.target_modules = listed(self.target_modules)
        self.exclude_modules = listed(self.exclude_modules)

        if not isinstance(self.bottleneck_size, int) or isinstance(self.bottleneck_size, bool):
            raise ValueError(f"bottleneck_size must be a whole number, not {self.bottleneck_size!r}.")
        if self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size must be at least 1, not {self.bottleneck_size}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}.")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, not {self.placement!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}.")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a positive number, not {self.scale}.")
        if self.init_std is not None and not 0 < self.init_std < math.inf:
            raise ValueError(f"init_std must be a positive number, or None for Kaiming-uniform, not {self.init_std}.")


def listed(names: Collection[str] | str | None) -> list[str] | str | None:
    """Names of modules as a list, in an order of their own where they come without; a pattern or None as it is."""
    if names is None or isinstance(names, str):
        return names
    return sorted(names) if isinstance(names, set | frozenset) else list(names)
