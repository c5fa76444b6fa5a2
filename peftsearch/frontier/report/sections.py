"""The sections of a report, in their order."""

from __future__ import annotations

from collections.abc import Sequence

from peftsearch.files import Place
from peftsearch.frontier.budget import cell_budgets
from peftsearch.frontier.front import domain_fronts
from peftsearch.frontier.report.answer import methods_by_domains, summary
from peftsearch.frontier.report.comparisons import compare_domain
from peftsearch.frontier.report.document import Document
from peftsearch.frontier.report.evidence import budgets, estimates, provenance, readings
from peftsearch.frontier.report.few_shot import few_shot
from peftsearch.frontier.report.material import Material
from peftsearch.frontier.report.one_domain import domain
from peftsearch.frontier.report.results import (
    results,
)
from peftsearch.frontier.tables import trials_csv
from peftsearch.spec import StudyFacts, StudySpec, TrialRecord


def build(
    records: Sequence[TrialRecord],
    facts: StudyFacts,
    spec: StudySpec,
    folder: Place,
    state: str | None = None,
    planned: int | None = None,
) -> Document:
    """The report of a study, whatever its state.

    Args:
        records: All trials.
        facts: What is known beside them.
        spec: The study file.
        folder: The study's folder, where predictions are.
        state: ``running``, ``interrupted`` or ``finished``, where known.
        planned: How many trials the study is to have; trials per cell times cells where absent.
    """
    records = sorted(records, key=lambda record: record.number)
    found = results(records, facts, spec)
    study = Material(
        records,
        facts,
        spec,
        found,
        domain_fronts(records, facts),
        cell_budgets(records, facts, spec),
        {
            name: compare_domain(
                found[name], facts.domains[name], folder, spec.domains[name].options if name in spec.domains else None
            )
            for name in facts.domains
        },
        list(dict.fromkeys([*facts.methods, *(record.method for record in records)])),
    )
    document = Document(f"{facts.study}: report")
    summary(document, study, state, planned)
    methods_by_domains(document, study)
    budgets(document, study)
    for name in facts.domains:
        domain(document, study, name)
    few_shot(document, study)
    estimates(document, study)
    readings(document, study)
    provenance(document, study)
    document.files["trials.csv"] = trials_csv(records)
    return document
