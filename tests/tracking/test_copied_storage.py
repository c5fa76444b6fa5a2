"""Copies of a storage share a ledger that is elsewhere: it goes on in one of them, and the others are told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from peftsearch.preparing import write_files
from peftsearch.spec import StudyError
from peftsearch.study import Study
from peftsearch.study_ledger import driver_ledger
from peftsearch.tracking.ledger import CLAIMS

if TYPE_CHECKING:
    from peftsearch.search.plan import StudyPlan

Begin = Callable[..., "tuple[Study, StudyPlan]"]


@pytest.fixture
def begin(write_study: Callable[..., Path], url: str, tmp_path: Path) -> Begin:
    """A study in a storage of this name, begun where it is not yet there, and its plan."""
    path = write_study("tiny", methods={"lora": {}, "full": {}}, tracking={"ledger": url, "mlflow": "off"})

    def call(name: str) -> tuple[Study, StudyPlan]:
        study = Study.from_file(path, storage=tmp_path / name)
        plan = study.validate()
        study.folder.create()
        write_files(study)
        return study, plan

    return call


class Dies:
    """A lease that ends its driver before the ledger's next write, after so many."""

    def __init__(self, writes: int) -> None:
        self.left = writes

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_only_the_copy_that_ran_last_goes_on(begin: Begin, tmp_path: Path) -> None:
    study, plan = begin("here")
    for _ in range(2):
        driver_ledger(study, plan).close()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    copy, _ = begin("there")
    assert copy.id == study.id
    for _ in range(2):
        driver_ledger(copy, plan).close()
    for _ in range(2):
        with pytest.raises(StudyError, match=rf"a copy of this storage has run, which is .*there: .*delete {CLAIMS}"):
            driver_ledger(study, plan)
    # Whoever only looks does no harm.
    assert study.trials() == copy.trials() == []
    # Moved, it is itself.
    shutil.move(tmp_path / "there", tmp_path / "elsewhere")
    moved, _ = begin("elsewhere")
    driver_ledger(moved, plan).close()
    # And somebody may decide.
    (study.folder.path / CLAIMS).unlink()
    driver_ledger(study, plan).close()
    with pytest.raises(StudyError, match=r"a copy of this storage has run, which is .*here"):
        driver_ledger(moved, plan)


@pytest.mark.parametrize("writes", range(1, 9, 2))
def test_a_driver_that_dies_while_it_opens_the_ledger_is_no_copy(begin: Begin, writes: int) -> None:
    study, plan = begin("here")
    for _ in range(3):
        try:
            driver_ledger(study, plan, Dies(writes)).close()  # type: ignore[arg-type]
        except KeyboardInterrupt:
            continue
    driver_ledger(study, plan).close()


def test_a_ledger_in_the_storage_is_copied_with_it(write_study: Callable[..., Path], tmp_path: Path) -> None:
    path = write_study("tiny", methods={"lora": {}}, tracking={"mlflow": "off"})
    study = Study.from_file(path, storage=tmp_path / "here")
    plan = study.validate()
    study.folder.create()
    write_files(study)
    driver_ledger(study, plan).close()
    assert not (study.folder.path / CLAIMS).exists()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for name in ("there", "here"):
        driver_ledger(Study.from_file(path, storage=tmp_path / name), plan).close()
