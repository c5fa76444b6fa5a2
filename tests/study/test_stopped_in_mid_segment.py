"""A study that is stopped while a long segment trains: nothing of it is trained again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from study_runs import run

from peftsearch.spec import TrialState
from peftsearch.study import Study
from peftsearch.training.checkpoint import saved_steps

pytestmark = [pytest.mark.slow, pytest.mark.ray]

PATIENCE = 400.0
"""Machines that run tests are busy."""

WORK_SECONDS = 4.0
"""A fraction of what the segment takes, and more than a worker needs before its first step."""


@pytest.fixture
def write_long_study(write_study: Callable[..., Path]) -> Callable[..., Path]:
    """A study whose trials have one segment each, of a quarter of a minute or more."""

    def write(trials: int = 1, **resources: Any) -> Path:
        return write_study(
            "long",
            methods={"lora": {"rank": 4}},
            search={"trials": trials, "scheduler": "none", "sampler": "random"},
            training={"epochs": 60, "evaluations": 1, "batch_size": 4, "max_length": 16},
            resources={"cpus_per_worker": 1, "slots": 1, **resources},
        )

    return write


@pytest.fixture
def start() -> Iterator[Callable[[Path, Path], subprocess.Popen[str]]]:
    """Starts drivers in process groups of their own; ends what is left of them."""
    started: list[subprocess.Popen[str]] = []

    def begin(path: Path, storage: Path) -> subprocess.Popen[str]:
        program = [sys.executable, "-m", "peftsearch", "run", str(path), "--storage", str(storage)]
        started.append(
            subprocess.Popen(
                program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
        )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_trials(process: subprocess.Popen[str], storage: Path, count: int) -> None:
    """Wait until so many trials are in training, and have trained some steps: for seconds of the workers' own time,
    which pass as slowly as their steps do on a busy machine.

    A trial is in the ledger before Ray has started the actor that asks for its segment, and a slot makes the baselines
    first: until then, there is nothing to write.
    """
    deadline = time.monotonic() + PATIENCE
    began: float | None = None
    while began is None or max(worked(process, "RayTrainWorker"), default=0.0) < began + WORK_SECONDS:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)
        # As Ray Tune names every trainable that has resources.
        if began is None and len(worked(process, "ResourceTrainable")) == count:
            study = Study.open("long", storage)
            if study.facts().domains["topics"].baselines:
                assert len(study.trials()) == count
                began = max(worked(process, "RayTrainWorker"), default=0.0)


def worked(process: subprocess.Popen[str], title: str) -> list[float]:
    """Seconds of processor time that each of its processes of such a title has had so far."""
    seconds = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(child.cmdline()):
                seconds.append(child.cpu_times().user)
    return seconds


def states(storage: Path) -> list[int]:
    """The steps after which the states of the study's trials were written."""
    trials = Study.open("long", storage).folder.path / "trials"
    return [step for folder in sorted(trials.iterdir()) for step in saved_steps(folder)]


def test_it_goes_on_where_it_was(
    write_long_study: Callable[..., Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    """Three trials at once. (That one alone ends with the same numbers, `tests/faults` sees at shorter segments.)"""
    trials = 3
    path = write_long_study(trials, pack=trials)
    process = start(path, tmp_path)
    wait_for_trials(process, tmp_path, trials)
    # As a terminal does it at Ctrl-C.
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said[-3000:]
    assert "write their state" in said
    before = Study.open("long", tmp_path).trials()
    assert [trial.state for trial in before] == [TrialState.RUNNING] * trials
    steps = states(tmp_path)
    assert len(steps) == trials
    assert all(0 < step < before[0].total_steps for step in steps)
    run(path, tmp_path)
    after = Study.open("long", tmp_path).trials()
    assert [trial.state for trial in after] == [TrialState.COMPLETE] * trials
    assert [trial.hyperparameters for trial in after] == [trial.hyperparameters for trial in before]
    assert [trial.retries for trial in after] == [0] * trials
