"""Which commit of a Hub model a study used is found once, pinned, and recorded; weights of the Hub are fingerprinted by
it. The Hub is a local cache here, as downloading leaves it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_study import small_study, write_study

from peftsearch.preparing import plan_facts, save_facts
from peftsearch.study import Study

COMMITS = ["1" * 40, "2" * 40]


@pytest.fixture
def hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model ``somebody/model`` with two commits; ``main`` is the first, ``v2`` the second."""
    import huggingface_hub

    cached = tmp_path / "hub" / "models--somebody--model"
    for commit in COMMITS:
        shutil.copytree(base, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    for name, commit in zip(("main", "v2"), COMMITS, strict=True):
        (cached / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cached


@pytest.mark.parametrize(
    ("model", "revision", "commit"),
    [
        ("somebody/model", None, COMMITS[0]),
        ({"path": "somebody/model", "revision": "v2"}, "v2", COMMITS[1]),
        ({"path": "somebody/model", "revision": COMMITS[1]}, COMMITS[1], COMMITS[1]),
    ],
)
def test_the_commit_is_used_and_recorded(
    model: object, revision: str | None, commit: str, hub: Path, project: Path, storage: Path
) -> None:
    study = small_study("")
    study["model"] = model
    opened = Study.from_file(write_study(project, study), storage=storage)
    plan = opened.validate()
    assert plan.unchecked == ()
    (place,) = plan.models.values()
    assert place.revision == commit
    facts = plan_facts(opened, plan).models["somebody/model"]
    assert (facts.revision, facts.commit, facts.fingerprint) == (revision, commit, commit)


def test_a_branch_that_moved_is_a_changed_model(hub: Path, project: Path, storage: Path) -> None:
    from peftsearch.spec import StudyError

    study = Study.from_file(write_study(project, small_study("somebody/model")), storage=storage)
    study.folder.create()
    save_facts(study, plan_facts(study, study.validate()))
    (hub / "refs" / "main").write_text(COMMITS[1])
    with pytest.raises(StudyError, match="the model 'somebody/model' has changed since the study"):
        plan_facts(study, study.validate())
