"""How long a trial trains and where it is evaluated; plain arithmetic, shared by the search and the workers."""

from __future__ import annotations

import math
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
        steps_per_epoch = math.ceil(examples / batch_size)
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
