"""A Ray cluster's machines, those that may come, and what Ray leaves behind when a helper of its own is killed.

Most of these are Ray's private interfaces: its public ones (`ray.util.state`) need the dashboard, which an embedded
cluster does not run and a locked-down one may not reach.
"""

from __future__ import annotations

from typing import Any

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


def without_cleaner(callbacks: list[Any]) -> list[Any]:
    """Ray Train's callbacks but for the one that starts a detached "cleaner" actor per run.

    It does what `remove_orphaned_groups` does, but polls the dashboard for it: where there is none it stays on the
    cluster for ever, and with two clusters on one machine it may ask the wrong one and free groups in use.
    """
    return [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]


def coordinator() -> Any | None:
    """Handle of Ray's autoscaling coordinator; None where no run has started one."""
    import ray

    try:
        return ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
    except ValueError:
        return None


def end_coordinator() -> None:
    """End Ray's autoscaling coordinator, unless another driver may be using it; it is started again when needed."""
    import ray
    from ray._private import state

    mine = ray.get_runtime_context().get_job_id()
    others = [
        actor
        for actor in state.actors(actor_state_name="ALIVE").values()
        if actor["JobID"] != mine and "TrainController" in actor["ActorClassName"]
    ]
    if not others and (actor := coordinator()) is not None:
        ray.kill(actor)
