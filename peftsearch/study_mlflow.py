"""A study in MLflow: its runs follow the ledger, and every domain has its report there."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from peftsearch.handle import StudyHandle
from peftsearch.holder import hold
from peftsearch.spec import StudyError, StudyFacts, TrialRecord, hide_secrets
from peftsearch.study_ledger import open_ledger
from peftsearch.tracking.ledger import Ledger

if TYPE_CHECKING:
    from peftsearch.tracking.mlflow_tracker import MlflowTracker


def open_tracker(study: StudyHandle, facts: StudyFacts, ledger: Ledger) -> MlflowTracker | None:
    """What writes the study's trials to MLflow; None where tracking is off."""
    from peftsearch.tracking.mlflow_tracker import MlflowTracker

    uri = study.mlflow_tracking_uri
    return None if uri is None else MlflowTracker(uri, artifact_location(study), facts, ledger.set_run_id)


def artifact_location(study: StudyHandle) -> str | None:
    """Where a new MLflow experiment keeps its artifacts; the server's choice where None."""
    from peftsearch.tracking.mlflow_tracker import default_artifacts

    return default_artifacts(study.folder.mlflow_folder) if study.spec.tracking.mlflow == "auto" else None


def write_reports(tracker: MlflowTracker, records: list[TrialRecord], facts: StudyFacts) -> list[str]:
    """Write the report of each domain to its run in MLflow.

    Returns:
        A sentence for each domain whose report could not be made; the others are written all the same.
    """
    from peftsearch.frontier import domain_report

    failed = []
    for name in facts.domains:
        try:
            report = domain_report(records, facts, name)
        except Exception as error:  # a picture of what is in the ledger: no reason to lose anything else
            why = (str(error).strip().splitlines() or [""])[0]
            why = f"{type(error).__name__}: {why}"
            failed.append(hide_secrets(f"the report of {name!r} for MLflow cannot be made: {why}"))
            continue
        tracker.report(name, report)
    return failed


def sync(study: StudyHandle) -> int:
    """Bring MLflow up to date from the ledger; returns the number of trials.

    Raises:
        StudyError: Tracking is off, the server cannot be reached, or a report cannot be made.
    """
    from peftsearch.tracking.mlflow_tracker import sync as check_server

    uri = study.mlflow_tracking_uri
    if uri is None:
        raise StudyError(f"the study {study.name!r} has tracking.mlflow: off: there is nothing to bring up to date")
    facts = study.facts()
    # A running study brings MLflow up to date itself, and its driver is the ledger's only writer.
    with hold(study.folder.path, study.name) as lease, closing(open_ledger(study, lease)) as ledger:
        # Whoever asked wants to know at once, and why, where the server does not answer.
        check_server(uri, [], facts, artifact_location=artifact_location(study))
        tracker = open_tracker(study, facts, ledger)
        assert tracker is not None
        for record in ledger.records:
            tracker.update(record)
        tracker.flush(60.0)
        failed = write_reports(tracker, ledger.records, facts)
        if not tracker.close(timeout=600.0):
            raise StudyError(f"MLflow at {study.public_tracking_uri} could not be reached: try again when it is up")
        if failed:
            raise StudyError("; ".join(failed))
        return len(ledger.records)


class ToMlflow:
    """Tells MLflow of every trial that changes (`peftsearch.search.run.Observer`)."""

    def __init__(self, tracker: MlflowTracker) -> None:
        self._tracker = tracker

    def trial_changed(self, record: TrialRecord) -> None:
        self._tracker.update(record)
