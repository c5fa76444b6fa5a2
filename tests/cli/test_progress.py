"""The progress display: what it says on a terminal and in a log, and that threads do not trip over it."""

from __future__ import annotations

import io
import re
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from peftsearch.cli import progress as module
from peftsearch.cli.progress import INTERVAL, Progress
from peftsearch.cli.words import duration, size
from peftsearch.spec import Baseline, Rung, TrialRecord, TrialState

BASELINES = {
    "majority": Baseline(title="majority class", value=0.25),
    "linear_probe": Baseline(title="logistic regression on frozen embeddings", value=0.5),
}


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def trial(
    number: int, state: TrialState, domain: str = "legal", value: float | None = None, **changes: object
) -> TrialRecord:
    rungs = [] if value is None else [Rung(step=10, epoch=1.0, value=value, loss=1.0, train_loss=1.0)]
    fields: dict[str, object] = {
        "number": number,
        "model": "base",
        "domain": domain,
        "method": "lora",
        "state": state,
        "seed": 0,
        "value": value,
        "trainable_parameters": 1000,
        "hyperparameters": {},
        "rungs": rungs,
        "total_steps": 20,
    }
    return TrialRecord.model_validate(fields | changes)


def make_study(baselines: dict[str, dict[str, Baseline]] | None = None, models: int = 1) -> Any:
    facts = SimpleNamespace(domains={"legal": SimpleNamespace(baselines=baselines or {})})
    return SimpleNamespace(name="small", facts=lambda: facts, spec=SimpleNamespace(models=range(models)))


def make_run(records: list[TrialRecord] | None = None, planned: int = 8) -> Any:
    domains = {
        "legal": SimpleNamespace(metric="macro_f1", direction="maximize"),
        "prose": SimpleNamespace(metric="perplexity", direction="minimize"),
    }
    return SimpleNamespace(
        planned=planned, cells=[1, 2], domains=domains, ledger=SimpleNamespace(records=records or [])
    )


def make_progress(
    terminal: bool = False, study: Any = None, width: int = 120
) -> tuple[Progress, io.StringIO, Clock, Console]:
    file, clock = io.StringIO(), Clock()
    console = Console(
        file=file, force_terminal=terminal, width=width, highlight=False, soft_wrap=True, color_system=None
    )
    return Progress(console, study or make_study(), clock), file, clock, console


def lines(file: io.StringIO) -> list[str]:
    return file.getvalue().splitlines()


def frame(progress: Progress, width: int = 120) -> str:
    """What the live view shows at this moment."""
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(progress._view())
    return captured.get()


def end_with_an_error(progress: Progress) -> None:
    def check() -> None:
        with progress:
            progress.phase("checking")
            raise ValueError

    with pytest.raises(ValueError):
        check()


def test_log_counts_confirmations() -> None:
    progress, file, clock, _ = make_progress()
    with progress:
        progress.phase("checking")
        progress.planned(make_run())
        clock.now += INTERVAL
        progress.confirmations(0, 0, 6)
        clock.now += INTERVAL
        # Its reading, which comes first, is news of a trial that has ended long ago.
        progress.trial_changed(trial(0, TrialState.COMPLETE))
        progress.confirmations(1, 0, 6)
        progress.confirmations(2, 0, 6)
        clock.now += INTERVAL
        progress.confirmations(4, 1, 6)
        progress.confirmations(5, 1, 6)
    assert [line.split(";")[0] for line in lines(file) if "confirmations" in line] == [
        "0 of 6 confirmations",
        "1 of 6 confirmations",
        "4 of 6 confirmations, 1 failed",
        "5 of 6 confirmations, 1 failed",
    ]


def test_the_log_of_a_study_stopped_in_its_confirmations_ends_with_their_count() -> None:
    progress, file, _, _ = make_progress()
    with progress:
        progress.planned(make_run())
        progress.confirmations(1, 0, 6)
    assert lines(file)[-1].startswith("1 of 6 confirmations; ")


def test_the_live_view_counts_confirmations() -> None:
    progress, _, _, _ = make_progress(terminal=True)
    with progress:
        progress.planned(make_run())
        assert "confirmations" not in frame(progress)
        progress.confirmations(2, 0, 6)
        assert "2 of 6 confirmations" in frame(progress)


