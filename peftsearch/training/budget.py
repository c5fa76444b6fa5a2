"""How long a trial trains and where it is evaluated; plain arithmetic, shared by the search and the workers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The full budget of every trial in a domain.

    Attributes:
        steps_per_epoch: Optimiser steps per pass over the training split; the last batch of a pass may be smaller.
        evaluation_steps: Steps after which the trial is evaluated, ascending; the last one is the full budget.
    """

    steps_per_epoch: int
    evaluation_steps: tuple[int, ...]

    @classmethod
    def of(cls, examples: int, batch_size: int, epochs: float, evaluations: int) -> Budget:
        """Spread evaluations evenly over ``epochs`` passes over ``examples`` examples."""
        return cls.of_steps(math.ceil(examples / batch_size), epochs, evaluations)

    @classmethod
    def of_steps(cls, steps_per_epoch: int, epochs: float, evaluations: int) -> Budget:
        """Spread evaluations evenly over ``epochs`` passes of so many steps."""
        total = max(1, round(epochs * steps_per_epoch))
        spread = sorted({max(1, round(total * (i + 1) / evaluations)) for i in range(evaluations)})
        return cls(steps_per_epoch, tuple(spread))

    @property
    def total_steps(self) -> int:
        """Steps of the full budget."""
        return self.evaluation_steps[-1]

    def epoch(self, step: int) -> float:
        """Passes over the training split after a step."""
        return step / self.steps_per_epoch


def batch_length(length: int) -> int:
    """What a text counts as where batches are filled up to a number of tokens: its length, or the next one of a grid.

    Texts of one grid point can take each other's place in a batch, which keeps batches random; so the grid is not
    finer than 8, to which a GPU's batches are padded, nor than an eighth of the length's power of two.
    """
    grid = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-max(1, length) // grid) * grid


def batch_sizes(lengths: Iterable[int], batch_size: int, tokens: int, batches: int | None = None) -> list[int]:
    """How many examples each batch of a pass holds, for examples in ascending order of `batch_length`.

    The sizes depend on the lengths alone, not on what is drawn: every pass of every trial has as many steps.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples per batch at most.
        tokens: Padded tokens per batch at most; a longer text has a batch of its own.
        batches: Cut the largest batches further until there are so many, as far as there are examples.
    """
    sizes = [0]
    for length in sorted(map(batch_length, lengths)):
        if sizes[-1] and (sizes[-1] == batch_size or (sizes[-1] + 1) * length > tokens):
            sizes.append(0)
        sizes[-1] += 1
    return sizes if batches is None else _cut_further(sizes, batches)


def tokens_of_a_pass(batch_size: int, tokens_per_batch: int | None, longest: int, parts: int) -> int:
    """Padded tokens of a forward pass, at most.

    Args:
        batch_size: Examples per step at most.
        tokens_per_batch: Padded tokens per step at most, if they are bounded.
        longest: Tokens of the longest text.
        parts: Into how many a step's batch is cut, by texts: over workers, and where gradients are accumulated.
    """
    most = -(-batch_size // parts) * longest
    if tokens_per_batch is None:
        return most
    # Of n texts of one length, n * length <= tokens, a part has n / parts, rounded up to whole texts; one text at least
    # is computed at once.
    return min(most, max(longest, (tokens_per_batch + (parts - 1) * longest) // parts))


def _cut_further(sizes: Sequence[int], batches: int) -> list[int]:
    pieces = [1] * len(sizes)
    # The batch with the largest pieces first.
    heap = [(-size, place) for place, size in enumerate(sizes)]
    heapq.heapify(heap)
    for _ in range(min(batches, sum(sizes)) - len(sizes)):
        _, place = heap[0]
        pieces[place] += 1
        heapq.heapreplace(heap, (-math.ceil(sizes[place] / pieces[place]), place))
    return [
        size * (number + 1) // count - size * number // count
        for size, count in zip(sizes, pieces, strict=True)
        for number in range(count)
    ]
