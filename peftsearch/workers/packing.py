"""Which of the waiting segments a slot gets that trains several trials at once; plain arithmetic over a queue."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

PATIENCE_SECONDS = 30.0
"""Work that has waited so long goes first: whoever trains other trials takes on no more of those, until it is done."""

Key = Callable[[Any], Hashable | None]


@dataclass
class Sizes:
    """How many trials of a kind a slot trains at once.

    Args:
        key: Equal for trials that can be trained together; None for work that is done alone.
        wanted: As the study file says; auto is 1 until a slot has measured it.
    """

    key: Key = lambda _: None
    wanted: int | Literal["auto"] = 1
    found: dict[Hashable, int] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether every slot trains one trial at a time, in every case."""
        return self.wanted == 1

    def of(self, key: Hashable | None) -> int:
        """Trials of this kind at once; 0 where that is to be measured."""
        if key is None or self.wanted == 1:
            return 1
        return self.found.get(key, 0 if self.wanted == "auto" else self.wanted)

    def largest(self) -> int:
        """How many trials a slot trains at once at most, as far as is known: so many are proposed for each slot."""
        if self.wanted == "auto":
            return max(self.found.values(), default=1)
        return self.wanted


@dataclass(frozen=True)
class Waiting:
    """A segment in the queue.

    Attributes:
        job: What the queue knows it by.
        key: See `Sizes`.
        held: Whether the asking slot has the trial in memory.
        seconds: How long it has waited.
    """

    job: Any
    key: Hashable | None
    held: bool
    seconds: float


@dataclass(frozen=True)
class Others:
    """The other warm slots: how many have nothing to do, and by kind how many segments each of the rest trains."""

    idle: int = 0
    at_work: tuple[tuple[Hashable | None, int], ...] = ()


def choose(
    waiting: Sequence[Waiting], key: Hashable | None, in_hand: int, sizes: Sizes, others: Others
) -> list[Waiting]:
    """What a slot gets.

    A slot with work takes on more of the same kind, up to its size, unless other work has waited for long. A slot
    without takes what has waited for long, or else the kind of which most waits. Where other slots have room for the
    kind, each gets its share. Of one kind, trials whose state is in the slot's memory go first.

    Args:
        waiting: Oldest first; nothing that another free slot is about to ask for.
        key: Kind of the work in hand.
        in_hand: How many segments that is.
        sizes: How many at once.
        others: The other slots.
    """
    if in_hand:
        if key is None or any(item.key != key and item.seconds > PATIENCE_SECONDS for item in waiting):
            return []
        group = [item for item in waiting if item.key == key]
    else:
        group = _group(waiting)
    if not group:
        return []
    key = group[0].key
    if key is None or sizes.of(key) <= 1:
        return [] if in_hand else _held_first(group)[:1]
    shared = [count for kind, count in others.at_work if kind == key]
    slots = 1 + others.idle + len(shared)
    share = -(-(in_hand + sum(shared) + len(group)) // slots)
    room = min(sizes.of(key), max(share, 0 if in_hand else 1)) - in_hand
    return _held_first(group)[: max(0, room)]


def _group(waiting: Sequence[Waiting]) -> list[Waiting]:
    """The segments of one kind that a free slot turns to."""
    if not waiting:
        return []
    groups: dict[Hashable, list[Waiting]] = {}
    for number, item in enumerate(waiting):
        groups.setdefault(("alone", number) if item.key is None else ("together", item.key), []).append(item)
    if waiting[0].seconds > PATIENCE_SECONDS:
        return next(iter(groups.values()))
    return max(groups.values(), key=lambda group: (len(group), any(item.held for item in group)))


def _held_first(group: Sequence[Waiting]) -> list[Waiting]:
    return sorted(group, key=lambda item: not item.held)
