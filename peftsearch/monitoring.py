"""What the driver tells Prometheus of its study (`peftsearch.workers.metrics`), and where Prometheus finds it all."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from peftsearch.files import Place, delete, is_local, write_json
from peftsearch.frontier.front import complete, front, goodness, hypervolume
from peftsearch.spec import StudyFacts, TrialRecord, TrialState
from peftsearch.workers.metrics import (
    BACKLOG,
    BEST,
    FRONT,
    HYPERVOLUME,
    METHOD_BEST,
    PLANNED,
    TRIALS,
    Meter,
    Metric,
    metrics_targets,
    regularly,
)

log = logging.getLogger(__name__)

_TARGETS_SECONDS = 10.0
"""How often it is looked which machines there are."""


class StudyMetrics:
    """Hears of every trial, and tells Ray every few seconds, in a thread of its own.

    Args:
        facts: The study.
        records: Its trials so far.
        backlog: How much MLflow does not have yet.
    """

    def __init__(self, facts: StudyFacts, records: Iterable[TrialRecord], backlog: Callable[[], int]) -> None:
        self._facts = facts
        self._backlog = backlog
        self._total = max((model.total_parameters for model in facts.models.values()), default=1)
        self._states: dict[int, TrialState] = {}
        self._news: deque[TrialRecord] = deque()
        # Known to the thread alone.
        self._counted: dict[int, tuple[str, str, str]] = {}
        self._trials: Counter[tuple[str, ...]] = Counter()
        self._fronts: dict[str, list[TrialRecord]] = {domain: [] for domain in facts.domains}
        self._best: dict[tuple[str, ...], TrialRecord] = {}
        for record in records:
            self.trial_changed(record)

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial was started, evaluated or ended."""
        # Evaluations change no number here, and there are many of them.
        if self._states.get(record.number) is not record.state:
            self._states[record.number] = record.state
            self._news.append(record)

    @contextlib.contextmanager
    def exporting(self, folder: Place, planned: int) -> Iterator[str | None]:
        """Within the block, in which Ray runs, tell it how the study goes; nothing where Ray exports no metrics.

        Where the storage is a folder, it names the cluster's metrics ports meanwhile to Prometheus's file discovery, in
        ``prometheus/STUDY.json`` (https://prometheus.io/docs/guides/file-sd/).

        Args:
            folder: The study's folder.
            planned: How many trials the study has in all.

        Yields:
            What the study is called in all metrics; None where there are none.
        """
        targets = metrics_targets()
        if not targets:
            yield None
            return
        meter = Meter(self._facts.study)
        file = folder.parent.parent / "prometheus" / f"{self._facts.study}.json"
        written: list[str] = []
        looked = time.monotonic()

        def name(found: list[str]) -> None:
            nonlocal written
            if is_local(folder) and found != written:
                write_json(file, [{"targets": found, "labels": {"job": "peftsearch"}}])
                written = found

        def look() -> None:
            nonlocal looked
            with _let_be("numbers"):
                numbers = self.numbers()
                numbers[PLANNED] = {(): float(planned)}
                for metric, values in numbers.items():
                    # One that cannot be told leaves the others alone.
                    with _let_be(metric.name):
                        meter.show(metric, values)
            if time.monotonic() > looked + _TARGETS_SECONDS:
                looked = time.monotonic()
                with _let_be("targets"):
                    name(metrics_targets())

        try:
            name(targets)
        except OSError as error:
            log.warning("Prometheus will not find this study: %s", error)
        try:
            with regularly(look, "metrics"):
                yield self._facts.study
        finally:
            with contextlib.suppress(OSError):
                if written:
                    delete(file)

    def numbers(self) -> dict[Metric, dict[tuple[str, ...], float]]:
        """Each of the driver's gauges, by the values of its labels. Called from one thread alone."""
        while self._news:
            self._count(self._news.popleft())
        best: dict[tuple[str, ...], float] = {}
        volumes: dict[tuple[str, ...], float] = {}
        for domain, found in self._fronts.items():
            facts = self._facts.domains[domain]
            volumes[(domain,)] = hypervolume(found, facts.direction, self._total)
            if found:
                best[(domain, facts.metric)] = _value(max(found, key=partial(goodness, direction=facts.direction)))
        return {
            TRIALS: {key: float(count) for key, count in self._trials.items()},
            BEST: best,
            METHOD_BEST: {key: _value(record) for key, record in self._best.items()},
            HYPERVOLUME: volumes,
            FRONT: {(domain,): float(len(found)) for domain, found in self._fronts.items()},
            BACKLOG: {(): float(self._backlog())},
        }

    def _count(self, record: TrialRecord) -> None:
        if (before := self._counted.get(record.number)) is not None:
            self._trials[before] -= 1
        key = self._counted[record.number] = (record.domain, record.method, record.state.value.lower())
        self._trials[key] += 1
        facts = self._facts.domains.get(record.domain)
        if facts is None or not complete([record]):
            return
        # A trial that was dominated once stays so, which keeps this fast with ten thousand of them.
        self._fronts[record.domain] = front([*self._fronts[record.domain], record], facts.direction)
        cell = (record.domain, record.method, facts.metric)
        known = self._best.get(cell)
        if known is None or goodness(record, facts.direction) > goodness(known, facts.direction):
            self._best[cell] = record


@contextlib.contextmanager
def _let_be(what: str) -> Iterator[None]:
    """Within the block nothing is raised: a full disk, a cluster that goes down. The study does not depend on it."""
    try:
        yield
    except Exception as error:
        log.debug("metrics, %s: %s", what, error)


def _value(record: TrialRecord) -> float:
    assert record.value is not None
    return record.value
