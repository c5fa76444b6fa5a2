"""A push replaces what an earlier one wrote and nothing else, and tells nobody of the machine that it came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer, Repository, hub_server

from peftsearch.export.published import publish

CARD = "---\nlicense: mit\n---\n# Ours\n"
PROGRAM = """
import json, sys
from pathlib import Path
from peftsearch.export.hub import HubRepo, check_repo, push_folder
from peftsearch.spec import StudyError

found = []
for name, folder in json.load(sys.stdin):
    try:
        check_repo(HubRepo(name), "forms", "lora")
        push_folder(Path(folder), HubRepo(name), private=True, message="pushed")
        found.append("")
    except StudyError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def export(folder: Path, **files: str) -> Path:
    """A folder as it is before it is pushed."""
    folder.mkdir()
    for name, content in {"README.md": CARD, **files}.items():
        (folder / name).write_text(content)
    (folder / "provenance.json").write_text(json.dumps({"study": "forms", "domain": {"name": "lora"}}))
    publish(folder)
    return folder


def push(hub: HubServer, home: Path, *pairs: tuple[str, Path]) -> list[str]:
    """What pushing folders to repositories says, in a process of its own: the server's address is read at import."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    given = json.dumps([[name, str(folder)] for name, folder in pairs])
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=given, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [str(item) for item in json.loads(done.stdout)]


def test_a_push_replaces_its_own_files_and_no_others(tmp_path: Path) -> None:
    first = export(tmp_path / "first", **{"adapter_config.json": "{}", "vocabulary.txt": "a"})
    second = export(tmp_path / "second", **{"config.json": "{}"})
    before_lists = {
        "provenance.json": b'{"study": "forms", "domain": {"name": "lora"}}',
        **dict.fromkeys(("adapter_config.json", "model-00001-of-00002.safetensors", "examples/a.txt", "b.md"), b"x"),
    }
    with hub_server() as hub:
        hub.repositories["me/old"] = Repository(True, before_lists)
        assert push(hub, tmp_path / "hf", ("me/new", first), ("me/old", second)) == ["", ""]
        new, old = hub.repositories["me/new"], hub.repositories["me/old"]
        assert set(old.files) == {"README.md", "provenance.json", "config.json", "examples/a.txt", "b.md"}
        new.files["examples/a.txt"] = new.files["adapter_config.bak"] = b"mine"
        new.commits.append("by somebody")
        assert push(hub, tmp_path / "hf", ("me/new", second)) == [""]
        expected = {"README.md", "provenance.json", "config.json", "examples/a.txt", "adapter_config.bak"}
        assert set(new.files) == expected
        # A card that somebody has changed is theirs.
        new.files["README.md"] += b"And what we learned.\n"
        new.commits.append("by somebody")
        (refused,) = push(hub, tmp_path / "hf", ("me/new", first))
        assert "README.md of 'me/new' was changed since it was pushed" in refused
        assert new.files["README.md"].endswith(b"learned.\n")
        del new.files["README.md"]
        new.commits.append("by somebody")
        assert push(hub, tmp_path / "hf", ("me/new", first)) == [""]


def test_a_readme_alone_is_something_else(tmp_path: Path) -> None:
    folder = export(tmp_path / "export")
    with hub_server() as hub:
        hub.repositories["me/readme"] = Repository(True, {"README.md": b"# Our plan", ".gitattributes": b""})
        hub.repositories["me/empty"] = Repository(True, {".gitattributes": b""})
        refused, pushed = push(hub, tmp_path / "hf", ("me/readme", folder), ("me/empty", folder))
        assert "is taken: it holds something else" in refused
        assert hub.repositories["me/readme"].files["README.md"] == b"# Our plan"
        assert pushed == ""
        assert set(hub.repositories["me/empty"].files) == {"README.md", "provenance.json", ".gitattributes"}


@pytest.mark.parametrize(
    ("location", "path", "shown"),
    [
        ("/home/me/models/base", "../models/base", "./base"),
        ("/venv/site-packages/some/model", "package:some/model", "package:some/model"),
        ("google/bert", "google/bert", "google/bert"),
    ],
)
def test_the_published_configuration_names_the_base_and_no_folder(
    location: str, path: str, shown: str, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "provenance.json").write_text(json.dumps({"model": {"path": path}}))
    config = {"base_model_name_or_path": location, "tokenizer_name_or_path": location, "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    publish(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found == {"base_model_name_or_path": shown, "tokenizer_name_or_path": shown, "r": 4}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/my models/base", "base"),
        ("/data/legal/train.csv, split by document", "train.csv, split by document"),
        ("read '/data/legal/train.csv'", "read 'train.csv'"),
        ("file:///data/legal/train.csv", "file://train.csv"),
        ("package:some/model", "package:some/model"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("me/legal", "me/legal"),
        ("data/train.csv", "data/train.csv"),
        ("../data/train.csv", "../data/train.csv"),
        ("yes and/or no", "yes and/or no"),
    ],
)
def test_the_published_provenance_names_no_place_of_this_machine(text: str, shown: str, tmp_path: Path) -> None:
    known = {
        "study": "s",
        "ledger": "postgresql://host/db",
        "specification": {"name": "s", "tracking": {"mlflow": "http://inside:5000"}, "models": [{"path": text}]},
        "domain": {"labels": ["/m/01/x"], "rows": {text: 3}},
    }
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "provenance.json").write_text(json.dumps(known))
    publish(tmp_path)
    found = json.loads((tmp_path / "provenance.json").read_text())
    assert found.pop("pushed")["files"] == ["README.md", "provenance.json"]
    assert found == {
        "study": "s",
        "specification": {"name": "s", "models": [{"path": shown}]},
        "domain": {"labels": ["/m/01/x"], "rows": {shown: 3}},
    }
