"""A report is a picture of the study: one that cannot be made is told of, and costs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from peftsearch import frontier
from peftsearch.events import SilentEvents
from peftsearch.frontier.mlflow_report import domain_report
from peftsearch.spec import StudyError, StudyFacts, TrialRecord
from peftsearch.study import Study
from peftsearch.tracking.mlflow_runs import DomainReport


class Warnings(SilentEvents):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def warning(self, text: str) -> None:
        self.heard.append(text)


def test_a_study_whose_report_fails_is_finished(
    write_study: Callable[..., Path], topics_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(records: Iterable[TrialRecord], facts: StudyFacts, domain: str, storage: str | None) -> DomainReport:
        assert storage == str(tmp_path / "storage")
        if domain == "broken":
            raise OverflowError("no picture\nof this")
        return domain_report(records, facts, domain, storage)

    data = {"data": {"source": str(topics_csv), "split": {"group": "document", "validation": 0.25, "test": 0.2}}}
    file = write_study(domains={"broken": data, "whole": data}, methods={"layer_norm": {}}, tracking={"mlflow": "auto"})
    monkeypatch.setattr("peftsearch.driver.run_study", lambda *_, **__: None)
    monkeypatch.setattr(frontier, "domain_report", report)
    study, events = Study.from_file(file, storage=tmp_path / "storage"), Warnings()
    study.run(events=events)
    assert study.status()["state"] == "finished"
    sentence = "the report of 'broken' for MLflow cannot be made: OverflowError: no picture"
    assert [text for text in events.heard if "cannot be made" in text] == [sentence]
    with pytest.raises(StudyError, match=sentence):
        study.sync()

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=study.mlflow_tracking_uri)
    found = client.get_experiment_by_name(study.name)
    assert found is not None
    runs = {run.data.tags["peftsearch.domain"]: run for run in client.search_runs([found.experiment_id])}
    assert {name for name, run in runs.items() if "hypervolume" in run.data.metrics} == {"whole"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
