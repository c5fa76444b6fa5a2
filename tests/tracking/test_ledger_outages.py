"""A database that is away for a while costs a study some time, and nothing else."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from postgres_server import PostgresServer, remove, start_server
from small_disk import fill

from peftsearch.files import on_network
from peftsearch.spec import Reading, Rung, StudyError, TrialRecord
from peftsearch.tracking import database
from peftsearch.tracking.ledger import Ledger, LedgerCell
from peftsearch.tracking.mlflow_store import prepare_sqlite

CELLS = [LedgerCell(f"d/{name}/m", "m", "d", name, "accuracy", "maximize") for name in ("lora", "full")]


def run_study(ledger: Ledger, trials: int = 8) -> None:
    """What a driver writes: first guesses, trials of every end, readings."""
    for cell in CELLS:
        ledger.enqueue(cell.key, [{"rank": 16}, {"rank": 2}])
    for number in range(trials):
        cell = CELLS[number % 2]
        while True:
            attempt = ledger.infeasible(cell.key, number)
            record = ledger.ask(
                cell.key,
                optuna.samplers.RandomSampler(seed=100 * number + attempt),
                lambda trial: {"rank": trial.suggest_int("rank", 1, 64)},
                lambda _, values, attempt=attempt: {
                    "seed": 0,
                    "trainable_parameters": 10 * values["rank"],
                    "constraints": {"limit": 1.0 if attempt == 0 and values["rank"] > 32 else -1.0},
                },
            )
            if record is not None:
                break
        assert record.number == number
        for step in (1, 2):
            ledger.add_rung(
                number,
                Rung(step=step, epoch=step, value=0.1 * step, loss=1.0, train_loss=1.0, train_seconds=1.0, scores={}),
            )
        ledger.set_run_id(number, f"run-{number}")
        if number % 4 == 3:
            ledger.fail(number, "broken")
        elif number % 4 == 2:
            ledger.prune(number)
        else:
            ledger.complete(number)
            ledger.add_reading(number, Reading(seed=1, value=0.5, loss=1.0))


def essence(records: list[TrialRecord]) -> list[dict[str, Any]]:
    return [record.model_dump(exclude={"started", "finished"}) for record in records]


def optuna_trials(url: str) -> list[tuple[str, int, str, dict[str, Any]]]:
    """Every trial as Optuna holds it."""
    storage = optuna.storages.RDBStorage(url)
    return [
        (name, trial.number, trial.state.name, trial.params)
        for name in sorted(optuna.get_all_study_names(storage))
        for trial in optuna.load_study(study_name=name, storage=storage).trials
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[Any]]:
    url = f"sqlite:///{tmp_path_factory.mktemp('undisturbed') / 'ledger.db'}"
    run_study(Ledger(url, "s", CELLS))
    assert any(state == "PRUNED" for _, _, state, _ in optuna_trials(url))
    return essence(Ledger(url, "s").records), optuna_trials(url)


@pytest.mark.parametrize("every", [2, 5])
def test_an_answer_that_was_lost_is_no_second_write(
    undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """The database commits, and the connection breaks before it can say so."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = Ledger(url, "s", CELLS)
    commits = 0

    def commit(connection: Any) -> None:
        nonlocal commits
        commits += 1
        connection.commit()
        if commits % every == 0:
            raise sqlite3.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(ledger._database.engine.dialect, "do_commit", commit)
    run_study(ledger)
    assert commits > 50
    monkeypatch.undo()
    assert optuna_trials(url) == undisturbed[1]
    assert essence(Ledger(url, "s").records) == undisturbed[0]
    assert essence(ledger.records) == undisturbed[0]


LOCKER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
connection.execute("COMMIT")
"""


def lock(path: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_file_that_another_process_locks_is_waited_for(undisturbed: Any, tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}", "s", CELLS, patience=60)
    with lock(path, 4.0):
        began = time.monotonic()
        run_study(ledger)
        # Longer than SQLite itself waits.
        assert time.monotonic() - began > 3
    assert essence(Ledger(f"sqlite:///{path}", "s").records) == undisturbed[0]


def test_patience_ends_in_one_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    url = f"sqlite:///{path}"
    ledger = Ledger(url, "s", CELLS, patience=1)
    run_study(ledger, trials=4)
    with lock(path, 60) as process:
        with pytest.raises(RuntimeError, match=r"has not answered for .* \(database is locked\).*run the study again"):
            run_study_on(ledger)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="has not answered"):
            run_study_on(ledger)
        assert time.monotonic() - began < 0.5
        assert isinstance(ledger.failure, RuntimeError)
        process.kill()
    assert [record.number for record in Ledger(url, "s").records] == [0, 1, 2, 3]
    run_study_on(Ledger(url, "s", CELLS))


def test_a_full_disk_is_waited_for_shortly_and_nothing_is_lost(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no server that comes back by itself: with the patience for those, a study would hang for ten minutes."""
    monkeypatch.setattr(database, "FULL", 1.0)
    url = f"sqlite:///{small_disk / 'ledger.db'}"
    ledger = Ledger(url, "s", CELLS, patience=600)
    run_study(ledger, trials=4)
    before = essence(ledger.records)
    filler = fill(small_disk)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"disk is full\): nothing that it holds is lost, run the study again"):
        run_study_on(ledger)
    assert time.monotonic() - began < 60
    filler.unlink()
    assert essence(Ledger(url, "s").records) == before
    run_study_on(Ledger(url, "s", CELLS))


