"""Studies whose trials are trained by two workers each, on real Ray."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from study_runs import ledger, run

from peftsearch.spec import TrialRecord, TrialState
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]

# Ray takes a process that answers slowly for dead, and machines that run tests are busy.
PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "240", "RAY_health_check_failure_threshold": "40"}


def without_dropout(base: Path, folder: Path) -> Path:
    """The model, for which masks do not depend on the number of workers that draw them."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_study_on_two_workers_has_the_ledger_of_one_on_one(
    write_study: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "model": str(without_dropout(tiny_base, tmp_path / "base")),
        "methods": {
            "lora": {"rank": [2, 4], "learning_rate": 5e-3},
            "adapter": {"bottleneck": 4, "learning_rate": 5e-3},
            "full": {"learning_rate": [1e-3, 2e-3]},
        },
        "search": {"trials": 2, "sampler": "grid", "scheduler": "none"},
        "training": {
            "epochs": 1,
            "evaluations": 2,
            "batch_size": 16,
            "max_length": 16,
            "precision": "fp32",
        },
    }
    run(write_study("one", **sections), tmp_path)
    alone = Study.open("one", tmp_path).trials()
    assert len(alone) == 5
    # Each with all of the base and half of every batch, or with a part of the base.
    for strategy in ("ddp", "fsdp"):
        resources = {"workers_per_trial": 2, "strategy": strategy, "cpus_per_worker": 1, "slots": 1}
        run(write_study(strategy, **sections, resources=resources), tmp_path)
        assert_alike(Study.open(strategy, tmp_path).trials(), alone)


def assert_alike(together: list[TrialRecord], alone: list[TrialRecord]) -> None:
    for expected, found in zip(alone, together, strict=True):
        assert found.hyperparameters == expected.hyperparameters
        assert found.state is expected.state is TrialState.COMPLETE
        assert found.retries == 0
        assert found.trainable_parameters == expected.trainable_parameters
        assert [rung.loss for rung in found.rungs] == pytest.approx([r.loss for r in expected.rungs], abs=1e-4)
        assert [rung.train_loss for rung in found.rungs] == pytest.approx(
            [rung.train_loss for rung in expected.rungs], abs=1e-4
        )


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name, value in PATIENCE.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}, shutdown_at_exit=False
    )
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_a_machine_that_is_about_to_be_taken_away_hands_its_work_to_another(
    machines: Any, write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an autoscaler drains a spot machine that is reclaimed; nothing counts as a retry, and no number changes."""
    path = write_study(
        "spot",
        methods={"lora": {"rank": [1, 2, 4], "learning_rate": [1e-3, 5e-3]}},
        search={"trials": 6, "sampler": "grid", "scheduler": "none"},
        training={"epochs": 12, "evaluations": 2, "batch_size": 4, "max_length": 16},
        resources={"cpus_per_worker": 1, "slots": 1},
    )
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    run(path, quiet)
    spot = machines.add_node(num_cpus=1, include_dashboard=False)
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    arguments = [sys.executable, "-m", "peftsearch", "run", path, "--storage", tmp_path, "--address", machines.address]
    log = tmp_path / "driver.log"
    with log.open("w") as file, subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT) as driver:
        try:
            wait_for(2, tmp_path, driver, log)
            machines.add_node(num_cpus=1, include_dashboard=False)
            drain(machines.address, spot.node_id)
            # It is left, with all that was done on it, before it is gone.
            wait_for(evaluations(tmp_path) + 3, tmp_path, driver, log)
            machines.remove_node(spot, allow_graceful=False)
            assert driver.wait(900) == 0, log.read_text()[-3000:]
        finally:
            driver.kill()
    records = Study.open("spot", tmp_path).trials()
    assert [record.state for record in records] == [TrialState.COMPLETE] * 6
    assert [record.retries for record in records] == [0] * 6
    assert ledger("spot", tmp_path) == ledger("spot", quiet)


def evaluations(storage: Path) -> int:
    """How many evaluations the ledger holds by now."""
    try:
        return sum(len(record.rungs) for record in Study.open("spot", storage).trials())
    except Exception:  # it is being made
        return 0


def wait_for(count: int, storage: Path, driver: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the ledger holds so many evaluations."""
    deadline = time.monotonic() + 900
    while evaluations(storage) < count:
        assert driver.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.3)


def drain(address: str, node: str) -> None:
    """What the autoscaler says to Ray when a cloud takes a spot machine back."""
    arguments = ["--address", address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    arguments += ["--reason-message", "reclaimed", "--deadline-remaining-seconds", "600"]
    ray = Path(sys.executable).with_name("ray")
    subprocess.run([ray, "drain-node", *arguments], check=True, timeout=120)
