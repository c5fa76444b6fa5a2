"""What all sections of a report are made from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from peftsearch.frontier.budget import CellBudget
from peftsearch.frontier.front import DomainFront
from peftsearch.frontier.report.comparisons import DomainComparison
from peftsearch.frontier.report.results import (
    Result,
)
from peftsearch.spec import DomainFacts, StudyFacts, StudySpec, TrialRecord

FOLD = 40
"""Tables with more rows are opened only by who wants them."""
VALIDATION = "†"
"""Marks a value of the validation split among those of the test split."""
LESS = "‡"
"""Marks a cell whose budget differs."""


@dataclass
class Material:
    """Everything that the sections read, computed once.

    Attributes:
        records: All trials, by number.
        facts: What is known beside them.
        spec: The study file.
        results: By domain, what stands for each method.
        fronts: By domain.
        budgets: Of every cell.
        comparisons: By domain.
        methods: All methods, in the order of their colours.
        names: Files that are taken.
    """

    records: list[TrialRecord]
    facts: StudyFacts
    spec: StudySpec
    results: dict[str, list[Result]]
    fronts: dict[str, DomainFront]
    budgets: list[CellBudget]
    comparisons: dict[str, DomainComparison]
    methods: list[str]
    names: set[str] = field(default_factory=set)

    @property
    def several_models(self) -> bool:
        """Whether a method has to be named with its model."""
        return len(self.spec.models) > 1

    def called(self, model: str, method: str) -> str:
        """A cell's name in its domain."""
        return f"{method} on {model}" if self.several_models else method

    def total(self, model: str) -> int | None:
        """Parameters of a model."""
        return self.facts.models[model].total_parameters if model in self.facts.models else None

    def less(self, model: str, domain: str, method: str) -> str | None:
        """How a cell's budget differs; None where it does not."""
        return next(
            (b.less for b in self.budgets if (b.model, b.domain, b.method) == (model, domain, method)),
            None,
        )

    def file(self, *parts: str) -> str:
        """A file name of its own, without what a file system or a URL would mind."""
        wanted = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part) for part in parts).strip("._-")[:100]
        name, count = wanted, 2
        while name.lower() in self.names:
            name, count = f"{wanted}-{count}", count + 1
        self.names.add(name.lower())
        return name


def metric_words(facts: DomainFacts) -> str:
    """A domain's metric as people write it."""
    return facts.metric.replace("_", " ")
