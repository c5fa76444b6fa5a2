"""Pareto sets against an independent brute force."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peftsearch.search.levels import Levels
from peftsearch.search.pareto import crowding_distance, non_dominated, non_dominated_rank

# Few distinct values, so that ties, duplicates, infinities and NaN meet often.
VALUES = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0, 3.0, math.inf, math.nan])
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
POINTS = st.integers(1, 4).flatmap(
    lambda objectives: arrays(
        np.float64, st.tuples(st.integers(0, 25), st.just(objectives)), elements=st.one_of(VALUES, NUMBERS)
    )
)


def dominates(one: list[float], other: list[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def brute_front(rows: list[list[float]]) -> list[bool]:
    valid = [row for row in rows if not any(math.isnan(value) for value in row)]
    return [
        not any(math.isnan(value) for value in row) and not any(dominates(other, row) for other in valid)
        for row in rows
    ]


def brute_ranks(rows: list[list[float]]) -> list[int]:
    ranks = [-1] * len(rows)
    left = [index for index, row in enumerate(rows) if not any(math.isnan(value) for value in row)]
    rank = 0
    while left:
        front = [i for i in left if not any(dominates(rows[j], rows[i]) for j in left)]
        for i in front:
            ranks[i] = rank
        left = [i for i in left if i not in front]
        rank += 1
    return [max(rank, 1) if value == -1 else value for value in ranks]


def brute_crowding(rows: list[list[float]]) -> list[float]:
    """NSGA-II's crowding-distance-assignment, as in the paper."""
    size = len(rows)
    distance = [0.0] * size
    for objective in range(len(rows[0]) if rows else 0):
        order = sorted(range(size), key=lambda index: rows[index][objective])
        spread = rows[order[-1]][objective] - rows[order[0]][objective]
        distance[order[0]] = distance[order[-1]] = math.inf
        for place in range(1, size - 1):
            if spread > 0:
                gap = rows[order[place + 1]][objective] - rows[order[place - 1]][objective]
                distance[order[place]] += gap / spread
    return distance


@settings(max_examples=500, deadline=None)
@given(POINTS)
def test_front_equals_brute_force(points: np.ndarray) -> None:
    assert non_dominated(points).tolist() == brute_front(points.tolist())


@settings(max_examples=500, deadline=None)
@given(POINTS)
def test_ranks_equal_brute_force(points: np.ndarray) -> None:
    assert non_dominated_rank(points).tolist() == brute_ranks(points.tolist())


@settings(max_examples=300, deadline=None)
@given(POINTS)
def test_rank_zero_is_the_front(points: np.ndarray) -> None:
    assert ((non_dominated_rank(points) == 0) == non_dominated(points)).all()


@settings(max_examples=300, deadline=None)
@given(
    arrays(np.float64, st.tuples(st.integers(0, 20), st.integers(1, 3)), elements=st.floats(-1e6, 1e6, width=32)),
)
def test_crowding_equals_the_paper(points: np.ndarray) -> None:
    np.testing.assert_allclose(crowding_distance(points), brute_crowding(points.tolist()), rtol=1e-12)


def test_crowding_of_known_points() -> None:
    points = [[0.0, 4.0], [1.0, 3.0], [3.0, 1.0], [4.0, 0.0]]
    assert crowding_distance(points).tolist() == [math.inf, 0.75 + 0.75, 0.75 + 0.75, math.inf]
    assert crowding_distance([[1.0, 2.0], [math.nan, 0.0]]).tolist() == [math.inf, 0.0]
    assert crowding_distance([[0.0, 1.0], [1.0, 1.0], [math.inf, 1.0]])[1] == 0.0
    assert crowding_distance(np.empty((0, 2))).tolist() == []


def test_equal_points_stay_together() -> None:
    points = [[1, 2], [1, 2], [2, 1], [2, 2], [math.nan, 0]]
    assert non_dominated(points).tolist() == [True, True, True, False, False]
    assert non_dominated_rank(points).tolist() == [0, 0, 0, 1, 2]
    assert non_dominated_rank([[math.nan, 1.0]]).tolist() == [1]


def test_wrong_shape_is_refused() -> None:
    for function in (non_dominated, non_dominated_rank, crowding_distance):
        with pytest.raises(ValueError, match="shape"):
            function([1.0, 2.0])


@pytest.mark.parametrize("kind", ["random", "all on the front", "three values"])
def test_a_million_points_in_a_second(kind: str) -> None:
    generator = np.random.default_rng(0)
    points = generator.random((1_000_000, 2))
    if kind == "all on the front":
        points[:, 1] = -points[:, 0]
    if kind == "three values":
        points = np.floor(points * 3)
    # Processor time: what else runs on the machine is not what is measured.
    start = time.process_time()
    front = non_dominated(points)
    assert time.process_time() - start < 1.0
    assert front.any()
    assert front.all() == (kind == "all on the front")


def test_points_that_come_one_by_one_end_in_the_fronts_of_all() -> None:
    generator = np.random.default_rng(3)
    points = generator.integers(0, 25, (600, 2)).astype(float)
    levels = Levels()
    for index, (x, y) in enumerate(points.tolist()):
        rank = levels.add(x, y, index)
        assert rank == non_dominated_rank(points[: index + 1])[-1]
    expected = non_dominated_rank(points)
    found = {
        member: rank for rank in range(expected.max() + 1) for *_, members in levels.steps(rank) for member in members
    }
    assert [found[index] for index in range(len(points))] == expected.tolist()
    assert [levels.size(rank) for rank in range(3)] == np.bincount(expected)[:3].tolist()
    assert levels.before(3) == np.bincount(expected)[:3].sum()
