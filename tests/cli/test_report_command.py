"""``peftsearch report`` and what ``peftsearch list`` does about a study that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cli_study import Result, tree

from peftsearch.study import Study

Cli = Callable[..., Result]


def test_a_report_of_an_interrupted_study(peftsearch: Cli, storage: Path, started: Study, tmp_path: Path) -> None:
    to = tmp_path / "out" / "report"
    before = tree(storage)
    result = peftsearch("report", "small", "--to", to, "--storage", storage)
    assert result.status == 0
    assert result.out.split() == [str(to / "report.html"), str(to / "report.md")]
    text = (to / "report.md").read_text()
    assert "The study is interrupted" in text
    assert "2 of 8 planned trials" in text
    assert tree(storage) == before


def test_json_names_every_file(peftsearch: Cli, storage: Path, started: Study, tmp_path: Path) -> None:
    result = peftsearch("report", "small", "--to", tmp_path / "report", "--storage", storage, "--json")
    assert (result.status, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["study"] == "small"
    assert sorted(found["files"]) == sorted(str(path) for path in (tmp_path / "report").iterdir())


def test_a_bad_target_is_one_sentence(peftsearch: Cli, storage: Path, started: Study, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("mine")
    for target in (file, file / "below"):
        result = peftsearch("report", "small", "--to", target, "--storage", storage)
        assert (result.status, result.out) == (2, "")
        assert result.err.count("\n") == 1
        assert str(target) in result.err
    assert file.read_text() == "mine"
    missing = peftsearch("report", "nothing", "--to", tmp_path / "report", "--storage", storage)
    assert missing.status == 2
    assert "no study 'nothing'" in missing.err
    assert not (tmp_path / "report").exists()


def test_list_shows_the_others_where_one_cannot_be_read(peftsearch: Cli, storage: Path, started: Study) -> None:
    import shutil

    for name in ("broken-ledger", "broken-file"):
        shutil.copytree(storage / "studies" / "small", storage / "studies" / name)
    specification = storage / "studies" / "broken-ledger" / "study.json"
    specification.write_text(specification.read_text().replace('"name": "small"', '"name": "broken-ledger"'))
    for path in (storage / "studies" / "broken-ledger").glob("ledger.db*"):
        path.write_bytes(b"this is not a database, it is a sentence " * 50)
    (storage / "studies" / "broken-file" / "study.json").write_text("{")
    result = peftsearch("list", "--storage", storage)
    assert result.status == 0
    assert "small" in result.out.split()
    assert result.out.count("unreadable") == 2
    assert "broken-ledger: " in result.err
    found = json.loads(peftsearch("list", "--storage", storage, "--json").out)
    assert [status["study"] for status in found["studies"]] == ["small"]
    assert [broken["study"] for broken in found["unreadable"]] == ["broken-file", "broken-ledger"]
    assert all(broken["error"] for broken in found["unreadable"])
