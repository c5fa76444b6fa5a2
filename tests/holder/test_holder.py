"""At most one driver writes a study, whatever dies, sleeps or is far away; the others are told who it is."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from holders import Driver, another_machine, eventually
from small_disk import fill

from peftsearch import holder
from peftsearch.spec import StudyError

Start = Callable[..., Driver]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Driver] = []

    def begin(*arguments: Any, **options: Any) -> Driver:
        started.append(Driver(*arguments, **options))
        return started[-1]

    yield begin
    for driver in started:
        driver.end()


def test_the_second_driver_is_told_who_holds_the_study(tmp_path: Path, start: Start) -> None:
    first = start(tmp_path)
    assert first.says() == "held"
    assert holder.is_held(tmp_path)
    said = start(tmp_path).says()
    assert f"'s' is being run by process {first.process.pid} on {socket.gethostname()} since 20" in said
    assert "wait for it, stop it, or give this run another --name" in said
    assert first.send("release") == "released"
    first.process.wait()
    assert not holder.is_held(tmp_path)
    assert start(tmp_path).says() == "held"


def test_a_driver_that_was_killed_here_is_followed_at_once(tmp_path: Path, start: Start) -> None:
    first = start(tmp_path, silence=600)
    assert first.says() == "held"
    # Its parent has not asked about it yet: it is a zombie, and no driver.
    first.signal(signal.SIGKILL)
    eventually(lambda: not holder.is_held(tmp_path))
    assert start(tmp_path, silence=600).says() == "held"


def test_a_driver_that_was_killed_was_heard_of_last(tmp_path: Path, start: Start) -> None:
    first = start(tmp_path, silence=600)
    assert first.says() == "held"
    driver = {"pid": first.process.pid, "host": socket.gethostname()}
    first.signal(signal.SIGKILL)
    eventually(lambda: not holder.is_held(tmp_path))
    heard = holder.last_heard(tmp_path, driver)
    assert heard is not None
    assert abs((datetime.now(UTC) - datetime.fromisoformat(heard)).total_seconds()) < 600
    # Whoever takes the lease after it says nothing of it.
    assert start(tmp_path, silence=600).says() == "held"
    assert holder.last_heard(tmp_path, driver) is None


def test_a_driver_here_that_only_sleeps_is_not_followed(tmp_path: Path, start: Start) -> None:
    first = start(tmp_path, silence=0.5)
    assert first.says() == "held"
    first.signal(signal.SIGSTOP)
    time.sleep(1.0)
    assert "is being run by process" in start(tmp_path, silence=0.5).says()
    assert holder.is_held(tmp_path)
    first.signal(signal.SIGCONT)
    assert first.send("line") == "wrote"


def test_another_process_of_the_same_number_is_not_the_driver(tmp_path: Path) -> None:
    with holder.hold(tmp_path, "s"):
        _, mine = holder.latest(tmp_path)
        assert mine is not None
        assert mine.lives()
        reborn = holder.Holder(**{**mine.__dict__, "started": "1"})
        assert reborn.here
        assert not reborn.lives()


def test_of_many_that_start_together_one_gets_the_study(tmp_path: Path, start: Start) -> None:
    for _ in range(3):
        drivers = [start(tmp_path) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            said = list(pool.map(Driver.says, drivers))
        assert said.count("held") == 1, said
        assert sum("is being run by" in line for line in said) == 3
        for driver in drivers:
            driver.end()


def test_a_living_driver_on_another_machine_is_left_alone(tmp_path: Path, start: Start) -> None:
    (folder := tmp_path / "s").mkdir()
    first = start(folder, another_machine("far", folder, tmp_path))
    assert first.says() == "held"
    assert holder.is_held(folder)
    second = start(folder, silence=20)
    assert second.says().startswith("waiting watching process ")
    began = time.monotonic()
    assert "on far since" in second.says()
    assert time.monotonic() - began < 10


def test_a_driver_on_another_machine_that_has_died_is_followed_when_it_was_silent(tmp_path: Path, start: Start) -> None:
    (folder := tmp_path / "s").mkdir()
    first = start(folder, another_machine("far", folder, tmp_path))
    assert first.says() == "held"
    first.end()
    began = time.monotonic()
    second = start(folder, silence=2)
    assert second.says().startswith("waiting watching process")
    assert second.says() == "held"
    assert time.monotonic() - began >= 2


def test_a_driver_that_was_followed_while_it_slept_writes_nothing_more(tmp_path: Path, start: Start) -> None:
    """The fence: its machine was suspended, its study taken over, and then it wakes up."""
    (folder := tmp_path / "s").mkdir()
    written = tmp_path / "written"
    first = start(folder, another_machine("far", folder, tmp_path), silence=2, written=written)
    assert first.says() == "held"
    assert first.send("of the first") == "wrote"
    first.signal(signal.SIGSTOP)
    second = start(folder, another_machine("near", folder, tmp_path), silence=2, written=written)
    assert second.says().startswith("waiting watching process")
    assert second.says() == "held"
    assert second.send("of the second") == "wrote"
    assert first.process.stdin is not None
    first.process.stdin.write("too late\n")
    first.process.stdin.flush()
    first.signal(signal.SIGCONT)
    answer = first.says()
    assert answer.startswith("TakenOver")
    assert "'s' was taken over by process" in answer
    assert "on near since" in answer
    assert second.send("of the second") == "wrote"
    assert written.read_text().splitlines() == ["of the first", "of the second", "of the second"]
    # The first one's end gave nothing back that was not its own.
    first.process.wait()
    assert holder.is_held(folder)


def test_a_driver_that_was_followed_stops_although_it_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "BEAT", 0.05)
    lost: list[str] = []
    with holder.hold(tmp_path, "s", lost=lambda: lost.append("lost")) as lease:
        number, mine = holder.latest(tmp_path)
        assert mine is not None
        another = {**mine.__dict__, "token": "x", "host": "far", "machine": "far", "pid": 7}
        assert holder.create_json(tmp_path / "drivers" / f"{number + 1:06d}.json", another)
        eventually(lambda: lost)
        with pytest.raises(holder.TakenOver, match="process 7 on far"):
            lease.check()
        lease.note(state="finished")
    assert holder.last_driver(tmp_path) == {}
    assert holder.latest(tmp_path)[1] == holder.Holder(**another)


def test_a_driver_that_cannot_see_its_storage_looks_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "BEAT", 0.05)
    monkeypatch.setattr(holder, "SILENCE", 0.4)
    (folder := tmp_path / "s").mkdir()
    with holder.hold(folder, "s") as lease:
        away = tmp_path / "away"
        (folder / "drivers").rename(away)
        (folder / "drivers").write_text("no folder: as a mount that is gone")
        time.sleep(0.5)
        with ThreadPoolExecutor(1) as pool:
            check = pool.submit(lease.check)
            time.sleep(0.3)
            assert not check.done()
            (folder / "drivers").unlink()
            away.rename(folder / "drivers")
            check.result(timeout=20)


def test_a_storage_that_is_away_when_a_driver_begins_is_waited_for(tmp_path: Path) -> None:
    (drivers := tmp_path / "drivers").write_text("no folder: as a mount that is gone")
    with ThreadPoolExecutor(1) as pool:
        back = pool.submit(lambda: (time.sleep(0.5), drivers.unlink()))
        with holder.hold(tmp_path, "s") as lease:
            lease.check()
        back.result()


def test_silence_is_not_heard_while_the_storage_is_away(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "s").mkdir()
    first = start(folder, another_machine("far", folder, tmp_path))
    assert first.says() == "held"
    first.end()
    monkeypatch.setattr(holder, "SILENCE", 3.0)
    lease, away = folder / "drivers" / "000001.json", tmp_path / "away"
    returned: list[float] = []

    def leave(_: str) -> None:
        lease.rename(away)
        lease.mkdir()  # that cannot be read, as a file of a server that is away
        Timer(0.5, come_back).start()

    def come_back() -> None:
        lease.rmdir()
        away.rename(lease)
        returned.append(holder.clock())

    with holder.hold(folder, "s", waiting=leave):
        assert holder.clock() - returned[0] >= 3.0


def test_a_lease_whose_answer_was_lost_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object store has made the file, and the connection broke before it could say so."""
    create, lost = holder.create_json, [True]

    def create_and_lose(where: Path, value: Any, contender: str) -> bool:
        made = create(where, value, contender)
        if lost.pop() if lost else False:
            raise ConnectionResetError("connection reset by peer")
        return made

    monkeypatch.setattr(holder, "create_json", create_and_lose)
    with holder.hold(tmp_path, "s") as lease:
        lease.check()
    assert not lost


