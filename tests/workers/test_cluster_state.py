"""Ray's autoscaling coordinator ends with the last who uses it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from peftsearch.driver import ray_cluster
from peftsearch.workers.cluster_state import end_coordinator

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(None):
        yield


def coordinators() -> list[str]:
    from ray._private import state

    living = [actor["Name"] for actor in state.actors().values() if actor["State"] != "DEAD"]
    return [name for name in living if name == "AutoscalingCoordinator"]


def start() -> Any:
    """The coordinator, once it answers."""
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    coordinator = get_or_create_autoscaling_coordinator()
    ray.get(coordinator.__ray_ready__.remote())
    return coordinator


def gone() -> bool:
    deadline = time.monotonic() + 60
    while coordinators() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not coordinators()


def test_none_is_ended_where_none_is() -> None:
    assert coordinators() == []
    end_coordinator(60)


def test_the_request_of_a_run_whose_driver_was_killed_keeps_none() -> None:
    import ray

    coordinator = start()
    request = {"requester_id": "train-killed", "resources": [{"CPU": 1.0}], "expire_after_s": 180.0}
    ray.get(coordinator.request_resources.remote(**request))
    end_coordinator(60)
    assert gone()


def test_an_execution_of_ray_data_keeps_it_until_its_end(tmp_path: Path) -> None:
    import ray

    begun, gate = tmp_path / "begun", tmp_path / "gate"

    def pass_gate(batch: dict[str, Any]) -> dict[str, Any]:
        begun.touch()
        while not gate.exists():
            time.sleep(0.1)
        return batch

    rows = ray.data.range(8).map_batches(pass_gate)
    with ThreadPoolExecutor(1) as thread:
        taken = thread.submit(rows.take_all)
        try:
            while not (begun.exists() or taken.done()):
                time.sleep(0.1)
            start()
            end_coordinator(60)
            assert coordinators() == ["AutoscalingCoordinator"]
        finally:
            gate.touch()
        assert len(taken.result()) == 8
    end_coordinator(60)
    assert gone()