def test_a_database_that_takes_no_writes_is_not_waited_for(tmp_path: Path) -> None:
    run_study(Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", "s", CELLS), trials=2)
    ledger = Ledger(f"sqlite:///file:{tmp_path / 'ledger.db'}?mode=ro&uri=true", "s", patience=600)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"cannot be used \(attempt to write a readonly database\)"):
        run_study_on(ledger)
    assert time.monotonic() - began < 60


def run_study_on(ledger: Ledger) -> None:
    ledger.set_run_id(0, "another")


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    server = start_server()
    yield server
    remove(server)


def test_a_postgresql_that_is_restarted_again_and_again_costs_nothing(
    undisturbed: Any, own_server: PostgresServer
) -> None:
    url = own_server.create_database()
    ledger = Ledger(url, "s", CELLS, patience=120)
    generator = random.Random(0)
    over = threading.Event()
    restarts = 0

    def restart() -> None:
        nonlocal restarts
        while not over.wait(generator.uniform(0.05, 0.4)):
            own_server.stop()
            over.wait(generator.uniform(0, 0.5))
            own_server.start()
            restarts += 1

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        run_study(ledger)
        while restarts < 3:
            run_study_on(ledger)
            time.sleep(0.1)
    finally:
        over.set()
        thread.join()
    ledger.set_run_id(0, "run-0")
    assert essence(Ledger(url, "s").records) == undisturbed[0]
    assert optuna_trials(url) == undisturbed[1]


def test_a_postgresql_that_stays_away_is_one_sentence_without_its_password(own_server: PostgresServer) -> None:
    url = own_server.create_database()
    ledger = Ledger(url, "s", CELLS, patience=0.5)
    run_study(ledger, trials=2)
    own_server.stop()
    with pytest.raises(RuntimeError, match="has not answered") as caught:
        run_study_on(ledger)
    assert own_server.password not in str(caught.value)
    with pytest.raises(StudyError, match="cannot open the ledger") as refused:
        Ledger(url, "s")
    assert own_server.password not in str(refused.value)
    own_server.start()
    assert len(Ledger(url, "s").records) == 2


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_server_with_no_connection_to_spare_is_waited_for(own_server: PostgresServer, driver: str) -> None:
    url = own_server.create_database()
    module = pytest.importorskip(driver)
    others: list[Any] = []

    def fill() -> None:
        while True:
            others.append(module.connect(url))

    with pytest.raises(module.OperationalError):
        fill()

    def leave() -> None:
        for connection in others:
            connection.close()

    threading.Timer(1.5, leave).start()
    began = time.monotonic()
    with closing(Ledger(url.replace("postgresql:", f"postgresql+{driver}:"), "s")) as ledger:
        assert ledger.records == []
    assert time.monotonic() - began > 1


def test_a_missing_driver_says_what_to_install(tmp_path: Path) -> None:
    """In a Python that cannot import either driver."""
    script = """
import sys
sys.modules.update({"psycopg": None, "psycopg2": None})
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith("psycopg") else find(name, *rest)
from peftsearch.tracking.ledger import Ledger
for url in ("postgresql://u:secret@h/d", "postgresql+psycopg2://u:secret@h/d"):
    try:
        Ledger(url, "s")
    except Exception as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    first, second = done.stdout.splitlines()
    assert first.startswith("StudyError")
    assert "pip install 'peftsearch[postgres]'" in first
    assert second.startswith("StudyError")
    assert "not installed" in second
    assert "secret" not in done.stdout


def test_a_write_ahead_log_is_for_local_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network's file system, SQLite's write-ahead log would corrupt what several machines open."""

    def mode(path: Path) -> str:
        Ledger(f"sqlite:///{path}", "s", CELLS).close()
        with closing(sqlite3.connect(path)) as connection:
            return str(connection.execute("PRAGMA journal_mode").fetchone()[0])

    import psutil
    from psutil._ntuples import sdiskpart

    assert not on_network(tmp_path)
    assert mode(tmp_path / "local.db") == "wal"
    prepare_sqlite(f"sqlite:///{tmp_path}/mlflow.db")
    mounts: Callable[..., Any] = lambda all: [sdiskpart("server:/x", str(tmp_path), "nfs4", "rw")]  # noqa: E731
    monkeypatch.setattr(psutil, "disk_partitions", mounts)
    assert mode(tmp_path / "shared.db") == "delete"
    assert mode(tmp_path / "local.db") == "delete"
    # MLflow's file is that of all studies of a storage.
    prepare_sqlite(f"sqlite:///{tmp_path}/mlflow.db")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
