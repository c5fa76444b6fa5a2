"""What the live pages keep between requests: each study's bytes, for a moment, and nothing of what is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from test_live_pages import begin

from peftsearch import live
from peftsearch.live import Pages
from peftsearch.storage import write_json


def request(name: str = "", **headers: str) -> Request:
    pairs = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
    return Request({"type": "http", "headers": pairs, "path_params": {"name": name}})


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pages:
    monkeypatch.setenv("PEFTSEARCH_STORAGE", str(tmp_path))
    begin(tmp_path, mlflow="off")
    return Pages()


def test_the_json_is_written_once_for_all_who_ask(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FRESH", 600.0)
    first = pages.data(request("made-up"))
    assert first.status_code == 200
    assert json.loads(bytes(first.body))["study"] == "made-up"
    monkeypatch.setattr(json, "dumps", lambda *_, **__: pytest.fail("written again"))
    assert pages.data(request("made-up")).body is first.body
    again = pages.data(request("made-up", if_none_match=first.headers["etag"]))
    assert (again.status_code, again.body) == (304, b"")


def test_names_that_are_not_there_leave_nothing_behind(pages: Pages) -> None:
    assert pages.page(request("made-up")).status_code == 200
    before = set(pages._locks), set(pages._known)
    for number in range(20):
        assert pages.data(request(f"other-{number}")).status_code == 404
        assert pages.page(request(f"../other-{number}")).status_code == 404
    assert (set(pages._locks), set(pages._known)) == before


def test_the_link_to_mlflow_opens_the_trials_in_their_view(pages: Pages, tmp_path: Path) -> None:
    study = begin(tmp_path, "tracked", mlflow="http://tracking.example.org:5000")
    address = "http://tracking.example.org:5000/#/experiments/7/runs?viewStateShareKey=peftsearch-trials"
    # Of a study that has not reached its server yet, the name is looked for.
    assert address.encode() not in pages.page(request("tracked")).body
    write_json(study.folder.path / "driver.json", {"mlflow_experiment_id": "7"})
    assert address.encode() in Pages().page(request("tracked")).body


def test_what_is_no_longer_fresh_is_let_go(pages: Pages) -> None:
    pages.data(request("made-up"))
    (known,) = pages._known.values()
    pages._known = {key: live._Known(known.value, 0.0) for key in pages._known}
    assert pages.studies(request()).status_code == 200
    assert set(pages._known) == {""}


def test_a_failure_is_one_sentence_and_not_repeated_at_once(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def read(name: str) -> Any:
        tries.append(name)
        raise OSError(f"the disk is away\nat {name}")

    monkeypatch.setattr(live, "_read", read)
    monkeypatch.setattr(live, "read_statuses", lambda storage: read(""))
    monkeypatch.setattr(live, "FRESH", 600.0)
    for answer in (pages.data, pages.page, pages.data):
        refused = answer(request("made-up"))
        assert (refused.status_code, refused.body) == (503, b"this cannot be read now: OSError: the disk is away\n")
    assert pages.studies(request()).status_code == 503
    assert tries == ["made-up", ""]
