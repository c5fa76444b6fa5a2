"""``peftsearch status --watch``: until the study is finished, and no line without news."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from cli_study import Result
from rich.console import Console

from peftsearch.cli.status import watch
from peftsearch.holder import hold
from peftsearch.spec import Rung
from peftsearch.study import Study
from peftsearch.tracking.ledger import Ledger

Cli = Callable[..., Result]


def finish(study: Study) -> None:
    with hold(study.folder.path, study.name) as lease:
        lease.note(state="finished", until="2026-01-01T00:00:00+00:00")


class Waits:
    """Does one thing at each wait, and counts the waits."""

    def __init__(self, *happenings: Callable[[], None]) -> None:
        self.happenings = list(happenings)
        self.count = 0

    def __call__(self, seconds: float) -> None:
        self.count += 1
        self.happenings.pop(0)()


def add_rung(study: Study) -> None:
    """A trial that fails later is begun meanwhile."""
    from optuna.samplers import RandomSampler

    with closing(Ledger(study.ledger_url, study.name)) as ledger:
        (key, *_) = ledger._studies
        record = ledger.ask(
            key,
            RandomSampler(seed=1),
            lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
            lambda number, _: {"seed": 0, "total_steps": 9, "trainable_parameters": 100},
        )
        ledger.add_rung(record.number, Rung(step=3, epoch=0.3, value=0.5, loss=0.5, train_loss=0.6))


def test_a_file_gets_a_line_for_each_change(started: Study, capsys: pytest.CaptureFixture[str]) -> None:
    waits = Waits(lambda: None, lambda: add_rung(started), lambda: finish(started))
    watch(started, Console(file=io.StringIO()), 1.0, sleep=waits)
    lines = capsys.readouterr().out.splitlines()
    assert waits.count == 3
    assert len(lines) == 3
    assert lines[0].startswith("small; interrupted; 0 running, 1 complete, 0 pruned, 1 failed of 8 planned")
    assert "1 running" in lines[1]
    assert "finished" in lines[2]


def test_json_lines_are_statuses(started: Study, capsys: pytest.CaptureFixture[str]) -> None:
    watch(started, Console(file=io.StringIO()), 1.0, as_json=True, sleep=Waits(lambda: None, lambda: finish(started)))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [status["state"] for status in found] == ["interrupted", "finished"]
    expected = started.status()
    assert found[-1] == expected


def test_a_terminal_shows_one_view(started: Study, capsys: pytest.CaptureFixture[str]) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, force_interactive=True, width=100)
    watch(started, console, 1.0, sleep=Waits(lambda: None, lambda: finish(started)))
    assert capsys.readouterr().out == ""
    text = shown.getvalue()
    assert "macro_f1 0.7500" in text
    assert "continues it" in text
    last = text[text.rindex("finished") :]
    assert "Ctrl-C" not in last


def test_the_command(peftsearch: Cli, storage: Path, started: Study) -> None:
    finish(started)
    result = peftsearch("status", "small", "--watch", "--json", "--storage", storage)
    assert (result.status, result.err) == (0, "")
    assert json.loads(result.out)["state"] == "finished"
    assert result.out.count("\n") == 1
    bad = peftsearch("status", "small", "--watch", "--interval", "0", "--storage", storage)
    assert bad.status == 2
    assert bad.err.count("\n") == 1
    missing = peftsearch("status", "other", "--watch", "--storage", storage)
    assert missing.status == 2
