"""Pareto sets: who is dominated, in which front one stands, and how much room one has there.

Every objective is minimised; negate what is to be maximised. A point dominates another if it is nowhere worse and
somewhere better, so equal points never dominate each other.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point dominates; exact.

    Sorting decides two objectives in O(n log n) (Kung, Luccio and Preparata 1975, "On Finding the Maxima of a Set of
    Vectors"); with more, each point of the front is compared with what is left, O(n * front).

    Args:
        points: Shape (n, objectives). A row with a NaN is never on the front, and dominates nothing.

    Returns:
        Shape (n,). Of equal points on the front, all are marked.

    Raises:
        ValueError: The points are not a two-dimensional array.
    """
    array = _checked(points)
    mask = np.zeros(len(array), dtype=np.bool_)
    valid = np.flatnonzero(~np.isnan(array).any(axis=1))
    if len(valid) == 0:
        return mask
    order, unique, run = _distinct(array[valid])
    on_front = _front_of_two(unique) if unique.shape[1] == 2 else _front_of_many(unique)
    mask[valid[order]] = on_front[run]
    return mask


def non_dominated_rank(points: ArrayLike) -> NDArray[np.intp]:
    """The number of the front in which each point stands: 0 for the Pareto front, 1 for the front of the rest, ...

    The fast non-dominated sorting of NSGA-II (Deb et al. 2002), for two objectives in O(n log n) (Jensen 2003,
    "Reducing the Run-Time Complexity of Multiobjective EAs").

    Args:
        points: Shape (n, objectives). Rows with a NaN form a front of their own behind all others, never front 0.

    Returns:
        Shape (n,). Equal points have equal ranks.

    Raises:
        ValueError: The points are not a two-dimensional array.
    """
    array = _checked(points)
    nan = np.isnan(array).any(axis=1)
    ranks = np.zeros(len(array), dtype=np.intp)
    valid = np.flatnonzero(~nan)
    if len(valid):
        order, unique, run = _distinct(array[valid])
        ranks[valid[order]] = (_ranks_of_two(unique) if unique.shape[1] == 2 else _ranks_of_many(unique))[run]
    ranks[nan] = ranks[valid].max() + 1 if len(valid) else 1
    return ranks


def crowding_distance(points: ArrayLike) -> NDArray[np.float64]:
    """How much room each point has among points of one front (Deb et al. 2002, "A Fast and Elitist Multiobjective
    Genetic Algorithm: NSGA-II", section III-B): the sum over objectives of the distance between its two neighbours,
    divided by the objective's range.

    Args:
        points: Shape (n, objectives), usually one front.

    Returns:
        Shape (n,). Infinite at both ends of every objective (of equal points at an end, one is the end), 0 for rows
        with a NaN. An objective with one value only, or with infinite values, adds nothing in between.

    Raises:
        ValueError: The points are not a two-dimensional array.
    """
    array = _checked(points)
    distance = np.zeros(len(array))
    valid = np.flatnonzero(~np.isnan(array).any(axis=1))
    if len(valid) == 0:
        return distance
    inner = np.zeros(len(valid))
    for column in array[valid].T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        with np.errstate(over="ignore", invalid="ignore"):
            spread = ordered[-1] - ordered[0]
        if np.isfinite(spread) and spread > 0:
            inner[order[1:-1]] += (ordered[2:] - ordered[:-2]) / spread
        inner[order[[0, -1]]] = np.inf
    distance[valid] = inner
    return distance


def _checked(points: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(points, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"points must have the shape (n, objectives), not {array.shape}")
    return array


def _distinct(array: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.intp]]:
    """The order by first, then second, ... objective; the distinct rows in it; and each ordered row's distinct row.

    In this order a point can be dominated by earlier ones only.
    """
    order: NDArray[np.intp] = np.lexsort(array.T[::-1]) if array.shape[1] else np.arange(len(array), dtype=np.intp)
    ordered = array[order]
    first = np.ones(len(array), dtype=np.bool_)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order, ordered[first], np.cumsum(first, dtype=np.intp) - 1


def _front_of_two(unique: NDArray[np.float64]) -> NDArray[np.bool_]:
    second = unique[:, 1]
    on_front = np.ones(len(unique), dtype=np.bool_)
    on_front[1:] = second[1:] < np.minimum.accumulate(second)[:-1]
    return on_front


def _front_of_many(unique: NDArray[np.float64]) -> NDArray[np.bool_]:
    on_front = np.zeros(len(unique), dtype=np.bool_)
    left: NDArray[Any] = np.arange(len(unique))
    while len(left):
        on_front[left[0]] = True
        # All rows differ, so a row that is nowhere better than the first is dominated by it.
        better = (unique[left[1:]] < unique[left[0]]).any(axis=1)
        left = left[1:][better]
    return on_front


def _ranks_of_two(unique: NDArray[np.float64]) -> NDArray[np.intp]:
    # lowest[i] is the smallest second objective in front i so far; it never falls from one front to the next.
    lowest: list[float] = []
    ranks = np.empty(len(unique), dtype=np.intp)
    for index, second in enumerate(unique[:, 1].tolist()):
        rank = bisect_right(lowest, second)
        if rank == len(lowest):
            lowest.append(second)
        else:
            lowest[rank] = second
        ranks[index] = rank
    return ranks


def _ranks_of_many(unique: NDArray[np.float64]) -> NDArray[np.intp]:
    ranks = np.zeros(len(unique), dtype=np.intp)
    left: NDArray[Any] = np.arange(len(unique))
    rank = 0
    while len(left):
        front = _front_of_many(unique[left])
        ranks[left[front]] = rank
        left = left[~front]
        rank += 1
    return ranks
