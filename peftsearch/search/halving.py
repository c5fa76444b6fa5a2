"""Asynchronous successive halving, with one objective or with two: the decisions, without Ray and without Optuna.

Successive halving evaluates trials at rungs (after 1, eta, eta^2, ... evaluations) and lets the best 1/eta of those
seen so far at the rung go on (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning",
arXiv:1810.05934). With two objectives, "best" is decided by non-dominated sorting (Schmucker et al. 2021,
"Multi-objective Asynchronous Successive Halving", arXiv:2106.12639).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from peftsearch.search.levels import Levels
from peftsearch.search.pareto import crowding_distance
from peftsearch.spec import Direction

Quality = tuple[float, float]
"""Less is better."""


@dataclass(frozen=True)
class Candidate:
    """A trial at a rung.

    Attributes:
        number: The trial's number.
        cell: Key of its cell.
        value: The domain's metric.
        loss: Validation loss; breaks ties of the metric.
        parameters: Trainable parameters.
    """

    number: int
    cell: str
    value: float
    loss: float
    parameters: int


def rung_evaluations(evaluations: int, eta: float, grace: int) -> tuple[int, ...]:
    """After which evaluations (from 1) a trial may be pruned: grace, grace * eta, ..., never the last one."""
    rungs: list[int] = []
    level = float(grace)
    while round(level) < evaluations:
        if not rungs or round(level) > rungs[-1]:
            rungs.append(round(level))
        level *= eta
    return tuple(rungs)


class Pruner(ABC):
    """Decides at each rung whether a trial goes on.

    Args:
        evaluations: Evaluations in the full budget.
        eta: A rung lets the top 1/eta go on.
        grace: Evaluations before the first rung.
        direction: Of the domain's metric.
    """

    def __init__(self, evaluations: int, eta: float, grace: int, direction: Direction) -> None:
        self.eta = eta
        self.sign = -1.0 if direction == "maximize" else 1.0
        self.rungs = {evaluation: self.table() for evaluation in rung_evaluations(evaluations, eta, grace)}

    def record(self, evaluation: int, candidate: Candidate) -> None:
        """Take note of a trial at an evaluation without deciding: what a resumed study has seen before."""
        if evaluation in self.rungs:
            self.rungs[evaluation].add(candidate, self._quality(candidate))

    def goes_on(self, evaluation: int, candidate: Candidate) -> bool:
        """Whether the trial that just finished an evaluation (from 1) should train on."""
        if evaluation not in self.rungs:
            return True
        table = self.rungs[evaluation]
        table.add(candidate, self._quality(candidate))
        return table.promotes_latest(max(1, math.floor(table.seen / self.eta)))

    def failed(self, cell: str, number: int) -> None:
        """A trial will not come to its full budget: whoever was worse may now be the best of its cell."""
        for table in self.rungs.values():
            table.failed(cell, number)

    @abstractmethod
    def table(self) -> RungTable:
        """What is kept of a rung."""

    def _quality(self, candidate: Candidate) -> Quality:
        """Metric, then validation loss: early on, many trials sit at the majority class with the very same metric.

        Not a number is the worst of all.
        """
        value, loss = self.sign * candidate.value, candidate.loss
        return (math.inf if math.isnan(value) else value, math.inf if math.isnan(loss) else loss)


class RungTable(ABC):
    """All trials that reached a rung so far, in an order that is kept up as they come: with ten thousand of them, a
    decision must not look at each."""

    seen = 0
    """Trials so far."""

    def add(self, candidate: Candidate, quality: Quality) -> None:
        """A trial has reached the rung."""
        self.seen += 1

    def failed(self, cell: str, number: int) -> None:
        """As `Pruner.failed`. It stays among those that the others are compared with."""
        return

    @abstractmethod
    def promotes_latest(self, places: int) -> bool:
        """Whether the trial that came last is among the best of all, of which so many go on."""


class NoPruning(Pruner):
    """Every trial gets the full budget."""

    def table(self) -> RungTable:
        """Of nothing."""
        return _Everyone()


class AccuracyHalving(Pruner):
    """Plain ASHA: ranks by the metric alone, across all methods of the domain; ties by validation loss, then the
    earlier trial."""

    def table(self) -> RungTable:
        """A sorted list."""
        return _ByQuality()


class ParetoHalving(Pruner):
    """Front-aware ASHA: ranks by non-dominated sorting on (metric, trainable parameters).

    Within a rank, trials with more room around them on the front go first, so that the survivors stay spread (crowding
    distance, Deb et al. 2002). The best trial of each cell so far (of those that have not failed since) always goes on,
    so that every method is seen at the full budget.
    """

    def table(self) -> RungTable:
        """Fronts."""
        return _ByFront()


class _Everyone(RungTable):
    def promotes_latest(self, places: int) -> bool:
        return True


class _ByQuality(RungTable):
    def __init__(self) -> None:
        self._order: list[tuple[float, float, int]] = []
        self._ahead = 0

    def add(self, candidate: Candidate, quality: Quality) -> None:
        super().add(candidate, quality)
        mine = (*quality, candidate.number)
        self._ahead = bisect_left(self._order, mine)
        self._order.insert(self._ahead, mine)

    def promotes_latest(self, places: int) -> bool:
        return self._ahead < places


class _ByFront(RungTable):
    def __init__(self) -> None:
        self._levels = Levels()
        self._numbers: list[int] = []
        self._qualities: list[Quality] = []
        """All that differ, in order."""
        self._of_cell: dict[str, list[tuple[Quality, int]]] = {}
        """By cell, qualities and numbers of those that have not failed, best first."""
        self._best_of_cell = False
        self._rank = 0

    def add(self, candidate: Candidate, quality: Quality) -> None:
        super().add(candidate, quality)
        own = self._of_cell.setdefault(candidate.cell, [])
        self._best_of_cell = not own or quality <= own[0][0]
        insort(own, (quality, candidate.number))
        place = bisect_left(self._qualities, quality)
        if self._qualities[place : place + 1] != [quality]:
            self._qualities.insert(place, quality)
        self._rank = self._levels.add(quality, math.log(max(1, candidate.parameters)), len(self._numbers))
        self._numbers.append(candidate.number)

    def failed(self, cell: str, number: int) -> None:
        own = self._of_cell.get(cell, [])
        own[:] = [entry for entry in own if entry[1] != number]

    def promotes_latest(self, places: int) -> bool:
        if self._best_of_cell:
            return True
        better = self._levels.before(self._rank)
        if better >= places:
            return False
        return better + self._levels.size(self._rank) <= places or better + self._peers_ahead() < places

    def _peers_ahead(self) -> int:
        """How many of the same front have more room, or as much and an earlier number."""
        peers: list[tuple[int, float, float]] = []
        for quality, cost, members in self._levels.steps(self._rank):
            # Metric and loss become one objective: the place in their lexicographic order, equal pairs sharing a place.
            place = float(bisect_left(self._qualities, quality))
            peers += [(member, place, cost) for member in members]
        peers.sort()
        room = crowding_distance(np.array([(place, cost) for _, place, cost in peers])).tolist()
        # Of the whole rung, the latest came last.
        mine, number = room[-1], self._numbers[-1]
        return sum(
            theirs > mine or (theirs == mine and self._numbers[member] < number)
            for theirs, (member, _, _) in zip(room, peers, strict=True)
        )


PRUNERS: dict[str, type[Pruner]] = {"pareto_asha": ParetoHalving, "asha": AccuracyHalving, "none": NoPruning}
"""By the word in the study file (``search.scheduler``)."""
