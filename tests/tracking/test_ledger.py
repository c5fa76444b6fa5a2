"""The ledger holds what it was told, across processes and crashes: on SQLite and on PostgreSQL."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import optuna
import pytest

from peftsearch.spec import Reading, Rung, StudyError, TrialState
from peftsearch.tracking.ledger import Ledger, LedgerCell, Owner, hide_password

CELL = LedgerCell("d/lora/m", "m", "d", "lora", "accuracy", "maximize")
OTHER = LedgerCell("d/full/m", "m", "d", "full", "accuracy", "maximize")


def open_ledger(url: str, *cells: LedgerCell) -> Ledger:
    return Ledger(url, "s", cells or (CELL, OTHER))


def ask(ledger: Ledger, cell: LedgerCell = CELL, seed: int = 0, **fields: Any) -> Any:
    return ledger.ask(
        cell.key,
        optuna.samplers.RandomSampler(seed=seed),
        lambda trial: {"rank": trial.suggest_int("rank", 1, 64), "alpha": 32.0},
        lambda number, values: {"seed": 0, "trainable_parameters": 10 * values["rank"], **fields},
    )


def rung(step: int, value: float = 0.5, **scores: float) -> Rung:
    return Rung(step=step, epoch=step / 10, value=value, loss=1.0, train_loss=1.0, train_seconds=2.0, scores=scores)


def test_everything_is_there_after_reopening(url: str) -> None:
    ledger = open_ledger(url)
    done, pruned, failed, running = (ask(ledger, seed=n).number for n in range(4))
    ledger.add_rung(done, rung(1, 0.4))
    ledger.add_rung(done, rung(2, 0.6), peak_memory_bytes=123)
    ledger.complete(done, checkpoint="trials/00000")
    ledger.add_rung(pruned, rung(1, 0.1))
    ledger.prune(pruned)
    ledger.fail(failed, "out of memory")
    ledger.add_rung(running, rung(1, 0.3))
    ledger.set_run_id(done, "run-of-a-finished-trial")
    before = ledger.records
    ledger.close()

    after = Ledger(url, "s").records
    assert after == before
    assert [record.state for record in after] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAILED,
        TrialState.RUNNING,
    ]
    first = after[0]
    assert (first.value, first.train_seconds, first.peak_memory_bytes) == (0.6, 4.0, 123)
    assert first.mlflow_run_id == "run-of-a-finished-trial"
    assert first.hyperparameters["alpha"] == 32.0
    assert after[2].error == "out of memory"


def test_optuna_sees_pruned_trials_as_pruned_and_never_on_its_front(url: str) -> None:
    ledger = open_ledger(url)
    complete, pruned = ask(ledger, seed=1).number, ask(ledger, seed=2).number
    ledger.add_rung(complete, rung(1, 0.2))
    ledger.complete(complete)
    ledger.add_rung(pruned, rung(1, 0.99))
    ledger.prune(pruned)
    study = optuna.load_study(study_name="s/d/lora/m", storage=url)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert [trial.number for trial in study.best_trials] == [0]
    assert study.metric_names == ["accuracy", "trainable_parameters"]


def test_numbers_run_through_all_cells(url: str) -> None:
    ledger = open_ledger(url)
    assert [ask(ledger, cell).number for cell in (CELL, OTHER, CELL, OTHER)] == [0, 1, 2, 3]
    assert ledger.started(CELL.key) == ledger.started(OTHER.key) == 2


def test_a_rung_is_recorded_once(url: str) -> None:
    ledger = open_ledger(url)
    number = ask(ledger).number
    ledger.add_rung(number, rung(1, 0.4))
    ledger.add_rung(number, rung(1, 0.9))
    assert [item.value for item in ledger.record(number).rungs] == [0.4]


def test_an_ended_trial_stays_as_it_ended(url: str) -> None:
    ledger = open_ledger(url)
    number = ask(ledger).number
    ledger.prune(number)
    ledger.fail(number, "late news")
    assert ledger.record(number).state is TrialState.PRUNED


def test_scores_of_single_classes_are_kept_for_the_last_rung(url: str) -> None:
    ledger = open_ledger(url)
    number = ask(ledger).number
    for step in (1, 2):
        ledger.add_rung(number, rung(step, accuracy=0.5, **{"f1/a": 0.1 * step}))
    assert [set(item.scores) for item in ledger.record(number).rungs] == [{"accuracy"}, {"accuracy", "f1/a"}]


def test_a_trial_that_was_asked_for_but_never_recorded_is_taken_up_again(url: str) -> None:
    """A driver killed between Optuna's answer and its own note must not lose a prior, nor count a trial twice."""
    ledger = open_ledger(url)
    ledger.enqueue(CELL.key, [{"rank": 16}])

    class Killed(BaseException):
        pass

    def dies(number: int, values: dict[str, Any]) -> dict[str, Any]:
        raise Killed

    with pytest.raises(Killed):
        ledger.ask(
            CELL.key,
            optuna.samplers.RandomSampler(seed=0),
            lambda trial: {"rank": trial.suggest_int("rank", 1, 64)},
            dies,
        )
    again = open_ledger(url)
    assert again.records == []
    record = ask(again)
    assert (record.number, record.hyperparameters["rank"]) == (0, 16)
    assert len(optuna.load_study(study_name="s/d/lora/m", storage=url).trials) == 1


