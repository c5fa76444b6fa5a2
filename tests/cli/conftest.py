from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_study import Result, rows, save_base, small_study, write_rows, write_study

from peftsearch.preparing import plan_facts, save_facts, write_files
from peftsearch.spec import Rung, StudyFacts
from peftsearch.study import Study
from peftsearch.study_ledger import driver_ledger


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base model; not to be written to."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A copy of the base model that a test may break."""
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the data of `small_study`."""
    folder = tmp_path / "project"
    folder.mkdir()
    write_rows(folder / "train.csv", rows(40, "tenant"))
    write_rows(folder / "test.csv", rows(10, "landlord"))
    write_rows(folder / "notes.csv", rows(40, "patient"))
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A storage in which somebody else has left something."""
    folder = tmp_path / "storage"
    folder.mkdir()
    (folder / "note.txt").write_text("not ours")
    return folder


@pytest.fixture
def peftsearch(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command line, in this process."""
    from peftsearch import driver
    from peftsearch.cli import progress
    from peftsearch.cli.app import run_app

    # A log says that checking takes long; on a busy machine it might.
    monkeypatch.setattr(progress, "PATIENCE", 3600.0)
    monkeypatch.setattr(driver, "run_study", lambda *_: pytest.fail("the study was about to run"))

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        status = run_app([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Result(status, out, err)

    return call


@pytest.fixture
def started(base: Path, project: Path, storage: Path) -> Study:
    """A study with one finished and one failed trial, as a run that was interrupted would have left it."""
    from optuna.samplers import RandomSampler

    study = Study.from_file(write_study(project, small_study(base)), storage=storage)
    plan = study.validate()
    study.folder.create()
    write_files(study)
    facts: StudyFacts = plan_facts(study, plan)
    save_facts(study, facts)
    ledger = driver_ledger(study, plan)
    for cell in plan.cells[:2]:
        record = ledger.ask(
            cell.cell.key,
            RandomSampler(seed=0),
            lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
            lambda number, _: {"seed": 0, "total_steps": 9, "trainable_parameters": 100 * (number + 1)},
        )
        if record.number == 0:
            rung = Rung(step=9, epoch=1.0, value=0.75, loss=0.5, train_loss=0.6, scores={"macro_f1": 0.75})
            ledger.add_rung(0, rung)
            ledger.complete(0)
        else:
            ledger.fail(record.number, "the loss became NaN")
    ledger.close()
    return study
