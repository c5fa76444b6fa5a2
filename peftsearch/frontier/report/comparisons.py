"""One domain's methods held against the best of them: what is noise, and what is the cheapest within it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftsearch.files import Place
from peftsearch.frontier.front import complete, fall_apart, seed_noise
from peftsearch.frontier.report.additive import Score
from peftsearch.frontier.report.results import Result, better, ranked, tested
from peftsearch.frontier.report.significance import (
    Comparison,
    Predicted,
    compare,
    holm,
    read_predictions,
)
from peftsearch.spec import DomainFacts, StudyError, TrialRecord

LEVEL = 0.05
_PATIENCE = 15.0
"""Seconds for trials that do not stand for their method."""


@dataclass(frozen=True)
class Other:
    """A method that is not the best.

    Attributes:
        result: What stands for it.
        comparison: Of the best with it; None where there can be none.
        why_not: Why there is none.
        within_noise: Whether the difference may be chance; None where that cannot be said.
    """

    result: Result
    comparison: Comparison | None
    why_not: str | None
    within_noise: bool | None


@dataclass(frozen=True)
class Cheapest:
    """The confirmed trial with fewest trainable parameters whose difference to the best is within the noise; none whose
    seeds are all worse than the best one's (`peftsearch.frontier.front.fall_apart`)."""

    record: TrialRecord


@dataclass(frozen=True)
class DomainComparison:
    """A domain's methods against the best of them.

    Attributes:
        best: By mean on the test split; by the validation split where nothing is confirmed; None without results.
        others: The other methods that have a result, best first; unconfirmed ones last.
        cheapest: None where noise cannot be told.
    """

    best: Result | None
    others: tuple[Other, ...]
    cheapest: Cheapest | None


def compare_domain(
    found: Sequence[Result], facts: DomainFacts, folder: Place, options: Mapping[str, Any] | None = None
) -> DomainComparison:
    """Compare the methods of one domain, by the predictions of their confirmations.

    Args:
        found: One result for each model and method.
        facts: The domain.
        folder: The study's folder.
        options: Of the domain's task.
    """
    order = ranked(found)
    if not order:
        return DomainComparison(None, (), None)
    best = order[0]
    rest = order[1:] + [result for result in found if result.chosen and result not in order]
    if not best.test or best.chosen is None:
        # Of a domain without a test split, seeds alone tell on validation.
        others = [
            Other(result, None, "no test split" if result.seeds else "not confirmed", _by_seeds(best, result))
            for result in rest
        ]
        return DomainComparison(best, tuple(others), None)
    answers = _Answers(facts, folder, options)
    compared, why_not = answers.compare(best.chosen, [result.chosen for result in rest if result.chosen])
    # The best was found by the scores that are compared now: any two of the methods might have been held together.
    pairs = len(order) * (len(order) - 1) // 2
    corrected = holm({number: comparison.p for number, comparison in compared.items()}, pairs)
    others = []
    for result in rest:
        assert result.chosen is not None
        number = result.chosen.number
        comparison = compared.get(number)
        if comparison is not None:
            comparison = dataclasses.replace(comparison, adjusted=corrected[number])
        noise = within_noise(best.chosen, result.chosen, facts, comparison)
        others.append(Other(result, comparison, why_not.get(number), noise))
    return DomainComparison(best, tuple(others), _cheapest(best.chosen, found, others, answers))


def within_noise(
    best: TrialRecord, other: TrialRecord, facts: DomainFacts, comparison: Comparison | None
) -> bool | None:
    """Whether the difference of two confirmed trials on the test split may be chance.

    It may where it is smaller than its error bars over the seeds (`seed_noise`), or where the paired bootstrap over the
    test examples gives a (corrected) p of at least 0.05. None where there is neither.
    """
    one, two = tested(best), tested(other)
    if one is None or two is None:
        return None
    several = one[2] > 1 or two[2] > 1
    if several and better(one[0], two[0], facts.direction) <= seed_noise(one, two):
        return True
    if comparison is not None:
        return (comparison.p if comparison.adjusted is None else comparison.adjusted) >= LEVEL
    return False if several else None


def _by_seeds(best: Result, other: Result) -> bool | None:
    """Whether a difference on the validation split is within the error bars of several seeds each."""
    if best.test or other.test or best.seeds < 2 or other.seeds < 2:
        return None
    assert best.validation is not None
    assert other.validation is not None
    difference = better(best.validation[0], other.validation[0], best.direction)
    return difference <= seed_noise(best.validation, other.validation)


