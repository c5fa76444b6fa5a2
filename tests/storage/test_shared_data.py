"""Prepared data reaches machines that have neither its source nor a disk in common with the driver."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from s3_server import S3Server

from peftsearch import files
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training.segment import WorkerPlan
from peftsearch.training.shared_data import fetch, publish


@pytest.fixture
def plan(write_study: Callable[..., Path], tmp_path: Path) -> StudyPlan:
    return plan_study(StudyFile.load(write_study(methods={"lora": {}})), tmp_path / "driver")


@pytest.fixture
def published(plan: StudyPlan, tmp_path: Path, s3_server: S3Server) -> WorkerPlan:
    storage = files.place(s3_server.storage(tmp_path.name))
    return publish(plan.for_workers(storage / "studies" / "tiny", threads=1), storage)


def test_workers_of_another_machine_copy_the_data_once(
    plan: StudyPlan, published: WorkerPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTSEARCH_CACHE", str(tmp_path / "worker"))
    (key,) = plan.prepared
    expected = plan.prepared[key]
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(published.domains[key]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prepared in found:
        assert prepared.folder.parent == tmp_path / "worker"
        assert prepared.facts() == expected.facts()
        assert prepared.split("train")[:] == expected.split("train")[:]
    assert [path.name for path in (tmp_path / "worker").iterdir()] == [expected.folder.name]


def test_a_copy_that_was_left_half_done_is_made_again(
    plan: StudyPlan, published: WorkerPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (key,) = plan.prepared
    cache = tmp_path / "worker"
    monkeypatch.setenv("PEFTSEARCH_CACHE", str(cache))
    half = cache / plan.prepared[key].folder.name
    half.mkdir(parents=True)
    (half / "manifest.json").write_text("{")
    assert fetch(published.domains[key]).facts() == plan.prepared[key].facts()


def test_data_that_is_in_the_storage_is_not_copied_again(
    plan: StudyPlan,
    published: WorkerPlan,
    s3_server: S3Server,
    tmp_path: Path,
) -> None:
    (where,) = published.domains.values()
    connection, path = files.filesystem(where / "manifest.json")
    before = connection.get_file_info(path).mtime_ns
    storage = files.place(s3_server.storage(tmp_path.name))
    assert publish(plan.for_workers(storage, threads=1), storage).domains == published.domains
    assert connection.get_file_info(path).mtime_ns == before


@pytest.mark.parametrize("damage", ["gone", "cut short", "altered"])
def test_damaged_data_in_the_storage_is_made_anew(
    damage: str,
    plan: StudyPlan,
    published: WorkerPlan,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (key,) = published.domains
    arrow = next((plan.prepared[key].folder / "train").glob("*.arrow"))
    where = published.domains[key] / f"train/{arrow.name}"
    content = files.read_bytes(where)
    if damage == "gone":
        files.delete(where)
    else:
        files.write_bytes(where, content[:-9] if damage == "cut short" else content[:-9] + bytes(9))
        assert files.read_bytes(where) != content
    monkeypatch.setenv("PEFTSEARCH_CACHE", str(tmp_path / "worker"))
    storage = files.place(s3_server.storage(tmp_path.name))
    again = publish(plan.for_workers(storage / "studies" / "tiny", threads=1), storage)
    assert files.read_bytes(where) == content
    assert fetch(again.domains[key]).facts() == plan.prepared[key].facts()


def test_data_in_a_folder_is_read_where_it_is(plan: StudyPlan) -> None:
    (prepared,) = plan.prepared.values()
    assert fetch(prepared.folder).folder == prepared.folder