def test_a_full_disk_is_no_storage_that_comes_back(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for shortly: a study would otherwise hang for ten minutes instead of saying what is wrong."""
    for name, seconds in (("BEAT", 0.2), ("SILENCE", 4.0), ("FULL", 1.0)):
        monkeypatch.setattr(holder, name, seconds)
    with holder.hold(small_disk, "s") as lease:
        filler = fill(small_disk)
        # Until the last heartbeat is too long ago to write without another look.
        time.sleep(3.0)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"No space left on device.*run the study again"):
            lease.check()
        assert time.monotonic() - began < 60
        filler.unlink()
        lease.check()


def test_a_lease_costs_little_to_check(tmp_path: Path) -> None:
    with holder.hold(tmp_path, "s") as lease:
        began = time.perf_counter()
        for _ in range(10_000):
            lease.check()
        assert time.perf_counter() - began < 0.5


def test_a_file_system_without_locks_is_no_other_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with holder.hold(tmp_path, "s"), pytest.raises(StudyError, match="is being run by"), holder.hold(tmp_path, "s"):
        pass
    with holder.hold(tmp_path, "s"):
        pass


def test_old_leases_do_not_pile_up(tmp_path: Path) -> None:
    for _ in range(10):
        with holder.hold(tmp_path, "s"):
            pass
    assert len(os.listdir(tmp_path / "drivers")) <= 5
    assert holder.latest(tmp_path)[0] == 10


def test_waiting_for_another_machine_can_be_stopped(tmp_path: Path) -> None:
    far = holder.Holder("x", "far", "far", 7, "1", "2026-01-01T00:00:00+00:00", heard="2026-01-01T00:00:00+00:00")
    holder.create_json(tmp_path / "drivers" / "000001.json", far.__dict__)
    assert not holder.is_held(tmp_path)
    with pytest.raises(KeyboardInterrupt), holder.hold(tmp_path, "s", stopped=lambda: True):
        pass


FORKING = """
import os, sys, time
from pathlib import Path
from peftsearch.holder import hold
with hold(Path(sys.argv[1]), "s"):
    if child := os.fork():
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_forked_process_that_outlives_its_driver_holds_nothing(tmp_path: Path, start: Start) -> None:
    driver = subprocess.Popen([sys.executable, "-c", FORKING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    forked = int(driver.stdout.readline())
    try:
        driver.kill()
        driver.wait()
        assert start(tmp_path).says() == "held"
    finally:
        os.kill(forked, signal.SIGKILL)


def test_a_lease_that_is_no_lease_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "drivers").mkdir()
    (tmp_path / "drivers" / "000001.json").write_text('{"token": "x"}')
    with pytest.raises(StudyError, match=r"drivers/000001\.json"), holder.hold(tmp_path, "s"):
        pass
