"""The MLflow UI answers those who call it by a name of its own, and listens on loopback unless asked."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from peftsearch.files import Place
from peftsearch.spec import StudyError
from peftsearch.tracking.ui import reachable_names, serve_ui


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, host: str, origin: str | None = None) -> int:
    """The status of a request under a Host header; with an origin, of one that a page elsewhere would send."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1")
    if origin:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search",
            data=b'{"max_results": 1}',
            headers={"Content-Type": "application/json", "Origin": origin},
        )
    request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@contextmanager
def ui(storage: Place, *options: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The command, until its server answers."""
    port = free_port()
    command = [sys.executable, "-m", "peftsearch", "ui", "--storage", str(storage), "--port", str(port), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(0.2)
        yield port, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def listening(process: subprocess.Popen[str]) -> set[str]:
    """The addresses that a process and those that it has started listen on."""
    parent = psutil.Process(process.pid)
    connections = [c for child in [parent, *parent.children(recursive=True)] for c in child.net_connections("inet")]
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with an MLflow store in it."""
    from mlflow import MlflowClient

    from peftsearch.tracking.mlflow_tracker import default_tracking_uri

    folder = tmp_path_factory.mktemp("ui")
    MlflowClient(tracking_uri=default_tracking_uri(folder)).create_experiment("study")
    return folder


@pytest.mark.slow
def test_by_default_only_loopback_is_served_and_foreign_names_are_refused(storage: Path) -> None:
    with ui(storage) as (port, process):
        assert ask(port, f"127.0.0.1:{port}") == 200
        assert ask(port, f"localhost:{port}") == 200
        # Forwarded, as with ssh -L 8080:localhost:5000.
        assert ask(port, "localhost:8080") == 200
        assert ask(port, "[::1]:8080") == 200
        # A name that an attacker's DNS server points at 127.0.0.1; MLflow by itself would admit the second one.
        assert ask(port, f"rebound.example.org:{port}") == 403
        assert ask(port, "10.example.org") == 403
        assert ask(port, f"localhost.example.org:{port}") == 403
        assert ask(port, f"localhost:{port}", origin="http://rebound.example.org") == 403
        assert ask(port, f"localhost:{port}", origin=f"http://localhost:{port}") == 200
        assert listening(process) == {"127.0.0.1"}


@pytest.mark.slow
def test_a_wider_host_is_served_under_the_machines_names_and_those_that_were_allowed(storage: Path) -> None:
    with ui(storage, "--host", "0.0.0.0", "--allowed-host", "mlflow.example.org") as (port, process):
        assert ask(port, f"{socket.gethostname().lower()}:{port}") == 200
        assert ask(port, f"mlflow.example.org:{port}") == 200
        # Behind a proxy on the usual port.
        assert ask(port, "mlflow.example.org") == 200
        assert ask(port, f"mlflow.example.org:{port}", origin="https://mlflow.example.org") == 200
        assert ask(port, f"127.0.0.1:{port}") == 200
        assert ask(port, f"other.example.org:{port}") == 403
        assert ask(port, f"mlflow.example.org:{port}", origin="http://other.example.org") == 403
        assert listening(process) == {"0.0.0.0"}
        os.kill(process.pid, signal.SIGTERM)
        assert process.stderr is not None
        assert "asks nobody for a password" in process.stderr.read()


def test_names_by_which_a_server_is_called() -> None:
    loopback = ["localhost", "127.0.0.1", "[::1]"]
    assert reachable_names("127.0.0.1") == loopback
    assert reachable_names("10.1.2.3", ["Box"]) == [*loopback, "box", "10.1.2.3"]
    assert reachable_names("fd00::2") == [*loopback, "[fd00::2]"]
    everywhere = reachable_names("0.0.0.0")
    assert socket.gethostname().lower() in everywhere
    assert "*" not in "".join(everywhere)


@pytest.mark.parametrize("name", ["*", "http://box", "box:5000", "box/path", "a,b", ""])
def test_what_is_not_a_name_is_refused(storage: Path, name: str, unused_port: Callable[[], int]) -> None:
    with pytest.raises(StudyError, match="is not the name of a host"):
        serve_ui(storage, port=unused_port(), names=[name])


@pytest.fixture
def unused_port() -> Callable[[], int]:
    return free_port
