"""A study's trials from first to last: what Ray Tune is told, and what the ledger is told.

Ray Tune calls three thin adapters (searcher, scheduler, callback), which all talk to one `StudyRun`. It decides what is
tried next, what goes on, and writes the ledger; so there is one account of what happened, in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peftsearch.search.allocation import Joint
from peftsearch.search.cells import Cell
from peftsearch.search.counts import ParameterCount
from peftsearch.search.halving import PRUNERS, Candidate, Pruner
from peftsearch.search.proposals import Grid, first_guesses, make_sampler, suggest
from peftsearch.spec import Direction, Rung, SearchSpec, TrialRecord, TrialState
from peftsearch.training.budget import Budget
from peftsearch.training.segment import SegmentResult, TrialPlan


class TrialLedger(Protocol):
    """What the search needs of the ledger."""

    @property
    def records(self) -> list[TrialRecord]: ...
    def record(self, number: int) -> TrialRecord: ...
    def started(self, cell: str) -> int: ...
    def next_number(self) -> int: ...
    def is_new(self, cell: str) -> bool: ...
    def enqueue(self, cell: str, configurations: Sequence[Mapping[str, Any]]) -> None: ...
    def ask(self, cell: str, sampler: Any, suggest: Any, describe: Any) -> TrialRecord | None: ...
    def infeasible(self, cell: str, number: int | None = None) -> int: ...
    def add_rung(self, number: int, rung: Rung, **updates: Any) -> TrialRecord: ...
    def complete(self, number: int, **updates: Any) -> TrialRecord: ...
    def prune(self, number: int, **updates: Any) -> TrialRecord: ...
    def fail(self, number: int, error: str, **updates: Any) -> TrialRecord: ...


class Observer(Protocol):
    """Somebody who wants to know: the progress display, MLflow."""

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial was started, evaluated or ended."""


PROPOSALS = 100
"""Configurations that are proposed for one trial, before it is given up because none is within the limits."""


@dataclass(frozen=True)
class DomainSearch:
    """What the search needs to know of a domain.

    Attributes:
        metric: The objective.
        direction: Of the metric.
        budgets: The full budget of every method. Where methods have budgets of their own, rungs still compare trials of
            all methods after the same number of evaluations: after the same share of each one's own budget.
    """

    metric: str
    direction: Direction
    budgets: Mapping[str, Budget]


@dataclass(frozen=True)
class TrialCost:
    """What a configuration is expected to take (`peftsearch.search.estimate`)."""

    memory_bytes: int
    seconds: float | None = None


