"""Domains as they are to be expected: what a study is planned with where its data or its tokenizer is not at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftsearch.domains.models import Architecture
from peftsearch.domains.prepare import PreparedDomain, check_architecture
from peftsearch.domains.raw import SPLITS, RawDomain
from peftsearch.domains.sources import describe_source
from peftsearch.domains.tasks import Task, get_metric, get_task
from peftsearch.spec import DataSpec, ExpectedSpec, StudyError, StudySpec

if TYPE_CHECKING:
    import datasets

UNKNOWN = ExpectedSpec(train=1000)
"""What a study file that says nothing is planned with: rather a plan for a thousand rows than none."""

UNCHECKED = "unchecked"
"""The fingerprint of data that is not at hand."""


@dataclass(frozen=True)
class ExpectedDomain(PreparedDomain):
    """A domain without its rows: for plans, never for training.

    Attributes:
        tokens: Tokens per text, or per window of it.
        windows: Windows that a row makes.
    """

    tokens: int
    windows: float

    def split(self, name: str) -> datasets.Dataset:
        """There are no rows.

        Raises:
            StudyError: Always.
        """
        raise StudyError(
            f"the data of {self.name!r} was not at hand when the study was planned", ("domains", self.name)
        )

    def lengths(self, name: str) -> tuple[int, ...]:
        """Tokens of each row to be expected."""
        return (self.tokens,) * round(self.windows * self.rows[name])

    def prepare(self, cache: Path) -> ExpectedDomain:
        """Nothing is to be tokenised: the domain itself."""
        return self


def expected_domain(
    name: str,
    spec: StudySpec,
    architecture: Architecture | None,
    model: str,
    raw: RawDomain | None = None,
) -> ExpectedDomain:
    """A domain to plan with.

    Args:
        name: Its name in the study.
        spec: The study.
        architecture: Kind of the model; one that can do the task where absent.
        model: The model, for errors.
        raw: The checked text, where that is at hand and only the tokenizer is not.

    Raises:
        StudyError: What is known without the data is wrong: the task, its options, the metric, the kind of model.
    """
    domain, place = spec.domains[name], ("domains", name)
    data = domain.data
    task = get_task(domain.task, place, domain.options)
    labels = raw.labels if raw is not None else _labels(task, data)
    metric = get_metric(task, domain.metric, (*place, "metric"), labels if raw is not None else None)
    kind = architecture if architecture is not None else next(iter(task.heads))
    check_architecture(task, kind, model, name)
    rows = {split: table.num_rows for split, table in raw.splits.items()} if raw is not None else _rows(data)
    longest = spec.domain_max_length(name)
    return ExpectedDomain(
        name=name,
        task_name=task.name,
        options=domain.options,
        architecture=kind,
        metric=metric.name,
        direction=metric.direction,
        labels=labels,
        parts=tuple(data.join or ()),
        rows={split: rows[split] for split in SPLITS if split in rows},
        max_length=longest,
        fingerprint=raw.fingerprint if raw is not None else UNCHECKED,
        source=raw.source if raw is not None else describe_source(data),
        warnings=raw.warnings if raw is not None else (),
        pad_token_id=0,
        folder=Path(),
        tokens=min(longest, round(_mean(data, lambda part: part.tokens or longest))),
        windows=_mean(data, lambda part: part.windows),
    )


def _parts(data: DataSpec) -> list[DataSpec]:
    return [data] if data.join is None else list(data.join.values())


def _rows(data: DataSpec) -> dict[str, int]:
    """Rows of each split as `load_domain` would cut and limit them; those of joined data together."""
    total: dict[str, int] = {}
    for part in _parts(data):
        expected = part.expected or UNKNOWN
        rows = {"train": expected.train, "validation": expected.validation, "test": expected.test}
        for split, share in (("validation", part.split.validation), ("test", part.split.test)):
            if rows[split] is None and share > 0:
                rows[split] = max(1, round(share * expected.train))
                rows["train"] = max(1, (rows["train"] or 0) - (rows[split] or 0))
        for split, count in rows.items():
            most = getattr(part.limit, split)
            if count is not None:
                total[split] = total.get(split, 0) + (count if most is None else min(count, most))
    # Beside 'join' it is a limit on all parts together, after their own.
    for split, count in total.items():
        most = getattr(data.limit, split)
        total[split] = count if most is None else min(count, most)
    return total


def _mean(data: DataSpec, number: Callable[[ExpectedSpec], int]) -> float:
    """What is expected of a row, on average over the parts' rows."""
    known = [part.expected or UNKNOWN for part in _parts(data)]
    return sum(part.train * number(part) for part in known) / sum(part.train for part in known)


def _labels(task: Task, data: DataSpec) -> tuple[str, ...]:
    found: list[str] = []
    for part in _parts(data):
        labels = (part.expected or UNKNOWN).labels
        if isinstance(labels, list):
            found += labels
        elif labels is not None:
            found += [f"label {number + 1}" for number in range(labels)]
        elif {part.columns.label, part.columns.tags} & set(task.columns(part)):
            found += ["label 1", "label 2"]
    return tuple(dict.fromkeys(found))
