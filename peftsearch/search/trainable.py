"""The Tune trainable: asks the dispatcher for one segment after another. No torch, no CPU, reused for every trial."""

from __future__ import annotations

from typing import Any

from ray import tune

from peftsearch.training.budget import Budget
from peftsearch.training.segment import Failure, Segment, SegmentResult, TrialPlan

RESULT = "segment"
FAILED = "failed"
BROKEN = "broken"
RETRIES = "retries"
FINAL = "final"


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """One trial as Ray Tune sees it; the training itself happens in a slot.

    Its config holds ``plan`` (`TrialPlan`), ``budget`` (`Budget`), ``done`` (evaluations that an interrupted run has
    recorded already) and ``dispatcher`` (handle of the actor).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Called by Tune for a new actor."""
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called by Tune to run another trial in this process."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._plan: TrialPlan = config["plan"]
        self._budget: Budget = config["budget"]
        self._evaluation: int = config["done"]
        self._dispatcher = config["dispatcher"]

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation."""
        import ray

        steps = self._budget.evaluation_steps
        last = self._evaluation == len(steps) - 1
        answered = steps[self._evaluation - 1] if self._evaluation else 0
        segment = Segment(self._plan, steps[self._evaluation], last, answered=answered)
        outcome, retries = ray.get(self._dispatcher.submit.remote(segment))
        if isinstance(outcome, Failure):
            # Not an exception: Tune would throw this process away, and the trial's fault is not the process's.
            kind = BROKEN if outcome.of_study else FAILED
            return {kind: outcome.error, RETRIES: retries, FINAL: True, "done": True}
        assert isinstance(outcome, SegmentResult)
        self._evaluation += 1
        final = last or outcome.stopped
        return {RESULT: outcome, RETRIES: retries, FINAL: final, "done": final}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the slots keep the trial's state in the study's storage."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, see `save_checkpoint`."""