def test_log_says_phases_warnings_and_failures_at_once() -> None:
    progress, file, _, _ = make_progress()
    with progress:
        progress.phase("checking")
        progress.phase("starting Ray")
        progress.planned(make_run())
        progress.trial_changed(trial(0, TrialState.RUNNING))
        progress.trial_changed(trial(0, TrialState.FAILED, error="the loss became NaN [/bold]\nat step 3"))
        progress.trial_changed(trial(0, TrialState.FAILED, error="the loss became NaN [/bold]\nat step 3"))
        progress.baselines("legal", BASELINES)
        progress.warning("MLflow is [away]")
    assert lines(file) == [
        "starting Ray",
        "training: 8 trials in 2 cells",
        "Trial 0 (lora, legal) failed: the loss became NaN [/bold] at step 3",
        "legal without tuning: majority class 0.2500, logistic regression on frozen embeddings 0.5000",
        "Warning: MLflow is [away]",
        "1 of 8 trials: 0 running, 0 pruned, 0 complete, 1 failed; 0 s",
    ]


def test_log_counts_at_most_every_five_seconds() -> None:
    progress, file, clock, _ = make_progress()
    with progress:
        progress.planned(make_run(planned=1000))
        for number in range(100):
            clock.now += 0.5
            progress.trial_changed(trial(number, TrialState.COMPLETE, value=0.5 + number / 1000))
    counts = [line for line in lines(file) if " of 1000 trials: " in line]
    # 50 seconds, and the last line of all.
    assert len(counts) == 11
    assert counts[0] == (
        "10 of 1000 trials: 0 running, 0 pruned, 10 complete, 0 failed; 5 s, about 8 min left; best legal 0.5090 (lora)"
    )


def test_log_does_not_mention_a_short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    progress, file, _, _ = make_progress()
    end_with_an_error(progress)
    assert file.getvalue() == ""
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    progress, file, _, _ = make_progress()
    with progress:
        progress.phase("checking")
        deadline = time.monotonic() + 30
        while not file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lines(file) == ["checking"]


def test_resumed_study_counts_what_was_done_before() -> None:
    before = [trial(0, TrialState.COMPLETE, value=0.7), trial(1, TrialState.PRUNED, value=0.2)]
    interrupted = trial(2, TrialState.RUNNING, value=0.4)
    progress, file, clock, _ = make_progress(study=make_study({"base": BASELINES}))
    with progress:
        progress.planned(make_run([*before, interrupted]))
        assert "majority 0.250, probe 0.500" in frame(progress)
        assert "2 of 8 trials" in frame(progress)
        clock.now += 60
        progress.trial_changed(trial(2, TrialState.COMPLETE, value=0.8))
    assert lines(file)[0] == "training: 8 trials in 2 cells, 2 of them done before"
    # One trial took this session a minute, and five are left.
    assert lines(file)[-1] == (
        "3 of 8 trials: 0 running, 1 pruned, 2 complete, 0 failed; 1 min 00 s, about 5 min left; "
        "best legal 0.8000 (lora)"
    )


def test_finished_study_says_so() -> None:
    progress, file, _, _ = make_progress()
    with progress:
        progress.planned(make_run([trial(0, TrialState.COMPLETE, value=0.5)], planned=1))
    assert lines(file)[0].startswith("every trial is done already: 1 trials in 2 cells")


def test_best_follows_the_metric_and_then_the_parameters() -> None:
    progress, _, _, _ = make_progress(terminal=True)
    progress.planned(make_run())
    progress.trial_changed(trial(0, TrialState.COMPLETE, value=0.5))
    progress.trial_changed(trial(1, TrialState.COMPLETE, value=0.5, trainable_parameters=900, method="prompt"))
    progress.trial_changed(trial(2, TrialState.PRUNED, value=0.9))
    progress.trial_changed(trial(3, TrialState.COMPLETE, "prose", value=30.0))
    progress.trial_changed(trial(4, TrialState.COMPLETE, "prose", value=20.0, method="full"))
    progress.trial_changed(trial(5, TrialState.COMPLETE, "prose", value=float("nan")))
    shown = [re.split(r"\s{2,}", line.strip()) for line in frame(progress).splitlines()]
    assert ["legal", "2", "1", "macro_f1 0.5000", "prompt", "900"] in shown
    assert ["prose", "3", "0", "perplexity 20.0000", "full", "1,000"] in shown


