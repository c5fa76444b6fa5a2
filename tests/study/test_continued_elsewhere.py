"""Studies that are continued from another place, extended, forked, fought over, and recorded in PostgreSQL."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import command
from postgres_server import PostgresServer, remove, start_server
from study_runs import ledger, run

from peftsearch.spec import TrialState
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def document(tiny_base: Path, topics_csv: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": str(tiny_base),
        "domains": {
            "topics": {"data": {"source": str(topics_csv), "split": {"group": "document", "validation": 0.25}}},
        },
        "methods": {"lora": {"rank": [1, 2, 4, 8]}, "full": {}},
        "search": {"trials": 3},
        "training": {"epochs": 2, "evaluations": 4, "batch_size": 16, "max_length": 16},
        "resources": {"cpus_per_worker": 1, "slots": 1},
        "tracking": {"mlflow": "off"},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]) -> tuple[Path, Path]:
    """The undisturbed study: its storage and its file."""
    storage = tmp_path_factory.mktemp("storage")
    path = storage / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    run(path, storage)
    return storage, path


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts drivers; ends what is left of them, workers included."""
    started: list[subprocess.Popen[str]] = []

    def begin(path: Path, storage: Path, *options: str, prefix: tuple[str, ...] = (), **other: Any) -> Any:
        program = [*prefix, sys.executable, "-m", "peftsearch", "run", str(path), "--storage", str(storage), *options]
        started.append(
            subprocess.Popen(
                program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, **other
            )
        )
        return started[-1]

    yield begin
    for process in started:
        for number in (signal.SIGCONT, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
        process.wait()


def wait_for_trials(storage: Path, ended: int, name: str = "tiny", process: Any = None) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        time.sleep(0.2)
        assert process is None or process.poll() is None, process.stderr.read()[-3000:]
        try:
            if sum(r.state is not TrialState.RUNNING for r in Study.open(name, storage).trials()) >= ended:
                return
        except Exception:  # the ledger is being created
            continue
    raise AssertionError("the study did not get so far")


def elsewhere(name: str) -> tuple[str, ...]:
    """What runs a command under another host name and with process numbers of its own."""
    script = f'hostname {name} && exec "$0" "$@"'
    prefix = ("unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script)
    if os.geteuid() != 0 or shutil.which("unshare") is None or subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("needs root and unshare, to be another machine")
    return prefix


def test_a_killed_driver_is_followed_from_another_machine_that_mounts_the_storage_elsewhere(
    finished: tuple[Path, Path], tmp_path: Path, start: Callable[..., Any]
) -> None:
    storage, path = finished
    before, after = tmp_path / "mount", tmp_path / "other" / "mount"
    first = start(path, before)
    wait_for_trials(before, 2, process=first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    after.parent.mkdir()
    before.rename(after)
    copied = tmp_path / "study.yaml"
    shutil.copy(path, copied)
    second = start(copied, after, prefix=elsewhere("far"), cwd=tmp_path)
    _, stderr = second.communicate(timeout=480)
    assert second.returncode == 0, stderr[-3000:]
    assert ledger("tiny", after) == ledger("tiny", storage)
    # A worker of the first driver may have written a last state there; the second one knows of no such place.
    assert not [*before.rglob("*.db"), *before.rglob("*.json")]
    status = Study.open("tiny", after).status()
    assert status["state"] == "finished"
    assert status["driver"]["host"] == "far"


def test_a_driver_whose_machine_was_suspended_is_followed_and_stops(
    finished: tuple[Path, Path], tmp_path: Path, start: Callable[..., Any]
) -> None:
    """The lease: silence, a new driver, and then the old one wakes up and finds that it may not write."""
    storage, path = finished
    first = start(path, tmp_path, prefix=elsewhere("far"))
    wait_for_trials(tmp_path, 2, process=first)
    os.killpg(first.pid, signal.SIGSTOP)
    # Another machine's kernel knows nothing of this lock.
    (tmp_path / "studies" / "tiny" / "driver.lock").unlink()
    second = start(path, tmp_path, prefix=elsewhere("near"))
    _, stderr = second.communicate(timeout=480)
    assert second.returncode == 0, stderr[-3000:]
    expected = ledger("tiny", storage)
    assert ledger("tiny", tmp_path) == expected
    os.killpg(first.pid, signal.SIGCONT)
    _, stderr = first.communicate(timeout=120)
    assert first.returncode == 2, stderr[-3000:]
    assert "the study 'tiny' was taken over by process" in stderr
    assert "on near since" in stderr
    assert "Traceback" not in stderr
    assert ledger("tiny", tmp_path) == expected
    assert Study.open("tiny", tmp_path).status()["state"] == "finished"


def test_more_trials_and_a_further_method_extend_the_study(
    finished: tuple[Path, Path], document: dict[str, Any], tmp_path: Path
) -> None:
    storage, _ = finished
    copied = tmp_path / "storage"
    shutil.copytree(storage, copied)
    wider = {**document, "methods": {**document["methods"], "prompt": {"tokens": [2, 4]}}, "search": {"trials": 4}}
    path = tmp_path / "wider.yaml"
    path.write_text(yaml.safe_dump(wider))
    run(path, copied)
    before, after = ledger("tiny", storage), ledger("tiny", copied)
    assert after[: len(before)] == before
    assert {m: sum(t["method"] == m for t in after) for m in wider["methods"]} == {"lora": 4, "full": 4, "prompt": 4}
    assert any(t["method"] == "prompt" and t["state"] == "COMPLETE" for t in after)
    done = command("run", tmp_path / "wider.yaml", "--storage", copied, "--set", "search.trials=3")
    assert done.returncode == 2
    assert "search.trials can grow but not shrink" in done.stderr


def test_a_fork_takes_over_the_cells_that_have_not_changed(
    finished: tuple[Path, Path], document: dict[str, Any], tmp_path: Path
) -> None:
    storage, _ = finished
    copied = tmp_path / "storage"
    shutil.copytree(storage, copied)
    path = tmp_path / "forked.yaml"
    path.write_text(yaml.safe_dump({**document, "methods": {"lora": {"rank": [16, 32]}, "full": {}}}))
    run(path, copied, "--name", "forked", "--fork", "tiny")
    old, new = ledger("tiny", copied), ledger("forked", copied)
    assert old == ledger("tiny", storage)
    assert [t for t in new if t["method"] == "full"] == [t for t in old if t["method"] == "full"]
    lora = [t for t in new if t["method"] == "lora"]
    assert len(lora) == 3
    assert {t["hyperparameters"]["rank"] for t in lora} <= {16, 32}
    # Not trained again: their clocks say when the old study trained them.
    clocks = [
        {r.number: r.finished for r in Study.open(name, copied).trials() if r.method == "full"}
        for name in ("tiny", "forked")
    ]
    assert clocks[0] == clocks[1]
    # Once begun, it goes on without the option, and with it.
    for options in ((), ("--fork", "tiny")):
        run(path, copied, "--name", "forked", *options)
        assert ledger("forked", copied) == new
    done = command("run", path, "--storage", copied, "--name", "forked", "--fork", "other")
    assert done.returncode == 2
    done = command("export", "forked", "--to", tmp_path / "adapters", "--storage", copied)
    assert done.returncode == 0, done.stderr[-3000:]
    front = Study.open("forked", copied).frontier()["topics"].front
    assert len(done.stdout.split()) == len(front)


def test_a_study_on_postgresql_survives_its_server_and_another_study_of_its_name(
    finished: tuple[Path, Path], tmp_path: Path, start: Callable[..., Any]
) -> None:
    storage, path = finished
    server: PostgresServer = start_server()
    try:
        setting = ("--set", f"tracking.ledger={server.create_database()}")
        os.environ["PGPASSWORD"] = server.password
        first = start(path, tmp_path / "a", *setting)
        wait_for_trials(tmp_path / "a", 1, process=first)
        server.stop()
        time.sleep(3)
        server.start()
        _, stderr = first.communicate(timeout=480)
        assert first.returncode == 0, stderr[-3000:]
        assert ledger("tiny", tmp_path / "a") == ledger("tiny", storage)
        done = command("run", path, "--storage", tmp_path / "b", *setting)
        assert done.returncode == 2
        assert "holds another study of the name 'tiny', which lives in" in done.stderr
        assert str(tmp_path / "a") in done.stderr
        assert server.password not in done.stderr
        assert not (tmp_path / "b" / "studies").exists()
    finally:
        del os.environ["PGPASSWORD"]
        remove(server)
