"""SIGKILL to the parts of Ray that a study rests on: worker, dispatcher, controller, a whole slot, the head."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from agreement import Undisturbed, assert_undisturbed
from injections import RAY_PARTS, Driver
from table import Row

from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]

HAPPENED = {
    "worker killed": "Ray Train starts a new one, which goes on from the trial's checkpoint",
    "dispatcher killed": "Ray starts another and repeats the calls to it; slots join again with what they hold and do",
    "slot's controller killed": "its placement group is removed, and the slot started again",
    "whole slot killed": "the slot is started again, and goes on from the trial's checkpoint",
    "trial actor killed": "Ray Tune starts another one, which asks for the evaluation that comes next",
}


def kill(driver: Driver, *titles: str) -> None:
    """Kill them as soon as each is there: between two trials, for example, Ray Tune has no actor for a moment."""
    assert driver.wait_until(lambda: all(driver.processes(title) for title in titles)), driver.output[-3000:]
    assert driver.kill(*titles), [process.cmdline() for process in driver.processes()]


def test_parts_of_ray_die_one_after_the_other(
    undisturbed: Undisturbed, drive: Callable[..., Driver], tmp_path: Path, note: Callable[[Row], None]
) -> None:
    """In one study, and the dispatcher once more while finalists are confirmed.

    Ray frees a dead controller's CPUs only when the driver ends (see `peftsearch.workers.cluster_state`).
    """
    driver = drive(undisturbed.file, tmp_path, "parts", "--set", f"tracking.mlflow={undisturbed.uri}")
    seconds = []
    for titles in RAY_PARTS.values():
        assert driver.wait_progress(3), "the study ended before the fault"
        before, killed = driver.evaluations(), time.monotonic()
        kill(driver, *titles)
        # The first further one may have been on its way already.
        assert driver.reach(before + 2)
        seconds.append(time.monotonic() - killed)
    study = Study.open("parts", tmp_path)
    assert driver.wait_until(lambda: "confirming" in driver.output)
    kill(driver, "DispatcherActor")
    assert driver.wait() == 0, driver.output[-3000:]
    assert driver.leftovers() == []
    assert "Traceback" not in driver.output
    counted = assert_undisturbed(study, undisturbed, undisturbed.uri)
    for (fault, titles), took in zip(RAY_PARTS.items(), seconds, strict=True):
        injected = f"SIGKILL to {' and '.join(f'`{title}`' for title in titles)} in mid-study"
        note(Row(fault, injected, HAPPENED[fault], counted.lost, counted.duplicated, (took,)))


def test_the_head_dies_and_the_same_command_continues(
    undisturbed: Undisturbed, drive: Callable[..., Driver], tmp_path: Path, note: Callable[[Row], None]
) -> None:
    """Nobody waits for it for ever: the driver ends with a sentence, and leaves nothing."""
    options = ["--set", f"tracking.mlflow={undisturbed.uri}"]
    driver = drive(undisturbed.file, tmp_path, "head", *options)
    assert driver.wait_progress(4)
    killed = time.monotonic()
    kill(driver, "gcs_server")
    assert driver.wait() == 1, driver.output[-3000:]
    took = time.monotonic() - killed
    assert driver.leftovers() == []
    before, began = driver.evaluations(), time.monotonic()
    assert "the Ray head at" in driver.output
    assert "continues the study" in driver.output
    assert "Traceback" not in driver.output
    study = Study.open("head", tmp_path)
    assert study.status()["state"] == "interrupted"
    again = drive(undisturbed.file, tmp_path, "head", *options)
    assert again.reach(before + 1), again.output[-3000:]
    seconds = took + time.monotonic() - began
    assert again.wait() == 0, again.output[-3000:]
    counted = assert_undisturbed(study, undisturbed, undisturbed.uri)
    note(
        Row(
            "Ray head killed",
            "SIGKILL to `gcs_server` in mid-study",
            f"after {took:.0f} s the driver ends with one sentence and status 1; the same command continues "
            "(seconds: both together, with Ray's start)",
            counted.lost,
            counted.duplicated,
            (seconds,),
        )
    )
