"""A study that begins with the trials of another one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_study import rows, small_study, write_rows, write_study

from peftsearch.fork import find_origin, shared_cells, take_over_into
from peftsearch.holder import hold
from peftsearch.preparing import plan_facts, save_facts, write_files
from peftsearch.saved import as_saved
from peftsearch.spec import StudyError
from peftsearch.study import Study
from peftsearch.study_ledger import driver_ledger

Fork = Callable[..., tuple[Study, Callable[[], None]]]


@pytest.fixture
def fork(base: Path, project: Path, storage: Path, started: Study) -> Fork:
    """Begins the study ``new`` as ``run --name new --fork small`` does, up to taking over, which is left to do.

    Of the study ``small``, trial 0 (legal, lora) is complete and has weights; trial 1 (legal, full) has failed.
    """
    weights = started.folder.path / "trials" / "00000"
    weights.mkdir(parents=True)
    (weights / "model.safetensors").write_bytes(b"weights")

    def begin(name: str = "new", **sections: Any) -> tuple[Study, Callable[[], None]]:
        path = write_study(project, {**small_study(base), **sections})
        study = Study.from_file(path, storage=storage, name=name)
        origin = find_origin(study, "small")
        assert origin is not None
        plan = study.validate()
        facts = plan_facts(study, plan)
        shared_cells(origin, as_saved(study.spec), facts)
        study.folder.create()
        write_files(study, origin)
        save_facts(study, facts)
        ledger = driver_ledger(study, plan)
        return study, lambda: take_over_into(study, origin, facts, ledger)

    return begin


def test_trials_of_unchanged_cells_are_there_with_their_weights(fork: Fork, started: Study) -> None:
    study, take_over = fork(methods={"lora": {"rank": {"low": 1, "high": 4}}, "full": {"learning_rate": [1e-4]}})
    take_over()
    (record,) = study.trials()
    before = started.trials()[0]
    assert (record.number, record.method, record.rungs) == (0, "lora", before.rungs)
    assert record.finished == before.finished
    assert (study.folder.path / "trials" / "00000" / "model.safetensors").read_bytes() == b"weights"
    assert len(started.trials()) == 2
    assert study.id != started.id


def test_what_retrainings_predicted_comes_along(fork: Fork, started: Study) -> None:
    """Comparisons between methods rest on it."""
    for name in ("00000-seed1", "00000-seed9", "00009-seed1"):
        (started.folder.path / "trials" / name).mkdir()
        (started.folder.path / "trials" / name / "test.jsonl").write_text(name)
    study, take_over = fork(confirm={"seeds": 2})
    take_over()
    trials = study.folder.path / "trials"
    assert sorted(path.name for path in trials.iterdir()) == ["00000", "00000-seed1"]
    assert (trials / "00000-seed1" / "test.jsonl").read_text() == "00000-seed1"


def test_once_taken_over_a_fork_is_a_study_like_others(fork: Fork, started: Study) -> None:
    study, take_over = fork()
    saved = study.folder.spec
    assert json.loads(saved.read_text())["forked_from"] == {"study": "small", "id": started.id, "done": False}
    # A driver that dies here leaves it to the next one, asked or not.
    for asked in (None, "small"):
        again = find_origin(study, asked)
        assert again is not None
        assert again.name == "small"
    take_over()
    assert json.loads(saved.read_text())["forked_from"]["done"] is True
    assert find_origin(study, None) is None
    assert find_origin(study, "small") is None
    # What it was forked from outlives a change that extends it.
    write_files(study)
    assert json.loads(saved.read_text())["forked_from"]["done"] is True
    assert json.loads(saved.read_text())["id"] == study.id
    with pytest.raises(StudyError, match="'new' was begun without --fork other"):
        find_origin(study, "other")


def test_a_study_that_was_begun_afresh_does_not_become_a_fork(fork: Fork, started: Study) -> None:
    fork()
    with pytest.raises(StudyError, match="'small' was begun without --fork new"):
        find_origin(started, "new")


def test_trials_are_not_taken_from_a_study_that_is_being_run(fork: Fork, started: Study) -> None:
    study, take_over = fork()
    with hold(started.folder.path, "small"), pytest.raises(StudyError, match="'small' is being run"):
        take_over()
    assert study.trials() == []
    take_over()
    assert len(study.trials()) == 2


def test_trials_on_other_data_are_not_taken(fork: Fork, project: Path) -> None:
    write_rows(project / "train.csv", rows(44, "tenant"))
    study, take_over = fork()
    take_over()
    # Both recorded trials are of the domain whose texts have changed.
    assert study.trials() == []
    write_rows(project / "notes.csv", rows(44, "patient"))
    with pytest.raises(StudyError, match=r"no cell of the study 'small' .* \(its data or models have changed\)"):
        fork("newer")
