"""MLflow as a projection of the ledger: one experiment per study, one run per domain, one child run per trial, and
below a confirmed trial one run per re-training.

What is written is `mlflow_runs`, how it gets there `mlflow_mirror`; here is when: while a study runs, from a thread of
its own that no trouble of MLflow's leaves, or all at once.

MLflow is imported in the tracker's thread only: that takes seconds.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from peftsearch.spec import StudyError, StudyFacts, TrialRecord, TrialState
from peftsearch.tracking.mlflow_mirror import Mirror
from peftsearch.tracking.mlflow_runs import NOTE_LENGTH, DomainReport
from peftsearch.tracking.mlflow_store import (
    brief,
    default_artifacts,
    default_tracking_uri,
    prepare_environment,
    public_uri,
)

__all__ = [
    "NOTE_LENGTH",
    "DomainReport",
    "MlflowTracker",
    "default_artifacts",
    "default_tracking_uri",
    "prepare_environment",
    "sync",
]

log = logging.getLogger(__name__)

_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
_HOPELESS = 30.0


def sync(
    tracking_uri: str,
    records: Iterable[TrialRecord],
    facts: StudyFacts,
    reports: Mapping[str, DomainReport] | None = None,
    artifact_location: str | None = None,
) -> dict[int, str]:
    """Bring MLflow up to date, whatever is there already.

    Args:
        tracking_uri: The server or store.
        records: All trials of the study.
        facts: The study.
        reports: Rendered domains.
        artifact_location: Where a new experiment keeps its artifacts; the server's choice where None.

    Returns:
        The id of each trial's run.

    Raises:
        StudyError: The server cannot be reached, or refuses what it is given.
    """
    prepare_environment()
    records = list(records)
    try:
        mirror = Mirror(tracking_uri, artifact_location, facts)
        mirror.connect()
        for record in records:
            mirror.write(record)
        for domain, report in (reports or {}).items():
            mirror.write_report(domain, report)
        mirror.settle(facts.domains, {record.domain for record in records if record.state is TrialState.RUNNING})
    except Exception as error:  # MLflow, requests and SQLAlchemy have no common base
        raise StudyError(
            f"MLflow at {public_uri(tracking_uri)} could not be brought up to date: {brief(error)}"
        ) from error
    return {record.number: mirror.run_id(record.number) for record in records}


class MlflowTracker:
    """Shows a study in MLflow while it runs, from a thread of its own.

    `update` and `report` only leave a note of what is new and return at once. The thread writes about once a second;
    what it cannot write, because the server is away or refuses it, it keeps and tries again, with pauses of up to half
    a minute. Nothing that happens there is raised into the study; ``last_error`` holds the latest trouble. What MLflow
    reads from the environment is set as `prepare_environment` says.

    Args:
        tracking_uri: MLflow's server, or a database URL.
        artifact_location: Where a new experiment keeps its artifacts; the server's choice where None.
        facts: The study. Baselines that are added to it later are seen.
        on_run_id: Told each trial's run id once. It is called in the thread of whoever calls `update`, `report`,
            `flush` or `close`, so it may write the ledger.
        on_experiment: Told what MLflow calls the study, and the experiment's id, in the same threads, once that is
            known. Told again later where it raises an OSError.
    """

    def __init__(
        self,
        tracking_uri: str,
        artifact_location: str | None,
        facts: StudyFacts,
        on_run_id: Callable[[int, str], None],
        on_experiment: Callable[[str, str], None] | None = None,
    ) -> None:
        prepare_environment()
        self.tracking_uri = tracking_uri
        self.last_error: str | None = None
        self._facts = facts
        self._on_run_id = on_run_id
        self._on_experiment = on_experiment
        self._experiment: tuple[str, str] | None = None
        self._mirror = Mirror(tracking_uri, artifact_location, facts)
        self._lock = threading.Lock()
        self._records: dict[int, TrialRecord] = {}
        self._reports: dict[str, DomainReport | Callable[[], DomainReport]] = {}
        self._running: dict[int, str] = {}
        self._unsettled: set[str] = set()
        self._run_ids: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._told: dict[int, str] = {}
        self._wake = threading.Event()
        self._written = threading.Condition(self._lock)
        self._closing = False
        self._last_progress = time.monotonic()
        self._attempt_began = self._last_progress
        self._failed_attempt = -math.inf
        """When the latest attempt began that failed."""
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def backlog(self) -> int:
        """How many trials and domains wait to be written."""
        with self._lock:
            return len(self._records) + len(self._reports) + len(self._unsettled)

    def update(self, record: TrialRecord) -> None:
        """A trial has changed. Only its latest state is written."""
        with self._lock:
            if self._closing:
                raise RuntimeError("the tracker is closed")
            self._records[record.number] = record
            if record.state is TrialState.RUNNING:
                self._running[record.number] = record.domain
            else:
                self._running.pop(record.number, None)
        self._deliver()

    def report(self, domain: str, report: DomainReport | Callable[[], DomainReport]) -> None:
        """A domain's page has changed. Only the latest one is written.

        Args:
            domain: Its name.
            report: The page, or what renders it: that is called in the tracker's thread, once for each attempt to write
                it. Where it fails, nothing is written.
        """
        with self._lock:
            if self._closing:
                raise RuntimeError("the tracker is closed")
            self._reports[domain] = report
        self._wake.set()
        self._deliver()

    def flush(self, timeout: float) -> bool:
        """Wait until everything is written, at most so many seconds; returns whether it is.

        Gives up earlier when nothing could be written for half a minute (of which some may have passed before), nor
        in an attempt that was begun now.
        """
        began = time.monotonic()
        deadline = began + timeout
        with self._lock:
            if self.last_error is None:
                self._last_progress = began
            while self._records or self._reports or self._unsettled:
                self._wake.set()
                now = time.monotonic()
                hopeless = self._failed_attempt >= began and now > self._last_progress + _HOPELESS
                if now >= deadline or hopeless or not self._thread.is_alive():
                    break
                self._written.wait(min(0.5, deadline - now))
            done = not (self._records or self._reports or self._unsettled)
        self._deliver()
        return done

    def close(self, timeout: float) -> bool:
        """Write what is left, mark domains without running trials as finished, and stop.

        Returns whether everything is written. Gives up when `flush` does. What is missing then is written by the next
        tracker that is told of the same trials, or by `sync`.
        """
        with self._lock:
            if not self._closing:
                self._closing = True
                self._unsettled = set(self._facts.domains)
        deadline = time.monotonic() + timeout
        done = self.flush(timeout)
        with self._lock:
            if not done:
                waiting = len(self._records) + len(self._reports)
                log.warning("%d trials and pages did not reach MLflow: %s", waiting, self.last_error or "no time left")
                self._records.clear()
                self._reports.clear()
                self._unsettled.clear()
        self._wake.set()
        self._thread.join(max(0.0, min(2.0, deadline - time.monotonic())))
        self._deliver()
        return done

    # --- the caller's side ---

    def _deliver(self) -> None:
        name, experiment = self._mirror.experiment_name, self._mirror.experiment
        known = None if name is None or experiment is None else (name, experiment)
        if self._on_experiment is not None and known is not None and known != self._experiment:
            try:
                self._on_experiment(*known)
                self._experiment = known
            except OSError as error:  # a note for people: tried again with the next trial
                log.info("the name of the experiment could not be noted: %s", error)
        while True:
            try:
                number, run_id = self._run_ids.get_nowait()
            except queue.Empty:
                return
            self._on_run_id(number, run_id)

    # --- the thread ---

    def _work(self) -> None:
        pause = _PAUSE
        while True:
            worked = self._write_all()
            with self._lock:
                if self._closing and not (self._records or self._reports or self._unsettled):
                    return
                hurry = self._closing
            pause = _PAUSE if worked else min(_LONGEST_PAUSE, pause * 2)
            # Somebody who waits for the end is not kept waiting by a long pause.
            self._wake.wait(min(pause, _PAUSE) if hurry else pause)
            self._wake.clear()

    def _write_all(self) -> bool:
        """Write what there is; returns whether all of it could be."""
        mirror = self._mirror
        self._attempt_began = time.monotonic()
        if not self._connect():
            return False
        with self._lock:
            records = list(self._records.values())
            reports = list(self._reports.items())
        worked = True
        for record in records:
            if self._attempt(partial(mirror.write, record), self._records, record.number, record):
                run_id = mirror.run_id(record.number)
                if self._told.get(record.number) != run_id:
                    self._told[record.number] = run_id
                    self._run_ids.put((record.number, run_id))
            else:
                worked = False
                # One trial that MLflow refuses must not stand in the way of the others.
                if not self._connect():
                    return False
        for domain, report in reports:
            if not self._attempt(partial(self._write_report, domain, report), self._reports, domain, report):
                worked = False
                if not self._connect():
                    return False
        with self._lock:
            settle = set() if self._records or self._reports else set(self._unsettled)
            running = set(self._running.values())
        if settle:
            try:
                mirror.settle(settle, running)
            except Exception as error:
                self._failed(error)
                return False
            with self._lock:
                self._unsettled -= settle
                self._progressed()
        return worked

    def _write_report(self, domain: str, report: DomainReport | Callable[[], DomainReport]) -> None:
        if not isinstance(report, DomainReport):
            try:
                report = report()
            except Exception as error:  # no trouble of MLflow's, and another attempt would not help
                log.info("the page of %r for MLflow cannot be made: %s", domain, brief(error))
                return
        self._mirror.write_report(domain, report)

    def _connect(self) -> bool:
        try:
            self._mirror.connect()
        except Exception as error:
            self._failed(error)
            return False
        return True

    def _attempt(self, write: Callable[[], None], waiting: dict[Any, Any], key: Any, written: Any) -> bool:
        try:
            write()
        except Exception as error:
            self._failed(error)
            return False
        with self._lock:
            if waiting.get(key) is written:
                del waiting[key]
            self._progressed()
        return True

    def _progressed(self) -> None:
        self._last_progress = time.monotonic()
        self.last_error = None
        self._written.notify_all()

    def _failed(self, error: Exception) -> None:
        message = brief(error)
        if message != self.last_error:
            log.info("MLflow at %s: %s", public_uri(self.tracking_uri), message)
        with self._lock:
            self.last_error = message
            self._failed_attempt = self._attempt_began
            self._written.notify_all()
