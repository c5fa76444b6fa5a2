"""The driver dies, or is told to stop: at once, at any moment, and many times in one study."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from agreement import Undisturbed, assert_ended_trials_are_kept, assert_undisturbed
from injections import Driver, Terminal
from mlflow_proxy import Proxy
from table import Row

from peftsearch.spec import TrialRecord
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]
KILLS = int(os.environ.get("PEFTSEARCH_DRIVER_KILLS", "20"))
SEED = 0


def records(storage: Path, name: str) -> list[TrialRecord]:
    study = Study.open(name, storage) if (storage / "studies" / name / "ledger.db").exists() else None
    return study.trials() if study else []


@pytest.mark.timeout(900 + 120 * KILLS)
def test_a_driver_killed_many_times_ends_with_the_same_ledger(
    undisturbed: Undisturbed, drive: Callable[..., Driver], tmp_path: Path, note: Callable[[Row], None]
) -> None:
    """At seeded random moments: a third of them while it starts. The next driver starts at once, while whatever the
    dead one left may still be ending."""
    chance = random.Random(SEED)
    seconds: list[float] = []
    dead: list[Driver] = []
    killed = 0.0
    for kill in range(KILLS + 1):
        driver = drive(undisturbed.file, tmp_path, "killed", "--set", f"tracking.mlflow={undisturbed.uri}")
        while_it_starts = chance.random() < 0.35
        pause = chance.uniform(0.2, 12.0) if while_it_starts else chance.uniform(0.0, 0.4)
        further = chance.randint(1, 2)
        if kill == KILLS:
            break
        if not while_it_starts:
            before = driver.evaluations()
            assert driver.wait_progress(1), f"the study ended before kill {kill}: {driver.output[-2000:]}"
            if killed:
                seconds.append(time.monotonic() - killed)
            driver.reach(before + further)
        time.sleep(pause)
        assert driver.running, f"the study ended before kill {kill}: {driver.output[-2000:]}"
        ended = records(tmp_path, "killed")
        driver.signal(signal.SIGKILL)
        driver.wait()
        if not while_it_starts or not killed:
            killed = time.monotonic()
        assert_ended_trials_are_kept(ended, records(tmp_path, "killed"))
        dead.append(driver)
    assert driver.wait() == 0, driver.output[-3000:]
    assert [left for each in [*dead, driver] for left in each.leftovers()] == []
    counted = assert_undisturbed(Study.open("killed", tmp_path), undisturbed, undisturbed.uri)
    note(
        Row(
            "driver killed",
            f"SIGKILL to the driver at random moments, {KILLS} times in one study, a third of them while it starts",
            "the same command, given again at once, continues; Ray and its workers end by themselves",
            counted.lost,
            counted.duplicated,
            tuple(seconds),
        )
    )


def test_a_driver_that_is_told_to_stop_continues_later(
    undisturbed: Undisturbed, drive: Callable[..., Driver], tmp_path: Path, proxy: Proxy, note: Callable[[Row], None]
) -> None:
    """Ctrl-C, Ctrl-C twice while MLflow does not answer, and a lost terminal, all in one study. (SIGTERM: where data is
    gone.)"""
    options = ("--set", f"tracking.mlflow={proxy.uri}")
    rows: dict[str, tuple[str, str]] = {}
    seconds: dict[str, float] = {}
    stopped = 0.0
    said = ""

    def start(terminal: str = "-") -> Driver:
        driver = drive(undisturbed.file, tmp_path, "stopped", *options, terminal=terminal)
        assert driver.wait_progress(3), driver.output[-3000:]
        if stopped:
            seconds[said] = time.monotonic() - stopped
        return driver

    def ended(driver: Driver, fault: str, injected: str, within: float, status: int = 130) -> None:
        nonlocal stopped, said
        began = time.monotonic()
        assert driver.wait(within) == status, driver.output[-3000:]
        took = time.monotonic() - began
        stopped, said = time.monotonic(), fault
        assert driver.leftovers() == []
        assert "Traceback" not in driver.output
        if driver.terminal == "-":
            assert "continue with" in driver.output
        assert Study.open("stopped", tmp_path).status()["state"] == "interrupted"
        rows[fault] = (injected, f"it stops within {took:.1f} s, and the same command continues")

    driver = start()
    driver.interrupt()
    ended(driver, "Ctrl-C", "SIGINT to the process group", 60)
    assert "peftsearch run" in driver.output
    driver = start()
    proxy.mode = "hang"
    driver.interrupt()
    time.sleep(0.5)
    driver.interrupt()
    ended(driver, "Ctrl-C twice", "two SIGINT half a second apart, while MLflow hangs", 45)
    proxy.mode = "pass"
    terminal = Terminal()
    driver = start(terminal.path)
    ledger_before = driver.evaluations()
    terminal.lose()
    ended(driver, "terminal lost", "the driver's pseudo-terminal is closed (SIGHUP, then failing writes)", 60)
    assert driver.evaluations() >= ledger_before
    driver = start()
    assert driver.wait() == 0, driver.output[-3000:]
    assert driver.leftovers() == []
    counted = assert_undisturbed(Study.open("stopped", tmp_path), undisturbed, proxy.uri)
    for fault, (injected, happened) in rows.items():
        note(Row(fault, injected, happened, counted.lost, counted.duplicated, (seconds[fault],)))
