"""Studies that something happens to: driver processes, what they start, and how long a study stands still."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from peftsearch.spec import TrialRecord
from peftsearch.study import Study

# Ray takes a process that answers slowly for dead, and machines that run tests are busy.
PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "240", "RAY_health_check_failure_threshold": "40"}


class RunningStudy:
    """A study that a process of its own runs.

    Args:
        path: The study file; it is named like the study.
        storage: The storage folder.
        options: Further options of ``peftsearch run``.
        environment: Settings of Ray for its processes; patient ones where absent.
    """

    def __init__(self, path: Path, storage: Path, *options: str, environment: Mapping[str, str] | None = None) -> None:
        self.name, self.storage = path.stem, storage
        arguments = [sys.executable, "-m", "peftsearch", "run", str(path), "--storage", str(storage), *options]
        self._log = (storage / "driver.log").open("w")
        variables = {**os.environ, **(PATIENCE if environment is None else environment)}
        self.process = subprocess.Popen(arguments, stdout=self._log, stderr=subprocess.STDOUT, env=variables)
        self._seen: dict[int, psutil.Process] = {}

    def trials(self) -> list[TrialRecord]:
        """What the ledger holds by now."""
        try:
            return Study.open(self.name, self.storage).trials()
        except Exception:  # the ledger is being created
            return []

    def evaluations(self) -> int:
        """How many evaluations have been recorded by now."""
        return sum(len(record.rungs) for record in self.trials())

    def wait_until(self, true: Callable[[], Any], seconds: float = 400) -> float:
        """Wait, and return for how long."""
        began = time.monotonic()
        while not true():
            assert self.process.poll() is None, f"{self.process.returncode} {self.said()[-3000:]}"
            assert time.monotonic() - began < seconds, self.said()[-3000:]
            time.sleep(0.1)
        return time.monotonic() - began

    def processes(self, title: str) -> list[psutil.Process]:
        """Its Ray processes of this title."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                self._seen[child.pid] = child
                if title in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.Error:  # it has just ended
                continue
        return found

    def kill(self, *titles: str) -> None:
        """SIGKILL, all at once, to its Ray processes of these titles."""
        victims = [process for title in titles for process in self.processes(title)]
        assert victims, [child.cmdline() for child in psutil.Process(self.process.pid).children(recursive=True)]
        for victim in victims:
            victim.kill()

    def ended(self, seconds: float = 400) -> int:
        """Wait for its end; returns the exit status."""
        began = time.monotonic()
        while self.process.poll() is None:
            assert time.monotonic() - began < seconds, self.said()[-3000:]
            self.processes("")
            time.sleep(0.5)
        return self.process.returncode

    def left_behind(self) -> list[list[str]]:
        """Processes that it started and that outlive it by more than a few seconds."""
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=15)
        return [process.cmdline() for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    def said(self) -> str:
        """What it said."""
        self._log.flush()
        return (self.storage / "driver.log").read_text()


@contextmanager
def running(
    path: Path, storage: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[RunningStudy]:
    """A study that runs, and is ended with the block whatever happens."""
    study = RunningStudy(path, storage, *options, environment=environment)
    try:
        yield study
    finally:
        study.process.kill()
        study.process.wait()
