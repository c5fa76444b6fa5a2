"""A real cluster of several machines with different resources, which come and go in mid-study.

The machines are raylets of their own on this one, which is how Ray tests itself: Ray knows nothing of it.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from agreement import Undisturbed, assert_undisturbed
from injections import Driver
from table import Row
from tracking_study import Server

from peftsearch.spec import TrialState
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]

OURS = (
    "RayTrainWorker",
    "TrainController",
    "DispatcherActor",
    "ResourceTrainable",
    "SynchronizationActor",
    "Coordinator",
)

NOTHING: dict[str, Any] = {"actors": [], "placement groups": [], "processes": []}


class Machines:
    """A Ray cluster whose head has no CPU; tests add machines to it and take them away."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(shutdown_at_exit=False)
        self.add(0)
        self.address: str = self._cluster.address

    def add(self, cpus: int, attempts: int = 4, **resources: float) -> Any:
        """A machine joins."""
        before = set(psutil.Process().children(recursive=True))
        try:
            return self._cluster.add_node(num_cpus=cpus, resources=resources, include_dashboard=False)
        except Exception:  # Ray gives a node 30 seconds to start, however busy this machine is
            for process in set(psutil.Process().children(recursive=True)) - before:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if attempts == 1:
                raise
            return self.add(cpus, attempts - 1, **resources)

    def lose(self, machine: Any) -> None:
        """SIGKILL to a machine's raylet; its workers follow it."""
        self._cluster.remove_node(machine, allow_graceful=False)

    def left_behind(self) -> dict[str, Any]:
        """Actors, placement groups and resources in use, as the cluster's own tables have them."""
        state = self._cluster.global_state
        actors = [a["ActorClassName"] for a in state.actor_table(None).values() if a["State"] != "DEAD"]
        groups = [g for g in state.placement_group_table().values() if g["state"] != "REMOVED"]
        titles = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                titles.append(" ".join(process.cmdline()))
        return {
            "actors": actors,
            "placement groups": groups,
            "processes": [title for title in titles if any(ours in title for ours in OURS)],
        }

    def leaves(self, expected: dict[str, Any] = NOTHING, seconds: float = 30) -> dict[str, Any]:
        """`left_behind`, once it is as expected; else after so many seconds."""
        deadline = time.monotonic() + seconds
        while (found := self.left_behind()) != expected and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def end(self) -> None:
        """Take down what is left."""
        self._cluster.shutdown()


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    found = Machines()
    try:
        yield found
    finally:
        found.end()


def study_file(folder: Path, base: Path, data: Path, **resources: Any) -> Path:
    """A grid without pruning: what a trial is and finds depends on its number alone, whoever else runs meanwhile."""
    path = folder / "nodes.yaml"
    document = {
        "name": "nodes",
        "model": str(base),
        "domains": {
            "topics": {"data": {"source": str(data), "split": {"group": "document", "validation": 0.25, "test": 0.2}}}
        },
        "methods": {
            "lora": {"rank": [1, 2, 4, 8], "learning_rate": [1e-3, 5e-3]},
            "adapter": {"bottleneck": [2, 4, 8, 16], "learning_rate": [1e-3, 5e-3]},
        },
        "search": {"trials": 7, "sampler": "grid", "scheduler": "none"},
        "training": {"epochs": 6, "evaluations": 4, "batch_size": 8, "max_length": 16},
        "resources": {"cpus_per_worker": 1, **resources},
        "tracking": {"mlflow": "off"},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def test_machines_leave_and_join_in_mid_study(
    machines: Machines,
    drive: Callable[..., Driver],
    tmp_path: Path,
    tiny_base: Path,
    topics_csv: Path,
    mlflow_server: Server,
    note: Callable[[Row], None],
) -> None:
    """Three slots on two machines; the larger machine is lost, then the other one too; then a third one joins."""
    path = study_file(tmp_path, tiny_base, topics_csv)
    quiet = drive(path, tmp_path / "quiet", "nodes", "--set", "resources.slots=1")
    assert quiet.wait() == 0, quiet.output[-3000:]
    small, large = machines.add(1, small=1.0), machines.add(2, large=1.0)
    options = ("--address", machines.address, "--set", f"tracking.mlflow={mlflow_server.uri}")
    driver = drive(path, tmp_path / "storage", "nodes", *options)
    seconds = []

    def lose(machine: Any, seen: Callable[[], bool]) -> None:
        lost = time.monotonic()
        machines.lose(machine)
        assert driver.wait_until(seen), driver.output[-3000:]
        seconds.append(time.monotonic() - lost)

    assert driver.wait_progress(4)
    goal = driver.evaluations() + 3
    lose(large, lambda: driver.evaluations() >= goal)
    lose(small, lambda: "the study waits" in driver.output)
    before, joined = driver.evaluations(), time.monotonic()
    machines.add(1)
    assert driver.reach(before + 1), driver.output[-3000:]
    resumed = time.monotonic() - joined
    assert driver.wait() == 0, driver.output[-3000:]
    assert driver.leftovers() == []
    assert "has room again" in driver.output
    assert "Traceback" not in driver.output
    study = Study.open("nodes", tmp_path / "storage")
    records = study.trials()
    assert [record.number for record in records] == list(range(14))
    assert all(record.state is TrialState.COMPLETE for record in records)
    undisturbed = Undisturbed(path, tmp_path / "quiet", "nodes", mlflow_server.uri)
    counted = assert_undisturbed(study, undisturbed, mlflow_server.uri)
    assert machines.leaves() == NOTHING
    waits = f"after {seconds[1]:.0f} s the study says that it waits; it goes on when one joins (seconds: from then)"
    for fault, happened, took in (
        ("machine lost", "its slots are given up, their work goes on in the others", seconds[0]),
        ("all machines lost", waits, resumed),
    ):
        injected = "SIGKILL to a raylet of a cluster of three"
        note(Row(fault, injected, happened, counted.lost, counted.duplicated, (took,)))


def test_what_a_killed_driver_leaves_on_a_cluster_is_ended_by_the_next(
    machines: Machines, drive: Callable[..., Driver], tmp_path: Path, tiny_base: Path, topics_csv: Path
) -> None:
    """Ray's detached actor outlives the driver (if it did not, this test would be pointless), and no further one."""
    path = study_file(tmp_path, tiny_base, topics_csv, slots=1)
    machines.add(1)

    def run() -> Driver:
        options = ("--address", machines.address, "--set", "search.trials=2")
        return drive(path, tmp_path / "storage", "nodes", *options)

    killed = run()
    assert killed.wait_progress(2), killed.output[-3000:]
    killed.signal(signal.SIGKILL)
    assert killed.leftovers() == []
    left = machines.leaves(seconds=5)
    assert left["actors"] == ["_AutoscalingCoordinatorActor"]
    driver = run()
    assert driver.wait() == 0, driver.output[-3000:]
    assert driver.leftovers() == []
    assert "Traceback" not in driver.output
    assert machines.leaves() == NOTHING
