"""The MLflow UI on a storage folder's studies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peftsearch.spec import StudyError
from peftsearch.tracking.mlflow_tracker import default_artifacts, default_tracking_uri


def ui_command(storage: Path, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command that serves the storage's MLflow store."""
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", default_tracking_uri(storage)),
        *("--default-artifact-root", default_artifacts(storage)),
        *("--host", host, "--port", str(port)),
        # Each worker loads all of MLflow; one serves a person well.
        *("--workers", "1"),
    ]


def ui_environment() -> dict[str, str]:
    """The environment for `ui_command`: without the background jobs (evaluation of language models) and telemetry of
    MLflow's server, which this project has no use for; what the user has set stays.
    """
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return quiet | dict(os.environ)


def serve_ui(storage: Path, host: str = "127.0.0.1", port: int = 5000, extra: Sequence[str] = ()) -> int:
    """Serve the MLflow UI until it is stopped (Ctrl-C); returns the server's exit status, 0 after Ctrl-C.

    Args:
        storage: The storage folder.
        host: Address to listen on; loopback by default, as MLflow's server asks nobody who they are.
        port: Port to listen on.
        extra: Further options of ``mlflow server``.

    Raises:
        StudyError: The storage holds no MLflow store yet, or the port is in use.
    """
    store = Path(default_tracking_uri(storage).removeprefix("sqlite:///"))
    if not store.is_file():
        raise StudyError(
            f"no study in {str(storage)!r} has been recorded in MLflow yet: "
            "run one, or name another folder with --storage"
        )
    check_port(host, port)
    # Without the last part MLflow shows what it has for chats and agents, and hides training runs behind a switch.
    address = f"http://{_for_url(host)}:{port}/#/experiments?workflowType=machine_learning"
    print(f"MLflow UI: {address}  (Ctrl-C stops it)", file=sys.stderr, flush=True)
    # In a session of its own the server does not get the terminal's Ctrl-C: it is ended below, with its workers, once.
    process = subprocess.Popen([*ui_command(storage, host, port), *extra], env=ui_environment(), start_new_session=True)
    try:
        with _terminate_as_interrupt():
            return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _end(process)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Have SIGTERM end us as Ctrl-C does, so that no server is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    # The second round is for workers that outlived the server.
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def check_port(host: str, port: int) -> None:
    """See that somebody can listen there.

    Raises:
        StudyError: The port is in use or not allowed, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server does: a connection that is still closing down does not count as in use.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise StudyError(
                f"cannot listen on {host} port {port} ({reason}): choose another with --port or --host"
            ) from None


def _for_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
