"""What stands for each method in each domain, and how the methods compare.

A method's configuration is chosen on the validation split; the test split only compares what was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from peftsearch.frontier.front import complete, goodness
from peftsearch.spec import Direction, Reading, StudyFacts, StudySpec, TrialRecord


@dataclass(frozen=True)
class Result:
    """One (model, domain, method).

    Attributes:
        model: The model's path.
        domain: Name of the domain.
        method: Name of the method.
        direction: Of the domain's metric.
        records: All trials of the cell.
        chosen: The trial that stands for it: of the confirmed ones the best by validation over its seeds, else the
            best on validation; None where no trial has reached the full budget.
    """

    model: str
    domain: str
    method: str
    direction: Direction
    records: tuple[TrialRecord, ...]
    chosen: TrialRecord | None

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The chosen configuration's confirmations."""
        return self.chosen.confirmed.readings if self.chosen and self.chosen.confirmed else ()

    @property
    def test(self) -> tuple[float, float, int] | None:
        """Mean, sample standard deviation and number of seeds on the test split."""
        return tested(self.chosen)

    @property
    def validation(self) -> tuple[float, float, int] | None:
        """The same on the validation split; of an unconfirmed trial its one value."""
        return validated(self.chosen)

    @property
    def train_seconds(self) -> float | None:
        """Of one training at the full budget; the mean over the seeds where confirmed."""
        return _mean(reading.train_seconds or None for reading in self.readings) or (
            self.chosen.train_seconds if self.chosen else None
        )

    @property
    def peak_memory_bytes(self) -> int | None:
        """The highest of the confirmations', else of the trial."""
        known = [reading.peak_memory_bytes for reading in self.readings if reading.peak_memory_bytes is not None]
        return max(known) if known else (self.chosen.peak_memory_bytes if self.chosen else None)

    @property
    def examples_per_second(self) -> float | None:
        """Inference on the test split, mean over the seeds."""
        return _mean(reading.examples_per_second for reading in self.readings)

    @property
    def forgetting(self) -> float | None:
        """Rise of the loss on general text, of the trial; None where the study does not measure it."""
        return self.chosen.scores.get("forgetting") if self.chosen else None

    @property
    def seeds(self) -> int:
        """How many seeds confirm it."""
        return self.chosen.confirmed.seeds if self.chosen and self.chosen.confirmed else 0


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def tested(record: TrialRecord | None) -> tuple[float, float, int] | None:
    """Mean, sample standard deviation and number of seeds of a trial on the test split; None without readings."""
    confirmed = record.confirmed if record else None
    if confirmed is None or confirmed.test_mean is None or not math.isfinite(confirmed.test_mean):
        return None
    read = sum(reading.test is not None for reading in confirmed.readings) or confirmed.seeds
    return confirmed.test_mean, confirmed.test_std or 0.0, read


def validated(record: TrialRecord | None) -> tuple[float, float, int] | None:
    """The same on the validation split; of an unconfirmed trial its one value."""
    if record is None:
        return None
    if record.confirmed and math.isfinite(record.confirmed.mean):
        return record.confirmed.mean, record.confirmed.std, record.confirmed.seeds
    return None if record.value is None else (record.value, 0.0, 1)


def results(records: Iterable[TrialRecord], facts: StudyFacts, spec: StudySpec) -> dict[str, list[Result]]:
    """By domain, one result for each model and method of the study, in the order of the study file."""
    cells: dict[tuple[str, str, str], list[TrialRecord]] = {
        (domain, model.path, method): [] for domain in facts.domains for model in spec.models for method in spec.methods
    }
    for record in records:
        if record.domain in facts.domains:
            cells.setdefault((record.domain, record.model, record.method), []).append(record)
    found: dict[str, list[Result]] = {domain: [] for domain in facts.domains}
    for (domain, model, method), mine in cells.items():
        direction = facts.domains[domain].direction
        found[domain].append(Result(model, domain, method, direction, tuple(mine), _chosen(mine, direction)))
    return found


def _chosen(records: Sequence[TrialRecord], direction: Direction) -> TrialRecord | None:
    finished = complete(records)
    sign = 1 if direction == "maximize" else -1
    confirmed = [record for record in finished if record.confirmed and math.isfinite(record.confirmed.mean)]
    # Where some have been scored on the test split, one of them stands for the method; and one that could be trained
    # again with every seed, where there is one: the mean over the seeds that survived flatters.
    confirmed = [record for record in confirmed if tested(record)] or confirmed
    confirmed = [record for record in confirmed if not record.failed_confirmations] or confirmed
    if confirmed:
        return min(
            confirmed,
            key=lambda record: (
                -sign * (record.confirmed.mean if record.confirmed else 0.0),
                record.trainable_parameters,
                record.number,
            ),
        )
    return min(
        finished,
        key=lambda record: (-goodness(record, direction), record.trainable_parameters, record.number),
        default=None,
    )


def better(one: float, other: float, direction: Direction) -> float:
    """By how much ``one`` is better."""
    return one - other if direction == "maximize" else other - one


def ranked(found: Sequence[Result]) -> list[Result]:
    """Results that can be compared with each other, best first.

    Those on the test split where there are any; else those on the validation split.
    """
    on_test = [(result, result.test) for result in found if result.test]
    pairs = on_test or [(result, result.validation) for result in found if result.validation]

    def key(pair: tuple[Result, tuple[float, float, int] | None]) -> tuple[float, int]:
        result, value = pair
        assert value is not None
        assert result.chosen is not None
        return -better(value[0], 0.0, result.direction), result.chosen.trainable_parameters

    return [result for result, _ in sorted(pairs, key=key)]


def macro_average(values: Sequence[float | None]) -> float | None:
    """The mean over domains; None where one is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def task_type(task: str, metric: str) -> str:
    """What is averaged together: a task with its metric. BLURB counts PICO, which is scored by words, apart from the
    other tagging tasks, which are scored by entities."""
    return f"{task} by {metric}"


def score_by_task(values: Sequence[float | None], tasks: Sequence[str]) -> float | None:
    """The mean over task types (`task_type`) of the mean over each type's domains, as BLURB's score (Gu et al. 2021,
    arXiv:2007.15779); None where a domain is missing."""
    if macro_average(values) is None:
        return None
    kinds = list(dict.fromkeys(tasks))
    return macro_average(
        [macro_average([v for v, task in zip(values, tasks, strict=True) if task == kind]) for kind in kinds]
    )
