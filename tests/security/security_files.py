"""What the security tests share: data, marker files that say that code ran, and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Outcome:
    """What a command line left."""

    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line of a refusal."""
        assert (self.status, self.out) == (2, ""), self
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


def run_here(capfd: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Run a command line in this process."""
    from peftsearch.cli.app import run_app

    capfd.readouterr()
    status = run_app([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return Outcome(status, out, err)


def write_project(folder: Path) -> Path:
    """The data of `cli_study.small_study`."""
    from cli_study import rows, write_rows

    folder.mkdir(parents=True)
    write_rows(folder / "train.csv", rows(40, "tenant"))
    write_rows(folder / "test.csv", rows(10, "landlord"))
    write_rows(folder / "notes.csv", rows(40, "patient"))
    return folder


class Malicious:
    """A pickle of it makes a marker file wherever it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.marker,)
