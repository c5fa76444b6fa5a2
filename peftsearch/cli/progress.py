"""What a person sees while a study runs: one live view on a terminal, a few plain lines in a log.

Everything goes to the console that is handed in (standard error), so that standard output stays free for results.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from peftsearch.cli.fitting import Fitted
from peftsearch.cli.words import duration
from peftsearch.spec import Baseline, Direction, TrialRecord, TrialState

if TYPE_CHECKING:
    from peftsearch.search.run import StudyRun
    from peftsearch.study import Study

INTERVAL = 5.0
"""Seconds between two lines of counts in a log."""
PATIENCE = 10.0
"""Seconds of checking after which a log says so: a study file that is wrong leaves its error and nothing else."""

_STOPPING = "Stopping: running trials write their state; a second Ctrl-C ends at once. Nothing recorded is lost."
_BASELINES = {"majority": "majority", "linear_probe": "probe"}


@dataclass
class _Domain:
    metric: str
    direction: Direction
    counts: Counter[TrialState] = field(default_factory=Counter)
    best: TrialRecord | None = None
    baselines: dict[str, Baseline] = field(default_factory=dict)

    def goodness(self, value: float) -> float:
        return value if self.direction == "maximize" else -value

    def take(self, record: TrialRecord) -> None:
        """Remember a finished trial if it is the best so far; of equals, the one with fewest parameters."""
        if record.value is None or record.value != record.value:
            return
        if self.best is None or self._rank(record) > self._rank(self.best):
            self.best = record

    def add_baselines(self, found: dict[str, Baseline]) -> None:
        """With several models, the best of each kind."""
        for name, baseline in found.items():
            known = self.baselines.get(name)
            if known is None or self.goodness(baseline.value) > self.goodness(known.value):
                self.baselines[name] = baseline

    def _rank(self, record: TrialRecord) -> tuple[float, int]:
        assert record.value is not None
        return self.goodness(record.value), -record.trainable_parameters


class Progress:
    """Shows a running study; implements `peftsearch.events.StudyEvents`. Events may come from any thread.

    Args:
        console: Where to show it: a live view on a terminal, plain lines elsewhere.
        study: The study.
        clock: Seconds since some moment.
    """

    def __init__(self, console: Console, study: Study, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._study = study
        self._clock = clock
        # Never held while something is printed: the live view's thread holds the console's lock when it asks for the
        # view, and would wait for this one.
        self._lock = threading.Lock()
        self._spinner = Spinner("dots")
        self._plain = not console.is_interactive
        self._announcement: threading.Timer | None = None
        self._phase = ""
        self._stopping = False
        self._began = clock()
        self._said = -INTERVAL
        self._planned: int | None = None
        self._search_began = 0.0
        self._ended_before = 0
        self._trials: dict[int, TrialState] = {}
        # How much of their budgets the running trials have had; the view is drawn often, and the others are many.
        self._shares: dict[int, float] = {}
        self._domains: dict[str, _Domain] = {}
        self._reasons: set[str] = set()
        self._confirmed: tuple[int, int, int] | None = None
        # Last, as it asks for the view at once.
        self._live = Live(get_renderable=self._view, console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._began = self._clock()
        if not self._plain:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._drop_announcement()
            lines = [self._line()] if self._plain and self._planned is not None else []
            if self._plain and self._confirmed is not None and sum(self._confirmed[:2]) < self._confirmed[2]:
                lines.append(self._confirmations())
        for line in lines:
            self._say(line)
        # An error is shown by itself; what was reached stays in view, also when somebody stopped the study.
        self._live.transient = error is not None and not isinstance(error, KeyboardInterrupt)
        self._live.stop()

    # --- events ---

    def phase(self, text: str) -> None:
        """See `StudyEvents`."""
        with self._lock:
            first, self._phase = not self._phase, text
            self._drop_announcement()
            if self._plain and first:
                self._announcement = threading.Timer(PATIENCE, self._say, (text,))
                self._announcement.daemon = True
                self._announcement.start()
        if self._plain and not first:
            self._say(text)

    def planned(self, run: StudyRun) -> None:
        """See `StudyEvents`; trials of an earlier session are counted as done."""
        facts = self._study.facts()
        with self._lock:
            self._drop_announcement()
            self._domains = {name: _Domain(domain.metric, domain.direction) for name, domain in run.domains.items()}
            for name, domain in facts.domains.items():
                for found in domain.baselines.values():
                    self._domains[name].add_baselines(found)
            self._trials.clear()
            self._shares.clear()
            for record in run.ledger.records:
                self._count(record)
            self._planned = run.planned
            self._ended_before = self._ended
            self._search_began = self._clock()
            self._phase = "training" if self._ended < run.planned else "every trial is done already"
            before = f", {self._ended} of them done before" if self._ended else ""
            self._said = self._clock()
        if self._plain:
            cells = f"{len(run.cells)} cell{'s' if len(run.cells) != 1 else ''}"
            self._say(f"{self._phase}: {run.planned} trials in {cells}{before}")

    def trial_changed(self, record: TrialRecord) -> None:
        """See `StudyEvents`."""
        with self._lock:
            known = self._trials.get(record.number)
            self._count(record)
            failure = line = None
            if record.state is TrialState.FAILED and known is not TrialState.FAILED:
                failure = self._failure(record)
            # While finalists are trained again, it is their number that grows.
            searching = self._planned is not None and self._confirmed is None
            if self._plain and searching and self._clock() - self._said >= INTERVAL:
                line = self._line()
                self._said = self._clock()
        if failure:
            self._say(failure, style="red")
        if line:
            self._say(line)

    def confirmations(self, done: int, failed: int, planned: int) -> None:
        """See `StudyEvents`."""
        with self._lock:
            self._confirmed = (done, failed, planned)
            say = self._plain and (done + failed == planned or self._clock() - self._said >= INTERVAL)
            if say:
                self._said = self._clock()
            text = self._confirmations()
        if say:
            self._say(text)

    def baselines(self, domain: str, baselines: dict[str, Baseline]) -> None:
        """See `StudyEvents`."""
        with self._lock:
            if domain in self._domains:
                self._domains[domain].add_baselines(baselines)
        if self._plain:
            listed = ", ".join(f"{item.title} {item.value:.4f}" for item in baselines.values())
            self._say(f"{domain} without tuning: {listed}")

    def warning(self, text: str) -> None:
        """See `StudyEvents`."""
        self._say(f"Warning: {text}", style="yellow")

    def stopping(self) -> None:
        """See `StudyEvents`."""
        if self._stopping:
            return
        self._stopping = True
        if self._plain:
            # Called by a signal's handler, perhaps in the middle of a line that the same thread is writing.
            threading.Thread(target=self._say, args=(_STOPPING,), daemon=True).start()

    # --- inside ---

    @property
    def _counts(self) -> Counter[TrialState]:
        return sum((domain.counts for domain in self._domains.values()), Counter())

    @property
    def _ended(self) -> int:
        counts = self._counts
        return counts.total() - counts[TrialState.RUNNING]

    def _count(self, record: TrialRecord) -> None:
        domain = self._domains.get(record.domain)
        if domain is None:
            return
        if record.number in self._trials:
            domain.counts[self._trials[record.number]] -= 1
        domain.counts[record.state] += 1
        self._trials[record.number] = record.state
        self._shares.pop(record.number, None)
        if record.state is TrialState.RUNNING and record.rungs and record.total_steps:
            self._shares[record.number] = record.rungs[-1].step / record.total_steps
        if record.state is TrialState.COMPLETE:
            domain.take(record)

    def _time_left(self) -> float | None:
        """Seconds, from the mean wall time per trial that ended in this session; None where that cannot be said.

        The wall time is the session's, so that trials which run beside one another count as they should.
        """
        if self._planned is None or self._stopping:
            return None
        ended = self._ended
        here, left = ended - self._ended_before, self._planned - ended
        if here <= 0 or left <= 0:
            return None
        return left * (self._clock() - self._search_began) / here

    def _times(self) -> str:
        left = self._time_left()
        return duration(self._clock() - self._began) + (f", about {duration(left, rough=True)} left" if left else "")

    def _numbers(self) -> str:
        order = (TrialState.RUNNING, TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAILED)
        counts = self._counts
        return ", ".join(f"{counts[state]} {state.value.lower()}" for state in order)

    def _confirmations(self) -> str:
        assert self._confirmed is not None
        done, failed, planned = self._confirmed
        lost = f", {failed} failed" if failed else ""
        return f"{done} of {planned} confirmations{lost}; {duration(self._clock() - self._began)}"

    def _line(self) -> str:
        best = [
            f"{name} {domain.best.value:.4f} ({domain.best.method})"
            for name, domain in self._domains.items()
            if domain.best is not None
        ]
        return f"{self._ended} of {self._planned} trials: {self._numbers()}; {self._times()}" + (
            f"; best {', '.join(best)}" if best else ""
        )

    def _failure(self, record: TrialRecord) -> str | None:
        reason = " ".join((record.error or "for a reason that is not known").split())
        if not self._plain:
            # On a terminal a reason is shown once: a search space that half fits can fail hundreds of trials.
            if reason in self._reasons:
                return None
            self._reasons.add(reason)
        return f"Trial {record.number} ({record.method}, {record.domain}) failed: {reason}"

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _drop_announcement(self) -> None:
        if self._announcement is not None:
            self._announcement.cancel()
            self._announcement = None

    def _view(self) -> RenderableType:
        with self._lock:
            head = Table.grid(padding=(0, 2))
            head.add_row(self._spinner, Text(self._study.name, style="bold"), Text(self._phase), Text(self._times()))
            parts: list[RenderableType] = [head]
            if self._planned is not None:
                done = self._ended + sum(self._shares.values())
                bar = Table.grid(padding=(0, 2))
                bar.add_row(
                    ProgressBar(total=max(1, self._planned), completed=done, width=24),
                    Text(f"{self._ended} of {self._planned} trials"),
                    Text(self._numbers(), style="dim"),
                )
                parts += [bar, self._table()]
            if self._confirmed is not None:
                parts.append(Text(self._confirmations()))
            if self._stopping:
                parts.append(Text(_STOPPING, style="bold yellow"))
            return Fitted(Group(*parts))

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("domain", "complete", "pruned", "best so far", "", "trainable", "baselines"):
            numeric = column in ("complete", "pruned", "trainable")
            # Where the terminal is narrow, the baselines give way.
            table.add_column(column, justify="right" if numeric else "left", no_wrap=column != "baselines")
        several = len(self._study.spec.models) > 1
        for name, domain in self._domains.items():
            best = domain.best
            table.add_row(
                Text(name),
                str(domain.counts[TrialState.COMPLETE]),
                str(domain.counts[TrialState.PRUNED]),
                Text(f"{domain.metric} {best.value:.4f}" if best else "-", style="bold" if best else "dim"),
                Text(best.method + (f" on {best.model}" if several else "")) if best else "",
                f"{best.trainable_parameters:,}" if best else "",
                Text(", ".join(f"{_short(key, item)} {item.value:.3f}" for key, item in domain.baselines.items())),
            )
        return table


def _short(name: str, baseline: Baseline) -> str:
    return _BASELINES.get(name, baseline.title)
