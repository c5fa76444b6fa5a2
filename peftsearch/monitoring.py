"""What the driver tells Prometheus of its study (`peftsearch.workers.metrics`), and where Prometheus finds it all."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from peftsearch.files import Place, delete, is_local, write_json
from peftsearch.frontier.front import complete, domain_fronts, goodness
from peftsearch.spec import StudyFacts, TrialRecord
from peftsearch.workers.metrics import (
    BACKLOG,
    BEST,
    FRONT,
    HYPERVOLUME,
    METHOD_BEST,
    PLANNED,
    TRIALS,
    Meter,
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
        self._records = {record.number: record for record in records}
        self._backlog = backlog
        self._changed = True
        self._trials: dict[tuple[str, ...], float] = {}
        self._best: dict[tuple[str, ...], float] = {}
        self._method_best: dict[tuple[str, ...], float] = {}
        self._hypervolume: dict[tuple[str, ...], float] = {}
        self._front: dict[tuple[str, ...], float] = {}

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial was started, evaluated or ended."""
        before = self._records.get(record.number)
        self._records[record.number] = record
        # Evaluations change no number here, and there are many of them.
        self._changed = self._changed or before is None or before.state is not record.state

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
            try:
                self._tell(meter, planned)
                if time.monotonic() > looked + _TARGETS_SECONDS:
                    looked = time.monotonic()
                    name(metrics_targets())
            except Exception as error:  # a full disk, a cluster that goes down: the study does not depend on it
                log.debug("metrics: %s", error)

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

    def _tell(self, meter: Meter, planned: int) -> None:
        if self._changed:
            self._changed = False
            self._count(list(self._records.values()))
        meter.show(TRIALS, self._trials)
        meter.show(PLANNED, {(): float(planned)})
        meter.show(BEST, self._best)
        meter.show(METHOD_BEST, self._method_best)
        meter.show(HYPERVOLUME, self._hypervolume)
        meter.show(FRONT, self._front)
        meter.show(BACKLOG, {(): float(self._backlog())})

    def _count(self, records: list[TrialRecord]) -> None:
        states = Counter((record.domain, record.method, record.state.value.lower()) for record in records)
        self._trials = {key: float(count) for key, count in states.items()}
        for domain, found in domain_fronts(records, self._facts).items():
            self._front[(domain,)] = float(len(found.front))
            self._hypervolume[(domain,)] = found.hypervolume
            if found.best is None or found.best.value is None:
                continue
            metric, direction = found.facts.metric, found.facts.direction
            self._best[(domain, metric)] = found.best.value
            # The best of each method comes last, and stays.
            for record in sorted(complete(found.records), key=partial(goodness, direction=direction)):
                assert record.value is not None
                self._method_best[(domain, record.method, metric)] = record.value
