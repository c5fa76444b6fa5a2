"""A study's account, with a real ledger and invented results: shares, pruning, and what a dead driver leaves behind."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from ledger_kills import Killed, kill_at

from peftsearch.methods import method_space
from peftsearch.search.cells import Cell
from peftsearch.search.counts import ParameterCount
from peftsearch.search.run import DomainSearch, StudyRun, TrialCost
from peftsearch.spec import Range, Rung, SearchSpec, TrialRecord, TrialState
from peftsearch.tracking import Ledger, LedgerCell
from peftsearch.training.budget import Budget
from peftsearch.training.segment import SegmentResult

BUDGET = Budget(steps_per_epoch=10, evaluation_steps=(10, 20, 30, 40))
CELLS = [Cell("m", "d", method_space(name, {})) for name in ("lora", "prompt", "full")]


def open_ledger(folder: Path) -> Ledger:
    cells = [LedgerCell(cell.key, cell.model, cell.domain, cell.method, "accuracy", "maximize") for cell in CELLS]
    return Ledger(f"sqlite:///{folder / 'ledger.db'}", "s", cells)


def count(cell: Cell, hyperparameters: Any) -> ParameterCount:
    size = int(hyperparameters.get("rank", hyperparameters.get("tokens", 20)))
    return ParameterCount(size * 100, size * 100)


def open_run(ledger: Ledger, trials: int = 6, guesses: Any = None, **settings: Any) -> StudyRun:
    search = SearchSpec(trials=trials, **{"scheduler": "pareto_asha", **settings})
    budgets = {cell.method: BUDGET for cell in CELLS}
    domains = {"d": DomainSearch("accuracy", "maximize", budgets)}
    return StudyRun(search, CELLS, domains, count, ledger, cost=cost, guesses=guesses)


def cost(cell: Cell, hyperparameters: Any, found: ParameterCount) -> TrialCost:
    """A GiB for every hundred parameters."""
    return TrialCost(found.trainable // 100 * 2**30, 7.0)


def result(record: TrialRecord, index: int) -> SegmentResult:
    value = round(abs(hash((record.number * 7919) % 101)) / 101 * 0.5 + index * 0.05, 4)
    return SegmentResult(BUDGET.evaluation_steps[index], 1 - value, 1.0, {"accuracy": value}, 1.0, 0.1, 10**6)


def drive(run: StudyRun, evaluate: Any = None, stop_after: int | None = None) -> None:
    while (stop_after is None or len(run.ledger.records) < stop_after) and (record := run.next_trial()) is not None:
        for index in range(len(record.rungs), 4):
            if not run.evaluated(record.number, (evaluate or result)(record, index), 0, final=index == 3):
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


def by_method(good: str) -> Any:
    """Results of which those of one method are by far the best, at any size."""

    def evaluate(record: TrialRecord, index: int) -> SegmentResult:
        value = (0.9 if record.method == good else 0.3) + index * 0.01
        return SegmentResult(BUDGET.evaluation_steps[index], 1 - value, 1.0, {"accuracy": value}, 1.0, 0.1, 10**6)

    return evaluate


@pytest.mark.parametrize("good", ["lora", "full"])
def test_with_joint_allocation_methods_share_their_trials_and_the_better_one_gets_most(
    good: str, tmp_path: Path
) -> None:
    ledger = open_ledger(tmp_path)
    run = open_run(ledger, trials=10, allocation="joint", scheduler="none")
    assert run.planned == 30
    drive(run, by_method(good))
    assert run.finished()
    methods = [record.method for record in ledger.records]
    assert len(methods) == 30
    assert methods[:6] == ["lora", "prompt", "full"] * 2
    had = {method: methods.count(method) for method in ("lora", "prompt", "full")}
    assert min(had.values()) >= 2
    assert max(had, key=had.__getitem__) == good
    assert had[good] > 12


def test_an_interrupted_study_goes_on_with_the_methods_that_it_would_have_had(tmp_path: Path) -> None:
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    whole, halves = open_ledger(tmp_path / "whole"), open_ledger(tmp_path / "halves")
    drive(open_run(whole, allocation="joint"))
    drive(open_run(halves, allocation="joint"), stop_after=11)
    drive(open_run(halves, allocation="joint"))
    assert states(halves) == states(whole)
    assert len(whole.records) == 18


def test_where_trials_are_trained_together_turns_are_longer(tmp_path: Path) -> None:
    """So that those of one domain and model come together."""
    ledger = open_ledger(tmp_path)
    run = open_run(ledger)
    run.at_once = lambda: 6
    drive(run)
    assert [record.method for record in ledger.records] == ["lora", "lora", "prompt", "prompt", "full", "full"] * 3


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
            kill_at(ledger, write, nth, when)
            try:
                drive(run)
            except Killed:
                kills += 1
    assert kills >= 3
    ledger = open_ledger(tmp_path / "killed")
    drive(open_run(ledger))
    assert states(ledger) == states(quiet)


@pytest.mark.parametrize("write", ["ask", "complete"])
def test_only_what_is_within_the_limits_is_run_and_every_cell_gets_its_share(write: str, tmp_path: Path) -> None:
    def start(ledger: Ledger) -> StudyRun:
        return open_run(ledger, max_parameters=2500, max_memory=20)

    (tmp_path / "quiet").mkdir()
    ledger = open_ledger(tmp_path / "quiet")
    run = start(ledger)
    drive(run)
    assert run.finished()
    records = ledger.records
    assert all(record.trainable_parameters <= 2000 for record in records)
    assert [record.number for record in ledger.records] == list(range(18))
    assert {cell.method: ledger.started(cell.key) for cell in CELLS} == {"lora": 6, "prompt": 6, "full": 6}
    assert ledger.infeasible(CELLS[0].key) > 0
    assert {record.estimated_seconds for record in ledger.records} == {7.0}
    assert all(record.estimated_memory_bytes == record.trainable_parameters // 100 * 2**30 for record in records)
    assert not any(record.state is TrialState.FAILED for record in records)

    # Killed among the proposals, the study ends with the same ledger.
    (tmp_path / "killed").mkdir()
    for nth in (2, 5):
        killed = open_ledger(tmp_path / "killed")
        run = start(killed)
        kill_at(killed, write, nth, "after")
        with contextlib.suppress(Killed):
            drive(run)
    drive(start(open_ledger(tmp_path / "killed")))
    killed = open_ledger(tmp_path / "killed")
    assert states(killed) == states(ledger)
    assert [r.hyperparameters for r in killed.records] == [r.hyperparameters for r in ledger.records]


def test_a_trial_for_which_nothing_fits_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftsearch.search.run.PROPOSALS", 5)
    ledger = open_ledger(tmp_path)
    drive(open_run(ledger, trials=2, max_memory=19))
    failed = [record for record in ledger.records if record.method == "full"]
    assert {record.state for record in failed} == {TrialState.FAILED}
    assert failed[0].error == "none of 5 proposals is within search.max_memory: narrow the search space"
    assert ledger.infeasible(CELLS[2].key) == 2 * 4


def grid_cells(**space: Any) -> list[Cell]:
    return [Cell("m", "d", method_space("lora", {"learning_rate": 1e-3, **space}))]


@pytest.mark.parametrize(("trials", "expected"), [(3, 3), (10, 4)])
def test_a_grid_is_run_in_order_and_a_cell_is_done_at_its_end(
    trials: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules[__name__], "CELLS", grid_cells(rank=(8, 4), dropout=Range(low=0.1, high=0.25, step=0.1))
    )
    ledger = open_ledger(tmp_path)
    run = open_run(ledger, trials=trials, sampler="grid", scheduler="none")
    assert run.planned == expected
    half = run.next_trial()
    assert half is not None
    # Interrupted in its first trial.
    drive(open_run(ledger, trials=trials, sampler="grid", scheduler="none"))
    tried = [(record.hyperparameters["rank"], record.hyperparameters["dropout"]) for record in ledger.records]
    assert tried == [(8, 0.1), (8, 0.2), (4, 0.1), (4, 0.2)][:expected]
    assert {record.state for record in ledger.records} == {TrialState.COMPLETE}
    assert open_run(ledger, trials=trials, sampler="grid", scheduler="none").finished()


def test_combinations_outside_the_limits_are_left_out_of_a_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CELLS", grid_cells(rank=(4, 64, 8)))
    ledger = open_ledger(tmp_path)
    run = open_run(ledger, trials=10, sampler="grid", scheduler="none", max_parameters=1000)
    drive(run)
    assert [record.hyperparameters["rank"] for record in ledger.records] == [4, 8]
    assert run.finished()
    assert run.planned == 2


def test_what_another_study_found_is_tried_first_and_takes_half_of_the_trials(tmp_path: Path) -> None:
    found = [
        {"rank": 5, "alpha": 7.0, "learning_rate": 2e-3},
        {"rank": 10_000, "learning_rate": 1e-3},  # Of this only the learning rate is in the space.
        {"rank": 5, "alpha": 7.0, "learning_rate": 2e-3},
        {"rank": 6},
        {"rank": 7},
    ]
    ledger = open_ledger(tmp_path)
    drive(open_run(ledger, trials=6, guesses={"lora": found}))
    lora = [record.hyperparameters for record in ledger.records if record.method == "lora"]
    assert (lora[0]["rank"], lora[0]["learning_rate"]) == (5, 2e-3)
    assert lora[1]["learning_rate"] == 1e-3
    assert lora[2]["rank"] == 6
    # Then the published defaults.
    assert (lora[3]["rank"], lora[3]["learning_rate"]) == (16, 3e-4)


def test_how_many_trials_shared_a_segments_steps_is_kept(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    run = open_run(ledger)
    record = run.next_trial()
    assert record is not None
    run.evaluated(record.number, replace(result(record, 0), together=3.5), 0, final=False)
    (rung,) = open_ledger(tmp_path).record(record.number).rungs
    assert rung.together == 3.5
    # What earlier versions wrote does not say.
    assert Rung(**rung.model_dump(exclude={"together"})).together == 1.0


def stopped(record: TrialRecord, index: int) -> SegmentResult:
    return replace(result(record, index), stopped=True)


@pytest.mark.parametrize("dies", [False, True])
def test_a_trial_that_early_stopping_ended_is_complete(dies: bool, tmp_path: Path) -> None:
    """Also when the driver died between recording its last evaluation and its end."""
    ledger = open_ledger(tmp_path)
    run = open_run(ledger, scheduler="none")
    record = run.next_trial()
    assert record is not None
    assert run.evaluated(record.number, result(record, 0), 0, final=False)
    if dies:
        kill_at(ledger, "complete", 1, "before")
        with pytest.raises(Killed):
            run.evaluated(record.number, stopped(record, 1), 0, final=False)
        ledger = open_ledger(tmp_path)
        following = open_run(ledger, scheduler="none").next_trial()
        assert following is not None
        assert following.number == record.number + 1
    else:
        assert not run.evaluated(record.number, stopped(record, 1), 0, final=True)
    ended = open_ledger(tmp_path).record(record.number)
    assert (ended.state, ended.stopped_early, ended.rungs[-1].step) == (TrialState.COMPLETE, True, 20)
    assert ended.total_steps == 40
    assert ended.checkpoint == f"trials/{record.number:05d}"


def test_a_study_with_early_stopping_is_continued_to_the_same_ledger(tmp_path: Path) -> None:
    """Early stopping may end a trial at a rung, where the others are compared with it."""

    def evaluate(record: TrialRecord, index: int) -> SegmentResult:
        value = Random(10 * record.number + index).random()
        found = (stopped if index == 1 and record.number % 2 else result)(record, index)
        return replace(found, scores={"accuracy": value}, loss=1 - value)

    whole = open_ledger(tmp_path)
    drive(open_run(whole, trials=12, scheduler="asha", eta=2), evaluate)
    assert {(r.state, r.stopped_early) for r in whole.records} >= {
        (TrialState.COMPLETE, True),
        (TrialState.PRUNED, False),
    }
    for interrupted_after in (11, 17, 23):
        folder = tmp_path / str(interrupted_after)
        folder.mkdir()
        drive(open_run(open_ledger(folder), trials=12, scheduler="asha", eta=2), evaluate, stop_after=interrupted_after)
        again = open_ledger(folder)
        drive(open_run(again, trials=12, scheduler="asha", eta=2), evaluate)
        assert states(again) == states(whole)


def test_a_method_whose_leader_diverged_is_seen_at_the_full_budget(tmp_path: Path) -> None:
    def evaluate(record: TrialRecord, index: int) -> SegmentResult:
        # The first trial of full fine-tuning leads its cell, whose trials are all behind those of the other methods.
        value = 0.9 if record.method != "full" else 0.5 if record.number < 3 else 0.4 - record.number / 1000
        return replace(result(record, index), scores={"accuracy": value}, loss=1 - value)

    def drive_with_failure(run: StudyRun, stop_after: int | None = None) -> None:
        while (stop_after is None or len(run.ledger.records) < stop_after) and (record := run.next_trial()) is not None:
            for index in range(len(record.rungs), 4):
                if record.number < 3 and record.method == "full" and index == 1:
                    run.failed(record.number, "the training loss became nan")
                    break
                if not run.evaluated(record.number, evaluate(record, index), 0, final=index == 3):
                    break

    whole = open_ledger(tmp_path)
    drive_with_failure(open_run(whole))
    mine = [record.state for record in whole.records if record.method == "full"]
    assert mine[:2] == [TrialState.FAILED, TrialState.COMPLETE]
    (tmp_path / "again").mkdir()
    drive_with_failure(open_run(open_ledger(tmp_path / "again")), stop_after=4)
    resumed = open_ledger(tmp_path / "again")
    drive_with_failure(open_run(resumed))
    assert states(resumed) == states(whole)


def test_rungs_compare_methods_after_the_same_share_of_their_own_budgets(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    double = Budget(steps_per_epoch=20, evaluation_steps=(20, 40, 60, 80))
    budgets = {"lora": double, "prompt": BUDGET, "full": BUDGET}
    search = SearchSpec(trials=1, scheduler="asha", eta=2)
    run = StudyRun(search, CELLS, {"d": DomainSearch("accuracy", "maximize", budgets)}, count, ledger)
    lora, prompt = run.next_trial(), run.next_trial()
    assert lora is not None
    assert prompt is not None
    assert (lora.total_steps, prompt.total_steps) == (80, 40)

    def at(step: int, value: float) -> SegmentResult:
        return SegmentResult(step, 1 - value, 1.0, {"accuracy": value}, 1.0, 0.1, 10**6)

    assert run.evaluated(lora.number, at(20, 0.9), 0, final=False)
    assert not run.evaluated(prompt.number, at(10, 0.2), 0, final=False)
    assert ledger.record(lora.number).rungs[0].epoch == 1.0
    assert ledger.record(prompt.number).rungs[0].epoch == 1.0