def test_a_cell_that_was_left_half_made_is_finished(url: str) -> None:
    """A driver killed between creating a cell's Optuna study and describing it."""
    optuna.create_study(storage=url, study_name="s/d/lora/m", directions=["maximize", "minimize"])
    assert ask(open_ledger(url)).number == 0
    assert len(Ledger(url, "s").records) == 1


def test_a_configuration_that_does_not_fit_is_failed_at_once(url: str) -> None:
    ledger = open_ledger(url)
    record = ask(ledger, error="rank 64 exceeds the layer")
    assert record.state is TrialState.FAILED
    assert Ledger(url, "s").records[0].error == "rank 64 exceeds the layer"


def test_two_studies_share_a_storage_without_meeting(url: str) -> None:
    ask(open_ledger(url))
    assert Ledger(url, "other", [CELL]).records == []


@pytest.mark.parametrize("bad", ["nonsense", "sqlite:////proc/no/such/place.db", "postgresql://u:secret@127.0.0.1:1/x"])
def test_a_storage_that_cannot_be_opened_is_one_sentence_without_its_password(bad: str) -> None:
    with pytest.raises(StudyError, match="cannot open the ledger") as caught:
        Ledger(bad, "s", [CELL])
    assert "secret" not in str(caught.value)


def test_passwords_are_hidden() -> None:
    assert hide_password("postgresql://me:secret@db/x") == "postgresql://me:***@db/x"


def reading(seed: int, value: float = 0.6) -> Reading:
    return Reading(seed=seed, value=value, loss=1.0, test=value - 0.1, read_at="2026-01-01T12:00:00.000+00:00")


def test_a_score_that_is_no_number_is_a_reading_like_others(url: str) -> None:
    """A model may give the same score to every pair of the test split: then there is no correlation."""
    ledger = open_ledger(url)
    number = ask(ledger).number
    ledger.add_rung(number, rung(1, 0.5))
    ledger.complete(number)
    for seed, test in enumerate((0.5, math.nan, math.inf), start=1):
        ledger.add_reading(number, reading(seed).model_copy(update={"test": test}))
    ledger.close()
    confirmed = Ledger(url, "s").record(number).confirmed
    assert confirmed is not None
    assert confirmed.mean == pytest.approx(0.6)
    assert confirmed.std == 0.0
    assert confirmed.test_mean is not None
    assert not math.isfinite(confirmed.test_mean)
    assert confirmed.test_std is not None
    assert math.isnan(confirmed.test_std)


def test_readings_are_recorded_after_the_trials_end_and_only_once(url: str) -> None:
    ledger = open_ledger(url)
    number = ask(ledger).number
    other = ask(ledger).number
    ledger.add_rung(number, rung(1, 0.5))
    ledger.complete(number)
    ledger.add_reading(number, reading(2, 0.7))
    ledger.add_reading(number, reading(1, 0.6))
    record = ledger.add_reading(number, reading(2, 0.99))
    assert record.confirmed is not None
    assert [(item.seed, item.value) for item in record.confirmed.readings] == [(1, 0.6), (2, 0.7)]
    assert record.confirmed.test_mean == pytest.approx(0.55)
    ledger.set_confirming(number, 3, {"step": 4, "train_seconds": 1.5})
    ledger.fail_confirmation(number, 4, "the training loss became nan")
    record = ledger.record(number)
    assert record.failed_confirmations == {4: "the training loss became nan"}
    ledger.close()

    again = Ledger(url, "s")
    assert again.record(number) == record
    assert again.record(other).confirmed is None
    assert again.confirming(number, 3) == {"step": 4, "train_seconds": 1.5}
    assert again.confirming(number, 1) == {}
    assert again.failed_confirmations(number) == {4: "the training loss became nan"}
    study = optuna.load_study(study_name="s/d/lora/m", storage=url)
    assert study.user_attrs[f"reading:{number}:1"]["read_at"] == "2026-01-01T12:00:00.000+00:00"


