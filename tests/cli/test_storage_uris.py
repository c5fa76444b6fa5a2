"""Storages in object stores, on the command line: what cannot work is one sentence before any work begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_study import Result, small_study, tree, write_study
from s3_server import S3Server, free_port

from peftsearch import files

Cli = Callable[..., Result]
POSTGRES = {"mlflow": "off", "ledger": "postgresql://127.0.0.1:1/nobody"}


def refused(result: Result, *parts: str) -> None:
    assert (result.status, result.out) == (2, ""), result
    assert result.err.startswith("Error: ")
    assert result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTSEARCH_CACHE", str(tmp_path / "own-cache"))
    return tmp_path / "own-cache"


@pytest.mark.parametrize("command", ["validate", "run", "submit"])
@pytest.mark.parametrize(
    ("tracking", "parts"),
    [
        ({"mlflow": "off"}, ("tracking.ledger", "SQLite cannot write to an object store", "postgresql://")),
        ({"ledger": POSTGRES["ledger"]}, ("tracking.mlflow", "the address of an MLflow server, or to off")),
    ],
)
def test_databases_cannot_be_in_an_object_store(
    tracking: dict[str, str],
    parts: tuple[str, ...],
    command: str,
    peftsearch: Cli,
    base: Path,
    project: Path,
    cache: Path,
) -> None:
    path = write_study(project, {**small_study(base), "tracking": tracking})
    # The cluster is not asked before.
    cluster = ["--address", "http://192.0.2.1:8265"] if command == "submit" else []
    refused(peftsearch(command, path, "--storage", "s3://bucket/a?region=us-east-1", *cluster), "study.yaml", *parts)
    assert tree(cache) == {}


@pytest.mark.parametrize("command", ["validate", "run"])
@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://key:hunter2@bucket/a", ("credentials", "AWS_ACCESS_KEY_ID")),
        ("ftp://host/a", ("'ftp'", "s3://")),
        ("s3://bucket/a?colour=blue", ("cannot use the storage", "colour")),
    ],
)
def test_what_is_no_storage(
    uri: str, parts: tuple[str, ...], command: str, peftsearch: Cli, base: Path, project: Path, cache: Path
) -> None:
    path = write_study(project, {**small_study(base), "tracking": POSTGRES})
    result = peftsearch(command, path, "--storage", uri)
    refused(result, *parts)
    assert "hunter2" not in result.err


def test_an_object_store_that_does_not_answer(peftsearch: Cli, base: Path, project: Path, cache: Path) -> None:
    path = write_study(project, {**small_study(base), "tracking": POSTGRES})
    uri = f"s3://bucket/a?scheme=http&endpoint_override=127.0.0.1:{free_port()}&region=us-east-1"
    for command in (("run", path), ("status", "small"), ("list",), ("ui",)):
        refused(peftsearch(*command, "--storage", uri), "the storage s3://bucket/a", "--storage")


def test_a_bucket_that_is_not_there(
    peftsearch: Cli,
    base: Path,
    project: Path,
    cache: Path,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_study(project, {**small_study(base), "tracking": POSTGRES})
    monkeypatch.setenv("PEFTSEARCH_STORAGE", s3_server.storage("a", bucket="nowhere"))
    refused(peftsearch("run", path), "there is no bucket 'nowhere'")


def test_reading_a_storage_in_an_object_store(
    peftsearch: Cli,
    base: Path,
    project: Path,
    cache: Path,
    s3_server: S3Server,
) -> None:
    uri = s3_server.storage("reading")
    path = write_study(project, {**small_study(base), "tracking": POSTGRES})
    assert peftsearch("validate", path, "--storage", uri).status == 0
    # Prepared data is on this machine; nothing is in the storage before the study begins.
    assert any(cache.iterdir())
    assert files.names(files.place(uri)) == []
    found = peftsearch("list", "--storage", uri, "--json")
    assert json.loads(found.out) == {"storage": uri, "studies": [], "unreadable": {}} or not found.status
    refused(peftsearch("status", "other", "--storage", uri), "no study 'other' in the storage s3://studies/reading")
    refused(peftsearch("ui", "--storage", uri), "there is no study in 's3://studies/reading", "--storage")
    health = json.loads(peftsearch("doctor", "--storage", uri, "--json").out)
    assert "the bucket answers" in json.dumps(health)


def test_a_file_uri_is_a_folder(peftsearch: Cli, base: Path, project: Path, storage: Path) -> None:
    path = write_study(project, small_study(base))
    assert peftsearch("validate", path, "--storage", storage.as_uri()).status == 0
    assert (storage / "cache").is_dir()
