"""Non-dominated sorting of two objectives, one point after another: nothing that was sorted before is sorted again."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Front:
    """A staircase: by rising first objective, along which the second falls; equal points are one step.

    Attributes:
        first: First objectives, ascending.
        negated: The second objectives' negatives, ascending, so that both can be bisected.
        members: Who stands on each step.
        size: Members of all steps.
    """

    first: list[Any] = field(default_factory=list)
    negated: list[float] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    size: int = 0

    def dominates(self, x: Any, y: float) -> bool:
        """Whether a step dominates the point; an equal one does not."""
        place = bisect_right(self.first, x) - 1
        return place >= 0 and -self.negated[place] <= y and (self.first[place], -self.negated[place]) != (x, y)

    def put(self, steps: _Front) -> _Front:
        """Take in neighbouring steps that none of this front dominates; returns those that they dominate."""
        begin = bisect_left(self.first, steps.first[0])
        end = max(begin, bisect_right(self.negated, steps.negated[-1]))
        place = slice(begin, end)
        out = _Front(self.first[place], self.negated[place], self.members[place])
        out.size = sum(map(len, out.members))
        self.first[place], self.negated[place], self.members[place] = steps.first, steps.negated, steps.members
        self.size += steps.size - out.size
        return out


class Levels:
    """The fronts of a growing set of points, both objectives minimised: front 0 is the Pareto front, front 1 that of
    the rest, and so on; equal points stand in the same front.

    A new point finds its front by bisection, and pushes what it dominates there into the next front, which is one run
    of neighbours, and so on (Buzdalov, Yakupov and Stankevich 2015, "Fast Implementation of the Steady-State NSGA-II
    Algorithm for Two Dimensions Based on Incremental Non-Dominated Sorting"). That takes O(fronts * log n) comparisons,
    where sorting anew takes O(n log n).
    """

    def __init__(self) -> None:
        self._fronts: list[_Front] = []

    def add(self, x: Any, y: float, member: int) -> int:
        """Put a point in; returns the number of its front.

        Args:
            x: First objective: anything that can be ordered, and no NaN.
            y: Second objective, no NaN.
            member: Tells the point from others.
        """
        rank = bisect_left(self._fronts, True, key=lambda front: not front.dominates(x, y))
        if rank < len(self._fronts):
            front = self._fronts[rank]
            place = bisect_left(front.first, x)
            if place < len(front.first) and (front.first[place], -front.negated[place]) == (x, y):
                front.members[place].append(member)
                front.size += 1
                return rank
        moving, into = _Front([x], [-y], [[member]], 1), rank
        while moving.size:
            if into == len(self._fronts):
                self._fronts.append(moving)
                break
            moving, into = self._fronts[into].put(moving), into + 1
        return rank

    def before(self, rank: int) -> int:
        """Members of all fronts before one."""
        return sum(front.size for front in self._fronts[:rank])

    def size(self, rank: int) -> int:
        """Members of a front."""
        return self._fronts[rank].size

    def steps(self, rank: int) -> Iterator[tuple[Any, float, list[int]]]:
        """The different points of a front, by rising first objective, and the members at each."""
        front = self._fronts[rank]
        for x, negated, members in zip(front.first, front.negated, front.members, strict=True):
            yield x, -negated, members