class _Answers:
    """What the confirmed trials of a domain answered on the test split, read and scored once."""

    def __init__(self, facts: DomainFacts, folder: Place, options: Mapping[str, Any] | None) -> None:
        self.facts = facts
        self._folder = folder
        self._options = options
        self._score: Score | None = None
        self._known: dict[int, tuple[list[Predicted], list[float]] | str] = {}

    def compare(self, best: TrialRecord, others: Sequence[TrialRecord]) -> tuple[dict[int, Comparison], dict[int, str]]:
        """Comparisons of the best trial with others, by their numbers; and why there is none."""
        why_not: dict[int, str] = {}
        runs, whole = {}, {}
        numbers = {_name(record): record.number for record in others}
        for record in (best, *others):
            try:
                runs[_name(record)], whole[_name(record)] = self.of(record)
            except ValueError as error:
                why_not[record.number] = str(error)
        if _name(best) not in runs:
            return {}, {record.number: why_not.get(record.number, why_not[best.number]) for record in others}
        # One that was tested on other data must not take the comparison of the others away.
        reference = runs[_name(best)][0].references
        for record in others:
            if any(run.references != reference for run in runs.get(_name(record), ())):
                del runs[_name(record)]
                why_not[record.number] = "its predictions are of other test examples than the best one's"
        if len(runs) < 2:
            return {}, why_not
        try:
            found = compare(_name(best), runs, self.score, labels=self.facts.labels, whole=whole)
        except ValueError as error:
            return {}, {numbers[name]: str(error) for name in runs if name in numbers} | why_not
        return {numbers[name]: comparison for name, comparison in found.items()}, why_not

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> float:
        """The domain's metric."""
        if self._score is None:
            self._score = scorer(self.facts, self._options)
        return self._score(predictions, references)

    def of(self, record: TrialRecord) -> tuple[list[Predicted], list[float]]:
        """A confirmed trial's answers and their scores, one for each seed.

        Raises:
            ValueError: Says what is missing, or that the score is not what the ledger holds.
        """
        if record.number not in self._known:
            try:
                self._known[record.number] = self._load(record)
            except (ValueError, StudyError) as error:
                self._known[record.number] = str(error)
        found = self._known[record.number]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _load(self, record: TrialRecord) -> tuple[list[Predicted], list[float]]:
        readings = [r for r in (record.confirmed.readings if record.confirmed else ()) if r.test is not None]
        if not readings:
            raise ValueError("not confirmed")
        runs, scores = [], []
        for reading in readings:
            assert reading.test is not None
            if reading.predictions is None:
                raise ValueError(f"the predictions of trial {record.number} with seed {reading.seed} were not kept")
            run = read_predictions(self._folder / reading.predictions)
            value = self.score(run.predictions, run.references)
            if not math.isclose(value, reading.test, rel_tol=1e-6, abs_tol=1e-6):
                raise ValueError(
                    f"the predictions of trial {record.number} with seed {reading.seed} score {value:.4g}, but the "
                    f"ledger holds {reading.test:.4g}"
                )
            runs.append(run)
            scores.append(value)
        return runs, scores


def _cheapest(
    best: TrialRecord, found: Sequence[Result], others: Sequence[Other], answers: _Answers
) -> Cheapest | None:
    """Methods first; then the further confirmed trials that are cheaper still, from the cheapest up."""

    def far(record: TrialRecord) -> bool:
        ours, theirs = (
            [reading.test for reading in item.confirmed.readings if reading.test is not None] if item.confirmed else []
            for item in (record, best)
        )
        return fall_apart(ours, theirs, answers.facts.direction)

    near = [
        other.result.chosen
        for other in others
        if other.within_noise and other.result.chosen and not far(other.result.chosen)
    ]
    cheapest = min([best, *near], key=lambda record: (record.trainable_parameters, record.number))
    known = {best.number, *(other.result.chosen.number for other in others if other.result.chosen)}
    further = [
        record
        for result in found
        for record in complete(result.records)
        if record.number not in known
        and tested(record) is not None
        and record.trainable_parameters < cheapest.trainable_parameters
    ]
    began = time.monotonic()
    told = any(other.within_noise is not None for other in others)
    for record in sorted(further, key=lambda record: (record.trainable_parameters, record.number)):
        if time.monotonic() - began > _PATIENCE:
            break
        comparison = answers.compare(best, [record])[0].get(record.number)
        noise = within_noise(best, record, answers.facts, comparison)
        told = told or noise is not None
        if noise and not far(record):
            return Cheapest(record)
    return Cheapest(cheapest) if told else None


def scorer(facts: DomainFacts, options: Mapping[str, Any] | None = None) -> Score:
    """The domain's metric as a function of predictions and references; NaN where it is undefined on them.

    Raises:
        StudyError: The task is unknown here.
    """
    from peftsearch.domains import get_task

    task = get_task(facts.task, options=options)

    def score(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        # A resample may hold no example of the kind that the metric counts.
        return float(task.score(list(predictions), list(references), facts.labels).get(facts.metric, math.nan))

    return score


def _name(record: TrialRecord) -> str:
    return f"trial {record.number}"
