"""The command line in forks of one process that has its libraries: importing them is a quarter of what a small study
costs, and tests run a hundred. A fork is a process as any other, with a session, signals and a Ray of its own.

Where the environment is not the one in which the libraries were imported, which some of them read then, a command gets
a new interpreter instead. So it does wherever a test starts one itself: how a real driver starts is tested, too.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

_FREE = ("PEFTSEARCH_", "PYTEST_", "PG", "MLFLOW_")
"""Variables that begin so are read when they are needed."""

_FIELD = 12
"""Characters of a number that the process that forks tells."""

_HERE = Path(__file__).parent


def command(*arguments: object, timeout: float = 480) -> subprocess.CompletedProcess[str]:
    """Run ``peftsearch ARGUMENTS`` to its end, and keep what it says.

    Raises:
        subprocess.TimeoutExpired: It has not ended so many seconds later, and was killed.
    """
    words = [str(argument) for argument in arguments]
    if not _usable():
        real = [sys.executable, "-m", "peftsearch", *words]
        return subprocess.run(real, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        fork = Fork(words, out, err)
        try:
            status = fork.wait(timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.kill(fork.pid, signal.SIGKILL)
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return subprocess.CompletedProcess(["peftsearch", *words], status, *texts)


def programs(
    path: Path, arguments: Sequence[Sequence[object]], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """Run a Python program beside itself, once with each list of arguments, to the end of all; what they say is kept.

    They find the libraries imported, and have one thread each (``torch.set_num_threads``) unless they ask for more.

    Raises:
        subprocess.TimeoutExpired: One has not ended so many seconds later; all were killed.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in arguments]
        forks = []
        for words, file in zip(arguments, files, strict=True):
            forks.append(Fork([str(word) for word in words], file, file, program=path))
        try:
            deadline = time.monotonic() + timeout
            for fork in forks:
                fork.wait(max(0.1, deadline - time.monotonic()))
        finally:
            for fork in forks:
                if fork.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(fork.pid, signal.SIGKILL)
        done = []
        for fork, file in zip(forks, files, strict=True):
            file.seek(0)
            text = file.read().decode(errors="replace")
            done.append(subprocess.CompletedProcess([str(path)], fork.returncode or 0, text, ""))
        return done


class Fork:
    """A fork that runs the command line, a warden above it (`warden.watch`), or a program, of the interface of
    `subprocess.Popen`.

    Args:
        arguments: Of the command line, or of the program.
        out: Where its standard output goes.
        err: Where its standard error goes.
        warden: Log and terminal of a warden; the command line alone where absent.
        program: A file of Python; the command line where absent.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        out: IO[Any] | int,
        err: IO[Any] | int,
        warden: Sequence[str] = (),
        program: Path | None = None,
    ) -> None:
        self._link = socket.socket(socket.AF_UNIX)
        self._link.connect(_server())
        order = {
            "arguments": list(arguments),
            "warden": list(warden),
            "program": None if program is None else str(program),
            "path": sys.path,
            "cwd": os.getcwd(),
            "environment": dict(os.environ),
        }
        files = [file if isinstance(file, int) else file.fileno() for file in (out, err)]
        data = json.dumps(order).encode() + b"\n"
        self._link.sendmsg([data[:1]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
        self._link.sendall(data[1:])
        self.pid = int(self._link.recv(_FIELD, socket.MSG_WAITALL))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.001)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; its exit status, negative where a signal ended it.

        Raises:
            subprocess.TimeoutExpired: It has not ended so many seconds later.
        """
        if self.returncode is None:
            self._link.settimeout(timeout)
            try:
                said = self._link.recv(_FIELD, socket.MSG_WAITALL)
            except TimeoutError:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout or 0.0) from None
            assert said, "the process that forks has ended"
            self.returncode = int(said)
            self._link.close()
        return self.returncode


_started: dict[str, Any] = {}


def _usable() -> bool:
    """Whether a fork would find the libraries as they would be, imported in this environment."""
    before = _started.setdefault("environment", dict(os.environ))
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    return all(name.startswith(_FREE) for name in changed)


def _server() -> str:
    """The address of the process that forks; it ends with this one."""
    if "address" not in _started:
        folder = tempfile.TemporaryDirectory(prefix="forks-")
        address = str(Path(folder.name) / "socket")
        server = subprocess.Popen(
            [sys.executable, str(_HERE / "forks_server.py"), address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C in the tests' terminal is theirs.
            start_new_session=True,
        )
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        _started.update(address=address, folder=folder, server=server)
        atexit.register(server.kill)
    return str(_started["address"])
