"""Which examples a step trains on: a function of seed and step alone, so that any worker can take a trial over."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_WINDOW = 16
"""Batches among which texts are sorted by length: enough to save most of the padding, few enough to stay random."""


class DataOrder:
    """Shuffled batches of texts of similar length, dealt anew for every pass.

    A pass is a random permutation, cut into windows of a few batches; within a window texts are sorted by length, so
    that a batch holds little padding, and the batches of the whole pass are then shuffled.

    Args:
        lengths: Tokens of each example of the training split.
        batch_size: Examples per step; one batch of a pass may be smaller.
        seed: The trial's seed.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batch(self, step: int) -> list[int]:
        """Row numbers of step ``step`` (from 0)."""
        epoch, position = divmod(step, -(-len(self.lengths) // self.batch_size))
        if epoch != self._epoch:
            self._batches = self._deal(epoch)
            self._epoch = epoch
        return self._batches[position]

    def _deal(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = _WINDOW * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(rows), window):
            alike = sorted(rows[start : start + window], key=lambda row: self.lengths[row])
            batches += [alike[first : first + self.batch_size] for first in range(0, len(alike), self.batch_size)]
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[index] for index in order]
