"""A slot's loop with several trials at once, against a real dispatcher actor; no Ray Train or Tune around it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_models import SAMPLES

from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.packing_key import pack_key
from peftsearch.training.segment import Failure, Probe, ProbeResult, Segment, SegmentResult, TrialPlan
from peftsearch.training.worker import Worker
from peftsearch.workers.pool import SlotPool
from peftsearch.workers.slot_plan import SlotPlan

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    from peftsearch.workers.pool import quiet_ray_environment

    quiet_ray_environment()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def plan(write_study: Callable[..., Path], tmp_path: Path) -> StudyPlan:
    training = {"epochs": 2, "evaluations": 2, "batch_size": 16, "max_length": 16, "precision": "fp32"}
    methods: dict[str, Any] = {method: {} for method in ("lora", "adapter", "prompt", "full")}
    path = write_study(methods=methods, training=training, resources={"pack": 3, "slots": 1})
    return plan_study(StudyFile.load(path), tmp_path / "cache")


def segments(plan: StudyPlan, number: int, method: str) -> list[Segment]:
    trial = TrialPlan(number, next(iter(plan.models)), "topics", method, SAMPLES[method], seed=number)
    steps = plan.budgets["topics", method].evaluation_steps
    return [Segment(trial, step, final=step == steps[-1]) for step in steps]


class Running:
    """A dispatcher, and a slot's loop in a thread of this process."""

    def __init__(self, plan: StudyPlan, folder: Path, **options: Any) -> None:
        import ray

        from peftsearch.workers.packing import Sizes
        from peftsearch.workers.pool import _DispatcherActor
        from peftsearch.workers.slot import _lead_several, _Link

        handed = plan.for_workers(folder, threads=1)
        assert handed.pack == 3
        sizes = Sizes(partial(pack_key, handed), options.get("pack", handed.pack))
        # Called from several threads at once, as trial actors do.
        self.dispatcher = ray.remote(_DispatcherActor).options(num_cpus=0, max_concurrency=100).remote(2, sizes)
        self.worker = Worker(handed, WorkerGroup())
        self.leave = threading.Event()
        self.worker.must_leave = self.leave.is_set
        link = _Link(self.dispatcher, 0)
        ray.get(self.dispatcher.join.remote(0, link.incarnation))
        ray.get(self.dispatcher.warm.remote(0, link.incarnation, {}))
        self.thread = threading.Thread(target=_lead_several, args=(self.worker, link))
        self.thread.start()

    def ask(self, *works: Any) -> list[Any]:
        import ray

        answers = [self.dispatcher.submit.remote(work) for work in works]
        return [outcome for outcome, _ in ray.get(answers, timeout=120)]

    def stop(self) -> None:
        import ray

        ray.get(self.dispatcher.stop.remote())
        self.thread.join(30)
        assert not self.thread.is_alive()
        ray.kill(self.dispatcher)


def test_a_slot_trains_what_packs_together_and_the_rest_alone(cluster: None, plan: StudyPlan, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    running = Running(plan, tmp_path / "packed")
    methods = ["lora", "adapter", "full", "prompt", "lora"]
    asked = [segments(plan, number, method) for number, method in enumerate(methods)]
    (model,) = plan.models
    try:
        *first, guessed = running.ask(*(own[0] for own in asked), Probe(model, "topics"))
        second = running.ask(*(own[1] for own in asked))
    finally:
        running.stop()
        torch.set_num_threads(threads)
    assert isinstance(guessed, ProbeResult)
    # Four of them pack, three at once; nobody waits for more than one round.
    assert max(result.together for result in first) > 2
    assert [result.together for result in first if result.train_loss == first[2].train_loss] == [1.0]
    alone = Worker(plan.for_workers(tmp_path / "alone", threads=1), WorkerGroup())
    for number, own in enumerate(asked):
        for segment, found in zip(own, (first[number], second[number]), strict=True):
            expected = alone.do(segment)
            assert isinstance(found, SegmentResult), found
            assert isinstance(expected, SegmentResult)
            assert found.step == expected.step
            # The tiny base has dropout, which a pack draws otherwise.
            if methods[number] == "full":
                assert (found.loss, found.train_loss) == (expected.loss, expected.train_loss)
            else:
                assert found.train_loss == pytest.approx(expected.train_loss, rel=0.2)
    torch.set_num_threads(threads)


def test_a_slot_that_must_leave_hands_back_all_that_it_has(cluster: None, plan: StudyPlan, tmp_path: Path) -> None:
    import ray

    running = Running(plan, tmp_path / "packed")
    asked = [segments(plan, number, "lora")[1] for number in range(3)]
    answers = [running.dispatcher.submit.remote(segment) for segment in asked]
    while not ray.get(running.dispatcher.status.remote())["busy"]:
        time.sleep(0.01)
    running.leave.set()
    running.thread.join(60)
    assert not running.thread.is_alive()
    status = ray.get(running.dispatcher.status.remote())
    done = len(ray.wait(answers, num_returns=3, timeout=1)[0])
    assert (status["queued"], status["busy"]) == (3 - done, 0)
    ray.kill(running.dispatcher)


def test_a_trial_that_fails_takes_nobody_along(cluster: None, plan: StudyPlan, tmp_path: Path) -> None:
    running = Running(plan, tmp_path / "packed")
    good = segments(plan, 0, "lora")[0]
    trial = TrialPlan(1, good.trial.model, "topics", "lora", SAMPLES["lora"] | {"targets": "nowhere"}, 0)
    try:
        found, failed = running.ask(good, Segment(trial, good.to_step))
    finally:
        running.stop()
    assert isinstance(found, SegmentResult)
    assert isinstance(failed, Failure)
    assert "nowhere" in failed.error


def test_a_slot_starts_no_more_than_it_needs(cluster: None, plan: StudyPlan, tmp_path: Path) -> None:
    """No coordinator for an autoscaler that is not there; and one worker on a CPU needs no torch in its controller."""
    from ray._private import state

    pool = SlotPool(plan.for_workers(tmp_path, threads=1), SlotPlan(1, 1, 1, 0.0), 2, tmp_path / "ray", embedded=True)
    pool.start()
    try:
        pool.wait_ready(lambda: False)
        living = [actor for actor in state.actors().values() if actor["State"] == "ALIVE"]
        assert "AutoscalingCoordinator" not in [actor["Name"] for actor in living]
        (controller,) = [actor for actor in living if "TrainController" in actor["ActorClassName"]]
        (worker,) = [actor for actor in living if "RayTrainWorker" in actor["ActorClassName"]]
        assert "libtorch" not in maps(controller["Pid"])
        assert "libtorch" in maps(worker["Pid"])
    finally:
        pool.stop()
    # Before the cluster goes down.
    assert not psutil.pid_exists(controller["Pid"])
    assert "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S" not in os.environ


def maps(pid: int) -> str:
    """What files a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()
