"""A running study answers nobody: its ports are on loopback, its Ray asks for a token that only it knows, and the
sockets of that are where nobody else can put others."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET, AF_INET6

import psutil
import pytest

from peftsearch.driver import ray_cluster
from peftsearch.spec import StudyError

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SERVE = """
import ray
ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=1)
print(ray.get_runtime_context().gcs_address, flush=True)
input()
"""
VISIT = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print("admitted", ray.cluster_resources()["CPU"])
"""


def environment(home: Path, **settings: str) -> dict[str, str]:
    """This process's environment without what it says of Ray's tokens, in another home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", **settings}


ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Without it, Ray looks for the cluster of 127.0.0.1 at the machine's other address, and waits for minutes."""


def visit(address: str, home: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", VISIT, address],
        env=environment(home, **settings),
        capture_output=True,
        text=True,
        timeout=300,
    )


@contextmanager
def somebodys_cluster(home: Path, **settings: str) -> Iterator[str]:
    """The address of a Ray that somebody else has started."""
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(
        command, env=environment(home, **settings), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("\n", timeout=300)


@contextmanager
def running(path: Path, storage: Path, home: Path, **settings: str) -> Iterator[psutil.Process]:
    """The driver of a study, once it trains."""
    command = [sys.executable, "-m", "peftsearch", "run", str(path), "--storage", str(storage)]
    log = (storage.parent / "driver.log").open("w")
    driver = subprocess.Popen(command, env=environment(home, **settings), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            assert driver.poll() is None, Path(log.name).read_text()[-3000:]
            if "training:" in Path(log.name).read_text():
                break
            time.sleep(0.3)
        yield psutil.Process(driver.pid)
    finally:
        driver.terminate()
        driver.wait(600)
        log.close()
    # As it says itself: an end in another way (a crash in Ray) leaves things behind.
    assert driver.returncode in (130, -signal.SIGKILL), Path(log.name).read_text()[-3000:]


def family(driver: psutil.Process) -> list[psutil.Process]:
    return [driver, *driver.children(recursive=True)]


def listeners(processes: list[psutil.Process]) -> dict[str, set[str]]:
    """Address -> names of the processes that listen there."""
    found: dict[str, set[str]] = {}
    for process in processes:
        try:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN or connection.type.name == "SOCK_DGRAM":
                    found.setdefault(connection.laddr.ip, set()).add(process.name())
        except psutil.NoSuchProcess:
            continue
    return found


def gcs_address(processes: list[psutil.Process]) -> str:
    (gcs,) = [process for process in processes if process.name() == "gcs_server"]
    ports = [c.laddr.port for c in gcs.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    (port,) = [port for port in ports if any(f"--gcs_server_port={port}" in word for word in gcs.cmdline())] or ports
    return f"127.0.0.1:{port}"


def sockets(processes: list[psutil.Process]) -> set[Path]:
    """The paths of Ray's sockets, as those who listen or talk there name them."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= {Path(connection.laddr) for connection in process.net_connections("unix") if connection.laddr}
    return {path for path in found if path.parent.name == "sockets"}


def reachable() -> list[str]:
    """This machine's addresses for others; without one, everything would be on loopback by itself."""
    addresses = [
        item.address.split("%")[0]
        for several in psutil.net_if_addrs().values()
        for item in several
        if item.family in (AF_INET, AF_INET6)
    ]
    return [address for address in addresses if not ip_address(address).is_loopback]


@pytest.mark.skipif(not reachable(), reason="this machine has no address but loopback")
def test_a_running_study_listens_on_loopback_and_admits_nobody_without_its_token(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = write_study(
        "guarded",
        methods={"lora": {}},
        search={"trials": 400, "scheduler": "none"},
        resources={"workers_per_trial": 2, "cpus_per_worker": 1, "slots": 1},
    )
    with running(path, tmp_path / "storage", home) as driver:
        processes = family(driver)
        found = listeners(processes)
        assert any("RayTrainWorker" in " ".join(process.cmdline()) for process in processes)
        outside = {
            address: names
            for address, names in found.items()
            if not (ip_address(address.removeprefix("::ffff:")).is_loopback)
        }
        assert found
        assert not outside

        address = gcs_address(processes)
        stranger = visit(address, home, **ON_LOOPBACK)
        assert stranger.returncode != 0
        assert "admitted" not in stranger.stdout
        guess = visit(address, home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 64, **ON_LOOPBACK)
        assert guess.returncode != 0
        assert "admitted" not in guess.stdout

        workers_token = {
            process.environ().get("RAY_AUTH_TOKEN")
            for process in processes
            if "RayTrainWorker" in " ".join(process.cmdline())
        }
        (token,) = workers_token
        assert token is not None
        assert len(token) == 64
        friend = visit(address, home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, **ON_LOOPBACK)
        assert friend.returncode == 0, friend.stderr
        assert "admitted" in friend.stdout
        # Neither on a command line, which everybody on the machine can read, nor in a file.
        assert not [process for process in processes if any(token in word for word in process.cmdline())]
    # Asked by SIGTERM, the study has stopped by itself: Ray's own handler would have ended it where it was.
    said = (tmp_path / "driver.log").read_text()
    assert "Stopped. Everything so far is recorded" in said
    assert "SIGTERM received" not in said
    assert not list(home.rglob("*auth*"))
    told = subprocess.run(["grep", "-rlF", token, str(tmp_path)], capture_output=True, text=True).stdout
    assert not told


def test_nobody_reaches_a_studys_sockets_and_no_folder_of_ray_outlives_it(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_study("hidden", methods={"lora": {}}, search={"trials": 400, "scheduler": "none"})
    # As the system's: open to everybody.
    temporary = Path(tempfile.mkdtemp(prefix="ps-", dir="/tmp"))
    temporary.chmod(0o1777)

    def run() -> AbstractContextManager[psutil.Process]:
        return running(path, tmp_path / "storage", tmp_path, TMPDIR=str(temporary))

    def folders() -> set[str]:
        return {item.name for item in temporary.iterdir() if "ray" in item.name}

    def private(folder: Path) -> bool:
        found = folder.stat()
        return found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700

    try:
        with run() as driver:
            processes = family(driver)
            paths = sockets(processes)
            assert {path.name for path in paths} == {"plasma_store", "raylet"}
            for socket in paths:
                assert temporary in socket.parents
                assert any(private(folder) for folder in socket.parents), socket
            killed = folders()
            driver.kill()
        assert psutil.wait_procs(processes, timeout=120)[1] == []
        assert folders() == killed
        with run():
            assert len(folders()) == 1
            assert not folders() & killed
        assert folders() == set()
    finally:
        shutil.rmtree(temporary)


def test_a_cluster_that_anybody_may_use_is_joined_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    told: list[str] = []
    with somebodys_cluster(tmp_path, RAY_AUTH_MODE="disabled") as address:
        with ray_cluster(address, told.append) as nodes:
            assert [node["CPU"] for node in nodes] == [1.0]
        assert len(told) == 1
        assert f"anybody who reaches the Ray cluster at {address} can run code on it" in told[0]
        assert "RAY_AUTH_MODE=token" in told[0]


def test_a_cluster_with_a_token_is_joined_by_those_who_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    told: list[str] = []
    with somebodys_cluster(tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="c" * 64) as address:
        with pytest.raises(StudyError, match="asks for a token and none was shown"), ray_cluster(address, told.append):
            raise AssertionError("admitted")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "d" * 64)
        with pytest.raises(StudyError, match="does not accept the token"), ray_cluster(address, told.append):
            raise AssertionError("admitted")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "c" * 64)
        with ray_cluster(address, told.append) as nodes:
            assert [node["CPU"] for node in nodes] == [1.0]
    assert told == []
