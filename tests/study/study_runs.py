"""Studies run by the command line in processes of their own, and what is left of them in the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forks import command

from peftsearch.spec import TrialRecord
from peftsearch.study import Study

_CLOCKS = {"train_seconds", "evaluation_seconds", "peak_memory_bytes"}


def run(path: Path, storage: Path, *options: str) -> None:
    done = command("run", path, "--storage", storage, *options)
    assert done.returncode == 0, done.stderr[-3000:]


def essence(record: TrialRecord) -> dict[str, Any]:
    """A trial without what the clock, the machine's speed and MLflow put into it."""
    fields = record.model_dump(
        exclude={"started", "finished", "mlflow_run_id", "retries", "estimated_seconds", *_CLOCKS}
    )
    for rung in fields["rungs"]:
        del rung["train_seconds"], rung["together"], rung["evaluation_seconds"], rung["usage"]
    for reading in fields["confirmed"]["readings"] if fields["confirmed"] else ():
        for name in ("read_at", "examples_per_second", *_CLOCKS):
            del reading[name]
    return fields


def ledger(name: str, storage: Path) -> list[dict[str, Any]]:
    return [essence(record) for record in Study.open(name, storage).trials()]
