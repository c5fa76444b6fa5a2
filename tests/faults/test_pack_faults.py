"""SIGKILL and SIGTERM to a process that trains several trials at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from agreement import Account, account, assert_mlflow_agrees
from injections import Driver
from table import Row
from tracking_study import Server

from peftsearch.spec import TrialState
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]


FAULTS = {"kill": ("pack killed", "SIGKILL"), "terminate": ("pack told to end", "SIGTERM")}


def test_a_pack_that_loses_its_process_goes_on(
    faulted_file: Path, drive: Callable[..., Driver], tmp_path: Path, mlflow_server: Server, note: Callable[[Row], None]
) -> None:
    """What a trial finds in a pack depends on its company: there is no undisturbed run to compare with."""
    options = ("--set", "resources.pack=4", "--set", f"tracking.mlflow={mlflow_server.uri}")
    driver = drive(faulted_file, tmp_path, "pack", *options)
    seconds = {}
    for kind in FAULTS:
        assert driver.wait_progress(3), "the study ended before the fault"
        (worker,) = driver.workers()
        before, began = driver.evaluations(), time.monotonic()
        getattr(worker, kind)()
        assert driver.reach(before + 2)
        seconds[kind] = time.monotonic() - began
    assert driver.wait() == 0, driver.output[-3000:]
    assert driver.leftovers() == []
    study = Study.open("pack", tmp_path)
    records = study.trials()
    assert len(records) == 12
    assert {record.state for record in records} <= {TrialState.COMPLETE, TrialState.PRUNED}
    for record in records:
        # No evaluation was lost or made twice.
        steps = [rung.step for rung in record.rungs]
        assert steps == sorted(set(steps))
        if record.state is TrialState.COMPLETE:
            assert len(steps) == 8
    # Those in the process that was killed. Of the other one the states were written, and no trial is to blame.
    assert {record.retries for record in records} == {0, 1}
    assert_mlflow_agrees(study, mlflow_server.uri)
    counted = account(study, mlflow_server.uri)
    assert counted == Account(lost=0, duplicated=0)
    for kind, (fault, number) in FAULTS.items():
        note(
            Row(
                fault,
                f"{number} to a process that trains four trials at once",
                "Ray Train starts a new worker, in which all of them go on from their checkpoints",
                counted.lost,
                counted.duplicated,
                (seconds[kind],),
            )
        )
