"""Re-training the finalists: every reading once, whatever the driver dies over. A real ledger, invented results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from ledger_kills import Killed, kill_at

from peftsearch.search.confirmation import Confirmations
from peftsearch.search.run import DomainSearch
from peftsearch.spec import Rung, TrialRecord
from peftsearch.tracking import Ledger, LedgerCell
from peftsearch.training.budget import Budget
from peftsearch.training.segment import Failure, Outcome, Segment, SegmentResult
from peftsearch.training.segment import TestReading as ReadTest

BUDGET = Budget(steps_per_epoch=10, evaluation_steps=(10, 20, 30))
DOMAINS = {"d": DomainSearch("accuracy", "maximize", {"lora": BUDGET})}
CELL = LedgerCell("d/lora/m", "m", "d", "lora", "accuracy", "maximize")
SEEDS = range(1, 4)


def open_ledger(folder: Path) -> Ledger:
    ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}", "s", [CELL])
    while len(ledger.records) < 2:
        sampler = optuna.samplers.RandomSampler(seed=0)
        record = ledger.ask(CELL.key, sampler, lambda _: {"rank": 4}, lambda *_: {"seed": 0, "trainable_parameters": 1})
        assert record is not None
        ledger.add_rung(record.number, Rung(step=30, epoch=3, value=0.5, loss=1.0, train_loss=1.0))
        ledger.complete(record.number)
    return ledger


class Slots:
    """Answers segments as a worker does, and remembers what it was asked for."""

    def __init__(self, stops_at: int | None = None, fails: tuple[int, int] | None = None, test: bool = True) -> None:
        self.asked: list[tuple[str, int]] = []
        self.stops_at = stops_at
        self.fails = fails
        self.test = test

    def __call__(self, segment: Segment) -> Outcome:
        trial, step = segment.trial, segment.to_step
        self.asked.append((trial.key, step))
        if (trial.number, trial.seed) == self.fails:
            return Failure("the training loss became nan")
        stopped = step == self.stops_at
        value = trial.number / 10 + trial.seed / 100
        assert segment.read_test
        read = ReadTest(1.2, {"accuracy": value - 0.01}, 40, 2.0, f"trials/{trial.key}/test.jsonl", "2026-01-01")
        last = segment.final or stopped
        test = read if last and self.test else None
        return SegmentResult(step, 1.0, 1.0, {"accuracy": value}, 1.0, 0.5, 10**6, test=test, stopped=stopped)


def confirmations(ledger: Ledger, folder: Path, **options: Any) -> Confirmations:
    return Confirmations(ledger.records, SEEDS, DOMAINS, ledger, folder, **options)


def drive(found: Confirmations, slots: Callable[[Segment], Outcome]) -> None:
    while (segment := found.next()) is not None:
        following: Segment | None = segment
        while following is not None:
            following = found.answered(following, slots(following))


class Heard:
    def __init__(self) -> None:
        self.records: list[TrialRecord] = []

    def trial_changed(self, record: TrialRecord) -> None:
        self.records.append(record)


def test_every_finalist_is_trained_again_with_every_seed_segment_by_segment(tmp_path: Path) -> None:
    ledger, slots, heard = open_ledger(tmp_path), Slots(), Heard()
    found = confirmations(ledger, tmp_path, observers=[heard])
    assert (found.planned, found.done, found.finished) == (6, 0, False)
    drive(found, slots)
    keys = [f"{number:05d}-seed{seed}" for seed in SEEDS for number in (0, 1)]
    assert slots.asked == [(key, step) for key in keys for step in (10, 20, 30)]
    assert found.finished
    assert len(heard.records) == 6
    confirmed = Ledger(ledger.url, "s").record(1).confirmed
    assert confirmed is not None
    assert confirmed == heard.records[-1].confirmed
    assert confirmed.mean == pytest.approx(0.12)
    assert confirmed.std == pytest.approx(0.01)
    assert confirmed.test_mean == pytest.approx(0.11)
    first = confirmed.readings[0]
    assert (first.seed, first.steps, first.train_seconds, first.evaluation_seconds) == (1, 30, 3.0, 1.5)
    assert (first.test, first.test_loss, first.test_examples) == (pytest.approx(0.1), 1.2, 40)
    assert first.examples_per_second == 20.0
    assert first.predictions == "trials/00001-seed1/test.jsonl"


def test_a_domain_without_a_test_split_is_confirmed_on_validation(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    drive(confirmations(ledger, tmp_path), Slots(test=False))
    confirmed = ledger.record(0).confirmed
    assert confirmed is not None
    assert confirmed.seeds == 3
    assert confirmed.test_mean is None
    assert confirmed.readings[0].read_at is None


def test_early_stopping_ends_a_retraining_with_its_reading(tmp_path: Path) -> None:
    ledger, slots = open_ledger(tmp_path), Slots(stops_at=20)
    drive(confirmations(ledger, tmp_path), slots)
    assert {step for _, step in slots.asked} == {10, 20}
    confirmed = ledger.record(0).confirmed
    assert confirmed is not None
    assert [(item.steps, item.test is not None) for item in confirmed.readings] == [(20, True)] * 3


def test_a_failure_is_recorded_and_said_and_the_others_go_on(tmp_path: Path) -> None:
    ledger, warnings = open_ledger(tmp_path), []
    found = confirmations(ledger, tmp_path, warn=warnings.append)
    drive(found, Slots(fails=(1, 2)))
    assert (found.done, found.failed, found.finished) == (5, 1, True)
    assert warnings == ["trial 1 (lora, d) could not be confirmed with seed 2: the training loss became nan"]
    again = open_ledger(tmp_path)
    assert again.failed_confirmations(1) == {2: "the training loss became nan"}
    confirmed = again.record(1).confirmed
    assert confirmed is not None
    assert [item.seed for item in confirmed.readings] == [1, 3]
    # It is not tried again.
    assert confirmations(again, tmp_path).finished


@pytest.mark.parametrize("write", ["add_reading", "set_confirming", "fail_confirmation"])
def test_a_driver_killed_at_any_write_goes_on_without_reading_again(write: str, tmp_path: Path) -> None:
    (tmp_path / "quiet").mkdir()
    quiet = open_ledger(tmp_path / "quiet")
    drive(confirmations(quiet, tmp_path), Slots(fails=(0, 3)))
    (tmp_path / "killed").mkdir()
    slots = Slots(fails=(0, 3))
    for when in ("before", "after"):
        for nth in (1, 2, 3):
            ledger = open_ledger(tmp_path / "killed")
            kill_at(ledger, write, nth, when)
            with contextlib.suppress(Killed):
                drive(confirmations(ledger, tmp_path), slots)
    ledger = open_ledger(tmp_path / "killed")
    drive(confirmations(ledger, tmp_path), slots)
    assert [essence(record) for record in ledger.records] == [essence(record) for record in quiet.records]
    # What had been recorded was not asked for again: a segment comes twice only if the driver died before noting it.
    again = {item for item in slots.asked if slots.asked.count(item) > 1}
    assert len(slots.asked) - len(set(slots.asked)) <= 3, again


def essence(record: TrialRecord) -> list[tuple[int, float, float | None, int]]:
    assert record.confirmed is not None
    return [(item.seed, item.value, item.test, item.steps) for item in record.confirmed.readings]


def test_weights_of_a_retraining_go_once_it_is_recorded_and_predictions_stay(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    original = tmp_path / "trials" / "00000" / "weights.safetensors"
    folder = tmp_path / "trials" / "00000-seed1"
    for file in (original, folder / "weights.safetensors", folder / "test.jsonl"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    drive(confirmations(ledger, tmp_path), Slots())
    assert original.exists()
    assert [item.name for item in folder.iterdir()] == ["test.jsonl"]
