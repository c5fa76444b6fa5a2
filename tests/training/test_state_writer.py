"""States that are written while training goes on: nothing is lost but time, whatever happens on the way."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SAMPLES

from peftsearch.files import StorageError
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training import checkpoint, state_writer
from peftsearch.training.checkpoint import WEIGHTS, saved_steps, sound_states, trial_folder, write_checkpoint
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import Failure, Segment, SegmentResult, TrialPlan
from peftsearch.training.session import TrialSession
from peftsearch.training.state_writer import WRITER, StateWriter, wait_for_state
from peftsearch.training.worker import Worker


@pytest.fixture(autouse=True)
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As large states are written; the tests' are small."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(state_writer, "AT_ONCE", 0)
    yield
    WRITER.wait()
    torch.set_num_threads(threads)


@pytest.fixture
def plan(write_study: Callable[..., Path], tmp_path: Path) -> StudyPlan:
    training = {"epochs": 2, "evaluations": 4, "batch_size": 16, "max_length": 16, "precision": "fp32"}
    return plan_study(StudyFile.load(write_study(methods={"lora": {}}, training=training)), tmp_path / "cache")


def segments(plan: StudyPlan) -> list[Segment]:
    trial = TrialPlan(0, next(iter(plan.models)), "topics", "lora", SAMPLES["lora"] | {"dropout": 0.2}, seed=0)
    steps = plan.budgets["topics", "lora"].evaluation_steps
    return [Segment(trial, step, final=step == steps[-1]) for step in steps]


def numbers(result: object) -> tuple[object, ...]:
    assert isinstance(result, SegmentResult), result
    return result.step, result.loss, result.train_loss, result.scores


def test_a_state_is_what_it_was_when_it_was_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, go_on = state_writer.write_state, threading.Event()

    def slowly(*args: Any) -> None:
        assert go_on.wait(10)
        written(*args)

    monkeypatch.setattr(state_writer, "write_state", slowly)
    writer, tensor = StateWriter(), torch.arange(5.0)
    writer.write(tmp_path, 3, {"x": tensor}, {"step": 3})
    tensor.zero_()
    assert saved_steps(tmp_path) == []
    go_on.set()
    writer.wait()
    ((tensors, _),) = sound_states(tmp_path, 3, "any")
    assert torch.equal(tensors["x"], torch.arange(5.0))


def test_a_storage_that_stumbles_while_old_states_are_deleted_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted, stumbles = checkpoint.delete, iter([OSError("Stale file handle")])

    def stumbling(place: Path) -> None:
        for error in stumbles:
            raise error
        deleted(place)

    monkeypatch.setattr(checkpoint, "delete", stumbling)
    writer = StateWriter()
    for step in range(1, 5):
        writer.write(tmp_path, step, {"x": torch.ones(3)}, {"step": step})
    writer.wait()
    assert saved_steps(tmp_path) == [4, 3]


def test_whatever_goes_wrong_in_the_thread_blames_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(state_writer, "write_state", broken)
    writer = StateWriter()
    writer.write(tmp_path / "trial-7", 3, {"x": torch.ones(3)}, {"step": 3})
    # Of another trial's segment a ValueError would say that its hyperparameters do not fit the model.
    with pytest.raises(StorageError, match="trial-7"):
        writer.wait()


def test_a_state_that_could_not_be_written_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StorageError("cannot write there: No space left on device")

    writer = StateWriter()
    with monkeypatch.context() as patched:
        patched.setattr(state_writer, "write_state", full)
        writer.write(tmp_path, 1, {"x": torch.zeros(1)}, {"step": 1})
        with pytest.raises(StorageError, match="No space left"):
            writer.write(tmp_path, 2, {"x": torch.zeros(1)}, {"step": 2})
    writer.wait()
    writer.write(tmp_path, 3, {"x": torch.zeros(1)}, {"step": 3})
    writer.wait()
    assert saved_steps(tmp_path) == [3]


def test_a_trial_that_was_finished_meanwhile_keeps_no_state(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / WEIGHTS, {"x": torch.zeros(1)}, {})
    writer = StateWriter()
    writer.write(tmp_path, 1, {"x": torch.zeros(1)}, {"step": 1})
    writer.wait()
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS]


def test_the_study_stops_where_states_cannot_be_written(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        raise StorageError(f"cannot write {folder}: No space left on device")

    monkeypatch.setattr(state_writer, "write_state", full)
    worker = Worker(plan.for_workers(tmp_path, threads=1), WorkerGroup())
    first, second, *_ = segments(plan)
    assert isinstance(worker.do(first), SegmentResult)
    outcome = worker.do(second)
    assert isinstance(outcome, Failure)
    assert outcome.of_study
    assert "No space left on device" in outcome.error


DIES = """
import os, pickle, sys, time
from peftsearch.training import checkpoint, state_writer
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.worker import Worker