def test_a_proposal_outside_the_limits_is_infeasible_and_no_trial(url: str) -> None:
    ledger = open_ledger(url)
    assert ask(ledger, constraints={"max_parameters": 0.5}) is None
    assert ledger.records == []
    assert (ledger.started(CELL.key), ledger.infeasible(CELL.key), ledger.infeasible(CELL.key, 0)) == (0, 1, 1)
    record = ask(ledger, seed=1, constraints={"max_parameters": -0.5})
    assert (record.number, record.state) == (0, TrialState.RUNNING)
    ledger.add_rung(0, rung(1))
    ledger.complete(0)
    study = optuna.load_study(study_name="s/d/lora/m", storage=url)
    assert [trial.constraints for trial in study.trials] == [{"max_parameters": 0.5}, {"max_parameters": -0.5}]
    assert [trial.number for trial in study.best_trials] == [1]
    again = Ledger(url, "s")
    assert again.records == ledger.records
    assert again.infeasible(CELL.key, 0) == 1
    assert again.infeasible(CELL.key, 1) == 0


def test_first_guesses_that_a_driver_died_over_are_enqueued_to_the_end(url: str) -> None:
    guesses = [{"rank": rank} for rank in (3, 5, 7)]
    ledger = open_ledger(url)
    ledger.enqueue(CELL.key, guesses[:2])
    again = open_ledger(url)
    assert again.is_new(CELL.key)
    again.enqueue(CELL.key, guesses)
    assert [ask(again, seed=seed).hyperparameters["rank"] for seed in range(3)] == [3, 5, 7]
    assert not again.is_new(CELL.key)


def test_another_study_of_the_same_name_is_told_where_this_one_lives(url: str) -> None:
    mine, theirs = Owner("1", "here:/storage"), Owner("2", "there:/other")
    ask(Ledger(url, "s", [CELL], owner=mine))
    for cells in ([], [CELL]):
        with pytest.raises(StudyError, match=r"'s', which lives in here:/storage.*--name"):
            Ledger(url, "s", cells, owner=theirs)
    # A storage that was moved is the same study, and says where it lives now.
    assert len(Ledger(url, "s", [CELL], owner=Owner("1", "here:/moved")).records) == 1
    with pytest.raises(StudyError, match="here:/moved"):
        Ledger(url, "s", owner=theirs)
    assert Ledger(url, "other", [CELL], owner=theirs).records == []


def test_a_cell_that_a_driver_died_over_before_it_was_signed_belongs_to_the_next_one(url: str) -> None:
    open_ledger(url)
    assert ask(Ledger(url, "s", [CELL], owner=Owner("1", "here"))).number == 0


def test_who_may_not_write_any_more_writes_nothing(url: str) -> None:
    class LostError(Exception):
        pass

    allowed = True

    def guard() -> None:
        if not allowed:
            raise LostError

    ledger = Ledger(url, "s", [CELL], guard=guard)
    number = ask(ledger).number
    before = Ledger(url, "s").records
    allowed = False
    writes: list[Callable[[], Any]] = [
        lambda: ask(ledger),
        lambda: ledger.add_rung(number, rung(1)),
        lambda: ledger.prune(number),
        lambda: ledger.set_run_id(number, "run"),
        lambda: ledger.enqueue(CELL.key, [{"rank": 1}] * 9),
    ]
    for write in writes:
        with pytest.raises(LostError):
            write()
    assert isinstance(ledger.failure, LostError)
    assert Ledger(url, "s").records == before


def test_a_new_ledger_can_be_opened_by_several_at_once(url: str) -> None:
    # Somebody asks for the status of a study that is just being started.
    together = threading.Barrier(6)

    def opened(_: int) -> int:
        together.wait()
        with closing(Ledger(url, "s")) as ledger:
            return len(ledger.records)

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(opened, range(6))) == [0] * 6
