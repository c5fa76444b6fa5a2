"""A ledger takes trials over from another study's: on SQLite and on PostgreSQL, whenever it is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
import pytest

from peftsearch.spec import Reading, Rung, TrialState
from peftsearch.tracking.ledger import Ledger, LedgerCell

CELL = LedgerCell("d/lora/m", "m", "d", "lora", "accuracy", "maximize")
OTHER = LedgerCell("d/full/m", "m", "d", "full", "accuracy", "maximize")


def ask(ledger: Ledger, cell: LedgerCell = CELL, seed: int = 0, **fields: Any) -> Any:
    return ledger.ask(
        cell.key,
        optuna.samplers.RandomSampler(seed=seed),
        lambda trial: {"rank": trial.suggest_int("rank", 1, 64)},
        lambda number, values: {"seed": 0, "trainable_parameters": 10 * values["rank"], **fields},
    )


@pytest.fixture
def old(url: str) -> Ledger:
    """Trials 0 to 4, of which 1 is another cell's and 4 unfinished; one proposal outside the limits, one enqueued."""
    ledger = Ledger(url, "old", [CELL, OTHER])
    ledger.enqueue(CELL.key, [{"rank": rank} for rank in (16, 1, 2, 3, 4)])
    for number, cell in enumerate((CELL, OTHER, CELL, CELL)):
        assert ask(ledger, cell, number).number == number
        ledger.add_rung(number, Rung(step=1, epoch=1, value=0.5 + number / 10, loss=1, train_loss=1, scores={}))
    ledger.complete(0, checkpoint="trials/00000")
    ledger.complete(1)
    ledger.prune(2)
    ledger.fail(3, "broken")
    for seed in (1, 2, 3):
        ledger.add_reading(0, Reading(seed=seed, value=0.6, loss=1.0))
    ledger.set_run_id(0, "a run of the old study")
    assert ask(ledger, constraints={"limit": 1.0}) is None
    assert ask(ledger).number == 4
    return ledger


def take(url: str, old: Ledger, trials: int = 9) -> Ledger:
    new = Ledger(url, "new", [CELL, OTHER])
    new.take_over(CELL.key, old, old.finished(CELL.key)[:trials], range(1, 3))
    return new


def test_finished_trials_come_with_their_numbers_rungs_and_confirmations(url: str, old: Ledger) -> None:
    new = take(url, old)
    assert [record.number for record in new.records] == [0, 2, 3]
    for record in Ledger(url, "new").records:
        before = old.record(record.number)
        same = {"mlflow_run_id", "confirmed"}
        assert record.model_dump(exclude=same) == before.model_dump(exclude=same)
        # Another study, another MLflow experiment.
        assert record.mlflow_run_id is None
    assert new.record(0).confirmed is not None
    assert [reading.seed for reading in new.record(0).confirmed.readings] == [1, 2]
    assert len(old.record(0).confirmed.readings) == 3
    assert (new.infeasible(CELL.key), new.started(CELL.key), new.started(OTHER.key)) == (1, 3, 0)
    assert new.next_number() == 4
    study = optuna.load_study(study_name="new/d/lora/m", storage=url)
    assert [trial.state.name for trial in study.trials] == [
        *("COMPLETE", "PRUNED", "FAIL", "PRUNED", "WAITING"),
    ]
    assert len(study.best_trials) == 1


def test_what_was_unfinished_is_tried_from_its_beginning(url: str, old: Ledger) -> None:
    new = take(url, old)
    assert not new.is_new(CELL.key)
    record = ask(new, seed=99)
    assert (record.number, record.state) == (4, TrialState.RUNNING)
    assert record.hyperparameters == old.record(4).hyperparameters
    assert record.rungs == []


def test_no_more_than_the_new_study_wants(url: str, old: Ledger) -> None:
    assert [record.number for record in take(url, old, trials=2).records] == [0, 2]


def test_taking_over_again_changes_nothing(url: str, old: Ledger) -> None:
    before = take(url, old).records
    assert take(url, old).records == before
    assert len(optuna.load_study(study_name="new/d/lora/m", storage=url).trials) == 5


@pytest.mark.parametrize("writes", [1, 3, 5, 6])
def test_a_driver_that_dies_while_it_takes_over_is_continued(url: str, old: Ledger, writes: int) -> None:
    left = writes

    class Killed(BaseException):
        pass

    def dies() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    new = Ledger(url, "new", [CELL, OTHER])
    new.close()
    guard: Callable[[], None] = dies
    with pytest.raises(Killed):
        Ledger(url, "new", guard=guard).take_over(CELL.key, old, old.finished(CELL.key), range(1, 3))
    continued = take(url, old).records
    assert [record.number for record in continued] == [0, 2, 3]
    states = [trial.state.name for trial in optuna.load_study(study_name="new/d/lora/m", storage=url).trials]
    assert states == ["COMPLETE", "PRUNED", "FAIL", "PRUNED", "WAITING"]
    assert continued[0].confirmed is not None
    assert len(continued[0].confirmed.readings) == 2
