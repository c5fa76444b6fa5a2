"""The changes that adapters make to a linear layer's output, for all members of a pack at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from peftsearch.methods.bottleneck.config import ACTIVATIONS
from peftsearch.training.batches import moved
from peftsearch.training.packing.layout import Layout


class Change(Protocol):
    """What is done to a layer's output; slices of members without this change stay as they are."""

    def __call__(self, layout: Layout, x: Tensor, y: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Range:
    """The members from the first to the last one that have a change; those between them without it have zeros."""

    first: int
    last: int

    def of(self, tensor: Tensor) -> Tensor:
        """Their slices, of a tensor (members, ...)."""
        return tensor if self.last - self.first == len(tensor) else tensor[self.first : self.last]

    def replaced(self, tensor: Tensor, changed: Tensor) -> Tensor:
        """The tensor with their slices changed."""
        if self.last - self.first == len(tensor):
            return changed
        return torch.cat([tensor[: self.first], changed, tensor[self.last :]])


class Dropout:
    """Dropout with a rate for each member, drawn for all of them at once.

    Args:
        rates: By member.
        device: Where.
    """

    def __init__(self, rates: Sequence[float], device: torch.device) -> None:
        self.rates = tuple(rates)
        self._kept = moved(1.0 - torch.tensor(self.rates)[:, None, None], device)

    def __call__(self, layout: Layout, x: Tensor) -> Tensor:
        """Of shape (members, ..., width)."""
        if not layout.drops or not any(self.rates):
            return x
        if len(set(self.rates)) == 1:
            return F.dropout(x, self.rates[0])
        kept = self._kept.to(x.dtype)
        return x.mul(torch.bernoulli(kept.expand_as(x))).div(kept)


class PackedLowRank:
    """``y + scale * up(down(dropout(x)))`` for every member (Hu et al. 2021, arXiv:2106.09685).

    Args:
        down: Of shape (members, rank, in); smaller ranks are filled up with zeros.
        up: Of shape (members, rank, out), likewise.
        scales: By member, 0 for those without.
        dropout: Rates by member.
        among: The members.
    """

    def __init__(
        self, down: Tensor, up: Tensor, scales: Sequence[float], dropout: Sequence[float], among: Range
    ) -> None:
        self.down, self.up, self.among = among.of(down), among.of(up), among
        # The scale goes where the numbers are fewest.
        self._scales = among.of(moved(torch.tensor(scales, dtype=torch.float32)[:, None, None], down.device))
        self._dropout = Dropout(dropout[among.first : among.last], down.device)

    def __call__(self, layout: Layout, x: Tensor, y: Tensor) -> Tensor:
        """See `Change`; ``x`` of shape (rows, ..., in) and ``y`` of shape (rows, ..., out)."""
        before = layout.sliced(y)
        now = self.among.of(before)
        hidden = self._dropout(layout, _in_format(self.among.of(layout.sliced(x)), self.down))
        hidden = torch.bmm(hidden, self.down.transpose(1, 2))
        hidden = hidden * self._scales.to(hidden.dtype)
        if _computes_in(self.up) == now.dtype:
            changed = torch.baddbmm(now, hidden, self.up)
        else:
            changed = now + torch.bmm(hidden, self.up).to(now.dtype)
        return self.among.replaced(before, changed).reshape(y.shape)


class PackedBottleneck:
    """``y + scale * up(activation(down(dropout(y))))`` for every member, or of the sublayer's input beside it.

    Args:
        down: Weight (members, bottleneck, in) and bias (members, bottleneck); smaller ones are filled up with zeros.
        up: Weight (members, bottleneck, out) and bias (members, out), likewise.
        activations: Names, by member; all of them are 0 at 0.
        scales: By member.
        dropout: Rates by member.
        among: The members.
        parallel: Whether it is beside the sublayer; `remember` is then to be told of each input.
    """

    def __init__(
        self,
        down: tuple[Tensor, Tensor],
        up: tuple[Tensor, Tensor],
        activations: Sequence[str],
        scales: Sequence[float],
        dropout: Sequence[float],
        among: Range,
        *,
        parallel: bool,
    ) -> None:
        self.down, self.up = [(among.of(weight), among.of(bias)[:, None]) for weight, bias in (down, up)]
        self.among, self.parallel = among, parallel
        device = down[0].device
        chosen = activations[among.first : among.last]
        edges = [index for index in range(1, len(chosen)) if chosen[index] != chosen[index - 1]]
        # Neighbours with the same activation, so that each kernel is started once for them.
        self._runs = [(a, b, chosen[a]) for a, b in zip([0, *edges], [*edges, len(chosen)], strict=True)]
        self._scales = among.of(moved(torch.tensor(scales, dtype=torch.float32)[:, None, None], device))
        self._scaled = any(scale != 1.0 for scale in scales[among.first : among.last])
        self._dropout = Dropout(dropout[among.first : among.last], device)
        self._input: Tensor | None = None

    def remember(self, x: Tensor) -> None:
        """The sublayer's input."""
        self._input = x

    def __call__(self, layout: Layout, x: Tensor, y: Tensor) -> Tensor:
        """See `Change`."""
        before = layout.sliced(y)
        now = self.among.of(before)
        source = now
        if self.parallel:
            assert self._input is not None
            source, self._input = self.among.of(layout.sliced(self._input)), None
        weight, bias = self.down
        hidden = self._dropout(layout, _in_format(source, weight))
        hidden = torch.baddbmm(bias, hidden, weight.transpose(1, 2))
        active = [ACTIVATIONS[name](hidden[first:last]) for first, last, name in self._runs]
        weight, bias = self.up
        change = torch.baddbmm(bias, active[0] if len(active) == 1 else torch.cat(active), weight)
        if self._scaled:
            change = change * self._scales.to(change.dtype)
        return self.among.replaced(before, (now + change).to(now.dtype)).reshape(y.shape)


def _in_format(x: Tensor, weight: Tensor) -> Tensor:
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


def _computes_in(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
