"""Starting and stopping the slots of a study: one Ray Train run each, beside one dispatcher."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftsearch.spec import ResourcesSpec, StudyError
from peftsearch.training.segment import WorkerPlan
from peftsearch.workers.dispatcher import Dispatcher
from peftsearch.workers.slot import slot_loop

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlotPlan:
    """How many slots there are, and what each of their workers takes.

    Attributes:
        slots: Number of worker groups.
        workers: Workers per group.
        cpus: CPUs (and threads) per worker.
        gpus: GPUs per worker.
    """

    slots: int
    workers: int
    cpus: int
    gpus: float

    @classmethod
    def fit(cls, resources: ResourcesSpec, nodes: list[dict[str, float]]) -> SlotPlan:
        """Choose what the study file leaves open, so that the slots fill the cluster.

        Args:
            resources: The study file's section.
            nodes: Ray's resources of every live node.

        Raises:
            StudyError: The cluster cannot hold a single slot.
        """
        workers, gpus = resources.workers_per_trial, resources.gpus_per_worker
        node_cpus = [int(node.get("CPU", 0)) for node in nodes]
        node_gpus = [node.get("GPU", 0.0) for node in nodes]
        if gpus and sum(node_gpus) < gpus * workers:
            raise StudyError(
                f"a trial needs {gpus * workers:g} GPUs and the cluster has {sum(node_gpus):g}: "
                "lower resources.gpus_per_worker or resources.workers_per_trial",
                ("resources", "gpus_per_worker"),
            )
        cpus = resources.cpus_per_worker
        if cpus is None:
            if gpus:
                shares = [c / (g / gpus) for c, g in zip(node_cpus, node_gpus, strict=True) if g >= gpus]
                cpus = max(1, min(8, int(min(shares, default=1))))
            else:
                cpus = max(1, max(node_cpus, default=1) // workers)
        fitting = sum(
            int(min(c // cpus, g // gpus if gpus else c // cpus)) for c, g in zip(node_cpus, node_gpus, strict=True)
        )
        if fitting < workers:
            raise StudyError(
                f"a trial needs {workers} workers with {cpus} CPUs each and the cluster has {sum(node_cpus)} CPUs: "
                "lower resources.cpus_per_worker or resources.workers_per_trial",
                ("resources", "cpus_per_worker"),
            )
        slots = fitting // workers if resources.slots == "auto" else resources.slots
        if slots * workers > fitting:
            raise StudyError(
                f"{slots} slots do not fit: the cluster holds {fitting // workers} of them (or write slots: auto)",
                ("resources", "slots"),
            )
        return cls(slots=slots, workers=workers, cpus=cpus, gpus=gpus)


class SlotPool:
    """The slots of one study.

    Args:
        plan: What the workers need to know.
        slots: Their number and size.
        max_retries: See `Dispatcher`.
        folder: Where Ray Train keeps its run's state; on shared storage where there are several machines.
    """

    def __init__(self, plan: WorkerPlan, slots: SlotPlan, max_retries: int, folder: Path) -> None:
        self.plan = plan
        self.slots = slots
        self.max_retries = max_retries
        self.folder = folder
        self.dispatcher: Any = None
        self.errors: list[str] = []
        self._threads: list[threading.Thread] = []
        self._stopping = False

    def start(self) -> None:
        """Start the dispatcher and all slots; returns at once, while they warm up."""
        import ray

        # Imported here, in the caller's thread: two threads that import parts of Ray at once trip over its cycles.
        import ray.train.torch

        # The dispatcher lives with the driver: on the head node, which outlives spot workers.
        here = ray.get_runtime_context().get_node_id()
        self.dispatcher = (
            ray.remote(Dispatcher)
            .options(
                num_cpus=0,
                max_concurrency=10_000,
                scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False),
            )
            .remote(self.max_retries)
        )
        for slot in range(self.slots.slots):
            thread = threading.Thread(target=self._run_slot, args=(slot,), name=f"slot-{slot}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def wait_ready(self, stopped: Callable[[], bool]) -> None:
        """Wait until a first slot is warm (the others join when they are), none can be, or somebody asked to stop."""
        import ray

        pending = self.dispatcher.wait_ready.remote()
        while not self.lost() and not stopped():
            ready, _ = ray.wait([pending], timeout=0.5)
            if ready:
                return

    def lost(self) -> bool:
        """Whether every slot has left for good though nobody told it to: nothing would ever be trained again."""
        return not self._stopping and not any(thread.is_alive() for thread in self._threads)

    def why_lost(self) -> str:
        """The reason, in one sentence."""
        import ray

        try:
            reasons = ray.get(self.dispatcher.status.remote(), timeout=10)["unusable"]
        except Exception:  # the cluster is gone, and the dispatcher with it
            reasons = []
        return f"no slot can work: {([*self.errors, *reasons] or ['their Ray Train runs ended'])[-1]}"

    def stop(self, timeout: float = 30.0) -> None:
        """Tell the slots to leave, and wait for them."""
        import ray

        self._stopping = True
        if self.dispatcher is None:
            return
        try:
            ray.get(self.dispatcher.stop.remote(), timeout=timeout)
        except Exception as error:  # the dispatcher may be gone; then the slots fail and leave by themselves
            log.warning("the dispatcher did not answer: %s", error)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        ray.kill(self.dispatcher)

    def _run_slot(self, slot: int) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        resources: dict[str, float] = {"CPU": self.slots.cpus}
        if self.slots.gpus:
            resources["GPU"] = self.slots.gpus
        trainer = TorchTrainer(
            slot_loop,
            train_loop_config={"plan": self.plan, "slot": slot, "dispatcher": self.dispatcher},
            scaling_config=ScalingConfig(
                num_workers=self.slots.workers, use_gpu=self.slots.gpus > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=f"slot-{slot}",
                storage_path=str(self.folder),
                failure_config=FailureConfig(max_failures=-1),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            if not self._stopping:
                log.exception("slot %d ended", slot)
                self.errors.append(str(error))


def quiet_ray_environment() -> None:
    """Settings of Ray that the environment does not already decide; call before ``ray.init``."""
    for name, value in {
        # Metrics of Train's controllers cost a thread each and are not read by anybody here.
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        # OpenMP threads that wait for work by spinning take the cores from the driver, the other slots and whatever
        # else runs here: on two contended cores a step with two threads took up to ten times as long (ran).
        "OMP_WAIT_POLICY": "PASSIVE",
        # Without this Ray overrides CUDA_VISIBLE_DEVICES of processes that ask for no GPU, and warns about it.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Controllers, dispatcher and trial actors are processes without a CPU of their own; with as few cores as a
        # laptop's Ray takes their number for a mistake and says so on standard output.
        "RAY_worker_maximum_startup_concurrency": "16",
    }.items():
        os.environ.setdefault(name, value)
