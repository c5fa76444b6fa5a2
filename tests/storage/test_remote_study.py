"""A whole study in an object store is the same as one in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import command
from postgres_server import PostgresServer
from s3_server import SECRET, S3Server
from study_runs import essence, ledger

from peftsearch import files
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SMALL = {
    "methods": {"lora": {"rank": [2, 4]}},
    "search": {"trials": 2, "seed": 0},
    "training": {"epochs": 1, "evaluations": 2, "batch_size": 16, "max_length": 16},
    "confirm": {"seeds": 1},
}
PATIENCE = 600.0
"""Seconds: Ray takes long to start where many others compute."""


def run(study: Path, storage: Path | str) -> None:
    done = command("run", study, "--storage", storage, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_study_in_an_object_store_is_that_in_a_folder(
    write_study: Callable[..., Path],
    tmp_path: Path,
    s3_server: S3Server,
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PEFTSEARCH_CACHE", str(tmp_path / "cache"))
    uri = s3_server.storage("team")
    database = postgres_server.create_database()
    # The study keeps none: whoever opens it by name brings the password along.
    monkeypatch.setenv("PGPASSWORD", postgres_server.password)
    remote = write_study("tiny", **SMALL, tracking={"mlflow": "off", "ledger": database})
    run(remote, uri)
    run(write_study("tiny", **SMALL), tmp_path / "local")
    expected = ledger("tiny", tmp_path / "local")
    assert [essence(record) for record in Study.open("tiny", uri).trials()] == expected
    # Again, there is nothing to do.
    remote = write_study("tiny", **SMALL, tracking={"mlflow": "off", "ledger": database})
    run(remote, uri)
    assert [essence(record) for record in Study.open("tiny", uri).trials()] == expected

    status = json.loads(command("status", "tiny", "--storage", uri, "--json").stdout)
    assert (status["state"], status["storage"]) == ("finished", uri)
    # All that was made is in the bucket, and no secret.
    folder = files.place(uri) / "studies" / "tiny"
    assert {"study.json", "study.yaml", "facts.json", "trials"} <= set(files.names(folder))
    kept = [files.read_bytes(folder / name) for name in ("study.json", "study.yaml", "facts.json")]
    assert not any(SECRET.encode() in content or postgres_server.password.encode() in content for content in kept)

    fronts = [
        json.loads(command("frontier", "tiny", "--storage", storage, "--json").stdout)
        for storage in (uri, tmp_path / "local")
    ]
    points = [[(trial["number"], trial["value"]) for trial in front["domains"]["topics"]["front"]] for front in fronts]
    assert points[0] == points[1] != []
    exported = command("export", "tiny", "--storage", uri, "--to", tmp_path / "adapters", "--pick", "best")
    assert exported.returncode == 0, exported.stderr[-2000:]
    assert list((tmp_path / "adapters" / "topics").iterdir())
    report = command("report", "tiny", "--storage", uri, "--to", tmp_path / "report")
    assert report.returncode == 0, report.stderr[-2000:]
    assert "cannot be read" not in (tmp_path / "report" / "report.md").read_text()

    number = fronts[0]["domains"]["topics"]["front"][0]["number"]
    weights = folder / "trials" / f"{number:05d}" / "weights.safetensors"
    files.write_bytes(weights, files.read_bytes(weights)[:-64])
    refused = command("export", "tiny", "--storage", uri, "--to", tmp_path / "again")
    assert refused.returncode == 2
    assert f"trial {number}" in refused.stderr
    assert "is damaged" in refused.stderr
    assert "Traceback" not in refused.stderr
