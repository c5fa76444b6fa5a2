"""The MLflow UI on a storage folder's studies, with their Pareto pages beside it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import psutil

from peftsearch import files
from peftsearch.files import Place, local_cache
from peftsearch.spec import StudyError
from peftsearch.tracking.mlflow_store import default_artifacts, default_tracking_uri, relocate_artifacts

PLUGIN = "peftsearch"
"""The entry point by which MLflow's server finds `peftsearch.live`."""
# A page asks every few seconds: nobody wants a line on the terminal for each.
_WITH_PAGES = ("--app-name", PLUGIN, "--uvicorn-opts=--no-access-log")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def ui_command(storage: Path, host: str = "127.0.0.1", port: int = 5000, names: Sequence[str] = ()) -> list[str]:
    """The command that serves the storage's MLflow store.

    Args:
        storage: The storage folder.
        host: Address to listen on.
        port: Port to listen on.
        names: Names beside those of ``host`` and of loopback under which browsers and clients reach the server.
    """
    served = reachable_names(host, names)
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", default_tracking_uri(storage)),
        *("--default-artifact-root", default_artifacts(storage)),
        *("--host", host, "--port", str(port)),
        *("--allowed-hosts", ",".join(_host_headers(served, port))),
        *("--cors-allowed-origins", ",".join(_origins(served, port))),
        # Each worker loads all of MLflow; one serves a person well.
        *("--workers", "1"),
    ]


def reachable_names(host: str, further: Sequence[str] = ()) -> list[str]:
    """The names and addresses by which a server is called, in the form of a URL.

    Args:
        host: The address that it listens on; where that is every address of the machine, all of these count, and the
            machine's names.
        further: Names that the machine does not know of: of a proxy, an alias, a service of Kubernetes.
    """
    names = [*LOOPBACK_NAMES, *further]
    if host in ("0.0.0.0", "::", ""):
        names += [socket.gethostname(), socket.getfqdn()]
        for addresses in psutil.net_if_addrs().values():
            names += [item.address for item in addresses if item.family in (socket.AF_INET, socket.AF_INET6)]
    else:
        names.append(host)
    # An address of IPv6 may name its interface (fe80::1%eth0), which no Host header does.
    return list(dict.fromkeys(_for_url(name.partition("%")[0]).lower() for name in names))


def _host_headers(names: Sequence[str], port: int) -> list[str]:
    """Host headers that the server answers; any other is taken for an attack by DNS rebinding.

    MLflow compares the whole header, so that the port belongs to it, and a list replaces its own one (which admits
    ``10.*``, and so a name like ``10.example.org``). Loopback may be forwarded from any port, as with ``ssh -L``; a
    proxy on the usual ports is called without one. In these patterns (of `fnmatch`) a bracket is written ``[[]``.
    """
    headers = [f"{name.replace('[', '[[]')}:*" for name in LOOPBACK_NAMES]
    return [*headers, *(header for name in names for header in (f"{name}:{port}", name))]


def _origins(names: Sequence[str], port: int) -> list[str]:
    """Origins of pages that may change something: the server's own."""
    others = [name for name in names if name not in LOOPBACK_NAMES]
    origins = [origin for name in others for origin in (f"http://{name}:{port}", f"http://{name}", f"https://{name}")]
    # Loopback is always among them for MLflow; an empty list it takes for none given.
    return origins or [f"http://localhost:{port}"]


def ui_environment() -> dict[str, str]:
    """The environment for `ui_command`: without the background jobs (evaluation of language models) and telemetry of
    MLflow's server, which this project has no use for; what the user has set stays.
    """
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return quiet | dict(os.environ)


def serve_ui(
    storage: Place, host: str = "127.0.0.1", port: int = 5000, names: Sequence[str] = (), extra: Sequence[str] = ()
) -> int:
    """Serve the MLflow UI, and the studies' live pages beside it (`peftsearch.live`), until it is stopped (Ctrl-C).

    Returns the server's exit status, 0 after Ctrl-C.

    Args:
        storage: The storage. For one in an object store, which holds no MLflow store, there is an empty one in this
            machine's cache.
        host: Address to listen on; loopback by default, as MLflow's server asks nobody who they are.
        port: Port to listen on.
        names: Further names under which browsers reach the server; see `reachable_names`.
        extra: Further options of ``mlflow server``.

    Raises:
        StudyError: The storage holds neither an MLflow store nor a study yet, or cannot be read; or the port is in use,
            or peftsearch was installed before it had pages.
    """
    folder = storage.expanduser() if isinstance(storage, Path) else local_cache() / "mlflow"
    store = Path(default_tracking_uri(folder).removeprefix("sqlite:///"))
    # Studies that track elsewhere, or not at all, have their pages here all the same.
    if not (isinstance(storage, Path) and os.path.isfile(store)) and not _holds_a_study(storage):
        raise StudyError(f"there is no study in {str(storage)!r} yet: run one, or name another folder with --storage")
    _check_names(names)
    if PLUGIN not in entry_points(group="mlflow.app").names:
        raise StudyError("the installed peftsearch is older than this code: install it again (pip install -e .)")
    check_port(host, port)
    if not isinstance(storage, Path):
        folder.mkdir(parents=True, exist_ok=True)
        print(
            "An object store holds no MLflow runs: this MLflow UI is empty (a study's runs are on the server that its "
            "tracking.mlflow names), the Pareto pages are live",
            file=sys.stderr,
            flush=True,
        )
    # Without the last part MLflow shows what it has for chats and agents, and hides training runs behind a switch.
    address = f"http://{_for_url(host)}:{port}/#/experiments?workflowType=machine_learning"
    print(f"MLflow UI:    {address}  (Ctrl-C stops it)", file=sys.stderr, flush=True)
    print(f"Pareto pages: http://{_for_url(host)}:{port}/peftsearch/", file=sys.stderr, flush=True)
    if not _is_loopback(host):
        print(
            f"MLflow asks nobody for a password: whoever reaches port {port} of this machine sees and changes all runs",
            file=sys.stderr,
            flush=True,
        )
    try:
        relocate_artifacts(default_tracking_uri(folder), default_artifacts(folder))
    except sqlite3.OperationalError:
        pass  # a store that cannot be written can be looked at all the same
    except sqlite3.DatabaseError as error:
        raise StudyError(f"{str(store)!r} is damaged ({error}): restore it from a copy, or move it away") from None
    # In a session of its own the server does not get the terminal's Ctrl-C: it is ended below, with its workers, once.
    process = subprocess.Popen(
        [*ui_command(folder, host, port, names), *_WITH_PAGES, *extra],
        env=ui_environment() | {"PEFTSEARCH_STORAGE": str(storage)},
        start_new_session=True,
    )
    try:
        with _terminate_as_interrupt():
            return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _end(process)


def _holds_a_study(storage: Place) -> bool:
    studies = storage / "studies"
    try:
        for name in files.names(studies):
            with contextlib.suppress(PermissionError):  # somebody else's, perhaps
                if files.exists(studies / name / "study.json"):
                    return True
        return False
    except OSError as error:
        raise StudyError(
            f"cannot read the storage {storage}: {files.reason(error)} (choose another with --storage)"
        ) from None


@contextlib.contextmanager
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


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+|\[?[0-9A-Fa-f:.]+\]?", name):
            raise StudyError(
                f"{name!r} is not the name of a host: write it without scheme, port and path, like mlflow.example.org"
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
