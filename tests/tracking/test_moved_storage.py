"""A storage that was moved, copied, or is mounted elsewhere: its artifacts are found and written where it is today."""

from __future__ import annotations

import shutil
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from tracking_study import study_facts, trial, wait_for

from peftsearch.tracking.mlflow_store import default_artifacts, default_tracking_uri
from peftsearch.tracking.mlflow_tracker import DomainReport, sync

Artifacts = dict[str, dict[str, str]]


def write(storage: Path, study: str, domain: str, content: str) -> None:
    """What a study does at its end: trials, and a page with a file."""
    pages = {domain: DomainReport("a note", {f"{content}.txt": content.encode()})}
    sync(default_tracking_uri(storage), [trial(0)], study_facts(study), pages, default_artifacts(storage))


def artifacts(storage: Path) -> Artifacts:
    """Contents of every artifact, as MLflow finds them, by study and file name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=default_tracking_uri(storage))
    found: Artifacts = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            for item in client.list_artifacts(run.info.run_id):
                path = Path(run.info.artifact_uri) / item.path
                assert path.is_relative_to(storage)
                found.setdefault(experiment.name, {})[item.path] = path.read_text()
    return found


def apart(call: Callable[..., Any], *arguments: object) -> Any:
    """In a process of its own: MLflow remembers each run's place for as long as its process lives."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result(300)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with two studies in its store, in its first place."""
    folder = tmp_path_factory.mktemp("be fore") / "storage"
    apart(write_both, folder)
    return folder


@pytest.fixture
def storage(before: Path, tmp_path: Path) -> Iterator[Path]:
    """The storage in another place, and nothing in the first one."""
    now = tmp_path / "now"
    shutil.copytree(before, now)
    aside = before.rename(before.with_name("aside"))
    yield now
    assert not before.exists()
    aside.rename(before)


def write_both(storage: Path) -> None:
    write(storage, "one", "clinical", "first")
    write(storage, "two", "legal", "other")


@pytest.mark.slow
def test_artifacts_are_found_and_written_in_todays_place(storage: Path) -> None:
    apart(write, storage, "one", "legal", "second")
    # Those of a study that is not continued, too.
    assert apart(artifacts, storage) == {
        "one": {"first.txt": "first", "second.txt": "second"},
        "two": {"other.txt": "other"},
    }


@pytest.mark.slow
def test_the_ui_of_a_moved_storage_shows_them(storage: Path) -> None:
    with closing(sqlite3.connect(storage / "mlflow.db")) as connection:
        query = "SELECT run_uuid FROM runs JOIN experiments USING (experiment_id)"
        query += " WHERE runs.name = 'legal' AND experiments.name = 'two'"
        ((run,),) = connection.execute(query)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "peftsearch", "ui", "--storage", str(storage), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        url = f"http://127.0.0.1:{port}/get-artifact?path=other.txt&run_uuid={run}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.read() == b"other"
    finally:
        process.terminate()
        process.wait(60)
