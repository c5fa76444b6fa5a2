"""Confirmation: the finalists are trained again with further seeds, and only then is the test split read.

Once per re-trained model: a reading is in the ledger the moment it arrives and is never asked for again; where a driver
died before it arrived, the slot answers from what it wrote beside the model instead of reading again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from peftsearch.files import Place
from peftsearch.search.run import DomainSearch, Observer
from peftsearch.spec import Reading, TrialRecord
from peftsearch.training.checkpoint import discard_weights, trial_folder
from peftsearch.training.segment import Failure, Outcome, Segment, SegmentResult, TrialPlan


class ReadingLedger(Protocol):
    """What confirmation needs of the ledger."""

    def add_reading(self, number: int, reading: Reading) -> TrialRecord: ...
    def fail_confirmation(self, number: int, seed: int, error: str) -> None: ...
    def failed_confirmations(self, number: int) -> Mapping[int, str]: ...
    def set_confirming(self, number: int, seed: int, progress: Mapping[str, Any]) -> None: ...
    def confirming(self, number: int, seed: int) -> Mapping[str, Any]: ...


class Confirmations:
    """Every finalist with every seed: what is to be trained next, and what was found.

    Args:
        finalists: COMPLETE trials.
        seeds: Seeds to train each of them with; none is the seed of the search.
        domains: Metric and budgets by domain.
        ledger: The study's ledger; what it holds already is not done again.
        folder: The study's folder.
        observers: Told of a trial whenever it has one more reading.
        warn: Told, in a sentence, of a re-training that could not go on.
    """

    def __init__(
        self,
        finalists: Sequence[TrialRecord],
        seeds: Sequence[int],
        domains: Mapping[str, DomainSearch],
        ledger: ReadingLedger,
        folder: Place,
        observers: Sequence[Observer] = (),
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.planned = len(finalists) * len(seeds)
        self.done = 0
        self.failed = 0
        self._domains = domains
        self._ledger = ledger
        self._folder = folder
        self._observers = observers
        self._warn = warn
        self._waiting: list[TrialPlan] = []
        # Seeds outermost: a study that is stopped half-way has a reading of every finalist first.
        for seed in seeds:
            for record in finalists:
                plan = TrialPlan(
                    record.number,
                    record.model,
                    record.domain,
                    record.method,
                    dict(record.hyperparameters),
                    seed,
                    confirmation=True,
                )
                read = {reading.seed for reading in record.confirmed.readings} if record.confirmed else set()
                if seed in read:
                    self.done += 1
                    self._discard_weights(plan)
                elif seed in ledger.failed_confirmations(record.number):
                    self.failed += 1
                else:
                    self._waiting.append(plan)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.done + self.failed == self.planned

    def next(self) -> Segment | None:
        """The first segment (or the next one, after an interruption) of another re-training; None at the end."""
        return self._segment(self._waiting.pop(0)) if self._waiting else None

    def answered(self, segment: Segment, outcome: Outcome) -> Segment | None:
        """Record a segment's outcome; returns the re-training's next segment, or None where it has ended.

        Raises:
            RuntimeError: No trial can go on, and none is to blame.
        """
        plan = segment.trial
        if isinstance(outcome, Failure) and outcome.of_study:
            raise RuntimeError(outcome.error)
        if isinstance(outcome, Failure):
            self._ledger.fail_confirmation(plan.number, plan.seed, outcome.error)
            self.failed += 1
            self._discard_weights(plan)
            self._warn(
                f"trial {plan.number} ({plan.method}, {plan.domain}) could not be confirmed with seed {plan.seed}: "
                f"{outcome.error}"
            )
            return None
        assert isinstance(outcome, SegmentResult)
        before = self._ledger.confirming(plan.number, plan.seed)
        seconds = {
            "train_seconds": before.get("train_seconds", 0.0) + outcome.train_seconds,
            "evaluation_seconds": before.get("evaluation_seconds", 0.0) + outcome.evaluation_seconds,
        }
        if not (segment.final or outcome.stopped):
            self._ledger.set_confirming(plan.number, plan.seed, {"step": outcome.step, **seconds})
            return self._segment(plan)
        record = self._ledger.add_reading(plan.number, self._reading(plan, outcome, seconds))
        self.done += 1
        self._discard_weights(plan)
        for observer in self._observers:
            observer.trial_changed(record)
        return None

    def _segment(self, plan: TrialPlan) -> Segment:
        steps = self._domains[plan.domain].budgets[plan.method].evaluation_steps
        done = self._ledger.confirming(plan.number, plan.seed).get("step", 0)
        following = next(step for step in steps if step > done)
        # The test split is read after the last step, and with early stopping any step may turn out to be the last.
        return Segment(plan, following, final=following == steps[-1], read_test=True, answered=done)

    def _reading(self, plan: TrialPlan, result: SegmentResult, seconds: Mapping[str, float]) -> Reading:
        metric = self._domains[plan.domain].metric
        reading = Reading(
            seed=plan.seed,
            value=result.scores[metric],
            loss=result.loss,
            steps=result.step,
            peak_memory_bytes=result.peak_memory_bytes,
            train_seconds=seconds["train_seconds"],
            evaluation_seconds=seconds["evaluation_seconds"],
        )
        test = result.test
        if test is None:
            return reading
        return reading.model_copy(
            update={
                "test": test.scores[metric],
                "test_loss": test.loss,
                "test_scores": test.scores,
                "test_examples": test.examples,
                "read_at": test.read_at,
                "predictions": test.predictions,
                "examples_per_second": test.examples / test.seconds if test.seconds > 0 else None,
            }
        )

    def _discard_weights(self, plan: TrialPlan) -> None:
        """The original trial's weights are the ones to export; of this one the predictions are kept."""
        # Those that are left over where the storage cannot be reached now cost room and nothing else.
        with contextlib.suppress(OSError):
            discard_weights(trial_folder(self._folder, plan.key))
