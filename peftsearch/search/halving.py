"""Asynchronous successive halving, with one objective or with two: the decisions, without Ray and without Optuna.

Successive halving evaluates trials at rungs (after 1, eta, eta^2, ... evaluations) and lets the best 1/eta of those
seen so far at the rung go on (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning",
arXiv:1810.05934). With two objectives, "best" is decided by non-dominated sorting (Schmucker et al. 2021,
"Multi-objective Asynchronous Successive Halving", arXiv:2106.12639).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peftsearch.search.pareto import crowding_distance, non_dominated_rank
from peftsearch.spec import Direction


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
        self.rungs = rung_evaluations(evaluations, eta, grace)
        self._seen: dict[int, list[Candidate]] = defaultdict(list)

    def record(self, evaluation: int, candidate: Candidate) -> None:
        """Take note of a trial at an evaluation without deciding: what a resumed study has seen before."""
        if evaluation in self.rungs:
            self._seen[evaluation].append(candidate)

    def goes_on(self, evaluation: int, candidate: Candidate) -> bool:
        """Whether the trial that just finished an evaluation (from 1) should train on."""
        if evaluation not in self.rungs:
            return True
        seen = self._seen[evaluation]
        seen.append(candidate)
        return self.promotes(seen, candidate)

    @abstractmethod
    def promotes(self, seen: Sequence[Candidate], candidate: Candidate) -> bool:
        """Whether a candidate goes on, given all that reached the rung so far, itself included."""

    def _quality(self, candidate: Candidate) -> tuple[float, float]:
        """Metric, then validation loss: early on, many trials sit at the majority class with the very same metric."""
        return (self.sign * candidate.value, candidate.loss)


class NoPruning(Pruner):
    """Every trial gets the full budget."""

    def promotes(self, seen: Sequence[Candidate], candidate: Candidate) -> bool:
        """Always."""
        return True


class AccuracyHalving(Pruner):
    """Plain ASHA: ranks by the metric alone, across all methods of the domain."""

    def promotes(self, seen: Sequence[Candidate], candidate: Candidate) -> bool:
        """The top 1/eta (at least one) by metric; ties by validation loss, then the earlier trial."""
        ahead = sum(
            (*self._quality(other), other.number) < (*self._quality(candidate), candidate.number) for other in seen
        )
        return ahead < max(1, math.floor(len(seen) / self.eta))


class ParetoHalving(Pruner):
    """Front-aware ASHA: ranks by non-dominated sorting on (metric, trainable parameters).

    Within a rank, trials with more room around them on the front go first, so that the survivors stay spread (crowding
    distance, Deb et al. 2002). The best trial of each cell so far always goes on, so that every method is seen at the
    full budget.
    """

    def promotes(self, seen: Sequence[Candidate], candidate: Candidate) -> bool:
        """The top 1/eta (at least one) of the sorting, and the best of the cell."""
        cell = [other for other in seen if other.cell == candidate.cell]
        if all(self._quality(candidate) <= self._quality(other) for other in cell):
            return True
        # Metric and loss become one objective: the place in their lexicographic order, equal pairs sharing a place.
        order = sorted({self._quality(other) for other in seen})
        place = {quality: float(index) for index, quality in enumerate(order)}
        points = np.array([(place[self._quality(other)], math.log(max(1, other.parameters))) for other in seen])
        ranks = non_dominated_rank(points)
        mine = next(index for index, other in enumerate(seen) if other is candidate)
        better = int((ranks < ranks[mine]).sum())
        peers = np.flatnonzero(ranks == ranks[mine])
        room = crowding_distance(points[peers])
        my_room = room[int(np.flatnonzero(peers == mine)[0])]
        earlier = sum(
            bool(room[i] > my_room or (room[i] == my_room and seen[peer].number < candidate.number))
            for i, peer in enumerate(peers.tolist())
        )
        return better + earlier < max(1, math.floor(len(seen) / self.eta))


PRUNERS: dict[str, type[Pruner]] = {"pareto_asha": ParetoHalving, "asha": AccuracyHalving, "none": NoPruning}
"""By the word in the study file (``search.scheduler``)."""
