"""What each cell was given to spend: a method must not look better because it was tuned more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peftsearch.spec import StudyFacts, StudySpec, TrialRecord, TrialState


@dataclass(frozen=True)
class CellBudget:
    """What one (model, domain, method) got.

    Attributes:
        model: The model's path as the study file writes it.
        domain: Name of the domain.
        method: Name of the method.
        trials: Trials that were started, whatever became of them.
        complete: Those that reached the full budget (or that early stopping ended).
        pruned: Those that the scheduler stopped; the same rule for every cell.
        failed: Those that could not go on.
        steps: Optimiser steps trained in all, confirmations not included.
        train_seconds: Seconds of training in all.
        less: Why it got less than the others, or something else, in a few words; None where it is a fair share.
    """

    model: str
    domain: str
    method: str
    trials: int
    complete: int
    pruned: int
    failed: int
    steps: int
    train_seconds: float
    less: str | None


def cell_budgets(records: Iterable[TrialRecord], facts: StudyFacts, spec: StudySpec) -> list[CellBudget]:
    """Every cell's budget, in the order of the study file: domains, then models, then methods.

    Args:
        records: All trials of the study.
        facts: The study's facts; they say how many trials a cell was to have.
        spec: The study file.
    """
    found: dict[tuple[str, str, str], list[TrialRecord]] = {
        (model.path, domain, method): [] for domain in spec.domains for model in spec.models for method in spec.methods
    }
    for record in records:
        found.setdefault((record.model, record.domain, record.method), []).append(record)
    return [_budget(*cell, mine, facts.trials_per_cell, spec) for cell, mine in found.items()]


def _budget(
    model: str, domain: str, method: str, records: list[TrialRecord], planned: int, spec: StudySpec
) -> CellBudget:
    count = {state: sum(record.state is state for record in records) for state in TrialState}
    failed, running = count[TrialState.FAILED], count[TrialState.RUNNING]
    reasons = []
    if len(records) < planned and spec.search.allocation == "equal":
        why = " (its grid has no more)" if spec.search.sampler == "grid" and records else ""
        reasons.append(f"{len(records)} of {planned} trials{why}")
    if failed:
        reasons.append(f"{failed} failed")
    if running:
        reasons.append(f"{running} unfinished")
    own = spec.methods[method].training.model_dump(exclude_none=True) if method in spec.methods else {}
    shared = spec.training.model_dump()
    different = [f"{key} {value} instead of {shared[key]}" for key, value in own.items() if value != shared[key]]
    if different:
        reasons.append("own training: " + ", ".join(different))
    return CellBudget(
        model=model,
        domain=domain,
        method=method,
        trials=len(records),
        complete=count[TrialState.COMPLETE],
        pruned=count[TrialState.PRUNED],
        failed=failed,
        steps=sum(record.rungs[-1].step for record in records if record.rungs),
        train_seconds=sum(record.train_seconds for record in records),
        less="; ".join(reasons) or None,
    )
