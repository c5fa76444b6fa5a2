"""A cell that got less than the others, or something else, is marked with the reason."""

from __future__ import annotations

from typing import Any

from frontier_study import make_facts, make_record

from peftsearch.frontier.budget import CellBudget, cell_budgets
from peftsearch.spec import Rung, StudySpec, TrialRecord, TrialState


def make_spec(**changes: Any) -> StudySpec:
    document: dict[str, Any] = {
        "name": "example",
        "model": "package:tiny/model",
        "domains": {"clinical": {"data": {"source": "a.csv"}}},
        "methods": {"lora": {}, "prompt": {}},
        "training": {"epochs": 3},
    }
    return StudySpec.model_validate(document | changes)


def record(number: int, method: str, state: TrialState = TrialState.COMPLETE, step: int = 90) -> TrialRecord:
    rungs = [Rung(step=step, epoch=step / 30, value=0.5, loss=1.0, train_loss=1.0, train_seconds=2.0)]
    return make_record(number, 0.5, 100, method=method, state=state, rungs=rungs, train_seconds=2.0)


def budgets(records: list[TrialRecord], **changes: Any) -> dict[str, CellBudget]:
    found = cell_budgets(records, make_facts(trials_per_cell=2), make_spec(**changes))
    assert [item.method for item in found] == ["lora", "prompt"]
    return {item.method: item for item in found}


def test_equal_budgets_have_no_remark_and_pruning_is_no_lesser_budget() -> None:
    records = [record(0, "lora"), record(1, "lora", TrialState.PRUNED, 30), record(2, "prompt"), record(3, "prompt")]
    found = budgets(records)
    assert found["lora"] == CellBudget("package:tiny/model", "clinical", "lora", 2, 1, 1, 0, 120, 4.0, None)
    assert found["prompt"].steps == 180
    assert found["prompt"].less is None


def test_failed_unfinished_and_missing_trials_are_said() -> None:
    found = budgets([record(0, "lora"), record(1, "lora", TrialState.FAILED), record(2, "prompt", TrialState.RUNNING)])
    assert found["lora"].less == "1 failed"
    assert found["prompt"].less == "1 of 2 trials; 1 unfinished"


def test_a_method_with_training_of_its_own_is_said() -> None:
    records = [record(number, method) for number, method in enumerate(("lora", "lora", "prompt", "prompt"))]
    methods = {"lora": {"training": {"epochs": 10, "weight_decay": 0.01}}, "prompt": {}}
    found = budgets(records, methods=methods)
    assert found["lora"].less == "own training: epochs 10.0 instead of 3.0"
    assert found["prompt"].less is None


def test_a_cell_without_any_trial_is_listed() -> None:
    assert budgets([])["lora"].less == "0 of 2 trials"
