"""SIGKILL to the process that trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from agreement import Undisturbed, assert_undisturbed
from injections import Driver
from table import Row

from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]
KILLS = 2


def test_a_killed_worker_costs_no_trial(
    undisturbed: Undisturbed, drive: Callable[..., Driver], tmp_path: Path, note: Callable[[Row], None]
) -> None:
    """In mid-segment, twice: Ray Train restarts it, and the study ends as the one to which nothing happened."""
    driver = drive(undisturbed.file, tmp_path, "worker", "--set", f"tracking.mlflow={undisturbed.uri}")
    seconds = []
    for _ in range(KILLS):
        assert driver.wait_progress(3), "the study ended before the fault"
        (worker,) = driver.workers()
        before = driver.evaluations()
        # Right after an evaluation was recorded, the next segment trains.
        killed = time.monotonic()
        worker.kill()
        assert driver.reach(before + 2)
        seconds.append(time.monotonic() - killed)
    assert driver.wait() == 0, driver.output[-3000:]
    assert driver.leftovers() == []
    counted = assert_undisturbed(Study.open("worker", tmp_path), undisturbed, undisturbed.uri)
    note(
        Row(
            "worker killed",
            f"SIGKILL to the training process in mid-segment, {KILLS} times in one study",
            "Ray Train starts a new worker, which goes on from the trial's checkpoint",
            counted.lost,
            counted.duplicated,
            tuple(seconds),
        )
    )
