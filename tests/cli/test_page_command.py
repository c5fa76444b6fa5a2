"""``peftsearch frontier --html``: the page of the study as it stands, with commands that find its storage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_study import Result

from peftsearch.study import Study

Cli = Callable[..., Result]


def test_the_page_of_an_interrupted_study(peftsearch: Cli, storage: Path, started: Study, tmp_path: Path) -> None:
    file = tmp_path / "new" / "front.html"
    result = peftsearch("frontier", "small", "--html", file, "--storage", storage)
    assert (result.status, result.out) == (0, "")
    found = re.search(r'id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    assert found
    data = json.loads(found[1])
    assert (data["study"], data["state"], data["planned"]) == ("small", "interrupted", 8)
    assert [domain["name"] for domain in data["domains"]] == ["legal", "clinical"]
    assert data["domains"][0]["commands"] == {
        "0": f"peftsearch export small --to adapters --domain legal --pick best --storage {storage}"
    }
    assert data["trials"]["error"] == [None, "the loss became NaN"]


@pytest.mark.parametrize("given", ["environment", "relative"])
def test_the_pages_commands_find_the_storage_from_anywhere(
    given: str,
    peftsearch: Cli,
    storage: Path,
    started: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The page is read in other folders, and by others than the shell that has the environment."""
    monkeypatch.chdir(storage.parent)
    option = ["--storage", f"./{storage.name}"] if given == "relative" else []
    if given == "environment":
        monkeypatch.setenv("PEFTSEARCH_STORAGE", str(storage))
    file = tmp_path / "front.html"
    assert peftsearch("frontier", "small", "--html", file, *option).status == 0
    assert f"--pick best --storage {storage}" in file.read_text()


def test_one_domain(peftsearch: Cli, storage: Path, started: Study, tmp_path: Path) -> None:
    file = tmp_path / "front.html"
    assert peftsearch("frontier", "small", "--domain", "clinical", "--html", file, "--storage", storage).status == 0
    assert "No trial has reached the full budget yet." in file.read_text()
    assert "<h2>legal</h2>" not in file.read_text()
    bad = peftsearch("frontier", "small", "--domain", "clinic", "--html", tmp_path / "x.html", "--storage", storage)
    assert (bad.status, bad.err.count("\n")) == (2, 1)
    assert "clinical" in bad.err
    assert not (tmp_path / "x.html").exists()