state_writer.AT_ONCE = 0
written, count = state_writer.write_state, 0

def dies(*args):
    global count
    count += 1
    if count == 2:
        print("writing", flush=True)
        time.sleep(600)
    written(*args)

state_writer.write_state = dies
plan, segments = pickle.load(open(sys.argv[1], "rb"))
worker = Worker(plan, WorkerGroup())
answers = [worker.do(segment) for segment in segments]
sys.stdout.buffer.write(b"answers " + pickle.dumps([(a.step, a.loss, a.train_loss, a.scores) for a in answers]))
sys.stdout.flush()
os._exit(9)
"""


def test_a_worker_that_dies_before_its_state_is_written_loses_no_answer(plan: StudyPlan, tmp_path: Path) -> None:
    worker = Worker(plan.for_workers(tmp_path / "undisturbed", threads=1), WorkerGroup())
    whole = [numbers(worker.do(segment)) for segment in segments(plan)]

    folder = tmp_path / "disturbed"
    handed = tmp_path / "plan.pickle"
    handed.write_bytes(pickle.dumps((plan.for_workers(folder, threads=1), segments(plan)[:2])))
    done = subprocess.run([sys.executable, "-c", DIES, handed], capture_output=True, check=False)
    assert done.returncode == 9, done.stderr.decode()
    answered = pickle.loads(done.stdout.partition(b"answers ")[2])
    # The second segment was answered, and its state is lost.
    assert [step for step, *_ in answered] == [segment.to_step for segment in segments(plan)[:2]]
    assert saved_steps(trial_folder(folder, "00000")) == [segments(plan)[0].to_step]

    again = Worker(plan.for_workers(folder, threads=1), WorkerGroup())
    rest = [numbers(again.do(segment)) for segment in segments(plan)[2:]]
    assert [*answered, *rest] == whole
    assert [file.name for file in trial_folder(folder, "00000").iterdir()] == [WEIGHTS]


def test_a_worker_leaves_when_its_last_state_is_in_its_storage(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has been answered is written in a thread, and Ray Train kills the process of a train loop that has ended."""
    written, go_on = state_writer.write_state, threading.Event()

    def slowly(*args: Any) -> None:
        assert go_on.wait(60)
        written(*args)

    monkeypatch.setattr(state_writer, "write_state", slowly)
    worker = Worker(plan.for_workers(tmp_path / "study", threads=1), WorkerGroup())
    first = segments(plan)[0]
    worker.do(first)
    folder = trial_folder(tmp_path / "study", "00000")
    assert saved_steps(folder) == []
    threading.Timer(0.5, go_on.set).start()
    worker.close()
    assert saved_steps(folder) == [first.to_step]


def test_a_worker_leaves_also_where_its_last_state_cannot_be_written(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(state_writer, "write_state", fails)
    worker = Worker(plan.for_workers(tmp_path / "study", threads=1), WorkerGroup())
    worker.do(segments(plan)[0])
    worker.close()
    assert saved_steps(trial_folder(tmp_path / "study", "00000")) == []


def test_a_trial_goes_on_elsewhere_from_the_state_that_is_still_being_written(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third, *_ = segments(plan)
    whole = Worker(plan.for_workers(tmp_path / "undisturbed", threads=1), WorkerGroup())
    expected = [numbers(whole.do(segment)) for segment in (first, second, third)][-1]

    folder = tmp_path / "two slots"
    one = Worker(plan.for_workers(folder, threads=1), WorkerGroup())
    one.do(first)
    one.do(second)
    WRITER.wait()
    (state,) = trial_folder(folder, "00000").glob(f"*{second.to_step}.safetensors")
    state.rename(tmp_path / "on its way")
    trained: list[int] = []
    monkeypatch.setattr(TrialSession, "catch_up", lambda _, step: trained.append(step))
    arrival = threading.Timer(1.0, lambda: (tmp_path / "on its way").rename(state))
    arrival.start()
    other = Worker(plan.for_workers(folder, threads=1), WorkerGroup())
    result = other.do(replace(third, answered=second.to_step))
    arrival.join()
    assert trained == []
    assert numbers(result) == expected


def test_a_state_that_never_comes_is_not_waited_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_writer, "STATE_SECONDS", 0.5)
    writer = StateWriter()
    writer.write(tmp_path, 4, {"x": torch.ones(1)}, {"step": 4})
    writer.wait()
    began = time.monotonic()
    wait_for_state(tmp_path, 8)
    assert 0.5 <= time.monotonic() - began < 5
