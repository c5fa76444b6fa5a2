"""SIGKILL and SIGTERM to a process that trains several trials at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from injections import Driver

from peftsearch.spec import TrialState
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.mark.parametrize("kind", ["kill", "terminate"])
def test_a_pack_that_loses_its_process_goes_on(
    kind: str, faulted_file: Path, drive: Callable[..., Driver], tmp_path: Path
) -> None:
    driver = drive(faulted_file, tmp_path, kind, "--set", "resources.pack=4", "--set", "tracking.mlflow=off")
    assert driver.wait_progress(3), "the study ended before the fault"
    (worker,) = driver.workers()
    before = driver.evaluations()
    getattr(worker, kind)()
    assert driver.reach(before + 2)
    assert driver.wait() == 0, driver.output[-3000:]
    assert driver.leftovers() == []
    records = Study.open(kind, tmp_path).trials()
    assert len(records) == 12
    assert {record.state for record in records} <= {TrialState.COMPLETE, TrialState.PRUNED}
    for record in records:
        # No evaluation was lost or made twice.
        steps = [rung.step for rung in record.rungs]
        assert steps == sorted(set(steps))
        if record.state is TrialState.COMPLETE:
            assert len(steps) == 8
    if kind == "terminate":
        # Its state was written: nobody is to blame.
        assert sum(record.retries for record in records) == 0
