"""Which examples a step trains on: a function of seed and step alone, so that any worker can take a trial over."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from peftsearch.training.budget import batch_length, batch_sizes

_WINDOW = 64
"""Batches at most among which texts are sorted by length: with so many, padding is 2 to 3% of the tokens, with a
quarter of them 6 to 11% (texts with log-normal lengths)."""

_WINDOWS, _LEAST = 4, 16
"""Windows in a pass, so that a text has other neighbours in the next one; but for passes in which they would hold fewer
than so many batches, and little would be saved."""


class DataOrder:
    """Shuffled batches of texts of similar length, dealt anew for every pass.

    A pass is a random permutation, cut into windows of a few batches; within a window texts are sorted by length, so
    that a batch holds little padding, and the batches of the whole pass are then shuffled.

    With a limit on tokens a pass is sorted whole, by length on a grid (`batch_length`): texts of one grid point are in
    random order, the batches are filled up to the limit, and then shuffled.

    Args:
        lengths: Tokens of each example of the training split.
        batch_size: Examples per step; one batch of a pass may be smaller.
        seed: The trial's seed.
        tokens: Padded tokens per batch at most.
        steps_per_epoch: Batches per pass where ``tokens`` is given, at least as many as the limit makes: models have
            tokenizers, and so lengths, of their own, and a domain's trials have equally many steps on all of them.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        tokens: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self._sizes = None if tokens is None else batch_sizes(lengths, batch_size, tokens, steps_per_epoch)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batch(self, step: int) -> list[int]:
        """Row numbers of step ``step`` (from 0)."""
        count = -(-len(self.lengths) // self.batch_size) if self._sizes is None else len(self._sizes)
        epoch, position = divmod(step, count)
        if epoch != self._epoch:
            self._batches = self._deal(epoch)
            self._epoch = epoch
        return self._batches[position]

    def _deal(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches = self._by_count(rows) if self._sizes is None else self._by_tokens(rows, self._sizes)
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[index] for index in order]

    def _by_count(self, rows: list[int]) -> list[list[int]]:
        count = -(-len(rows) // self.batch_size)
        window = min(_WINDOW, max(_LEAST, count // _WINDOWS)) * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(rows), window):
            alike = sorted(rows[start : start + window], key=lambda row: self.lengths[row])
            batches += [alike[first : first + self.batch_size] for first in range(0, len(alike), self.batch_size)]
        return batches

    def _by_tokens(self, rows: list[int], sizes: Sequence[int]) -> list[list[int]]:
        alike = iter(sorted(rows, key=lambda row: batch_length(self.lengths[row])))
        return [list(islice(alike, size)) for size in sizes]
