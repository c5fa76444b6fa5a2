"""A study's account, with a real ledger and invented results: shares, pruning, and what a dead driver leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftsearch.methods import method_space
from peftsearch.search.cells import Cell
from peftsearch.search.counts import ParameterCount
from peftsearch.search.run import DomainSearch, StudyRun
from peftsearch.spec import SearchSpec, TrialRecord, TrialState
from peftsearch.tracking import Ledger, LedgerCell
from peftsearch.training.budget import Budget
from peftsearch.training.segment import SegmentResult

BUDGET = Budget(steps_per_epoch=10, evaluation_steps=(10, 20, 30, 40))
CELLS = [Cell("m", "d", method_space(name, {})) for name in ("lora", "prompt", "full")]


def open_ledger(folder: Path) -> Ledger:
    cells = [LedgerCell(cell.key, cell.model, cell.domain, cell.method, "accuracy", "maximize") for cell in CELLS]
    return Ledger(f"sqlite:///{folder / 'ledger.db'}", "s", cells)


def open_run(ledger: Ledger, trials: int = 6) -> StudyRun:
    def count(cell: Cell, hyperparameters: Any) -> ParameterCount:
        size = int(hyperparameters.get("rank", hyperparameters.get("tokens", 1000)))
        return ParameterCount(size * 100, size * 100)

    search = SearchSpec(trials=trials, scheduler="pareto_asha")
    budgets = {cell.method: BUDGET for cell in CELLS}
    return StudyRun(search, CELLS, {"d": DomainSearch("accuracy", "maximize", budgets)}, count, ledger)


def result(record: TrialRecord, index: int) -> SegmentResult:
    value = round(abs(hash((record.number * 7919) % 101)) / 101 * 0.5 + index * 0.05, 4)
    return SegmentResult(BUDGET.evaluation_steps[index], 1 - value, 1.0, {"accuracy": value}, 1.0, 0.1, 10**6)


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def drive(run: StudyRun) -> None:
    while (record := run.next_trial()) is not None:
        for index in range(len(record.rungs), 4):
            if not run.evaluated(record.number, result(record, index), 0, final=index == 3):
                break


def states(ledger: Ledger) -> list[tuple[int, str, str, int, float | None]]:
    return [(r.number, r.method, r.state.value, len(r.rungs), r.value) for r in ledger.records]


def test_every_cell_gets_its_share_in_turns(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    run = open_run(ledger)
    drive(run)
    assert run.finished()
    assert [record.method for record in ledger.records] == ["lora", "prompt", "full"] * 6
    assert {record.state for record in ledger.records} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_more_trials_extend_a_finished_study(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    drive(open_run(ledger, trials=2))
    before = states(ledger)
    drive(open_run(ledger, trials=3))
    assert states(ledger)[:6] == before
    assert len(states(ledger)) == 9


@pytest.mark.parametrize("write", ["add_rung", "complete", "prune", "ask"])
def test_a_driver_killed_at_any_write_is_continued_to_the_same_ledger(write: str, tmp_path: Path) -> None:
    (tmp_path / "quiet").mkdir()
    quiet = open_ledger(tmp_path / "quiet")
    drive(open_run(quiet))
    (tmp_path / "killed").mkdir()
    kills = 0
    for when in ("before", "after"):
        for nth in (1, 2, 4):
            ledger = open_ledger(tmp_path / "killed")
            run = open_run(ledger)
            _kill_at(ledger, write, nth, when)
            try:
                drive(run)
            except Killed:
                kills += 1
    assert kills >= 3
    ledger = open_ledger(tmp_path / "killed")
    drive(open_run(ledger))
    assert states(ledger) == states(quiet)


def _kill_at(ledger: Ledger, write: str, nth: int, when: str) -> None:
    real: Callable[..., Any] = getattr(ledger, write)
    calls = 0

    def deadly(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and when == "before":
            raise Killed
        answer = real(*arguments, **options)
        if calls == nth:
            raise Killed
        return answer

    setattr(ledger, write, deadly)
