"""A study whose files or ledger are damaged: each command works, or says one sentence; the others are still listed."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cli_study import save_base, small_study, write_study
from fuzzing import LONG, damage, no_hang
from security_files import Outcome, run_here, write_project

from peftsearch.holder import Holder, _machine
from peftsearch.preparing import plan_facts, save_facts, write_files
from peftsearch.spec import Reading, Rung, StudyFacts
from peftsearch.study import Study
from peftsearch.study_ledger import driver_ledger

SEEDS = range(1000 if LONG else 8)
LEASE = "drivers/000001.json"
OTHERS_LEASE = Holder(
    "t", "there", "another boot", 7, "8", since="2026-01-01T00:00:00Z", heard="2026-01-01T00:00:09Z", released=True
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study file, and the storage that an interrupted run of it left: a trial of each state, one confirmed."""
    from optuna.samplers import RandomSampler

    place = tmp_path_factory.mktemp("damaged")
    path = write_study(write_project(place / "project"), small_study(save_base(place / "base")))
    storage = place / "storage"
    study = Study.from_file(path, storage=storage)
    plan = study.validate()
    study.folder.create()
    write_files(study)
    facts: StudyFacts = plan_facts(study, plan)
    save_facts(study, facts)
    ledger = driver_ledger(study, plan)
    for cell in plan.cells:
        record = ledger.ask(
            cell.cell.key,
            RandomSampler(seed=0),
            lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
            lambda number, _: {"seed": 0, "total_steps": 9, "trainable_parameters": 100 * (number + 1)},
        )
        assert record is not None
        metric = plan.domains[cell.cell.domain].metric
        rung = Rung(step=9, epoch=1.0, value=0.75, loss=0.5, train_loss=0.6, scores={metric: 0.75})
        if record.number < 3:
            ledger.add_rung(record.number, rung)
        if record.number == 0:
            ledger.complete(0)
            ledger.add_reading(0, Reading(seed=1, value=0.7, loss=0.6))
        elif record.number == 1:
            ledger.prune(1)
        elif record.number == 2:
            ledger.fail(2, "the loss became NaN")
    ledger.close()
    with sqlite3.connect(study.folder.path / "ledger.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (study.folder.path / LEASE).parent.mkdir()
    (study.folder.path / LEASE).write_text(json.dumps(asdict(OTHERS_LEASE)))
    (study.folder.path / "driver.json").write_text(json.dumps({"state": "interrupted", "since": "2026-01-01T00:00:00"}))
    return path, storage


@pytest.fixture
def copy(finished: tuple[Path, Path], tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Makes a storage with a sound study ``other`` and a study ``small`` to be damaged; the latter's folder too."""

    def make(name: str) -> tuple[Path, Path]:
        storage = tmp_path / name
        for study in ("small", "other"):
            shutil.copytree(finished[1] / "studies" / "small", storage / "studies" / study)
        spec = storage / "studies" / "other" / "study.json"
        saved = json.loads(spec.read_text())
        saved["study"]["name"] = "other"
        spec.write_text(json.dumps(saved))
        return storage, storage / "studies" / "small"

    return make


def check(outcome: Outcome, case: object) -> None:
    """It worked, or one sentence said why not."""
    assert outcome.status in (0, 1, 2), (case, outcome)
    assert "Traceback" not in outcome.err, (case, outcome.err)
    if outcome.status:
        lines = [line for line in outcome.err.splitlines() if not line.startswith("checking the study")]
        assert len(lines) == 1, (case, outcome.err)
        assert lines[0].startswith("Error: "), (case, outcome.err)
        assert len(lines[0]) < 2000
        assert outcome.out == ""


def look(storage: Path, capfd: pytest.CaptureFixture[str], case: object, commands: Any = None) -> None:
    for command in commands or (("status", "small", "--json"), ("trials", "small", "--json"), ("frontier", "small")):
        with no_hang():
            check(run_here(capfd, *command, "--storage", storage), (case, command))
    with no_hang():
        listed = run_here(capfd, "list", "--json", "--storage", storage)
    assert listed.status == 0, (case, listed)
    found = json.loads(listed.out)
    names = [study["study"] for study in found["studies"]] + [study["study"] for study in found["unreadable"]]
    assert sorted(names) == (["other", "small"] if (storage / "studies/small/study.json").is_file() else ["other"])
    assert "other" not in [study["study"] for study in found["unreadable"]], case


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_ledger(seed: int, copy: Any, capfd: pytest.CaptureFixture[str]) -> None:
    storage, folder = copy("storage")
    ledger = folder / "ledger.db"
    ledger.write_bytes(damage(ledger.read_bytes(), seed))
    look(storage, capfd, seed, [("trials", "small", "--json"), ("status", "small")])


def edit(statement: str) -> Callable[[Path], object]:
    """A change that keeps the database sound for SQLite, and not for us."""

    def change(ledger: Path) -> None:
        connection = sqlite3.connect(ledger)
        connection.execute(statement)
        connection.commit()
        connection.close()

    return change


def folder_instead(ledger: Path) -> None:
    ledger.unlink()
    ledger.mkdir()


LEDGERS: dict[str, Callable[[Path], object]] = {
    "empty": lambda ledger: ledger.write_bytes(b""),
    "text": lambda ledger: ledger.write_text("This is a letter.\n" * 1000),
    "zeros": lambda ledger: ledger.write_bytes(bytes(ledger.stat().st_size)),
    "half": lambda ledger: ledger.write_bytes(ledger.read_bytes()[: ledger.stat().st_size // 2]),
    "header": lambda ledger: ledger.write_bytes(ledger.read_bytes()[:100]),
    "folder": folder_instead,
    "gone": lambda ledger: ledger.unlink(),
    "link to itself": lambda ledger: (ledger.unlink(), ledger.symlink_to(ledger)),
    "write-ahead log": lambda ledger: Path(f"{ledger}-wal").write_bytes(b"\x37\x7f\x06\x82" + bytes(range(256)) * 40),
    "another program's": lambda ledger: (ledger.unlink(), edit("CREATE TABLE letters (text TEXT)")(ledger)),
    "no trials": edit("DROP TABLE trials"),
    "no values": edit("DROP TABLE trial_user_attributes"),
    "broken JSON": edit("UPDATE trial_user_attributes SET value_json = '{'"),
    "other JSON": edit("UPDATE trial_user_attributes SET value_json = '[1, 2]'"),
    "null": edit("UPDATE trial_user_attributes SET value_json = 'null'"),
    "numbers": edit("UPDATE study_user_attributes SET value_json = '7'"),
    "no state": edit("UPDATE trials SET state = 'SLEEPING'"),
    "version": edit("UPDATE version_info SET schema_version = 99"),
    "revision": edit("UPDATE alembic_version SET version_num = 'v9'"),
    "deep JSON": edit(f"UPDATE trial_user_attributes SET value_json = '{'[' * 100_000}'"),
    "studies": edit("DELETE FROM studies"),
}


@pytest.mark.parametrize("kind", LEDGERS)
def test_ledger_that_is_none(kind: str, copy: Any, capfd: pytest.CaptureFixture[str]) -> None:
    storage, folder = copy("storage")
    LEDGERS[kind](folder / "ledger.db")
    look(storage, capfd, kind)


FILES = ("study.json", "facts.json", "driver.json", LEASE)


def changed_lease(**changes: Any) -> bytes:
    return json.dumps(asdict(OTHERS_LEASE) | {"released": False} | changes).encode()


CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "text": b'"x"',
    "number": b"1e999",
    "nan": b"NaN",
    "deep": b"[" * 100_000,
    "utf-16": '{"study": 1}'.encode("utf-16"),
    "bytes": bytes(range(256)),
    "surrogate": b'{"study": "\\ud800", "since": "\\ud800"}',
    "naive time": changed_lease(heard="2026-01-01"),
    "process of this machine": changed_lease(machine=_machine(), pid="\x00"),
    "no process number": changed_lease(machine=_machine(), pid=-7),
    "huge process number": changed_lease(machine=_machine(), pid=10**30),
    "other types": b'{"study": [], "domains": 1, "since": 7, "until": {}, "state": [], "error": 3, "pid": "x"}',
}


@pytest.mark.parametrize("file", FILES)
def test_files_that_hold_something_else(file: str, copy: Any, capfd: pytest.CaptureFixture[str]) -> None:
    for kind, content in CONTENTS.items():
        storage, folder = copy(kind.replace(" ", "-"))
        (folder / file).write_bytes(content)
        look(storage, capfd, (file, kind), [("status", "small"), ("frontier", "small", "--json")])


@pytest.mark.parametrize("file", FILES)
def test_damaged_files(file: str, copy: Any, capfd: pytest.CaptureFixture[str]) -> None:
    for seed in SEEDS[: len(SEEDS) // 2]:
        storage, folder = copy(f"s{seed}")
        (folder / file).write_bytes(damage((folder / file).read_bytes(), seed))
        look(storage, capfd, (file, seed), [("status", "small", "--json"), ("frontier", "small", "--json")])


@pytest.mark.parametrize("file", ["study.json", "facts.json", "driver.json", "ledger.db"])
def test_a_folder_in_a_files_place(file: str, copy: Any, capfd: pytest.CaptureFixture[str]) -> None:
    storage, folder = copy("storage")
    (folder / file).unlink()
    (folder / file).mkdir()
    look(storage, capfd, file)


@pytest.mark.parametrize("kind", ["study.json", "facts.json", "ledger.db", "broken JSON", "text"])
def test_run_and_report_say_one_sentence(
    kind: str,
    copy: Any,
    finished: tuple[Path, Path],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peftsearch.driver.run_study", lambda *_, **__: None)
    storage, folder = copy("storage")
    if kind in LEDGERS:
        LEDGERS[kind](folder / "ledger.db")
    else:
        (folder / kind).write_bytes((folder / kind).read_bytes()[:50])
    with no_hang():
        done = run_here(capfd, "run", finished[0], "--storage", storage)
    check(done, kind)
    assert done.status == 2
    for command in (("report", "small", "--to", tmp_path / "r"), ("export", "small", "--to", tmp_path / "e")):
        with no_hang():
            done = run_here(capfd, *command, "--storage", storage)
        check(done, (kind, command))
        assert done.status == 2


def test_names_of_folders_that_are_none_of_ours(copy: Any, capfd: pytest.CaptureFixture[str]) -> None:
    storage, folder = copy("storage")
    for name in (" ", "-rf", "a b", "\n", "é", "[red]", "=1+1", "x" * 200, "..."):
        shutil.copytree(folder, storage / "studies" / name)
    (storage / "studies" / "file").write_text("x")
    (storage / "studies" / "loop").symlink_to(storage / "studies" / "loop")
    with no_hang():
        listed = run_here(capfd, "list", "--storage", storage)
    assert listed.status == 0, listed
    assert "other" in listed.out
