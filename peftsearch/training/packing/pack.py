"""Trials of one domain in step with each other: one forward and backward pass for all, and each one's own step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from peftsearch.training.batches import Batch, ahead, collated, load, moved, padded_to, padding_known
from peftsearch.training.optimizer import learning_rate_factor
from peftsearch.training.packing.banks import Banks
from peftsearch.training.packing.host import Host, placed_of
from peftsearch.training.packing.layout import Layout, filled
from peftsearch.training.packing.parts import NotPackableError
from peftsearch.training.precision import training_autocast
from peftsearch.training.session import TrialSession

_FILL = {"attention_mask": 0, "token_type_ids": 0, "decoder_attention_mask": 0}
_TOKENS = ("input_ids", "decoder_input_ids")
_BY_TOKEN = ("start_logits", "end_logits")
"""Outputs with a number for each token and no further dimension."""

_ALIKE, _ALIKE_QUANTISED = 0.05, 0.3
"""How far a pack's gradients may be from a member's own, as a share of these. What is mixed up is off by far more."""
_ROUNDING = 1e-5
"""How far gradients may be apart whatever their size. A member that is sure of its examples has next to none: its loss
takes a probability from 1, of which rounding leaves a few bits, or nothing."""
_CHECKED_ROWS = 2
"""Examples of each member that are compared: enough to be mixed up."""


class MemberError(Exception):
    """One member cannot go on, for a reason of its own; the others can."""

    def __init__(self, session: TrialSession, error: Exception) -> None:
        super().__init__(str(error))
        self.session = session
        self.error = error


@dataclass(frozen=True)
class _Part:
    """What one forward pass is about, on the device.

    Attributes:
        inputs: What the model sees: all members' texts below one another.
        batches: Each member's own batch.
        learns: Whether it counts: a member without a part of its own runs along, and its loss is left out.
        rows: As `Layout.rows`.
        widths: As `Layout.widths`.
    """

    inputs: Batch
    batches: list[dict[str, Any]]
    learns: list[bool]
    rows: int
    widths: dict[str, list[int]]


_Loaded = tuple[list[list[int]], list[_Part]]
"""The rows of each member's step, and its forward passes."""


