"""A slot as a run of Ray Train, with what a slot needs of it: each part that is left out costs a process, or seconds of
imports in one, for every slot.

What is changed here is private to Ray (2.60); `tests/workers/test_packing_slot.py` says what has to hold.
"""

from __future__ import annotations

from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import BackendConfig
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from peftsearch.files import Place, filesystem, is_local
from peftsearch.workers.cluster_state import needed_callbacks
from peftsearch.workers.slot import slot_loop
from peftsearch.workers.slot_plan import SlotPlan


class WithoutAutoscaler(FixedScalingPolicy):  # type: ignore[misc]
    """A fixed number of workers, of which no autoscaler is told: Ray Train's own starts a detached actor for that,
    which imports Ray Data, and its controller waits for it."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Without the request that the autoscaler would get."""

    def _maybe_send_resource_request(self) -> None:
        pass


class SlotTrainer(DataParallelTrainer):  # type: ignore[misc]
    """The run of one slot.

    Args:
        slots: How large it is.
        number: Its number.
        config: What `slot_loop` gets.
        folder: Where Ray Train keeps its run's state.
        embedded: Whether the cluster is the study's own, which has no autoscaler.
    """

    def __init__(self, slots: SlotPlan, number: int, config: dict[str, Any], folder: Place, *, embedded: bool) -> None:
        resources: dict[str, float] = {"CPU": slots.cpus}
        if slots.gpus:
            resources["GPU"] = slots.gpus
        if slots.memory:
            # So that a cluster's slots are spread over its machines as they were counted.
            resources["memory"] = slots.memory
        system, path = filesystem(folder)
        self._embedded = embedded
        super().__init__(
            slot_loop,
            train_loop_config=config,
            backend_config=_backend(slots),
            scaling_config=ScalingConfig(
                num_workers=slots.workers, use_gpu=slots.gpus > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=f"slot-{number}",
                storage_path=path,
                storage_filesystem=None if is_local(folder) else system,
                # Workers that die are Ray Train's to start again; a group that finds no room is ours.
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=0),
            ),
        )

    def _create_default_callbacks(self) -> list[Any]:
        return needed_callbacks(super()._create_default_callbacks())

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        if self._embedded:
            given["scaling_policy"] = WithoutAutoscaler(self.scaling_config)
        return super()._initialize_and_run_controller(**given)


def _backend(slots: SlotPlan) -> BackendConfig:
    """What lets the workers of a slot find each other, and their GPUs; a single one on CPUs needs neither, and then
    Ray Train's controller need not import torch."""
    if slots.workers == 1 and not slots.gpus:
        return BackendConfig()
    from peftsearch.workers.process_group import SlotTorchConfig

    return SlotTorchConfig()
