"""optuna-dashboard shows a ledger as it is, and leaves it so."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from peftsearch.spec import Rung, TrialRecord
from peftsearch.tracking.ledger import Ledger, LedgerCell

CELLS = [LedgerCell(f"d/{method}/m", "m", "d", method, "accuracy", "maximize") for method in ("lora", "full")]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A ledger with a complete, a pruned and a running trial in one cell, and a failed one in another."""

    def ask(cell: LedgerCell) -> TrialRecord:
        record = ledger.ask(
            cell.key,
            optuna.samplers.RandomSampler(seed=0),
            lambda trial: {"rank": trial.suggest_int("rank", 1, 64)},
            lambda number, values: {"seed": 0, "trainable_parameters": 10 * values["rank"]},
        )
        assert record is not None
        return record

    where = f"sqlite:///{tmp_path / 'ledger.db'}"
    with closing(Ledger(where, "s", CELLS)) as ledger:
        complete, pruned, _ = (ask(CELLS[0]).number for _ in range(3))
        for number, value in ((complete, 0.75), (pruned, 0.9)):
            ledger.add_rung(number, Rung(step=1, epoch=1, value=value, loss=1, train_loss=1, train_seconds=1))
        ledger.complete(complete)
        ledger.prune(pruned)
        ledger.fail(ask(CELLS[1]).number, "out of memory")
    return where


@pytest.fixture
def server(url: str, tmp_path: Path) -> Iterator[str]:
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("optuna-dashboard", path=beside)
    if program is None:
        pytest.skip("optuna-dashboard is not installed (it is in the extra 'test')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([program, url, "--port", str(port)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=60) as answer:
        return json.load(answer)


def test_it_shows_the_cells_their_trials_and_their_front_and_changes_nothing(server: str, url: str) -> None:
    before = Ledger(url, "s").records
    studies = {item["study_name"]: item["study_id"] for item in get(f"{server}/api/studies")["study_summaries"]}
    assert set(studies) == {f"s/{cell.key}" for cell in CELLS}
    lora = get(f"{server}/api/studies/{studies['s/d/lora/m']}?after=0")
    assert [trial["state"] for trial in lora["trials"]] == ["Complete", "Pruned", "Running"]
    assert lora["directions"] == ["maximize", "minimize"]
    assert lora["objective_names"] == ["accuracy", "trainable_parameters"]
    assert [trial["number"] for trial in lora["best_trials"]] == [0]
    assert lora["best_trials"][0]["values"][0] == 0.75
    failed = get(f"{server}/api/studies/{studies['s/d/full/m']}?after=0")
    assert [trial["state"] for trial in failed["trials"]] == ["Fail"]
    assert Ledger(url, "s").records == before
