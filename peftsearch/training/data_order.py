"""Which examples a step trains on: a function of seed and step alone, so that any worker can take a trial over."""

from __future__ import annotations

import torch


class DataOrder:
    """Shuffled batches, a new permutation for every pass.

    Args:
        examples: Size of the training split.
        batch_size: Examples per step; the last batch of a pass may be smaller.
        seed: The trial's seed.
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def batch(self, step: int) -> list[int]:
        """Row numbers of step ``step`` (from 0)."""
        steps_per_epoch = -(-self.examples // self.batch_size)
        epoch, position = divmod(step, steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._permutation = torch.randperm(self.examples, generator=generator).tolist()
            self._epoch = epoch
        return self._permutation[position * self.batch_size : (position + 1) * self.batch_size]
