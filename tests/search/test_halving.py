"""Who goes on at a rung."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from peftsearch.search.halving import PRUNERS, AccuracyHalving, Candidate, ParetoHalving, Pruner, rung_evaluations
from peftsearch.search.pareto import crowding_distance, non_dominated_rank


def pruner(kind: str, evaluations: int = 9, eta: float = 3.0) -> Pruner:
    return PRUNERS[kind](evaluations, eta, 1, "maximize")


def candidate(number: int, value: float, parameters: int = 100, *, loss: float = 1.0, cell: str = "a") -> Candidate:
    return Candidate(number, cell, value, loss, parameters)


@pytest.mark.parametrize(
    ("evaluations", "eta", "grace", "rungs"),
    [(9, 3.0, 1, (1, 3)), (10, 3.0, 1, (1, 3, 9)), (9, 2.0, 2, (2, 4, 8)), (1, 3.0, 1, ()), (4, 1.3, 1, (1, 2, 3))],
)
def test_rungs_never_include_the_full_budget(evaluations: int, eta: float, grace: int, rungs: tuple[int, ...]) -> None:
    assert rung_evaluations(evaluations, eta, grace) == rungs


def test_without_pruning_everything_goes_on() -> None:
    none = pruner("none")
    assert all(none.goes_on(1, candidate(n, -n)) for n in range(20))


def test_accuracy_halving_lets_the_top_third_go_on() -> None:
    asha = pruner("asha")
    for number in range(9):
        asha.record(1, candidate(number, number / 10))
    assert asha.goes_on(1, candidate(9, 0.75))
    assert not asha.goes_on(1, candidate(10, 0.45))


def test_between_rungs_nothing_is_decided() -> None:
    asha = pruner("asha")
    asha.record(1, candidate(0, 1.0))
    assert asha.goes_on(2, candidate(1, 0.0))
    assert not asha.goes_on(1, candidate(1, 0.0))


@pytest.mark.parametrize("kind", ["asha", "pareto_asha"])
def test_equal_metrics_are_told_apart_by_loss(kind: str) -> None:
    """Early on, every trial sits at the majority class: Ray's ASHA stops none of them then."""
    chosen = pruner(kind)
    going = [chosen.goes_on(1, candidate(n, 0.33, loss=2.0 + n / 10)) for n in range(9)]
    assert going[0]
    assert sum(going) <= 3


def test_a_cheap_trial_on_the_front_goes_on_where_accuracy_alone_would_stop_it() -> None:
    def fill(chosen: Pruner) -> bool:
        for number in range(8):
            chosen.record(1, candidate(number, 0.8 + number / 100, 10_000 + number, cell="b"))
        return chosen.goes_on(1, candidate(8, 0.7, 50, cell="a")) and chosen.goes_on(
            1, candidate(9, 0.69, 49, cell="a")
        )

    assert fill(ParetoHalving(9, 3.0, 1, "maximize"))
    assert not fill(AccuracyHalving(9, 3.0, 1, "maximize"))


def test_a_dominated_trial_stops() -> None:
    pareto = pruner("pareto_asha")
    for number in range(6):
        pareto.record(1, candidate(number, 0.8 + number / 100, 100 + number))
    assert not pareto.goes_on(1, candidate(6, 0.5, 1000))


def test_the_best_of_each_cell_goes_on() -> None:
    pareto = pruner("pareto_asha")
    for number in range(9):
        pareto.record(1, candidate(number, 0.9, 10, loss=number, cell="strong"))
    assert pareto.goes_on(1, candidate(9, 0.2, 1_000_000, cell="weak"))
    assert not pareto.goes_on(1, candidate(10, 0.1, 1_000_000, cell="weak"))
    assert pareto.goes_on(1, candidate(11, 0.3, 1_000_000, cell="weak"))


def test_a_leader_that_fails_gives_its_place_to_the_next_of_its_cell() -> None:
    pareto = pruner("pareto_asha")
    for number in range(9):
        pareto.record(1, candidate(number, 0.9, 10, loss=number, cell="strong"))
    assert pareto.goes_on(1, candidate(9, 0.3, 1_000_000, cell="weak"))
    assert not pareto.goes_on(1, candidate(10, 0.2, 1_000_000, cell="weak"))
    pareto.failed("weak", 9)
    assert pareto.goes_on(1, candidate(11, 0.2, 1_000_000, cell="weak"))
    assert not pareto.goes_on(1, candidate(12, 0.1, 1_000_000, cell="weak"))
    # Of which nothing was seen.
    pareto.failed("weak", 99)
    pareto.failed("new", 100)


