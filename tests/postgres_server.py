"""A real PostgreSQL server of the tests' own, on a free port of the loopback interface.

Every test can ask for it::

    def test_something(postgres_server: PostgresServer) -> None:
        url = postgres_server.create_database()

It needs the server's programs (Debian: ``apt-get install postgresql``), and starts no service of the system.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

USER = "peftsearch"


def programs() -> Path | None:
    """The folder with ``initdb``, ``postgres`` and ``psql``, the newest there is."""
    # Debian keeps them out of PATH, in a folder per version.
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    found = shutil.which("initdb")
    for folder in (*debian, *([Path(found).resolve().parent] if found else [])):
        if all((folder / name).exists() for name in ("initdb", "postgres", "psql")):
            return folder
    return None


class PostgresServer:
    """One server; it can be stopped and started again, and asked for fresh databases.

    Args:
        programs: Folder of the server's programs.
        folder: A folder of its own, which the server's user can enter.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._data = folder / "data"
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._names = (f"d{number}" for number in itertools.count())
        self.password = secrets.token_hex(8)
        self.port = 0
        # The server refuses to run as root.
        self._identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            import pwd

            for name in ("postgres", "nobody"):
                try:
                    user = pwd.getpwnam(name)
                except KeyError:
                    continue
                self._identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
                os.chown(folder, user.pw_uid, user.pw_gid)
                break

    def url(self, database: str) -> str:
        """The SQLAlchemy URL of a database."""
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """The URL of a new, empty database."""
        name = next(self._names)
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, statement: str, database: str = "postgres") -> str:
        """Run one SQL statement; returns what it prints, without headings."""
        return self._run(
            "psql",
            *("-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-d", database),
            *("-v", "ON_ERROR_STOP=1", "-qAt", "-c", statement),
            environment={"PGPASSWORD": self.password},
        )

    def make(self) -> None:
        """Create the server's files."""
        secret = self._folder / "password"
        secret.write_text(self.password)
        if self._identity:
            os.chown(secret, self._identity["user"], self._identity["group"])
        self._run(
            "initdb",
            *("-D", str(self._data), "-U", USER, f"--pwfile={secret}", "--auth=scram-sha-256"),
            *("--encoding=UTF8", "--locale=C", "--no-sync"),
        )
        secret.unlink()

    def start(self) -> None:
        """Start the server, on the port that it had before, and wait until it answers."""
        self.port = self.port or free_port()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(str(self._programs / "postgres"), "-D", str(self._data), "-p", str(self.port)),
                    *("-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self._folder}"),
                    # Nothing here has to survive a power cut.
                    *("-c", "fsync=off", "-c", "shared_buffers=16MB", "-c", "max_connections=40"),
                ],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **self._identity,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                self.execute("SELECT 1")
                return
            except RuntimeError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{error}\n{self._log.read_text(errors='replace')[-2000:]}") from None
                time.sleep(0.05)

    def stop(self) -> None:
        """End the server at once, and every connection with it."""
        if self._process is not None:
            # "Fast shutdown": https://www.postgresql.org/docs/current/server-shutdown.html
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGQUIT)
                self._process.wait(30)
            self._process = None

    def _run(self, program: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            cwd=self._folder,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=120,
            **self._identity,
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stdout.strip()} {done.stderr.strip()}")
        return done.stdout.strip()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(needed: Sequence[str] = ("psycopg",)) -> PostgresServer:
    """Start a server in a folder of its own; call `remove` with it at the end.

    Skips the test where the server's programs or the driver are missing.
    """
    folder = programs()
    if folder is None:
        pytest.skip("needs a PostgreSQL server's programs (Debian: apt-get install postgresql)")
    for module in needed:
        pytest.importorskip(module)
    # Not pytest's folder: only its owner can enter that, and the server has another user than root.
    server = PostgresServer(folder, Path(tempfile.mkdtemp(prefix="postgres-")))
    try:
        server.make()
        server.start()
    except BaseException:
        remove(server)
        raise
    return server


def remove(server: PostgresServer) -> None:
    """Stop a server and delete its files."""
    server.stop()
    shutil.rmtree(server._folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A running server, shared by all tests: take a database of your own (`create_database`), and leave it running."""
    server = start_server()
    yield server
    remove(server)
