"""What a contender leaves behind: one line for each evaluation of a trial."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One evaluation of a trial, and the training before it.

    Attributes:
        trial: Its number; no other trial of the contender's has it.
        rank: LoRA rank.
        learning_rate: Peak learning rate.
        step: Steps done.
        final: Whether the trial has reached its full budget.
        examples: Examples trained on so far.
        train_loss: Mean training loss since the evaluation before.
        loss: Mean validation loss.
        accuracy: On the validation rows.
        parameters: Trainable parameters.
        seconds: Time that training since the evaluation before, and the evaluation, took.
        ended: When it was known: seconds since 1970.
    """

    trial: int
    rank: int
    learning_rate: float
    step: int
    final: bool
    examples: int
    train_loss: float
    loss: float
    accuracy: float
    parameters: int
    seconds: float
    ended: float


def write_record(path: Path, **fields: float) -> None:
    """Add a record that ends now. One write per line: several processes may add to the same file."""
    line = json.dumps(asdict(Record(**{"ended": time.time(), **fields}))) + "\n"  # type: ignore[arg-type]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read_records(path: Path) -> list[Record]:
    """All records of a file by the time at which they ended; none where a contender came to no result."""
    if not path.exists():
        return []
    lines: Iterable[str] = path.read_text().splitlines()
    return sorted((Record(**json.loads(line)) for line in lines), key=lambda record: record.ended)
