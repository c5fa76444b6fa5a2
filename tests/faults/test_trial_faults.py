"""What a trial or its data can do wrong: a loss that is no number, a model too large, data that is gone or changed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from agreement import (
    Account,
    Undisturbed,
    account,
    assert_ended_trials_are_kept,
    assert_mlflow_agrees,
    assert_undisturbed,
)
from forks import command
from injections import Driver
from study_runs import essence
from table import Row
from tracking_study import Server

from peftsearch.spec import TrialState
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SPARE_MEMORY = 400 * 2**20
"""Bytes that a worker may take beside those that it has when its first trial has been evaluated."""


def test_a_trial_that_diverges_or_does_not_fit_fails_alone(
    drive: Callable[..., Driver],
    write_study: Callable[..., Path],
    mlflow_server: Server,
    tmp_path: Path,
    note: Callable[[Row], None],
) -> None:
    """A learning rate and a weight decay under which weights grow ten million times at each step, and a bottleneck that
    needs 1 GB of a worker that may have no more than 400 MB beside what it has already."""

    def misfits(rate: float, bottleneck: int) -> Path:
        return write_study(
            "misfits",
            methods={
                "full": {"learning_rate": [1e-8, rate]},
                "adapter": {"bottleneck": [4, bottleneck], "learning_rate": 1e-8},
            },
            search={"trials": 2, "sampler": "grid", "scheduler": "none"},
            training={"epochs": 2, "evaluations": 2, "batch_size": 16, "max_length": 16, "weight_decay": 1e6},
            tracking={"mlflow": mlflow_server.uri},
        )

    quiet = drive(misfits(2e-8, 12), tmp_path / "quiet", "misfits", "--set", "tracking.mlflow=off")
    assert quiet.wait() == 0, quiet.output[-3000:]
    path = misfits(10.0, 65536)
    driver = drive(path, tmp_path / "storage", "misfits")
    assert driver.wait_progress(1)
    (worker,) = driver.workers()
    limit = worker.memory_info().vms + SPARE_MEMORY
    worker.rlimit(psutil.RLIMIT_AS, (limit, limit))
    assert driver.wait() == 0, driver.output[-3000:]
    assert driver.leftovers() == []
    study = Study.open("misfits", tmp_path / "storage")
    found = {
        (record.method, value): record
        for record in study.trials()
        for name, value in record.hyperparameters.items()
        if (record.method, name) in {("full", "learning_rate"), ("adapter", "bottleneck")}
    }
    failed = {("full", 10.0), ("adapter", 65536)}
    assert {key for key, record in found.items() if record.state is TrialState.FAILED} == failed
    assert {key for key, record in found.items() if record.state is TrialState.COMPLETE} == set(found) - failed
    assert len(found) == 4
    diverged, misfit = found["full", 10.0].error or "", found["adapter", 65536].error or ""
    assert "loss" in diverged
    assert "memory" in misfit
    # The others find what they find in a study without these two.
    fitting = [essence(record) for key, record in found.items() if key not in failed]
    without = {record.number: essence(record) for record in Study.open("misfits", tmp_path / "quiet").trials()}
    assert fitting == [without[trial["number"]] for trial in fitting]
    # Their own fault: they are not tried again.
    assert {record.retries for record in found.values()} == {0}
    assert_mlflow_agrees(study, mlflow_server.uri)
    counted = account(study, mlflow_server.uri)
    assert counted == Account(0, 0)
    for fault, injected in (
        ("loss not a number", "a learning rate of 10 under a weight decay of 1e6"),
        (
            "out of memory (CPU)",
            "a trial that needs 1 GB, in a worker that is limited to 400 MB more than it has (setrlimit)",
        ),
    ):
        happened = "that trial is FAILED with its reason, at once; the others go on in the same worker"
        note(Row(fault, injected, happened, counted.lost, counted.duplicated))


def test_a_study_none_of_whose_trials_can_be_trained_does_not_end_as_if_it_had_gone_well(
    drive: Callable[..., Driver], write_study: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_study(
        "hopeless",
        methods={"full": {"learning_rate": [9.0, 10.0]}},
        search={"trials": 2, "sampler": "grid", "scheduler": "none"},
        training={"epochs": 1, "evaluations": 1, "batch_size": 16, "max_length": 16, "weight_decay": 1e6},
    )
    driver = drive(path, tmp_path / "storage", "hopeless")
    assert driver.wait() == 1, driver.output[-3000:]
    assert "Error: all 2 trials failed, and there is no front; trial 0 (full): " in driver.output
    assert "Traceback" not in driver.output
    assert driver.leftovers() == []


def test_data_that_is_gone_or_another_is_one_sentence_and_costs_nothing(
    undisturbed: Undisturbed,
    drive: Callable[..., Driver],
    topics_csv: Path,
    tmp_path: Path,
    note: Callable[[Row], None],
) -> None:
    """While a study runs, its data may go: it has its own copy. To go on later, it must be there, and the same."""
    data = tmp_path / "topics.csv"
    content = topics_csv.read_bytes()
    data.write_bytes(content)
    document: dict[str, Any] = yaml.safe_load(undisturbed.file.read_text())
    document["domains"]["topics"]["data"]["source"] = str(data)
    path = tmp_path / "moved.yaml"
    path.write_text(yaml.safe_dump(document))
    storage = tmp_path / "storage"
    options = ("--set", f"tracking.mlflow={undisturbed.uri}")
    driver = drive(path, storage, "moved", *options)
    assert driver.wait_progress(2)
    data.unlink()
    assert driver.wait_progress(3), "the study ended with its data file"
    driver.signal(signal.SIGTERM)
    began = time.monotonic()
    assert driver.wait() == 130, driver.output[-3000:]
    took = time.monotonic() - began
    assert driver.leftovers() == []
    assert "Traceback" not in driver.output
    assert "continue with" in driver.output
    assert Study.open("moved", storage).status()["state"] == "interrupted"
    before = Study.open("moved", storage).trials()

    def refused() -> str:
        done = command("run", path, "--storage", storage, "--name", "moved", *options)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert Study.open("moved", storage).trials() == before
        return " ".join(line for line in done.stderr.splitlines() if line.startswith("Error"))

    gone = refused()
    assert str(data) in gone
    data.write_bytes(content.replace(b"fever", b"cough"))
    changed = refused()
    assert "the data of domain 'topics'" in changed
    assert "has changed since the study 'moved' began" in changed
    data.write_bytes(content)
    driver = drive(path, storage, "moved", *options)
    assert driver.wait() == 0, driver.output[-3000:]
    assert_ended_trials_are_kept(before, Study.open("moved", storage).trials())
    counted = assert_undisturbed(Study.open("moved", storage), undisturbed, undisturbed.uri)
    happened = f"it stops within {took:.1f} s, and the same command continues"
    note(Row("SIGTERM", "SIGTERM to the driver", happened, counted.lost, counted.duplicated))
    happened = "a running study goes on; starting it again is refused in one sentence until the data is back"
    note(
        Row(
            "data file gone or changed",
            "the CSV is deleted while the study runs, and has another text between runs",
            happened,
            counted.lost,
            counted.duplicated,
        )
    )


def test_a_worker_that_dies_whenever_it_loads_the_model_ends_the_study_in_one_sentence(
    drive: Callable[..., Driver], write_study: Callable[..., Path], tmp_path: Path, note: Callable[[Row], None]
) -> None:
    """As where the system kills it for its memory: Ray Train would start it for ever."""
    driver = drive(write_study("heavy", methods={"lora": {}}), tmp_path / "storage", "heavy")
    killed: set[int] = set()

    def loads(worker: psutil.Process) -> bool:
        try:
            return "model.safetensors" in Path(f"/proc/{worker.pid}/maps").read_text()
        except OSError:
            return False

    while driver.running:
        for worker in driver.workers():
            deadline = time.monotonic() + 60
            while driver.running and worker.is_running() and time.monotonic() < deadline:
                if loads(worker):
                    killed.add(worker.pid)
                    worker.kill()
                    break
                time.sleep(0.01)
        time.sleep(0.2)
    assert driver.wait() == 1
    assert len(killed) >= 5
    assert "no slot can work: slot 0: its worker died 5 times while it loaded model and data" in driver.output
    assert "Traceback" not in driver.output
    assert driver.leftovers() == []
    note(
        Row(
            "worker killed whenever it loads the model",
            "SIGKILL as it maps the weights, each time",
            "after five times the slot is given up; where it was the last, the study ends with one sentence",
            0,
            0,
        )
    )
