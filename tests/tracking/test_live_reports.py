"""While a study runs, its domains' pages in MLflow follow it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tracking_study import study_facts, trial

from peftsearch import study_mlflow
from peftsearch.spec import TrialRecord, TrialState
from peftsearch.study_mlflow import ToMlflow
from peftsearch.tracking.mlflow_runs import DomainReport
from peftsearch.tracking.mlflow_tracker import MlflowTracker, default_artifacts, default_tracking_uri


def test_a_running_study_has_notes_marks_and_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_mlflow, "_PAUSE", 0.0)
    monkeypatch.setattr(study_mlflow, "_IDLE", 0.0)
    facts, uri = study_facts("running"), default_tracking_uri(tmp_path)
    tracker = MlflowTracker(uri, default_artifacts(tmp_path), facts, lambda number, run_id: None)
    known: dict[int, TrialRecord] = {}
    told = ToMlflow(tracker, lambda: list(known.values()), facts, "/elsewhere")
    for record in (trial(0, 1, TrialState.RUNNING), trial(1, 1, TrialState.RUNNING), trial(1)):
        known[record.number] = record
        told.trial_changed(record)
    assert tracker.flush(600), tracker.last_error
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("running")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    legal = runs["legal"]
    assert legal.info.status == runs["clinical"].info.status == "RUNNING"
    assert "--pick knee --storage /elsewhere" in legal.data.tags["mlflow.note.content"]
    assert "front.html" in {item.path for item in client.list_artifacts(legal.info.run_id)}
    (best,) = client.search_runs([experiment.experiment_id], 'tags.on_front = "true" and tags.method_best = "true"')
    assert best.data.tags["peftsearch.number"] == "1"
    # Nothing of the other domain has reached the full budget.
    assert "mlflow.note.content" not in runs["clinical"].data.tags
    assert tracker.close(600)


class Counting(MlflowTracker):
    """Counts the pages that it is asked to write."""

    pages = 0

    def report(self, domain: str, report: DomainReport | Callable[[], DomainReport]) -> None:
        """As `MlflowTracker`."""
        self.pages += 1
        super().report(domain, report)


def test_pages_of_a_running_study_take_little_of_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_mlflow, "_PAUSE", 2.0)
    facts = study_facts("paused")
    tracker = Counting(default_tracking_uri(tmp_path), default_artifacts(tmp_path), facts, lambda number, run_id: None)
    known = {number: trial(number) for number in range(4)}
    told = ToMlflow(tracker, lambda: list(known.values()), facts, None)
    for record in known.values():
        told.trial_changed(record)
    assert tracker.pages == 0
    time.sleep(2.1)
    for record in known.values():
        told.trial_changed(record)
    # Both domains had news; what came right after waits.
    assert tracker.pages == 2
    assert tracker.flush(600), tracker.last_error
    time.sleep(2.1)
    told.trial_changed(known[0])
    # They took some time to draw, and the next ones wait a multiple of it.
    assert tracker.pages == 2
    assert tracker.close(600)


def test_a_page_that_cannot_be_drawn_holds_nothing_up(tmp_path: Path) -> None:
    def broken() -> DomainReport:
        raise OverflowError("no picture")

    facts = study_facts("broken")
    tracker = MlflowTracker(
        default_tracking_uri(tmp_path), default_artifacts(tmp_path), facts, lambda number, run_id: None
    )
    tracker.update(trial(0))
    tracker.report("clinical", broken)
    assert tracker.close(600)
    assert tracker.last_error is None