class Pack:
    """Members that train together until one of them joins or leaves; then a new pack is made.

    A step computes for every member what `TrialSession` computes for it alone: its batch in its own order, its own
    losses and options, its gradients clipped by their own norm, its own learning rate. Products are batched, so that
    results differ by rounding. Where there is dropout, masks are drawn for the whole pack, as a function of its
    members' seeds and steps.

    Args:
        sessions: The members: of one domain, model, quantization of the base, batch size and precision. Their
            parameters live here until `close`.
        host: What they run on.

    Raises:
        NotPackableError: They cannot be trained together; it names the member that is in the way, where one is.
    """

    def __init__(self, sessions: Sequence[TrialSession], host: Host) -> None:
        # Members with the same kinds of adapters side by side.
        self.sessions = sorted(sessions, key=lambda session: (session.plan.method, session.plan.key))
        self.host = host
        self._coming: Generator[_Loaded, None, None] | None = None
        first = self.sessions[0]
        self.domain, self.device = first.domain, first.group.device
        self._precision = first.training.precision
        self._accumulation = first.training.gradient_accumulation
        if len({(session.plan.model, session.plan.domain) for session in self.sessions}) > 1:
            raise NotPackableError("trials of several domains or models are not trained together")
        parts = [host.parts_of(session) for session in self.sessions]
        self.layout = Layout(len(self.sessions))
        self.banks = Banks(self.sessions, [placed_of(own) for own in parts])
        # What one of them needs alone, all need together.
        host.recompute(any(session.recomputes for session in self.sessions))
        try:
            self._prompts = host.attach(self.layout, parts, self.banks)
        except BaseException:
            self.close()
            raise
        self._running = (host.model, *(module for own in parts for module in own.own.values()))
        self._trains = False
        """Whether these are in training mode, in all their parts."""
        self._counts: dict[tuple[int, ...], Tensor] = {}
        self.losses = torch.zeros(len(self.sessions), dtype=torch.float64, device=self.device)
        """By member, the loss of the last step, summed over its examples."""
        self.total = torch.zeros_like(self.losses)
        """By member, the losses of all steps."""
        self.counts = [0] * len(self.sessions)
        """By member, the examples of the last step."""
        self.examples = [0] * len(self.sessions)
        """By member, the examples of all steps."""

    def close(self) -> None:
        """Give the members their parameters back."""
        self._forget()
        self.host.detach()
        self.banks.close()

    def step(self) -> None:
        """One step of every member.

        Raises:
            MemberError: A member's text does not fit; nobody has stepped.
            Exception: Nobody has stepped either, unless the optimiser failed.
        """
        self._train()
        torch.manual_seed(_seed(self.sessions))
        try:
            indices, parts = self._next()
            losses = self._gradients(indices, parts)
        except BaseException:
            # Another try begins at the same step.
            self._forget()
            raise
        self.banks.step(
            [
                learning_rate_factor(session.step, session.budget.total_steps, session.training)
                for session in self.sessions
            ]
        )
        counts = tuple(len(rows) for rows in indices)
        if counts not in self._counts:
            self._counts[counts] = moved(torch.tensor(counts, dtype=torch.float64), self.device)
        # Kept on the device: reading it every step would make the host wait for the GPU.
        self.losses = losses.double() * self._counts[counts]
        self.total = self.total + self.losses
        self.counts = list(counts)
        self.examples = [done + count for done, count in zip(self.examples, counts, strict=True)]
        for session in self.sessions:
            session.step += 1

    def check(self) -> None:
        """Compare every member's gradients with those that its own model gives, before the first step.

        A pack takes for granted that a model treats the rows of a batch apart from each other and leaves them in their
        order. An architecture that does not (and whose layers have the right shapes by chance) would train wrongly,
        without an error; it is worth a forward and backward pass of each member to know.

        Raises:
            NotPackableError: They differ by more than rounding.
            MemberError: As `step`.
        """
        # Heads are the members', not the host's: of those that have trained before, some would drop.
        for model in (self.host.model, *(session.model for session in self.sessions)):
            model.eval()
        self._trains = False
        # In full precision, where the pack's size was measured in half: of each member a part of its batch has to do.
        indices = [session.order.batch(session.step)[:_CHECKED_ROWS] for session in self.sessions]
        self.layout.drops = False
        try:
            self._gradients(indices, self._parts(indices), autocast=False)
        finally:
            self.layout.drops = True
        for row, session in enumerate(self.sessions):
            difference, size = self.banks.difference(row, self._own_loss(session, indices[row]))
            bound = _ALIKE if session.plan.hyperparameters.get("quantization", "none") == "none" else _ALIKE_QUANTISED
            if not difference <= bound * size + _ROUNDING and math.isfinite(size):
                raise NotPackableError(
                    f"in a pack, gradients of trial {session.plan.number} are off by {difference:.2g}, of {size:.2g}"
                )

    # --- inside ---

    def _own_loss(self, session: TrialSession, rows: Sequence[int]) -> Tensor:
        """The loss of a member by itself, in its own model."""
        task = self.domain.task
        batch = collated(task, self.domain.split("train")[rows], self.domain.pad_token_id, self.device)
        output = session.model(**{name: value for name, value in batch.items() if name not in task.hidden})
        return task.losses(output, batch, session.loss_options).mean()

    def _train(self) -> None:
        # A model's own flag does not speak for its parts: PEFT puts a new one in training mode around a base in
        # evaluation mode. And going through all parts at every step would take milliseconds. Of the members' models
        # their own modules run here, no others.
        if not self._trains:
            for module in self._running:
                module.train()
            self._trains = True

    def _next(self) -> _Loaded:
        """The members' next step; on a GPU the one after it is made meanwhile."""
        if self._coming is None:
            first = [session.step for session in self.sessions]

            def made(number: int) -> _Loaded:
                indices = [s.order.batch(step + number) for s, step in zip(self.sessions, first, strict=True)]
                return indices, self._parts(indices)

            self._coming = ahead(count(), made, self.device)
        return next(self._coming)

    def _forget(self) -> None:
        """Make no more batches: the members' orders are theirs again."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.close()

    def _parts(self, indices: Sequence[Sequence[int]]) -> list[_Part]:
        """The forward passes of a step."""
        part = [-(-len(rows) // self._accumulation) for rows in indices]
        parts = [
            [rows[first : first + size] for first in range(0, len(rows), size)]
            for rows, size in zip(indices, part, strict=True)
        ]
        return [
            self._part(
                [own[number] if number < len(own) else own[0][:1] for own in parts],
                [number < len(own) for own in parts],
            )
            for number in range(max(len(own) for own in parts))
        ]

    def _gradients(self, indices: Sequence[Sequence[int]], parts: Sequence[_Part], *, autocast: bool = True) -> Tensor:
        """Gradients of every member's mean loss, in the banks; returns these losses."""
        summed = torch.zeros(len(indices), device=self.device)
        for number, part in enumerate(parts):
            self._lay_out(part)
            full = part.inputs.full
            if full and any(len(set(prompts.counts)) > 1 for prompts in self._prompts):
                # Soft tokens of different numbers are padded in their turn.
                full = False
            with training_autocast(self._precision if autocast else "fp32", self.device), padding_known(full):
                output = self.host.model(**part.inputs.values)
            found, shares = [], self._shares(output)
            for member, batch in enumerate(part.batches):
                if not part.learns[member]:
                    found.append(summed.new_zeros(()))
                    continue
                own = self._output_of(member, type(output), shares, batch)
                losses = self.domain.task.losses(own, batch, self.sessions[member].loss_options)
                found.append(losses.sum() / len(indices[member]))
            self.layout.encoder_mask = None
            of_members = torch.stack(found)
            self.banks.backward(of_members.sum(), first=number == 0)
            summed = summed + of_members.detach()
        return summed

    def _collate(self, rows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """Each member's batch by itself; members that are at the same examples share one."""
        data, task = self.domain.split("train"), self.domain.task
        distinct = {tuple(own): None for own in rows}
        # One reading of the data for all.
        every = data[[row for own in distinct for row in own]]
        found: dict[tuple[int, ...], dict[str, Any]] = {}
        first = 0
        for own in distinct:
            columns = {name: values[first : first + len(own)] for name, values in every.items()}
            found[own] = task.collate(columns, self.domain.pad_token_id, multiple_of=padded_to(self.device))
            first += len(own)
        return [found[tuple(own)] for own in rows]

    def _part(self, rows: Sequence[Sequence[int]], learns: list[bool]) -> _Part:
        """A forward pass over some rows of each member."""
        task, batches = self.domain.task, self._collate(rows)
        names = [name for name in batches[0] if name not in task.hidden]
        for name in names:
            if name not in _FILL and name not in _TOKENS:
                raise NotPackableError(f"how {name} of several trials goes together is not known")
        most = max(len(batch["input_ids"]) for batch in batches)
        inputs = load(
            {
                name: filled([batch[name] for batch in batches], most, _FILL.get(name, self.domain.pad_token_id))
                for name in names
            },
            self.device,
        )
        # The texts are there already, each in its slice.
        further = {
            id(batch): load({name: value for name, value in batch.items() if name not in names}, self.device).values
            for batch in batches
        }
        own = [
            {
                name: inputs.values[name][member * most :][: len(value), : value.shape[1]]
                if name in names
                else further[id(batch)][name]
                for name, value in batch.items()
            }
            for member, batch in enumerate(batches)
        ]
        return _Part(inputs, own, learns, most, {name: [batch[name].shape[1] for batch in batches] for name in names})

    def _lay_out(self, part: _Part) -> None:
        """Tell the hooks what comes."""
        self.layout.rows, self.layout.widths = part.rows, part.widths
        for prompts in self._prompts:
            for member, width in enumerate(self.layout.widths_of(prompts.source)):
                try:
                    prompts.check(member, width)
                except ValueError as error:
                    raise MemberError(self.sessions[member], error) from error

    def _shares(self, output: Any) -> dict[str, tuple[Tensor, ...]]:
        """By name of what the model gives for each text, each member's part."""
        every = self.layout.members * self.layout.rows
        return {
            name: self.layout.shares(value)
            for name, value in output.items()
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == every
        }

    def _output_of(
        self, member: int, kind: type[Any], shares: Mapping[str, tuple[Tensor, ...]], batch: Mapping[str, Any]
    ) -> Any:
        """What the model would have given a member alone."""
        rows, layout = len(batch["input_ids"]), self.layout
        own = {}
        for name, of_members in shares.items():
            value = of_members[member]
            if rows < layout.rows:
                value = value[:rows]
            if value.ndim > 2 or name in _BY_TOKEN:
                source = "decoder_input_ids" if "decoder_input_ids" in layout.widths else "input_ids"
                if value.shape[1] == max(layout.widths[source]):
                    value = value[:, : layout.widths[source][member]]
            own[name] = value
        return kind(**own)


def _seed(sessions: Sequence[TrialSession]) -> int:
    text = " ".join(f"{session.plan.key}:{session.plan.seed}:{session.step}" for session in sessions)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
