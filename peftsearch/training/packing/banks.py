"""Parameters, gradients and moments of a pack's members in common buffers: a row for each member.

A bank holds parameters of one kind (adapter or head, matrices or vectors, one data type), so that all of a member's row
has one learning rate and one weight decay. Within a row every part has the place that the largest member's needs; the
rest is zero, has gradients of zero, and stays zero under AdamW.

One AdamW steps on all rows of all banks, in a few kernels however many members there are: it finds each row's direction
(a step at rate 1, without decay, from zero), which each member then takes at its own rate and with its own decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftsearch.training.batches import moved
from peftsearch.training.packing.parts import NotPackableError
from peftsearch.training.session import TrialSession

_ALIGNMENT = 16
"""Numbers; every part begins at a multiple of it, so that kernels may read several at once."""

Key = tuple[str, ...]


@dataclass(frozen=True)
class Placed:
    """One parameter of one member.

    Attributes:
        parameter: The member's own.
        key: Which part it is; members' parameters of the same key share a place.
        shape: What the part looks like, at its size in this member.
        view: The parameter within a row's part (of the padded shape).
        own: Whether the parameter itself lies in the row while it is packed, for modules that are called as they are.
    """

    parameter: Tensor
    key: Key
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor]
    own: bool = False


def along_rows(parameter: Tensor, key: Key) -> Placed:
    """A parameter whose first dimension is padded: (rank, in), (bottleneck, in), (tokens, width), (bottleneck,)."""
    size = len(parameter)
    return Placed(parameter, key, tuple(parameter.shape), lambda part: part[:size])


def along_columns(parameter: Tensor, key: Key) -> Placed:
    """A matrix (out, rank) that is kept as (rank, out), padded in its rank."""
    size = parameter.shape[1]
    return Placed(parameter, key, (size, parameter.shape[0]), lambda part: part[:size].T)


def as_it_is(parameter: Tensor, key: Key) -> Placed:
    """A parameter of a module that is called as it is."""
    shape, size = parameter.shape, parameter.numel()
    return Placed(parameter, key, (size,), lambda part: part[:size].view(shape), own=True)


_BankKey = tuple[bool, bool, torch.dtype]


@dataclass
class _Bank:
    size: int = 0
    weights: Tensor = field(init=False)
    gradients: Tensor = field(init=False)
    masters: Tensor = field(init=False)
    """The weights themselves, unless these are stored in half precision; as `master_weights`."""
    master_gradients: Tensor = field(init=False)
    average: Tensor = field(init=False)
    square: Tensor = field(init=False)
    direction: Tensor = field(init=False)
    """What AdamW would add at a rate of 1."""

    def make(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.weights = torch.zeros(rows, self.size, dtype=dtype, device=device)
        self.gradients = torch.zeros_like(self.weights)
        half = dtype in (torch.bfloat16, torch.float16)
        self.masters = self.weights.float() if half else self.weights
        self.master_gradients = self.gradients.float() if half else self.gradients
        self.average, self.square, self.direction = (torch.zeros_like(self.masters) for _ in range(3))


@dataclass
class _Part:
    bank: _Bank
    offset: int
    shape: tuple[int, ...]

    def of(self, buffer: Tensor) -> Tensor:
        """The part in a whole buffer (rows first), or in one row of it."""
        last = self.offset + math.prod(self.shape)
        return buffer[..., self.offset : last].view(*buffer.shape[:-1], *self.shape)


class Banks:
    """The members' parameters, taken from their sessions; `close` gives them back.

    Args:
        sessions: The members.
        placed: Their parameters.

    Raises:
        NotPackableError: An optimiser or a data type does not go with the others.
    """

    def __init__(self, sessions: Sequence[TrialSession], placed: Sequence[Sequence[Placed]]) -> None:
        self.sessions = list(sessions)
        self._placed = [list(own) for own in placed]
        self._device = sessions[0].group.device
        self._banks: dict[_BankKey, _Bank] = {}
        self._parts: dict[Key, _Part] = {}
        self._originals: dict[int, Tensor] = {}
        self._lay_out()
        self.leaves: dict[Key, Tensor] = {}
        """By part: all members' parameters together, of shape (members, ...); not for modules of members' own."""
        for key in dict.fromkeys(placed.key for own in self._placed for placed in own if not placed.own):
            part = self._parts[key]
            self.leaves[key] = part.of(part.bank.weights).detach().requires_grad_()
        self._targets: list[Tensor] = list(self.leaves.values())
        """What gradients are computed for, beside where these go (`_into`)."""
        self._into = [self._parts[key].of(self._parts[key].bank.gradients) for key in self.leaves]
        self._number_of: dict[int, int] = {}
        self._reached: set[int] = set()
        self._options = [self._take(row) for row in range(len(self.sessions))]
        self._optimizer, self._steps = self._make_optimizer()
        # Last, when nothing can go wrong any more: from here on members live in the banks.
        for row in range(len(self.sessions)):
            self._move_in(row)
        largest = torch.tensor([session.training.max_grad_norm for session in self.sessions])
        self._largest_norms = moved(largest, self._device)

    def close(self) -> None:
        """Give every member its parameters and moments back."""
        for row, session in enumerate(self.sessions):
            names = {id(parameter): name for name, parameter in session.parameters.items()}
            step = self._steps[row]
            for placed in self._placed[row]:
                part, parameter = self._parts[placed.key], placed.parameter
                if placed.own:
                    parameter.data = self._originals[id(parameter)]
                if self._number_of[id(parameter)] not in self._reached:
                    continue
                bank, target = part.bank, session.masters.get(names[id(parameter)], parameter)
                parameter.data.copy_(placed.view(part.of(bank.weights[row])))
                if target is not parameter:
                    target.data.copy_(placed.view(part.of(bank.masters[row])))
                moments = {"exp_avg": bank.average[row], "exp_avg_sq": bank.square[row]}
                session.optimizer.state[target] = {
                    name: placed.view(part.of(moment)).clone(memory_format=torch.contiguous_format)
                    for name, moment in moments.items()
                }
                session.optimizer.state[target]["step"] = step.clone()

    def backward(self, loss: Tensor, *, first: bool) -> None:
        """Add a loss's gradients to the banks, or put them there where it is a step's ``first``.

        AdamW passes over parameters without a gradient, and would let a gradient of zero decay them: which parameters
        no loss reaches is noted, and `close` leaves them as they were.
        """
        found = torch.autograd.grad(loss, self._targets, allow_unused=True)
        pairs = [(into, gradient) for into, gradient in zip(self._into, found, strict=True) if gradient is not None]
        self._reached |= {number for number, gradient in enumerate(found) if gradient is not None}
        views, gradients = [into for into, _ in pairs], [gradient for _, gradient in pairs]
        if first:
            torch._foreach_copy_(views, gradients)
        else:
            torch._foreach_add_(views, gradients)

    def difference(self, row: int, loss: Tensor) -> tuple[float, float]:
        """How far the gradients in a member's row are from those of its own model's loss, and how large these are."""
        parameters = [placed.parameter for placed in self._placed[row]]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        off = size = torch.zeros((), device=self._device)
        for placed, gradient in zip(self._placed[row], found, strict=True):
            part = self._parts[placed.key]
            mine = placed.view(part.of(part.bank.gradients[row])).float()
            own = torch.zeros_like(mine) if gradient is None else gradient.float()
            off, size = off + (mine - own).square().sum(), size + own.square().sum()
        return float(off.sqrt()), float(size.sqrt())

    def step(self, factors: Sequence[float]) -> None:
        """Clip every member's gradients by their own norm, and take its step of AdamW.

        Args:
            factors: By member, the share of its peak learning rate.
        """
        for bank in self._banks.values():
            if bank.masters is not bank.weights:
                bank.master_gradients.copy_(bank.gradients)
        # Norms of the gradients in the parameters' own format, as torch.nn.utils.clip_grad_norm_ takes them.
        norms = torch.stack([torch.linalg.vector_norm(b.master_gradients, dim=1) for b in self._banks.values()], dim=1)
        norm = torch.linalg.vector_norm(norms, dim=1)
        shares = (self._largest_norms / (norm + 1e-6)).clamp(max=1.0)[:, None]
        for bank in self._banks.values():
            bank.master_gradients.mul_(shares)
        for bank in self._banks.values():
            bank.direction.zero_()
        self._optimizer.step()
        for bank, (kept, rate) in zip(self._banks.values(), self._rates(factors), strict=True):
            bank.masters.mul_(kept).addcmul_(bank.direction, rate)
            if bank.masters is not bank.weights:
                bank.weights.copy_(bank.masters)

    # --- inside ---

    def _lay_out(self) -> None:
        heads = [head_of(session) for session in self.sessions]
        shapes: dict[Key, tuple[int, ...]] = {}
        kinds: dict[Key, _BankKey] = {}
        for own, head in zip(self._placed, heads, strict=True):
            for placed in own:
                parameter = placed.parameter
                kind = (id(parameter) in head, parameter.ndim > 1, parameter.dtype)
                if kinds.setdefault(placed.key, kind) != kind or len(shapes.get(placed.key, placed.shape)) != len(
                    placed.shape
                ):
                    raise NotPackableError(f"{placed.key[0]} differs between the trials")
                known = shapes.get(placed.key, placed.shape)
                if known[1:] != placed.shape[1:]:
                    raise NotPackableError(f"{placed.key[0]} has another width in another trial")
                shapes[placed.key] = (max(known[0], placed.shape[0]), *placed.shape[1:])
        for key, shape in shapes.items():
            bank = self._banks.setdefault(kinds[key], _Bank())
            self._parts[key] = _Part(bank, bank.size, shape)
            bank.size += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
        for (_, _, dtype), bank in self._banks.items():
            bank.make(len(self.sessions), dtype, self._device)

    def _take(self, row: int) -> dict[int, tuple[dict[str, Any], Tensor | None]]:
        """Copy a member's parameters and moments into its row; by bank its optimiser's options and steps done."""
        session = self.sessions[row]
        if type(session.optimizer) is not torch.optim.AdamW:
            raise NotPackableError(f"{type(session.optimizer).__name__} is not packed")
        groups = {id(parameter): group for group in session.optimizer.param_groups for parameter in group["params"]}
        names = {id(parameter): name for name, parameter in session.parameters.items()}
        found: dict[int, tuple[dict[str, Any], Tensor | None]] = {}
        for placed in self._placed[row]:
            part, parameter = self._parts[placed.key], placed.parameter
            bank, target = part.bank, session.masters.get(names[id(parameter)], parameter)
            placed.view(part.of(bank.weights[row])).copy_(parameter.data)
            if target is not parameter:
                placed.view(part.of(bank.masters[row])).copy_(target.data)
            state = session.optimizer.state.get(target, {})
            if state:
                placed.view(part.of(bank.average[row])).copy_(state["exp_avg"])
                placed.view(part.of(bank.square[row])).copy_(state["exp_avg_sq"])
            options = {name: value for name, value in groups[id(target)].items() if name != "params"}
            known, steps = found.get(id(bank), (options, None))
            if known != options:
                raise NotPackableError("parameters of one kind have different learning rates")
            found[id(bank)] = (known, state["step"] if state else steps)
        return found

    def _move_in(self, row: int) -> None:
        """Let the parameters of a member's own modules lie in its row, and list what gradients are computed for."""
        numbers = {key: number for number, key in enumerate(self.leaves)}
        for placed in self._placed[row]:
            placed.parameter.grad = None
            if placed.own:
                self._originals[id(placed.parameter)] = placed.parameter.data
                part = self._parts[placed.key]
                placed.parameter.data = placed.view(part.of(part.bank.weights[row]))
                self._number_of[id(placed.parameter)] = len(self._targets)
                self._targets.append(placed.parameter)
                self._into.append(placed.view(part.of(part.bank.gradients[row])))
            else:
                self._number_of[id(placed.parameter)] = numbers[placed.key]

    def _rates(self, factors: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """By bank, of shape (members, 1): the share of the weights that decay leaves, and the learning rate."""
        rates = []
        for bank in self._banks.values():
            rows = []
            for factor, options in zip(factors, self._options, strict=True):
                # Nothing of a member without such parameters changes.
                own = options[id(bank)][0] if id(bank) in options else {"peak": 0.0, "weight_decay": 0.0}
                rate = own["peak"] * factor
                rows.append((1.0 - rate * own["weight_decay"], rate))
            rates.append(rows)
        # Numbers that the host has now and the device wants: copied without waiting for what was launched before.
        found = moved(torch.tensor(rates), self._device)
        return [(rows[:, :1], rows[:, 1:]) for rows in found]

    def _make_optimizer(self) -> tuple[torch.optim.AdamW, list[Tensor]]:
        """The optimiser of all rows, and by member how many steps it has taken."""
        groups: dict[str, dict[str, Any]] = {}
        states: dict[Tensor, dict[str, Tensor]] = {}
        taken: list[Tensor] = []
        for row, by_bank in enumerate(self._options):
            for bank in self._banks.values():
                if id(bank) not in by_bank:
                    continue
                options, steps = by_bank[id(bank)]
                direction = nn.Parameter(bank.direction[row])
                direction.grad = bank.master_gradients[row]
                alike = {**options, "lr": 1.0, "weight_decay": 0.0, "peak": 1.0}
                groups.setdefault(repr(sorted(alike.items())), {**alike, "params": []})["params"].append(direction)
                states[direction] = {
                    "step": torch.zeros((), device=self._device) if steps is None else steps.clone(),
                    "exp_avg": bank.average[row],
                    "exp_avg_sq": bank.square[row],
                }
                if len(taken) == row:
                    taken.append(states[direction]["step"])
        optimizer = torch.optim.AdamW(list(groups.values()), fused=self._device.type in ("cuda", "cpu"))
        optimizer.state.update(states)
        return optimizer, taken


def head_of(session: TrialSession) -> frozenset[int]:
    """``id`` of each parameter of a trial's task head."""
    from peftsearch.training.session import head_parameters

    return head_parameters(session.model)