class StudyRun:
    """Proposes, prunes and records the trials of one study.

    Args:
        search: The study file's section.
        cells: All cells.
        domains: Metric and budget by domain.
        count: Parameters of a configuration; raises ValueError where it does not fit the model.
        ledger: The study's ledger; what it holds already is continued.
        observers: Told of every change.
        cost: Memory and time of a configuration, given its parameters; not recorded (and no limit) where absent.
        guesses: By method, configurations to try first, the best one first: what another study found.
    """

    def __init__(
        self,
        search: SearchSpec,
        cells: Sequence[Cell],
        domains: Mapping[str, DomainSearch],
        count: Callable[[Cell, Mapping[str, Any]], ParameterCount],
        ledger: TrialLedger,
        observers: Sequence[Observer] = (),
        *,
        cost: Callable[[Cell, Mapping[str, Any], ParameterCount], TrialCost] | None = None,
        guesses: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        from peftsearch.search.history import Memory

        self.search = search
        self.cells = list(cells)
        self.domains = domains
        self.ledger = ledger
        self.broken: str | None = None
        """Why no trial can go on, where none is to blame; those that are RUNNING stay so."""
        self.at_once: Callable[[], int] = lambda: 1
        """How many trials a slot trains at once, by now."""
        self._count = count
        self._cost = cost
        self._observers = observers
        self._cell_of = {(cell.model, cell.domain, cell.method): cell for cell in cells}
        self._shares = self._shared_cells()
        self._share_of = {cell.key: cells for cells in self._shares for cell in cells}
        self._joint = {
            (cells[0].model, cells[0].domain): Joint(
                search, [cell.method for cell in cells], domains[cells[0].domain].direction
            )
            for cells in (self._shares if search.allocation == "joint" else [])
        }
        self._pruners = {name: self._pruner(domain) for name, domain in domains.items()}
        self._memories = {cell.key: Memory() for cell in self.cells}
        self._interrupted: list[int] = []
        self._grids = {cell.key: Grid(cell.space) for cell in self.cells} if search.sampler == "grid" else {}
        for cell in self.cells:
            if not self._grids and ledger.is_new(cell.key):
                ledger.enqueue(cell.key, first_guesses(cell.space, search.trials, (guesses or {}).get(cell.method, ())))
        for record in ledger.records:
            self._learn(record)
            running = record.state is TrialState.RUNNING
            for index, rung in enumerate(record.rungs, start=1):
                if not (running and rung is record.rungs[-1]):
                    self._pruners[record.domain].record(index, self._candidate(record, rung))
        for record in ledger.records:
            if record.state is TrialState.FAILED:
                self._pruners[record.domain].failed(self._key(record), record.number)
        for record in ledger.records:
            if record.state is TrialState.RUNNING and not self._settled(record):
                self._interrupted.append(record.number)

    @property
    def planned(self) -> int:
        """Number of trials of the whole study."""
        return sum(self._share(cell) for cell in self.cells)

    def finished(self) -> bool:
        """Whether every cell has had its trials and none is running."""
        return self._next_share() is None and not any(
            record.state is TrialState.RUNNING for record in self.ledger.records
        )

    def next_trial(self) -> TrialRecord | None:
        """An interrupted trial to continue, or a new one; None when every cell has had its share.

        Cells take turns, so that at any moment they have had (nearly) the same budget; with ``allocation: joint`` those
        take turns that share their trials. Where slots train several trials at once, turns are so long that those of
        one domain and model, which can be trained together, come together.
        """
        if self._interrupted:
            return self.ledger.record(self._interrupted.pop(0))
        while (cell := self._next_cell()) is not None:
            record = self._ask(cell)
            if record is None:
                continue
            self._tell(record)
            if record.state is TrialState.RUNNING:
                return record
        return None

    @property
    def interrupted(self) -> bool:
        """Whether trials wait to be continued."""
        return bool(self._interrupted)

    def again(self, number: int) -> None:
        """A trial whose process in Ray Tune was lost: it is continued like one that a driver left behind."""
        self._interrupted.append(number)

    def plan(self, record: TrialRecord) -> TrialPlan:
        """A trial as the slots see it."""
        return TrialPlan(
            record.number, record.model, record.domain, record.method, dict(record.hyperparameters), record.seed
        )

    def evaluated(self, number: int, result: SegmentResult, retries: int, *, final: bool) -> bool:
        """Record a segment's result; returns whether the trial goes on.

        It does not after the segment that reaches the full budget (``final``), nor after early stopping.
        """
        before = self.ledger.record(number)
        domain = self.domains[before.domain]
        known = len(before.rungs)
        rung = Rung(
            step=result.step,
            epoch=round(domain.budgets[before.method].epoch(result.step), 6),
            value=result.scores[domain.metric],
            loss=result.loss,
            train_loss=result.train_loss,
            train_seconds=result.train_seconds,
            together=result.together,
            evaluation_seconds=result.evaluation_seconds,
            scores=result.scores,
            usage=result.usage,
        )
        record = self.ledger.add_rung(
            number,
            rung,
            peak_memory_bytes=max(result.peak_memory_bytes, before.peak_memory_bytes or 0),
            retries=before.retries + retries,
            # With the evaluation, in one write: a driver that dies now still knows that it was the last one.
            stopped_early=result.stopped,
        )
        if final or result.stopped:
            if len(record.rungs) > known:
                # Its early stopping may be at a rung.
                self._pruners[record.domain].record(len(record.rungs), self._candidate(record, rung))
            record = self.ledger.complete(number, checkpoint=f"trials/{number:05d}")
        elif len(record.rungs) > known and not self._pruners[record.domain].goes_on(
            len(record.rungs), self._candidate(record, rung)
        ):
            record = self.ledger.prune(number)
        self._tell(record)
        return record.state is TrialState.RUNNING

    def failed(self, number: int, error: str, retries: int = 0) -> None:
        """Record that a trial cannot go on."""
        record = self.ledger.fail(number, error, retries=self.ledger.record(number).retries + retries)
        self._pruners[record.domain].failed(self._key(record), number)
        self._tell(record)

    def _settled(self, record: TrialRecord) -> bool:
        """Take the decision that a driver died over, between recording a trial's evaluation and its consequence."""
        if not record.rungs:
            return False
        last = record.rungs[-1]
        if record.stopped_early or last.step >= record.total_steps:
            self._pruners[record.domain].record(len(record.rungs), self._candidate(record, last))
            self._tell(self.ledger.complete(record.number, checkpoint=f"trials/{record.number:05d}"))
            return True
        if not self._pruners[record.domain].goes_on(len(record.rungs), self._candidate(record, last)):
            self._tell(self.ledger.prune(record.number))
            return True
        return False

    def _shared_cells(self) -> list[list[Cell]]:
        """The cells that share their trials: every one by itself, or the methods of a model and domain."""
        if self.search.allocation == "equal":
            return [[cell] for cell in self.cells]
        shares: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.cells:
            shares.setdefault((cell.model, cell.domain), []).append(cell)
        return list(shares.values())

    def _room(self, cells: Sequence[Cell]) -> int:
        """Trials that cells which share them may still start."""
        return sum(self._share(cell) - self.ledger.started(cell.key) for cell in cells)

    def _next_share(self) -> list[Cell] | None:
        methods = max(1, len({cell.method for cell in self.cells}))
        left = []
        for index, cells in enumerate(self._shares):
            if self._room(cells) > 0:
                turn = -(-self.at_once() * len(cells) // methods)
                left.append((sum(self.ledger.started(cell.key) for cell in cells) // turn, index))
        return self._shares[min(left)[1]] if left else None

    def _next_cell(self) -> Cell | None:
        cells = self._next_share()
        if cells is None or len(cells) == 1:
            return cells[0] if cells else None
        model, domain = cells[0].model, cells[0].domain
        method = self._joint[model, domain].method(self.ledger.next_number())
        return self._cell_of[model, domain, method]

    def _share(self, cell: Cell) -> int:
        """Trials of a cell: a grid may hold fewer than the others have, and not all of it within the limits."""
        if cell.key not in self._grids:
            return self.search.trials
        return min(self.search.trials, self._grids[cell.key].size - self.ledger.infeasible(cell.key))

    def _ask(self, cell: Cell) -> TrialRecord | None:
        """The next trial of a cell, after as many proposals as it takes to keep the limits; None at a grid's end.

        Proposals outside the limits are recorded in Optuna, so the sampler learns from them and a driver that dies
        among them continues with the next one.
        """
        number = self.ledger.next_number()
        while self._room(self._share_of[cell.key]) > 0:
            attempt = self.ledger.infeasible(cell.key, number)
            last = cell.key not in self._grids and attempt >= PROPOSALS - 1
            record = self.ledger.ask(
                cell.key,
                make_sampler(self.search, number, attempt, self._grids.get(cell.key), self._memories[cell.key]),
                lambda trial: suggest(trial, cell.space),
                lambda _, values, last=last: self._describe(cell, values, last),
            )
            if record is not None:
                return record
        return None

    def _describe(self, cell: Cell, hyperparameters: dict[str, Any], last: bool) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "seed": self.search.seed,
            "total_steps": self.domains[cell.domain].budgets[cell.method].total_steps,
        }
        try:
            count = self._count(cell, hyperparameters)
        except ValueError as error:
            return {**fields, "trainable_parameters": 0, "error": str(error)}
        fields |= {"trainable_parameters": count.trainable, "exported_parameters": count.exported}
        cost = self._cost(cell, hyperparameters, count) if self._cost else None
        if cost is not None:
            fields |= {"estimated_memory_bytes": cost.memory_bytes, "estimated_seconds": cost.seconds}
        constraints = excesses(self.search, count, cost)
        if last and any(excess > 0 for excess in constraints.values()):
            names = " and ".join(f"search.{name}" for name in constraints)
            return {**fields, "error": f"none of {PROPOSALS} proposals is within {names}: narrow the search space"}
        return {**fields, "constraints": constraints}

    def _pruner(self, domain: DomainSearch) -> Pruner:
        evaluations = max(len(budget.evaluation_steps) for budget in domain.budgets.values())
        return PRUNERS[self.search.scheduler](evaluations, self.search.eta, self.search.grace, domain.direction)

    def _candidate(self, record: TrialRecord, rung: Rung) -> Candidate:
        return Candidate(record.number, self._key(record), rung.value, rung.loss, record.trainable_parameters)

    def _key(self, record: TrialRecord) -> str:
        cell = self._cell_of.get((record.model, record.domain, record.method))
        return cell.key if cell else f"{record.domain}/{record.method}/{record.model}"

    def _learn(self, record: TrialRecord) -> None:
        if (joint := self._joint.get((record.model, record.domain))) is not None:
            joint.learn(record)

    def _tell(self, record: TrialRecord) -> None:
        self._learn(record)
        for observer in self._observers:
            observer.trial_changed(record)


def excesses(search: SearchSpec, count: ParameterCount, cost: TrialCost | None) -> dict[str, float]:
    """By how much a configuration exceeds each limit of the study, as a share of it; 0 or less is within.

    These are Optuna's constraints: it adds them up to tell how far from feasible a proposal is.
    """
    found = {}
    if search.max_parameters is not None:
        found["max_parameters"] = count.trainable / search.max_parameters - 1
    if search.max_memory is not None and cost is not None:
        found["max_memory"] = cost.memory_bytes / (search.max_memory * 2**30) - 1
    return found
