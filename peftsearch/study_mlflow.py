"""A study in MLflow: its runs follow the ledger, and every domain has its report there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from peftsearch.handle import StudyHandle
from peftsearch.holder import Lease, hold
from peftsearch.spec import StudyError, StudyFacts, TrialRecord, TrialState, first_line, hide_secrets
from peftsearch.storage import mendable
from peftsearch.study_ledger import open_ledger
from peftsearch.tracking.ledger import Ledger
from peftsearch.tracking.mlflow_runs import DomainReport

if TYPE_CHECKING:
    from peftsearch.tracking.mlflow_tracker import MlflowTracker

_PAUSE = 180.0
"""Seconds between two reports of a running study, at least."""
_IDLE = 50.0
"""And so many times what the ones before took to draw, so that they take little of the driver's time."""
_DRAWING = threading.Lock()
"""matplotlib draws in one thread at a time."""


def open_tracker(study: StudyHandle, facts: StudyFacts, ledger: Ledger, lease: Lease) -> MlflowTracker | None:
    """What writes the study's trials to MLflow; None where tracking is off."""
    from peftsearch.tracking.mlflow_tracker import MlflowTracker

    uri = study.mlflow_tracking_uri
    if uri is None:
        return None

    def note(name: str, experiment: str) -> None:
        lease.note(mlflow_experiment=name, mlflow_experiment_id=experiment)

    return MlflowTracker(uri, artifact_location(study), facts, ledger.set_run_id, note)


def artifact_location(study: StudyHandle) -> str | None:
    """Where a new MLflow experiment keeps its artifacts; the server's choice where None."""
    from peftsearch.tracking.mlflow_tracker import default_artifacts

    return default_artifacts(study.folder.mlflow_folder) if study.spec.tracking.mlflow == "auto" else None


def write_reports(
    tracker: MlflowTracker, records: list[TrialRecord], facts: StudyFacts, storage: str | None
) -> list[str]:
    """Write the report of each domain to its run in MLflow.

    Args:
        tracker: Writes them.
        records: All trials of the study.
        facts: The study.
        storage: What its commands need as ``--storage``.

    Returns:
        A sentence for each domain whose report could not be made; the others are written all the same.
    """
    failed = []
    for name in facts.domains:
        try:
            report = _drawn(records, facts, name, storage)
        except Exception as error:  # a picture of what is in the ledger: no reason to lose anything else
            why = f"{type(error).__name__}: {first_line(error)}"
            failed.append(hide_secrets(f"the report of {name!r} for MLflow cannot be made: {why}"))
            continue
        tracker.report(name, report)
    return failed


def _drawn(records: list[TrialRecord], facts: StudyFacts, domain: str, storage: str | None) -> DomainReport:
    from peftsearch.frontier import domain_report

    with _DRAWING:
        return domain_report(records, facts, domain, storage)


def sync(study: StudyHandle) -> int:
    """Bring MLflow up to date from the ledger; returns the number of trials.

    Raises:
        StudyError: Tracking is off, the server cannot be reached, or a report cannot be made.
        RuntimeError: The storage takes nothing.
    """
    from peftsearch.tracking.mlflow_tracker import sync as check_server

    uri = study.mlflow_tracking_uri
    if uri is None:
        raise StudyError(f"the study {study.name!r} has tracking.mlflow: off: there is nothing to bring up to date")
    facts = study.facts()
    # A running study brings MLflow up to date itself, and its driver is the ledger's only writer.
    with (
        mendable(),
        hold(study.folder.path, study.name) as lease,
        closing(open_ledger(study, lease)) as ledger,
    ):
        # Whoever asked wants to know at once, and why, where the server does not answer.
        check_server(uri, [], facts, artifact_location=artifact_location(study))
        tracker = open_tracker(study, facts, ledger, lease)
        assert tracker is not None
        for record in ledger.records:
            tracker.update(record)
        tracker.flush(60.0)
        failed = write_reports(tracker, ledger.records, facts, study.folder.option)
        if not tracker.close(timeout=600.0):
            raise StudyError(f"MLflow at {study.public_tracking_uri} could not be reached: try again when it is up")
        if failed:
            raise StudyError("; ".join(failed))
        return len(ledger.records)


class ToMlflow:
    """Tells MLflow of every trial that changes (`peftsearch.search.run.Observer`); and every few minutes it brings the
    reports of those domains up to date in which a trial has reached the full budget or was confirmed. They are drawn in
    the tracker's thread.

    Args:
        tracker: Writes to MLflow.
        records: All trials of the study, as they are when it is called; that is done where `trial_changed` is.
        facts: The study.
        storage: As for `write_reports`.
    """

    def __init__(
        self,
        tracker: MlflowTracker,
        records: Callable[[], list[TrialRecord]],
        facts: StudyFacts,
        storage: str | None,
    ) -> None:
        self._tracker = tracker
        self._records = records
        self._facts = facts
        self._storage = storage
        self._changed: set[str] = set()
        self._next = time.monotonic() + _PAUSE

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial was started, evaluated, ended or confirmed."""
        self._tracker.update(record)
        if record.state is TrialState.COMPLETE:
            self._changed.add(record.domain)
        if self._changed and time.monotonic() >= self._next:
            self._next = time.monotonic() + _PAUSE
            records = self._records()
            for domain in self._changed:
                self._tracker.report(domain, partial(self._draw, records, domain))
            self._changed.clear()

    def _draw(self, records: list[TrialRecord], domain: str) -> DomainReport:
        began = time.monotonic()
        try:
            return _drawn(records, self._facts, domain, self._storage)
        finally:
            self._next += _IDLE * (time.monotonic() - began)
