"""No name and no path, wherever it comes from, makes a file outside the folder that it belongs to."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_study import small_study, write_study
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from security_files import Outcome

from peftsearch.spec import (
    Reading,
    StudyError,
    StudyFile,
    TrialRecord,
    check_name,
    model_location,
    package_path,
)
from peftsearch.storage import study_folder

Cli = Callable[..., Outcome]
ALLOWED = set(string.ascii_letters + string.digits + "._-")
HOSTILE = [
    "",
    ".",
    "..",
    "...",
    "../x",
    "../../../tmp/x",
    "x/../../y",
    "/etc/passwd",
    "//host/share",
    "a/b",
    "a\\b",
    "..\\x",
    "C:\\x",
    "C:x",
    "a:b",
    "~",
    "~root",
    "a\0b",
    "a\nb",
    "a b",
    " a",
    "a ",
    "-rf",
    ".hidden",
    "_x",
    "a" * 101,
    "a" * 5000,
    "е",  # noqa: RUF001 (a Cyrillic letter that looks like Latin e)
    "ａ",  # noqa: RUF001 (full width)
    "a\u2215b",
    "a\u2024\u2024",
    "a\u202eb",
    "é",
    "e\u0301",
    "1\u0661",
    "$HOME",
    "%2e%2e%2f",
    "a;b",
    "a`b`",
    "a|b",
    "a\x7f",
    "a\n",
    "\udcff",
]
names = st.one_of(
    st.text(max_size=120),
    st.sampled_from(HOSTILE),
    st.lists(st.sampled_from([*"./\\:~ aA0_-", "..", "\0", "\n", "é"]), max_size=8).map("".join),
)
effort = settings(max_examples=400, derandomize=True, database=None, deadline=None)


@given(names)
@effort
def test_what_is_a_name(name: str) -> None:
    """What passes is plain, and a single step down on every file system."""
    try:
        check_name(name)
    except ValueError:
        return
    assert set(name) <= ALLOWED
    assert name[0] in string.ascii_letters + string.digits
    assert 1 <= len(name) <= 100
    assert os.path.normpath(os.path.join("/storage/studies", name)) == f"/storage/studies/{name}"


@given(names)
@effort
def test_a_study_stays_in_its_storage(name: str) -> None:
    try:
        folder = study_folder(name, "/storage")
    except StudyError as error:
        assert "is not a name" in str(error)  # noqa: PT017
        assert str(error).isprintable()  # noqa: PT017
        return
    for path in (folder.path, folder.spec, folder.facts, folder.study_file):
        assert Path(os.path.normpath(str(path))).is_relative_to(f"/storage/studies/{name}")


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_hostile_name_passes(name: str) -> None:
    if name in ("a" * 100,):
        return
    with pytest.raises(ValueError):
        check_name(name)
    with pytest.raises(StudyError):
        study_folder(name, "/storage")


def place(document: dict[str, Any], where: str, name: str) -> dict[str, Any]:
    if where == "name":
        document["name"] = name
    elif where == "domain":
        document["domains"][name] = document["domains"].pop("legal")
    elif where == "method":
        document["methods"][name] = {}
    elif where == "part":
        part = {"source": "notes.csv"}
        document["domains"]["legal"]["data"] = {"join": {name: part, "other": part}}
    else:
        document["search"]["warm_start"] = name
    return document


@pytest.mark.parametrize("where", ["name", "domain", "method", "part", "warm_start"])
def test_names_in_study_files(where: str, base: Path, project: Path, tmp_path: Path) -> None:
    """Every hostile name is refused at every place of a study file that takes names, before anything is written."""
    from peftsearch.study import Study

    before = sorted(tmp_path.rglob("*"))
    for name in HOSTILE:
        document = place(small_study(base), where, name)
        with pytest.raises(StudyError) as caught:
            Study(
                (file := StudyFile(document, folder=project)).spec,
                study_folder(file.spec.name, tmp_path / "storage"),
                file,
            ).validate()
        assert str(caught.value).isprintable()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../x", "..", "/abs", "a\nb", "C:\\x", "é", "a" * 300, "-x"])
def test_names_on_the_command_line(name: str, peftsearch: Cli, base: Path, project: Path, tmp_path: Path) -> None:
    path, storage = write_study(project, small_study(base)), tmp_path / "storage"
    before = sorted(tmp_path.rglob("*"))
    options = ("--storage", storage)
    commands = [
        ("validate", path, f"--name={name}"),
        ("run", path, "--set", f"name={json.dumps(name)}"),
        ("status", "--storage", storage, "--", name),
        ("trials", "--storage", storage, "--", name),
        ("sync", "--storage", storage, "--", name),
        ("export", "--to", tmp_path / "e", "--storage", storage, "--", name),
    ]
    for command in commands:
        sentence = peftsearch(*command, *(options if "--storage" not in command else ())).sentence
        assert "is not a name" in sentence
    assert sorted(tmp_path.rglob("*")) == before


RECORD: dict[str, Any] = {
    "number": 1,
    "model": "m",
    "domain": "legal",
    "method": "lora",
    "state": "COMPLETE",
    "seed": 0,
    "trainable_parameters": 1,
    "hyperparameters": {},
}
READING: dict[str, Any] = {"seed": 1, "value": 0.5, "loss": 0.5}
OUTSIDE = ["../x", "a/../../x", "/etc/passwd", "\\x", "..\\x", "C:\\x", "s3://bucket/x", "a\0b", ".."]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_ledger_that_somebody_else_wrote_names_no_files_outside(path: str) -> None:
    """A shared database may hold anything; what it names is read and written only inside the study's folder."""
    TrialRecord.model_validate(RECORD)
    Reading.model_validate({**READING, "predictions": "trials/00001-seed1/test.jsonl"})
    with pytest.raises(ValidationError):
        Reading.model_validate({**READING, "predictions": path})
    with pytest.raises(ValidationError):
        TrialRecord.model_validate({**RECORD, "checkpoint": path})
    if path not in ("s3://bucket/x",):
        for field in ("domain", "method"):
            if "/" in path or "\\" in path or path in ("..",) or "\0" in path:
                with pytest.raises(ValidationError):
                    TrialRecord.model_validate({**RECORD, field: path})
    with pytest.raises(ValidationError):
        TrialRecord.model_validate({**RECORD, "number": -1})


