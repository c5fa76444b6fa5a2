"""The number of threads is measured once for a study; whoever trains it later computes with the same number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from group_runs import GroupRun, run_group

from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyError, StudyFile
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import Segment, SegmentResult, TrialPlan, WorkerPlan
from peftsearch.training.threads import counts_up_to, fastest, keep_threads, kept_threads
from peftsearch.training.worker import Worker

ADAPTER = {
    "bottleneck": 8,
    "activation": "gelu",
    "placement": "pfeiffer",
    "scale": 4.0,
    "quantization": "none",
    "dropout": 0.1,
    "learning_rate": 5e-3,
}


@pytest.fixture
def plan(write_study: Callable[..., Path], tmp_path: Path) -> StudyPlan:
    path = write_study(methods={"adapter": {}}, resources={"threads_per_worker": "auto"})
    return plan_study(StudyFile.load(path), tmp_path / "cache")


def segment(plan: StudyPlan) -> Segment:
    (model,) = plan.models
    first = plan.budgets["topics", "adapter"].evaluation_steps[0]
    return Segment(TrialPlan(0, model, "topics", "adapter", ADAPTER, 0), first)


def trained(worker: Worker, plan: StudyPlan) -> SegmentResult:
    outcome = worker.do(segment(plan))
    assert isinstance(outcome, SegmentResult), outcome
    return outcome


def warm(plan: WorkerPlan) -> Worker:
    worker = Worker(plan, WorkerGroup())
    worker.warm_up()
    return worker


class Machine:
    """A clock that steps move, by how long they take with so many threads."""

    def __init__(self, seconds: dict[int, float], warm_up: float = 0.0) -> None:
        self.now = 100.0
        self.seconds = seconds
        self.warm_up = warm_up
        self.done: list[int] = []

    def clock(self) -> float:
        return self.now

    def step(self, threads: int) -> None:
        self.now += self.seconds[threads] + (0.0 if threads in self.done else self.warm_up)
        self.done.append(threads)


def test_the_number_with_the_shortest_step_is_taken() -> None:
    machine = Machine({4: 0.03, 2: 0.02, 1: 0.05}, warm_up=0.2)
    found, seconds = fastest([4, 2, 1], machine.step, machine.clock)
    assert found == 2
    assert seconds == pytest.approx(machine.seconds)
    assert machine.now - 100 < 2


def test_where_steps_are_long_every_core_is_taken_after_one_step() -> None:
    machine = Machine({4: 30.0, 2: 20.0, 1: 10.0})
    assert fastest([4, 2, 1], machine.step, machine.clock) == (4, {})
    assert machine.done == [4]


def test_numbers_that_are_compared() -> None:
    assert [counts_up_to(cpus) for cpus in (1, 2, 6, 8)] == [[1], [2, 1], [6, 4, 2, 1], [8, 4, 2, 1]]


def test_of_two_workers_that_measure_at_once_the_first_one_counts(tmp_path: Path) -> None:
    assert kept_threads(tmp_path) is None
    assert keep_threads(tmp_path, 2, {1: 0.2, 2: 0.1}) == 2
    assert keep_threads(tmp_path, 1, {1: 0.1, 2: 0.2}) == 2
    assert kept_threads(tmp_path) == 2


def test_a_worker_measures_where_none_has_and_a_later_one_takes_what_was_found(plan: StudyPlan, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    handed = plan.for_workers(folder, threads=2)
    assert handed.measure_threads
    warm(handed)
    kept = json.loads((folder / "threads.json").read_text())
    assert torch.get_num_threads() == kept["threads"]
    assert kept["threads"] in (1, 2)
    assert kept["seconds per step"].keys() <= {"1", "2"}
    # Also one that has more cores: its sums are the study's.
    (folder / "threads.json").write_text(json.dumps({"threads": 1}))
    warm(plan.for_workers(folder, threads=3))
    assert torch.get_num_threads() == 1


def test_a_worker_with_fewer_cores_than_were_measured_takes_those(plan: StudyPlan, tmp_path: Path) -> None:
    (tmp_path / "threads.json").write_text(json.dumps({"threads": 3}))
    warm(plan.for_workers(tmp_path, threads=2))
    assert torch.get_num_threads() == 2
    # The study's number stays, for workers that have the cores.
    assert kept_threads(tmp_path) == 3


def test_where_memory_is_short_every_core_is_taken(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("peftsearch.training.worker.fastest", too_large)
    warm(plan.for_workers(tmp_path, threads=2))
    assert (torch.get_num_threads(), kept_threads(tmp_path)) == (2, 2)


def test_measuring_changes_neither_the_base_nor_the_trials(plan: StudyPlan, tmp_path: Path) -> None:
    measured = warm(plan.for_workers(tmp_path / "measured", threads=1))
    plain = warm(replace(plan.for_workers(tmp_path / "plain", threads=1), measure_threads=False))
    assert kept_threads(tmp_path / "measured") == 1
    assert kept_threads(tmp_path / "plain") is None
    (model,) = plan.models
    assert measured.base(model).fingerprint() == plain.base(model).fingerprint()
    found, expected = trained(measured, plan), trained(plain, plan)
    assert (found.loss, found.train_loss, found.scores) == (expected.loss, expected.train_loss, expected.scores)


@pytest.mark.slow
def test_the_workers_of_a_group_agree(plan: StudyPlan, tmp_path: Path) -> None:
    handed = plan.for_workers(tmp_path / "study", threads=2)
    answers = run_group(GroupRun(handed, [[segment(plan)]], "ddp")).outcomes
    assert kept_threads(tmp_path / "study") in (1, 2)
    first, second = (answer for (answer,) in answers)
    assert isinstance(first, SegmentResult), first
    assert isinstance(second, SegmentResult), second
    assert first.loss == second.loss


@pytest.mark.parametrize(
    "resources", [{"gpus_per_worker": 1}, {"strategy": "fsdp", "workers_per_trial": 2}], ids=["gpu", "fsdp"]
)
def test_where_there_is_nothing_to_measure_it_is_refused(
    resources: dict[str, object], write_study: Callable[..., Path]
) -> None:
    with pytest.raises(StudyError, match=r"threads_per_worker: auto measures one worker by itself.*leave it out"):
        StudyFile.load(write_study(resources={"threads_per_worker": "auto", **resources}))
