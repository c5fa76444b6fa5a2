"""A worker that is told to leave writes its trial's state at the next step; whoever goes on gives the same numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lone_worker import new_worker, numbers
from tiny_models import SAMPLES

from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training.checkpoint import saved_steps, trial_folder
from peftsearch.training.data_order import DataOrder
from peftsearch.training.segment import HandedBack, Segment, TrialPlan
from peftsearch.training.worker import Worker


@pytest.fixture
def plan(write_study: Callable[..., Path], tmp_path: Path) -> StudyPlan:
    training = {"epochs": 2, "evaluations": 2, "batch_size": 16, "max_length": 16, "precision": "fp32"}
    return plan_study(StudyFile.load(write_study(methods={"lora": {}}, training=training)), tmp_path / "cache")


def segments(plan: StudyPlan) -> list[Segment]:
    # Dropout: the masks after the interruption are those that would have been drawn.
    trial = TrialPlan(0, next(iter(plan.models)), "topics", "lora", SAMPLES["lora"] | {"dropout": 0.2}, seed=0)
    steps = plan.budgets["topics", "lora"].evaluation_steps
    return [Segment(trial, step, final=step == steps[-1]) for step in steps]


def leaving_worker(plan: StudyPlan, folder: Path, steps: int) -> Worker:
    """A worker that is told to leave after some steps."""
    worker = new_worker(plan, folder)
    asked = iter(range(10**6))
    worker.must_leave = lambda: next(asked) >= steps
    return worker


@pytest.mark.parametrize("left", [0, 3])
def test_a_segment_that_is_cut_short_goes_on_elsewhere_to_the_same_numbers(
    left: int, plan: StudyPlan, tmp_path: Path
) -> None:
    first, second = segments(plan)
    undisturbed = new_worker(plan, tmp_path / "undisturbed")
    expected = [numbers(undisturbed.do(first)), numbers(undisturbed.do(second))]

    folder = tmp_path / "disturbed"
    assert leaving_worker(plan, folder, left).do(first) == HandedBack()
    assert saved_steps(trial_folder(folder, "00000"))[0] == left
    found = [numbers(new_worker(plan, folder).do(first))]
    assert leaving_worker(plan, folder, left).do(second) == HandedBack()
    assert saved_steps(trial_folder(folder, "00000"))[0] == first.to_step + left
    # Told a second time, one step further on.
    assert leaving_worker(plan, folder, 1).do(second) == HandedBack()
    found.append(numbers(new_worker(plan, folder).do(second)))
    assert found == expected


@pytest.mark.parametrize("patience", [None, 1])
@pytest.mark.parametrize("batch", [0, 1])
def test_an_evaluation_is_given_up_and_none_of_its_steps(
    batch: int, patience: int | None, write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"epochs": 2, "evaluations": 2, "batch_size": 16, "max_length": 16, "precision": "fp32"}
    training |= {"evaluation_batch_size": 16, "patience": patience}
    plan = plan_study(StudyFile.load(write_study(methods={"lora": {}}, training=training)), tmp_path / "cache")
    first, second = segments(plan)
    undisturbed = new_worker(plan, tmp_path / "undisturbed")
    expected = [numbers(undisturbed.do(first)), numbers(undisturbed.do(second))]

    folder = tmp_path / "disturbed"
    # Once a step, once before the evaluation, and once a batch of it.
    assert leaving_worker(plan, folder, first.to_step + batch).do(first) == HandedBack()
    assert saved_steps(trial_folder(folder, "00000")) == [first.to_step]
    if patience is not None:
        # Where the evaluation was recorded before and is only passed by, early stopping goes by it all the same.
        assert leaving_worker(plan, folder, batch).do(second) == HandedBack()
        assert saved_steps(trial_folder(folder, "00000")) == [first.to_step]
    trained: list[int] = []
    batch_of = DataOrder.batch

    def noted(order: DataOrder, step: int) -> list[int]:
        trained.append(step)
        return batch_of(order, step)

    monkeypatch.setattr(DataOrder, "batch", noted)
    found = [numbers(new_worker(plan, folder).do(first))]
    assert trained == []
    assert leaving_worker(plan, folder, second.to_step - first.to_step + batch).do(second) == HandedBack()
    found.append(numbers(new_worker(plan, folder).do(second)))
    assert found == expected
    assert trained == list(range(first.to_step, second.to_step))


WAITS = """
import os, sys, threading, time
from peftsearch.workers.departure import departure

def loop():
    leaves = departure()
    assert not leaves()
    print("ready", flush=True)
    while not leaves():
        time.sleep(0.01)
    print("left", flush=True)

thread = threading.Thread(target=loop)
thread.start()
thread.join()
"""


def test_a_terminated_worker_leaves_by_itself() -> None:
    """As in a Ray worker: the train loop runs in a thread, and the main thread waits in C."""
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "left\n"
        assert process.wait(30) == 0
    finally:
        process.kill()