@given(st.text(max_size=40))
@example("../" * 30 + "etc")
@example("x/../../../../etc")
@example("\0")
@example("a/b/" + "c" * 300)
@effort
def test_a_package_resource_stays_in_its_package(inside: str) -> None:
    try:
        found = package_path(f"package:peftsearch/{inside}")
    except StudyError:
        return
    import peftsearch

    assert found.is_relative_to(Path(peftsearch.__file__).parent.resolve())


@given(names)
@effort
def test_model_paths_of_any_kind(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    """A model is a folder or a Hub id, or one sentence says that it is not."""
    try:
        model_location(path, Path("/nowhere"))
    except StudyError as error:
        assert str(error).isprintable()  # noqa: PT017


def test_links_planted_in_a_storage(peftsearch: Cli, base: Path, project: Path, tmp_path: Path) -> None:
    """The cache follows no link to what it would write: an entry of it is made aside and moved into place."""
    storage, elsewhere = tmp_path / "storage", tmp_path / "elsewhere"
    path = write_study(project, small_study(base))
    assert peftsearch("validate", path, "--storage", storage).status == 0
    entries = [item for item in (storage / "cache").rglob("*") if item.is_dir() and (item / "manifest.json").exists()]
    assert entries
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("not ours")
    for entry in entries:
        import shutil

        shutil.rmtree(entry)
        entry.symlink_to(elsewhere)
    assert peftsearch("validate", path, "--storage", storage).status == 0
    assert [item.name for item in elsewhere.iterdir()] == ["precious"]
    assert (elsewhere / "precious").read_text() == "not ours"
