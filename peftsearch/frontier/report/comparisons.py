"""One domain's methods held against the best of them: what is noise, and what is the cheapest within it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftsearch.frontier.front import complete
from peftsearch.frontier.report.additive import Score
from peftsearch.frontier.report.results import Result, better, ranked, seed_noise, tested
from peftsearch.frontier.report.significance import (
    Comparison,
    Predicted,
    compare,
    holm,
    read_predictions,
)
from peftsearch.spec import DomainFacts, StudyError, TrialRecord

LEVEL = 0.05


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
    """The confirmed trial with fewest trainable parameters whose difference to the best is within the noise."""

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


def compare_domain(found: Sequence[Result], facts: DomainFacts, folder: Path) -> DomainComparison:
    """Compare the methods of one domain, by the predictions of their confirmations.

    Args:
        found: One result for each model and method.
        facts: The domain.
        folder: The study's folder.
    """
    order = ranked(found)
    if not order:
        return DomainComparison(None, (), None)
    best = order[0]
    rest = order[1:] + [result for result in found if result.chosen and result not in order]
    if not best.test or best.chosen is None:
        why = "not confirmed"
        return DomainComparison(best, tuple(Other(result, None, why, None) for result in rest), None)
    runs: dict[str, list[Predicted]] = {}
    missing: dict[str, str] = {}
    for result in (best, *rest):
        assert result.chosen is not None
        try:
            runs[_key(result.chosen)] = predictions_of(result.chosen, folder)
        except ValueError as error:
            missing[_key(result.chosen)] = str(error)
    compared, why_not = _compare(best.chosen, runs, facts)
    corrected = holm({key: comparison.p for key, comparison in compared.items()})
    others = []
    for result in rest:
        assert result.chosen is not None
        key = _key(result.chosen)
        comparison = compared.get(key)
        if comparison is not None:
            comparison = dataclasses.replace(comparison, adjusted=corrected[key])
        reason = None if comparison else (missing.get(key) or missing.get(_key(best.chosen)) or why_not)
        others.append(Other(result, comparison, reason, within_noise(best.chosen, result.chosen, facts, comparison)))
    return DomainComparison(best, tuple(others), _cheapest(best.chosen, found, others, runs, facts, folder))


def within_noise(
    best: TrialRecord, other: TrialRecord, facts: DomainFacts, comparison: Comparison | None
) -> bool | None:
    """Whether the difference of two confirmed trials on the test split may be chance.

    It may where it is smaller than twice its standard error over the seeds, or where the paired bootstrap over the
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


def predictions_of(record: TrialRecord, folder: Path) -> list[Predicted]:
    """What a confirmed trial's models answered on the test split, one entry for each seed.

    Raises:
        ValueError: Says what is missing.
    """
    readings = record.confirmed.readings if record.confirmed else ()
    if not any(reading.test is not None for reading in readings):
        raise ValueError("not confirmed")
    found = []
    for reading in readings:
        if reading.test is None:
            continue
        if reading.predictions is None:
            raise ValueError(f"the predictions of trial {record.number} with seed {reading.seed} were not kept")
        found.append(read_predictions(folder / reading.predictions))
    return found


def _compare(
    best: TrialRecord, runs: dict[str, list[Predicted]], facts: DomainFacts
) -> tuple[dict[str, Comparison], str | None]:
    """Comparisons by trial; and, where there are none, why."""
    if _key(best) not in runs or len(runs) < 2:
        return {}, None
    try:
        score = scorer(facts)
        # One that was tested on other data must not take the comparison of the others away.
        reference = runs[_key(best)][0].references
        same = {key: own for key, own in runs.items() if all(run.references == reference for run in own)}
        found = compare(_key(best), same, score, labels=facts.labels) if len(same) > 1 else {}
    except (ValueError, StudyError) as error:
        return {}, str(error)
    return found, "its predictions are of other test examples than the best one's"


def _cheapest(
    best: TrialRecord,
    found: Sequence[Result],
    others: Sequence[Other],
    runs: dict[str, list[Predicted]],
    facts: DomainFacts,
    folder: Path,
) -> Cheapest | None:
    """Methods first; then the further confirmed trials that are cheaper still, from the cheapest up."""
    near = [other.result.chosen for other in others if other.within_noise and other.result.chosen]
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
        if time.monotonic() - began > 15:
            break
        comparison = None
        if _key(best) in runs:
            try:
                own = {_key(best): runs[_key(best)], _key(record): predictions_of(record, folder)}
                comparison = _compare(best, own, facts)[0].get(_key(record))
            except ValueError:
                comparison = None
        near_it = within_noise(best, record, facts, comparison)
        told = told or near_it is not None
        if near_it:
            return Cheapest(record)
    return Cheapest(cheapest) if told else None


def scorer(facts: DomainFacts) -> Score:
    """The domain's metric as a function of predictions and references.

    Raises:
        StudyError: The task is unknown here.
    """
    from peftsearch.domains import get_task

    task = get_task(facts.task)

    def score(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        return float(task.score(list(predictions), list(references), facts.labels)[facts.metric])

    return score


def _key(record: TrialRecord) -> str:
    return f"trial {record.number}"
