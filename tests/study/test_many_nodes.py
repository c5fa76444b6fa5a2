"""A real cluster of several machines with different resources, which come and go in mid-study.

The machines are raylets of their own on this one, which is how Ray tests itself: Ray knows nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from study_faults import running
from study_runs import ledger, run

from peftsearch.spec import TrialState
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]

OURS = ("RayTrainWorker", "TrainController", "DispatcherActor", "TrialActor", "SynchronizationActor", "Coordinator")


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
        titles = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True) if p.is_running()]
        return {
            "actors": actors,
            "placement groups": groups,
            "processes": [title for title in titles if any(ours in title for ours in OURS)],
        }

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
    machines: Machines, tmp_path: Path, tiny_base: Path, topics_csv: Path
) -> None:
    """Three slots on two machines; the larger machine is lost, then the other one too; then a third one joins."""
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    path = study_file(tmp_path, tiny_base, topics_csv)
    run(path, quiet, "--set", "resources.slots=1")
    small, large = machines.add(1, small=1.0), machines.add(2, large=1.0)
    rows = []
    with running(path, tmp_path, "--address", machines.address) as study:
        study.wait_until(lambda: study.evaluations() >= 4)
        machines.lose(large)
        before = study.evaluations()
        rows.append(("a machine with two of three slots", study.wait_until(lambda: study.evaluations() > before + 2)))
        machines.lose(small)
        rows.append(("the last machine", study.wait_until(lambda: "the study waits" in study.said())))
        time.sleep(1)
        before = study.evaluations()
        machines.add(1)
        rows.append(("(a machine joins)", study.wait_until(lambda: study.evaluations() > before)))
        assert study.ended(400) == 0, study.said()[-3000:]
        assert "has room again" in study.said()
        assert "Traceback" not in study.said()
    for lost, seconds in rows:
        print(json.dumps({"lost": lost, "seconds": round(seconds, 1)}))
    records = Study.open("nodes", tmp_path).trials()
    assert [record.number for record in records] == list(range(14))
    assert all(record.state is TrialState.COMPLETE for record in records)
    assert ledger("nodes", tmp_path) == ledger("nodes", quiet)
    deadline = time.monotonic() + 20
    nothing: dict[str, Any] = {"actors": [], "placement groups": [], "processes": []}
    while machines.left_behind() != nothing and time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error):
            time.sleep(0.5)
    assert machines.left_behind() == nothing
