"""A Ray cluster's machines, those that may come, and what Ray leaves behind when a helper of its own is killed.

Most of these are Ray's private interfaces: its public ones (`ray.util.state`) need the dashboard, which an embedded
cluster does not run and a locked-down one may not reach.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import psutil

from peftsearch.workers.slot_plan import Node

_COORDINATOR = "AutoscalingCoordinator"
"""Name and namespace of a detached actor that Ray Train starts on a cluster with its first run, and never ends."""


def live_nodes() -> dict[str, Node]:
    """Ray's resources of every live node, by its id."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def nodes_to_come() -> list[Node]:
    """The machines that the cluster's autoscaler may add; [] where there is no autoscaler."""
    from ray._private import state

    config = state.state.get_cluster_config()
    if config is None:
        return []
    # A group without a limit says -1.
    return [
        dict(group.resources)
        for group in config.node_group_configs
        for _ in range(min(group.max_count, 1000) if group.max_count >= 0 else 1000)
    ]


def remove_orphaned_groups() -> int:
    """Remove this driver's placement groups whose creator is dead; returns how many there were.

    A Train controller that is killed leaves its placement group, and with it its workers' CPUs and GPUs, taken until
    the driver ends (seen with Ray 2.60: the GCS frees a group when its creating actor *and* its job have ended). A slot
    that is started again would wait for them for ever.
    """
    import ray
    from ray._private import state
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    mine = ray.get_runtime_context().get_job_id()
    removed = 0
    for raw in state.state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(raw)
        gone = group.state == gcs_pb2.PlacementGroupTableData.REMOVED
        # The driver's own groups (Ray Tune's) say of the actor that did not create them that it is dead.
        by_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        if not gone and by_actor and group.creator_actor_dead and group.creator_job_id.hex() == mine:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            removed += 1
    return removed


def needed_callbacks(callbacks: list[Any]) -> list[Any]:
    """Ray Train's callbacks but for two, each of which starts an actor, a process of a second or more, per slot.

    The "cleaner" does what `remove_orphaned_groups` does, but polls the dashboard for it: where there is none it stays
    on the cluster for ever, and with two clusters on one machine it may ask the wrong one and free groups in use. The
    other hands out shards of Ray Data's datasets, of which a slot has none.
    """
    unneeded = {"PlacementGroupCleanerCallback", "DatasetsCallback"}
    return [callback for callback in callbacks if type(callback).__name__ not in unneeded]


def controllers() -> list[psutil.Process]:
    """The processes of this driver's Train controllers, which are on its own machine."""
    found = []
    for actor in _controllers().values():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(actor["Pid"])
            # Its number may mean another process here, where the driver is in a container of its own.
            if "TrainController" in " ".join(process.cmdline()):
                found.append(process)
    return found


def end_controllers() -> None:
    """End this driver's Train controllers whatever they do, as `ray.kill` does; Ray Train keeps their handles."""
    import ray
    from ray._private.worker import global_worker

    for actor in _controllers():
        with contextlib.suppress(Exception):  # has ended meanwhile
            global_worker.core_worker.kill_actor(ray.ActorID.from_hex(actor), True)


def _controllers() -> dict[str, dict[str, Any]]:
    """This driver's living Train controllers, by Ray's id of theirs."""
    import ray
    from ray._private import state

    mine = ray.get_runtime_context().get_job_id()
    return {
        key: actor
        for key, actor in state.actors(actor_state_name="ALIVE").items()
        if actor["JobID"] == mine and "TrainController" in actor["ActorClassName"]
    }


def end_processes(processes: Sequence[psutil.Process], seconds: float) -> None:
    """See that processes whose work is done end.

    A Train controller whose run has ended exits when it hears that nobody needs it any more. One that hears so while
    its cluster is being shut down may never end (seen once with Ray 2.60, minutes after the raylet was gone).
    """
    _, left = psutil.wait_procs(processes, timeout=seconds)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()


def end_coordinator(timeout: float) -> None:
    """End Ray's autoscaling coordinator, unless somebody else may be using it; it is started again when needed.

    Whoever uses it keeps asking the one that they found at first: Ray Train's controllers, and Ray Data's executions.
    A run whose driver was killed used it too, and left it to the next one.

    Args:
        timeout: Seconds; a coordinator that does not say within these who uses it is left alone.
    """
    import ray
    from ray._private import state

    mine = ray.get_runtime_context().get_job_id()
    alive = state.actors(actor_state_name="ALIVE").values()
    if any(actor["JobID"] != mine and "TrainController" in actor["ActorClassName"] for actor in alive):
        return
    try:
        coordinator = ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
    except ValueError:  # no run has started one
        return
    # One that is not alive answers nobody, and waits, perhaps for ever, for the machine that it was on.
    if any(actor["Name"] == _COORDINATOR for actor in alive) and _used_by_data(coordinator, timeout):
        return
    ray.kill(coordinator)


def _used_by_data(coordinator: Any, timeout: float) -> bool:
    """Whether an execution of Ray Data has asked the coordinator for resources and may come back to it.

    Executions are no actors that could be looked for: they are threads of drivers and tasks. What Ray Train asked for
    does not count here: its controllers have been looked for, and a killed one's request would stand for three minutes.
    """
    import ray

    def requesters(actor: Any) -> list[str]:
        # What is within goes to Ray's process by value: that need not have this package.
        return [name for name, request in actor._ongoing_reqs.items() if request.expiration_time > time.time()]

    try:
        found = ray.get(coordinator.__ray_call__.remote(requesters), timeout=timeout)
    except ray.exceptions.RayError:
        return True
    return not all(name.startswith("train-") for name in found)
