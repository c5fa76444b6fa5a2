"""Drivers in processes, and on machines, of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

DRIVER = """
import sys, time
from pathlib import Path
from peftsearch import holder
from peftsearch.spec import StudyError
folder, beat, silence, *rest = sys.argv[1:]
holder.BEAT, holder.SILENCE = float(beat), float(silence)
written = Path(rest[0]) if rest else None
try:
    with holder.hold(Path(folder), "s", waiting=lambda sentence: print("waiting", sentence, flush=True)) as lease:
        print("held", flush=True)
        for line in sys.stdin:
            if line == "release\\n":
                break
            lease.check()
            if written:
                with written.open("a") as file:
                    file.write(line)
            print("wrote", flush=True)
        print("released", flush=True)
except StudyError as error:
    print(type(error).__name__, error, flush=True)
"""


class Driver:
    """A process that asks for a study and holds it until it is told otherwise.

    Args:
        folder: The study's folder.
        prefix: A command that runs the process elsewhere (`another_machine`).
        written: A file that it writes what it is sent to.
    """

    def __init__(
        self,
        folder: Path,
        prefix: Sequence[str] = (),
        beat: float = 0.2,
        silence: float = 3.0,
        written: Path | None = None,
    ) -> None:
        arguments = [str(folder), str(beat), str(silence), *([str(written)] if written else [])]
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", DRIVER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def says(self) -> str:
        """The next thing that it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def send(self, line: str) -> str:
        """Have it check its lease and write a line; returns its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.says()

    def signal(self, number: signal.Signals) -> None:
        """To all of its processes."""
        os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Whatever it does."""
        for number in (signal.SIGCONT, signal.SIGKILL):
            with contextless(ProcessLookupError):
                self.signal(number)
        self.process.wait()


@contextmanager
def contextless(error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except error:
        return


def another_machine(name: str, folder: Path, tmp: Path) -> list[str]:
    """A command that runs another under a host name and a space of process numbers of its own, where the study's kernel
    lock is another file: as on a network's file system whose locks reach no further than one machine.
    """
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare, to be another machine")
    private = tmp / f"lock-of-{name}"
    private.touch()
    (folder / "driver.lock").touch()
    script = f'hostname {name} && mount --bind "{private}" "{folder}/driver.lock" && exec "$0" "$@"'
    prefix = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us be another one (unshare)")
    return prefix


def eventually(condition: object, seconds: float = 20) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