def test_baselines_of_several_models_show_the_best() -> None:
    worse = {"majority": BASELINES["majority"], "linear_probe": Baseline(title="probe", value=0.4)}
    progress, _, _, _ = make_progress(terminal=True, study=make_study({"a": worse}, models=2))
    progress.planned(make_run())
    progress.trial_changed(trial(0, TrialState.COMPLETE, value=0.5, model="a/tiny"))
    assert "probe 0.400" in frame(progress)
    assert "lora on a/tiny" in frame(progress)
    progress.baselines("legal", BASELINES)
    progress.baselines("legal", worse)
    assert "majority 0.250, probe 0.500" in frame(progress)


def test_view_on_a_terminal() -> None:
    progress, file, clock, _ = make_progress(terminal=True)
    with progress:
        progress.phase("starting Ray")
        assert "starting Ray" in frame(progress)
        progress.planned(make_run())
        progress.trial_changed(trial(0, TrialState.RUNNING, value=0.4))
        progress.trial_changed(trial(1, TrialState.PRUNED, value=0.4))
        clock.now += 30
        shown = frame(progress)
        assert "small" in shown
        assert "30 s, about 4 min left" in shown
        assert "1 of 8 trials" in shown
        assert "1 running, 1 pruned, 0 complete, 0 failed" in shown
        progress.trial_changed(trial(2, TrialState.FAILED, error="too large"))
        progress.trial_changed(trial(3, TrialState.FAILED, error="too large"))
        progress.stopping()
        assert "second Ctrl-C ends at once" in frame(progress)
        assert "left" not in frame(progress)
    # The same reason is told once.
    assert file.getvalue().count("failed: too large") == 1
    assert all(len(line) <= 60 for line in frame(progress, width=60).splitlines())


def test_nothing_is_left_of_the_view_after_an_error() -> None:
    progress, file, _, _ = make_progress(terminal=True)
    end_with_an_error(progress)
    erase_line_and_go_up = "\x1b[2K"
    assert file.getvalue().rstrip("\n").endswith(erase_line_and_go_up)


def test_stopping_is_said_once_in_a_log() -> None:
    progress, file, _, _ = make_progress()
    with progress:
        progress.stopping()
        progress.stopping()
        deadline = time.monotonic() + 30
        while not file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    (line,) = lines(file)
    assert "running trials write their state" in line
    assert "second Ctrl-C" in line


@pytest.mark.parametrize("terminal", [True, False])
def test_events_from_many_threads(terminal: bool) -> None:
    progress, _, clock, console = make_progress(terminal=terminal)

    def tell(first: int) -> None:
        for number in range(first, first + 50):
            clock.now += 1
            progress.trial_changed(trial(number, TrialState.RUNNING))
            progress.trial_changed(trial(number, TrialState.FAILED, error=f"reason {number}"))
            progress.warning("again")
            progress.baselines("legal", BASELINES)

    with progress:
        progress.planned(make_run(planned=400))
        threads = [threading.Thread(target=tell, args=(50 * index,), daemon=True) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert "400 of 400 trials" in frame(progress)
    assert console.file.getvalue().count("Warning: again") == 400  # type: ignore[attr-defined]


def test_words() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.4, 59.6, 185, 3600, 7800, 180_000)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 10 min",
        "2 days 2 h",
    ]
    assert [duration(seconds, rough=True) for seconds in (1, 42, 58, 95, 185, 3599)] == [
        "5 s",
        "40 s",
        "1 min",
        "2 min",
        "3 min",
        "1 h 00 min",
    ]
    assert [size(count) for count in (0, 600 * 2**20, 1536 * 2**20)] == ["0 MiB", "600 MiB", "1.5 GiB"]
