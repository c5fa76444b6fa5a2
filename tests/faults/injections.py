"""Runs of the command line to which faults are done: when, to which process, and what is left of it afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from forks import Fork

WARDEN = Path(__file__).with_name("warden.py")
PATIENCE = 600.0
"""Seconds after which nothing is waited for any more; machines that run these tests may be busy."""

RAY_PARTS = {
    "worker killed": ("RayTrainWorker",),
    "dispatcher killed": ("DispatcherActor",),
    "slot's controller killed": ("TrainController",),
    "whole slot killed": ("TrainController", "RayTrainWorker"),
    # As Ray Tune names every trainable that has resources.
    "trial actor killed": ("ResourceTrainable",),
}
"""By fault, what the titles of the processes hold that are killed; the study goes on after each by itself."""


def evaluations(storage: Path, name: str) -> int:
    """How many evaluations, ends of trials and readings of the test split the ledger holds; 0 where there is none yet.

    Read past the package, as this is asked many times a second.
    """
    file = storage / "studies" / name / "ledger.db"
    query = """SELECT key, value_json FROM trial_user_attributes WHERE key IN ('rungs', 'ended')
               UNION ALL SELECT key, '' FROM study_user_attributes WHERE key LIKE 'reading:%'"""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5)) as connection:
            rows = connection.execute(query).fetchall()
    except sqlite3.Error:
        return 0
    return sum(len(json.loads(value)["rungs"]) if key == "rungs" else 1 for key, value in rows)


class Driver:
    """``peftsearch run`` in a session of its own, below a warden that outlives it and everything that it starts.

    Args:
        study: The study file.
        storage: The storage folder.
        name: The study's name.
        options: Further options of the command.
        terminal: A terminal to run in; a log file where absent.
    """

    def __init__(self, study: Path, storage: Path, name: str, *options: str, terminal: str = "-") -> None:
        self.storage, self.name, self.terminal = storage, name, terminal
        self.log = storage.with_name(f"{storage.name}-{name}.log")
        command = ["run", str(study), "--storage", str(storage), "--name", name, *options]
        self.began = time.monotonic()
        self._said = self.log.stat().st_size if self.log.exists() else 0
        reading, writing = os.pipe()
        self._warden = Fork(command, out=writing, err=2, warden=(str(self.log), terminal))
        os.close(writing)
        self._tells = os.fdopen(reading)
        self.pid = int(self._tells.readline().split()[1])
        self._status: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        with self._tells:
            line = self._tells.readline()
        self._status = int(line.split()[1]) if line else None
        self._ended.set()

    # --- watching ---

    @property
    def running(self) -> bool:
        """Whether the driver itself lives."""
        return not self._ended.is_set()

    @property
    def output(self) -> str:
        """What this run has written to its log."""
        return self.log.read_bytes()[self._said :].decode(errors="replace") if self.log.exists() else ""

    def evaluations(self) -> int:
        """See `evaluations`."""
        return evaluations(self.storage, self.name)

    def wait_until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
        """Wait for something while the driver runs; False where the driver ended before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.running:
                return bool(condition())
            assert time.monotonic() < deadline, f"waited in vain; the driver says:\n{self.output[-3000:]}"
            time.sleep(0.1)
        return True

    def wait_progress(self, further: int = 1, seconds: float = PATIENCE) -> bool:
        """Wait for so many further evaluations in the ledger; False where the driver ended before."""
        return self.reach(self.evaluations() + further, seconds)

    def reach(self, goal: int, seconds: float = PATIENCE) -> bool:
        """Wait for so many evaluations in the ledger; False where the driver ended before."""
        return self.wait_until(lambda: self.evaluations() >= goal, seconds)

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Every process of this run, orphans included, whose command line holds a text."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._warden.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.status() != psutil.STATUS_ZOMBIE and title in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """The slots' training processes."""
        return self.processes("RayTrainWorker")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the workers from training for some seconds, so that a short study does not end meanwhile.

        Fewer than the dispatcher's lease: a slot that is silent for longer counts as lost.
        """
        workers = self.workers()
        for worker in workers:
            worker.suspend()
        try:
            yield
        finally:
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.resume()

    # --- ending ---

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the driver alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self, *titles: str) -> int:
        """SIGKILL to all processes of these titles at once; returns how many there were."""
        victims = [process for title in titles for process in self.processes(title)]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        return len(victims)

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal does it: SIGINT to the whole foreground process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGINT)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for the driver's own end; its exit status."""
        assert self._ended.wait(seconds), f"the driver did not end; it says:\n{self.output[-3000:]}"
        assert self._status is not None
        return self._status

    def leftovers(self, seconds: float = 120) -> list[str]:
        """What is alive of this run so many seconds after the driver's end; [] as soon as there is nothing."""
        self.wait()
        try:
            self._warden.wait(seconds)
        except subprocess.TimeoutExpired:
            return [f"{process.pid} {' '.join(process.cmdline())[:200]}" for process in self.processes()]
        return []

    def end(self) -> None:
        """Kill whatever is left, the warden last."""
        while self._warden.poll() is None:
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._warden.wait(0.2)


class Terminal:
    """A terminal in which a command runs, and which can be lost."""

    def __init__(self) -> None:
        self._own, self._other = pty.openpty()
        self.path = os.ttyname(self._other)
        self.shown = b""
        self._lost = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def lose(self) -> None:
        """As when a window is closed or a connection breaks: SIGHUP, and writing to it fails from then on."""
        self._lost.set()
        # A read that waits would keep the terminal alive.
        self._reader.join()
        os.close(self._other)
        os.close(self._own)

    def _read(self) -> None:
        while not self._lost.is_set():
            if select.select([self._own], [], [], 0.05)[0]:
                self.shown += os.read(self._own, 65536)
