"""What a trial costs must not grow with those before it: counted, not timed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy import event
from test_run import open_ledger, open_run, result

from peftsearch.search import history
from peftsearch.search.history import BEST, EVERY, OTHERS, RECENT, WHOLE, Memory, RememberingTPE
from peftsearch.spec import TrialState
from peftsearch.tracking import Ledger

DIRECTIONS = [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]


class Database:
    """Statements that a ledger sends, and rows that it reads."""

    def __init__(self, ledger: Ledger) -> None:
        self.statements = 0
        self.rows = 0
        engine = ledger._database.engine
        event.listen(engine, "connect", self._watch)
        event.listen(engine, "before_cursor_execute", self._count)
        engine.dispose()

    def take(self) -> tuple[int, int]:
        taken, self.statements, self.rows = (self.statements, self.rows), 0, 0
        return taken

    def _watch(self, connection: Any, _: Any) -> None:
        def row(cursor: Any, values: Any) -> Any:
            self.rows += 1
            return values

        connection.row_factory = row

    def _count(self, *arguments: Any) -> None:
        self.statements += 1


def test_a_trial_asks_the_ledger_s_database_for_as_much_as_the_first_ones_did(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    database = Database(ledger)
    run = open_run(ledger, trials=25, sampler="random", scheduler="none")
    costs = []
    for _ in range(3 * 25):
        record = run.next_trial()
        assert record is not None
        for index in range(2):
            run.evaluated(record.number, result(record, index), 0, final=index == 1)
        # MLflow's thread tells the ledger each trial's run, which the cell's study keeps as an attribute.
        ledger.set_run_id(record.number, f"{record.number:032d}")
        costs.append(database.take())
    assert run.next_trial() is None
    assert min(statements for statements, _ in costs) > 5
    # Of the first trials of each cell some are enqueued, which takes a few statements more.
    statements, rows = (max(cost[place] for cost in costs[15:35]) for place in (0, 1))
    assert max(statements for statements, _ in costs[-20:]) <= statements
    assert max(rows for _, rows in costs[-20:]) <= rows


def test_a_proposal_reads_as_much_whatever_runs_beside_it(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    run = open_run(ledger, trials=20, sampler="random", scheduler="none")
    database = Database(ledger)
    costs = []
    for _ in range(45):
        record = run.next_trial()
        assert record is not None
        run.evaluated(record.number, result(record, 0), 0, final=False)
        costs.append(database.take())
    assert len([record for record in ledger.records if record.state is TrialState.RUNNING]) > 20
    for place in (0, 1):
        assert max(cost[place] for cost in costs[-9:]) <= max(cost[place] for cost in costs[9:18])


def test_tpe_sees_what_runs_beside_its_proposal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of running trials it takes each for a bad one (constant liar): four slots shall not train four times the same.
    seen: list[list[optuna.trial.FrozenTrial]] = []
    split = optuna.samplers._tpe.sampler._split_trials

    def looked(study: optuna.Study, trials: list[optuna.trial.FrozenTrial], *rest: Any) -> Any:
        seen.append([trial for trial in trials if trial.state is optuna.trial.TrialState.RUNNING])
        return split(study, trials, *rest)

    monkeypatch.setattr(optuna.samplers._tpe.sampler, "_split_trials", looked)
    ledger = open_ledger(tmp_path)
    run = open_run(ledger, trials=25, sampler="tpe", scheduler="none")
    for place in range(60):
        record = run.next_trial()
        assert record is not None
        for index in range(4) if place < 40 else ():
            run.evaluated(record.number, result(record, index), 0, final=index == 3)
    assert seen
    assert max(map(len, seen)) >= 5
    for running in seen:
        assert all(trial.params for trial in running)


def finished(count: int, seed: int = 0) -> list[optuna.trial.FrozenTrial]:
    generator = random.Random(seed)
    space: dict[str, optuna.distributions.BaseDistribution] = {"x": optuna.distributions.FloatDistribution(0, 1)}
    trials = []
    for number in range(count):
        x = generator.random()
        complete = number % 3 == 0
        state = optuna.trial.TrialState.COMPLETE if complete else optuna.trial.TrialState.PRUNED
        values = [x + generator.random() / 10, float(generator.randint(1, 10**6))] if complete else None
        trials.append(optuna.trial.create_trial(state=state, values=values, params={"x": x}, distributions=space))
        trials[-1].number = number
    return trials


def test_a_short_history_is_shown_whole() -> None:
    trials = finished(WHOLE)
    assert Memory().choose(trials, DIRECTIONS) == trials


def test_of_a_long_history_the_best_the_latest_and_some_others_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_lengths: list[int] = []

    def ranked(points: Any) -> Any:
        sorted_lengths.append(len(points))
        return history_rank(points)

    history_rank = history.non_dominated_rank
    monkeypatch.setattr(history, "non_dominated_rank", ranked)
    trials = finished(3000)
    memory = Memory()
    for count in range(2001, 3001):
        shown = memory.choose(trials[:count], DIRECTIONS)
        assert len(shown) <= BEST + OTHERS + RECENT + EVERY
    # Everything is sorted once in a while only.
    assert len(sorted_lengths) == 1 + 1000 // EVERY
    numbers = [trial.number for trial in shown]
    assert numbers == sorted(set(numbers))
    assert set(range(3000 - RECENT, 3000)) <= set(numbers)

    def dominated(one: optuna.trial.FrozenTrial) -> bool:
        return any(a.values[0] > one.values[0] and a.values[1] < one.values[1] for a in trials if a.values)

    front = {trial.number for trial in trials if trial.values and not dominated(trial)}
    assert 1 < len(front) < BEST
    assert front <= set(numbers)
    assert any(trial.state is optuna.trial.TrialState.PRUNED for trial in shown[: BEST + OTHERS])


def test_what_is_shown_does_not_depend_on_when_the_driver_was_started() -> None:
    trials = finished(900)
    living = Memory()
    for count in range(401, 901):
        shown = living.choose(trials[:count], DIRECTIONS)
        if count % 90 == 0:
            assert Memory().choose(trials[:count], DIRECTIONS) == shown


def test_tpe_sorts_no_more_than_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def split(study: Any, trials: Any, below: int) -> Any:
        lengths.append(len(trials))
        return optuna_split(study, trials, below)

    optuna_split = optuna.samplers._tpe.sampler._split_trials
    monkeypatch.setattr(optuna.samplers._tpe.sampler, "_split_trials", split)
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.add_trials(finished(1200))
    study.sampler = RememberingTPE(Memory(), seed=1)
    proposed = study.ask().suggest_float("x", 0, 1)
    assert lengths == [BEST + OTHERS + 1200 - (1200 - RECENT) // EVERY * EVERY]
    # It has learnt: a higher x has a better first objective.
    assert proposed > 0.4


def test_a_joint_proposal_looks_at_no_trial_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = open_ledger(tmp_path)
    run = open_run(ledger, trials=10, allocation="joint", scheduler="none")
    looked, made = [], []
    whole, create = Ledger.records, optuna.trial.create_trial

    def records(self: Ledger) -> Any:
        looked.append(1)
        return whole.fget(self)  # type: ignore[attr-defined]

    def counted(**options: Any) -> Any:
        made.append(1)
        return create(**options)

    monkeypatch.setattr(Ledger, "records", property(records))
    monkeypatch.setattr(optuna.trial, "create_trial", counted)
    started = 0
    while (record := run.next_trial()) is not None:
        started += 1
        assert not looked
        for index in range(2):
            run.evaluated(record.number, result(record, index), 0, final=index == 1)
        looked.clear()
    assert started == 3 * 10
    # Once when it is started, once when it has ended.
    assert len(made) <= 2 * started
