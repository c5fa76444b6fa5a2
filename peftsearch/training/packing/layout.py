"""How a pack's batch is laid out: which rows and columns are whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Layout:
    """Shared by all hooks of a pack; changes from step to step.

    Attributes:
        members: Number of members.
        rows: Rows of each member's slice; members with fewer texts have copies of one in the rest.
        widths: By name of the model's input, how wide each member's texts are by themselves.
    """

    members: int
    rows: int = 0
    widths: dict[str, list[int]] = field(default_factory=dict)
    encoder_mask: Tensor | None = None
    """Mask of the encoder's output where soft tokens have made it longer than its input."""
    drops: bool = True
    """Whether the members' changes drop what they read, at their rates, as in training."""

    def widths_of(self, source: str) -> list[int]:
        """How wide each member's texts are; a decoder that is given none reads its encoder's."""
        return self.widths.get(source, self.widths["input_ids"])

    def shares(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Each member's rows of a tensor (rows of all members, ...).

        Their gradients are put together once; those of slices would each be a tensor of all members' size.
        """
        return torch.split(tensor, self.rows)

    def sliced(self, tensor: Tensor) -> Tensor:
        """A tensor (rows of all members, ..., width) as (members, numbers in between, width).

        Raises:
            ValueError: Its rows are not the pack's.
        """
        if tensor.shape[0] % (self.members * self.rows):
            raise ValueError(f"a layer of the model reorders its batch: its first dimension is {tensor.shape[0]}")
        return tensor.reshape(self.members, -1, tensor.shape[-1])


def filled(batches: Sequence[Tensor], rows: int, fill: int) -> Tensor:
    """The members' texts below one another, each filled up to the widest, and to ``rows`` with copies of its first.

    Args:
        batches: Token numbers or masks, of shape (up to ``rows``, own width).
        rows: Rows of each slice.
        fill: What stands behind a text.
    """
    width = max(batch.shape[1] for batch in batches)
    joined = torch.full((len(batches) * rows, width), fill, dtype=batches[0].dtype)
    for member, batch in enumerate(batches):
        first = member * rows
        joined[first : first + len(batch), : batch.shape[1]] = batch
        joined[first + len(batch) : first + rows, : batch.shape[1]] = batch[:1]
    return joined