def test_minimised_metrics_rank_the_other_way() -> None:
    asha = PRUNERS["asha"](9, 3.0, 1, "minimize")
    for number in range(9):
        asha.record(1, candidate(number, number / 10))
    assert asha.goes_on(1, candidate(9, 0.05))
    assert not asha.goes_on(1, candidate(10, 0.75))


def test_about_a_third_goes_on_in_the_long_run() -> None:
    generator = random.Random(0)
    pareto = pruner("pareto_asha")
    going = [
        pareto.goes_on(1, candidate(n, generator.random(), generator.randint(1, 10**6), cell=str(n % 4)))
        for n in range(400)
    ]
    assert 0.3 < sum(going) / len(going) < 0.45


def test_what_was_recorded_before_an_interruption_counts() -> None:
    trials = [candidate(n, random.Random(n).random(), random.Random(-n).randint(1, 999)) for n in range(30)]
    whole = pruner("pareto_asha")
    decided = [whole.goes_on(1, item) for item in trials]
    resumed = pruner("pareto_asha")
    for item in trials[:15]:
        resumed.record(1, item)
    assert [resumed.goes_on(1, item) for item in trials[15:]] == decided[15:]


def promoted_by_sorting_anew(seen: list[Candidate], eta: float) -> bool:
    """What `ParetoHalving` is defined as: everything that the rung has seen, sorted from the start, for the latest."""
    latest = seen[-1]
    qualities = [(-other.value, other.loss) for other in seen]
    if all(
        qualities[-1] <= quality for other, quality in zip(seen, qualities, strict=True) if other.cell == latest.cell
    ):
        return True
    place = {quality: float(index) for index, quality in enumerate(sorted(set(qualities)))}
    points = np.array([(place[q], math.log(other.parameters)) for q, other in zip(qualities, seen, strict=True)])
    ranks = non_dominated_rank(points)
    peers = np.flatnonzero(ranks == ranks[-1])
    room = crowding_distance(points[peers])
    earlier = sum(
        room[i] > room[-1] or (room[i] == room[-1] and seen[peer].number < latest.number)
        for i, peer in enumerate(peers.tolist())
    )
    return int((ranks < ranks[-1]).sum()) + int(earlier) < max(1, math.floor(len(seen) / eta))


@pytest.mark.parametrize("values", [7, 10**6])
@pytest.mark.parametrize("eta", [1.5, 3.0])
def test_sorting_as_trials_come_decides_like_sorting_anew(values: int, eta: float) -> None:
    generator = random.Random(values)
    pareto = pruner("pareto_asha", eta=eta)
    seen: list[Candidate] = []
    numbers = random.Random(1).sample(range(400), 400)
    decided = []
    for number in numbers:
        size = generator.randint(1, 12) * 50
        value = generator.randrange(values) / values * math.log(size)
        loss = generator.randrange(3) / 2
        seen.append(candidate(number, value, size, loss=loss, cell=str(number % 3)))
        decided.append(pareto.goes_on(1, seen[-1]))
        assert decided[-1] == promoted_by_sorting_anew(seen, eta), len(seen)
    assert 20 < sum(decided) < 380


def test_a_metric_that_is_no_number_is_the_worst() -> None:
    pareto = pruner("pareto_asha")
    for number in range(6):
        pareto.record(1, candidate(number, 0.5 + number / 100, 100 + number))
    assert not pareto.goes_on(1, candidate(6, math.nan, 1000))
    assert pareto.goes_on(1, candidate(7, 0.9, 1000))


@pytest.mark.parametrize("kind", ["asha", "pareto_asha"])
def test_a_decision_among_thousands_compares_few(kind: str) -> None:
    """Counted, not timed: how often two metrics are compared."""
    compared = 0

    class Counted(float):
        def __lt__(self, other: float) -> bool:
            nonlocal compared
            compared += 1
            return float(self) < float(other)

        def __neg__(self) -> Counted:
            return Counted(-float(self))

        def __rmul__(self, other: float) -> Counted:
            return Counted(other * float(self))

    generator = random.Random(5)
    chosen = pruner(kind)
    counts = []
    for number in range(4000):
        before = compared
        size = generator.randint(1, 10**6)
        chosen.goes_on(1, candidate(number, Counted(generator.random()), size, cell=str(number % 4)))
        counts.append(compared - before)
    first, last = sum(counts[400:800]) / 400, sum(counts[-400:]) / 400
    assert first > 0
    assert last < 4 * first
    assert last < 2000
