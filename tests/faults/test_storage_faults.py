"""What a study keeps cannot be written, or is not what was written: locked ledger, damaged checkpoints, full disk."""

from __future__ import annotations

import contextlib
import functools
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agreement import Undisturbed, assert_ended_trials_are_kept, assert_undisturbed
from injections import Driver, evaluations
from small_disk import disk, fill
from table import Row

from peftsearch.spec import TrialState
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]
LOCKED = 5.0
"""Seconds that the lock stays after the driver has met it."""


@contextlib.contextmanager
def locked(ledger: Path) -> Iterator[None]:
    """Another process writes, and does not end."""
    with contextlib.closing(sqlite3.connect(ledger, timeout=60, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


def test_a_locked_ledger_is_waited_for(
    undisturbed: Undisturbed, drive: Callable[..., Driver], tmp_path: Path, note: Callable[[Row], None]
) -> None:
    """For longer than SQLite itself waits, twice: among trials, and among the last ones."""
    driver = drive(undisturbed.file, tmp_path, "locked", "--set", f"tracking.mlflow={undisturbed.uri}")
    seconds = []
    for meeting in (1, 2):
        assert driver.wait_progress(4), "the study ended before the fault"
        with locked(tmp_path / "studies" / "locked" / "ledger.db"):
            before = driver.evaluations()
            assert before > 0
            assert driver.wait_until(lambda: driver.output.count("does not answer, waiting") >= meeting)  # noqa: B023
            time.sleep(LOCKED)
            assert driver.running, driver.output[-3000:]
            assert driver.evaluations() == before
        unlocked = time.monotonic()
        assert driver.reach(before + 1)
        seconds.append(time.monotonic() - unlocked)
    assert driver.wait() == 0, driver.output[-3000:]
    assert driver.leftovers() == []
    assert "Traceback" not in driver.output
    counted = assert_undisturbed(Study.open("locked", tmp_path), undisturbed, undisturbed.uri)
    note(
        Row(
            "ledger locked",
            f"another process holds SQLite's exclusive lock for {LOCKED:g} s after the driver has met it, twice",
            "the driver says so and waits (seconds: from the lock's end to the next evaluation)",
            counted.lost,
            counted.duplicated,
            tuple(seconds),
        )
    )


def cut_short(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(1, len(content))]


def flipped(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content) // 2, len(content))  # among the numbers, which only the checksum guards
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


DAMAGES = {
    "checkpoint cut short": (cut_short, "each running trial's latest state is cut at a random byte"),
    "checkpoint with a flipped byte": (flipped, "a byte of each running trial's latest state is inverted"),
}


def said(driver: Driver, sentences: list[str]) -> bool:
    """Whether the driver has passed one of these sentences on from its worker."""
    text = " ".join(driver.output.split())
    return "goes on from an earlier state" in text and any(sentence in text for sentence in sentences)


def test_a_damaged_state_is_noticed_and_the_one_before_it_used(
    undisturbed: Undisturbed, drive: Callable[..., Driver], tmp_path: Path, note: Callable[[Row], None]
) -> None:
    """In one study, each after a SIGKILL to the driver: what running trials would go on from is damaged."""
    chance = random.Random(0)
    folder = tmp_path / "studies" / "damaged"
    seconds: dict[str, float] = {}

    def start() -> Driver:
        return drive(undisturbed.file, tmp_path, "damaged", "--set", f"tracking.mlflow={undisturbed.uri}")

    def with_two_states() -> list[list[Path]]:
        states = [sorted(trial.glob("state-*.safetensors")) for trial in (folder / "trials").glob("*")]
        return [found for found in states if len(found) > 1]

    def damageable() -> list[Path]:
        trials = Study.open("damaged", tmp_path).trials()
        running = {f"{record.number:05d}" for record in trials if record.state is TrialState.RUNNING}
        return [states[-1] for states in with_two_states() if states[-1].parent.name in running]

    driver = start()
    for fault, (damage, _) in DAMAGES.items():
        files: list[Path] = []
        while not files:
            assert driver.wait_progress(2), f"the study ended before: {fault}"
            assert driver.wait_until(with_two_states), f"the study ended before: {fault}"
            driver.signal(signal.SIGKILL)
            driver.wait()
            assert driver.leftovers() == []
            files = damageable()
            if not files:
                driver = start()
        for file in files:
            file.write_bytes(damage(file.read_bytes(), chance))
        ended = Study.open("damaged", tmp_path).trials()
        began, before = time.monotonic(), evaluations(tmp_path, "damaged")
        driver = start()
        assert driver.reach(before + 1), driver.output[-3000:]
        seconds[fault] = time.monotonic() - began
        assert_ended_trials_are_kept(ended, Study.open("damaged", tmp_path).trials())
        sentences = [f"{file.name} of trial folder {file.parent.name} is damaged" for file in files]
        assert driver.wait_until(functools.partial(said, driver, sentences)), "nobody noticed"
    assert driver.wait() == 0, driver.output[-3000:]
    assert driver.leftovers() == []
    counted = assert_undisturbed(Study.open("damaged", tmp_path), undisturbed, undisturbed.uri)
    for fault, (_, injected) in DAMAGES.items():
        note(
            Row(
                fault,
                f"after SIGKILL to the driver, {injected}",
                "its checksum tells; the trial goes on from the state before it, and trains the lost steps again "
                "(seconds: from the next command, with Ray's start)",
                counted.lost,
                counted.duplicated,
                (seconds[fault],),
            )
        )


def test_a_disk_that_is_full_in_mid_study_stops_it_until_there_is_room(
    undisturbed: Undisturbed, drive: Callable[..., Driver], tmp_path: Path, note: Callable[[Row], None]
) -> None:
    """Somebody else takes the room on a disk that has the trials' files. (The ledger's: tests/tracking.)"""
    storage = tmp_path / "storage"
    place = storage / "studies" / "full" / "trials"
    options = ("--set", f"tracking.mlflow={undisturbed.uri}")
    with disk(place, 32):
        driver = drive(undisturbed.file, storage, "full", *options)
        assert driver.wait_progress(6)
        filler = fill(place)
        began = time.monotonic()
        assert driver.wait() == 1, driver.output[-3000:]
        took = time.monotonic() - began
        assert driver.leftovers() == []
        assert "Traceback" not in driver.output
        last = driver.output.strip().splitlines()[-1]
        assert "No space left on device" in last
        assert "run the study again" in last
        filler.unlink()
        ended = Study.open("full", storage).trials()
        assert TrialState.FAILED not in {record.state for record in ended}
        assert Study.open("full", storage).status()["state"] == "interrupted"
        before, began = evaluations(storage, "full"), time.monotonic()
        again = drive(undisturbed.file, storage, "full", *options)
        assert again.reach(before + 1), again.output[-3000:]
        seconds = time.monotonic() - began
        assert again.wait() == 0, again.output[-3000:]
        assert again.leftovers() == []
        assert_ended_trials_are_kept(ended, Study.open("full", storage).trials())
        counted = assert_undisturbed(Study.open("full", storage), undisturbed, undisturbed.uri)
    note(
        Row(
            "disk full",
            "the trials' file system is filled in mid-study",
            f"after {took:.0f} s the study ends with one sentence; with room again the same command continues "
            "(seconds: from that command, with Ray's start)",
            counted.lost,
            counted.duplicated,
            (seconds,),
        )
    )
