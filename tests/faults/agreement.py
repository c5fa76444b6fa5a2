"""What must be true after any fault: nothing lost, nothing twice, MLflow as the ledger, all as without the fault."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from study_runs import essence

from peftsearch.spec import TrialRecord, TrialState
from peftsearch.study import Study

CLOCKS = {
    "train_seconds",
    "evaluation_seconds",
    "estimated_seconds",
    "peak_memory_bytes",
    "usage",
    "together",
    "examples_per_second",
    "started",
    "finished",
    "test_read_at",
    "read_at",
    "retries",
}
"""What the clock, the machine's speed and the number of attempts put into a trial."""

_STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAILED: "FAILED"}
_STORAGE = re.compile(r"--storage [^\s`'\"\\<&]+")
Key = tuple[str, ...]


@dataclass(frozen=True)
class Account:
    """What a fault has cost.

    Attributes:
        lost: Planned trials that did not end.
        duplicated: Trials that are in the ledger or in MLflow once more than they should be.
    """

    lost: int
    duplicated: int


@dataclass(frozen=True)
class Undisturbed:
    """The study to which nothing happened, and where it is shown."""

    file: Path
    storage: Path
    name: str
    uri: str

    @property
    def study(self) -> Study:
        """The study, opened."""
        return Study.open(self.name, self.storage)


def account(study: Study, uri: str | None) -> Account:
    """Count what is missing and what is there twice, in the database itself and in MLflow."""
    database = study.folder.path / "ledger.db"
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        rows = connection.execute("SELECT value_json FROM trial_user_attributes WHERE key = 'trial'").fetchall()
    numbers = Counter(json.loads(value)["number"] for (value,) in rows)
    duplicated = numbers.total() - len(numbers)
    ended = {record.number for record in study.trials() if record.state is not TrialState.RUNNING}
    if uri is not None:
        runs = Counter(_key(run) for run in _runs(uri, study.name))
        duplicated += runs.total() - len(runs)
    return Account(lost=len(set(range(study.status()["planned"])) - ended), duplicated=duplicated)


def assert_mlflow_agrees(study: Study, uri: str) -> None:
    """Run by run: the same trials, states, curves and final metrics, each once."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    runs = {_key(run): run for run in _runs(uri, study.name)}
    records = study.trials()
    expected: set[Key] = {("domain", name) for name in study.facts().domains}
    for record in records:
        expected.add(("trial", str(record.number)))
        expected |= {
            ("reading", str(record.number), str(item.seed))
            for item in (record.confirmed.readings if record.confirmed else ())
        }
    assert set(runs) == expected
    for record in records:
        run = runs["trial", str(record.number)]
        assert run.info.run_id == record.mlflow_run_id
        assert run.info.status == _STATUS[record.state]
        assert run.data.tags["state"] == record.state
        assert run.data.tags.get("error") == record.error
        history = [(item.step, item.value) for item in client.get_metric_history(run.info.run_id, "loss")]
        assert history == [(rung.step, pytest.approx(rung.loss, nan_ok=True)) for rung in record.rungs]
        if record.value is not None:
            assert run.data.metrics["value"] == pytest.approx(record.value, nan_ok=True)
        if record.confirmed:
            # Means change with every seed, and MLflow shows the largest of what stands at one moment.
            assert run.data.metrics["confirmed_mean"] == pytest.approx(record.confirmed.mean)
            assert run.data.metrics.get("confirmed_test_mean") == pytest.approx(record.confirmed.test_mean)
        for item in record.confirmed.readings if record.confirmed else ():
            reading = runs["reading", str(record.number), str(item.seed)]
            assert reading.info.status == "FINISHED"
            assert reading.data.metrics["test"] == pytest.approx(item.test)
    for name in study.facts().domains:
        assert runs["domain", name].info.status == "FINISHED"


def assert_undisturbed(study: Study, undisturbed: Undisturbed, uri: str | None) -> Account:
    """The study has ended as the one to which nothing happened: ledger, front, and MLflow where there is one."""
    found, expected = study.trials(), undisturbed.study.trials()
    assert [record.number for record in found] == list(range(study.status()["planned"]))
    assert [essence(record) for record in found] == [essence(record) for record in expected]
    assert _fronts(study) == _fronts(undisturbed.study)
    assert study.status()["state"] == "finished"
    if uri is not None:
        assert_mlflow_agrees(study, uri)
    counted = account(study, uri)
    assert counted == Account(lost=0, duplicated=0)
    return counted


def assert_ended_trials_are_kept(before: list[TrialRecord], after: list[TrialRecord]) -> None:
    """What had ended is as it was, with its times: it did not run again."""
    later = {record.number: record for record in after}
    for record in before:
        if record.state is not TrialState.RUNNING:
            kept = later[record.number].model_copy(
                update={"mlflow_run_id": record.mlflow_run_id, "confirmed": record.confirmed}
            )
            assert kept == record


def _fronts(study: Study) -> dict[str, tuple[list[int], float | None]]:
    return {
        name: ([record.number for record in front.front], front.hypervolume) for name, front in study.frontier().items()
    }


# --- what a server shows ---


def shown(uri: str, study: str) -> dict[Key, Any]:
    """All that can be seen of a study in MLflow, without identities, names and times: to compare two servers."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    runs = _runs(uri, study)
    keys = {run.info.run_id: _key(run) for run in runs}
    assert len(set(keys.values())) == len(keys), "a trial has two runs"
    names = {study: "STUDY", **{run_id: "-".join(key) for run_id, key in keys.items()}}

    def plain(text: str) -> str:
        for before, after in names.items():
            text = text.replace(before, after)
        # Commands name the storage, and each study here has its own.
        return _STORAGE.sub("--storage STORAGE", text)

    seen: dict[Key, Any] = {}
    for run in runs:
        run_id = run.info.run_id
        tags = {key: plain(value) for key, value in run.data.tags.items() if key not in CLOCKS}
        if "mlflow.note.content" in tags:
            tags["mlflow.note.content"] = _without_times(tags["mlflow.note.content"])
        # A digest of the page, which holds runs' identities.
        tags.pop("peftsearch.report", None)
        seen[keys[run_id]] = {
            "status": run.info.status,
            "name": run.info.run_name,
            "tags": tags,
            "params": dict(run.data.params),
            "metrics": {
                name: "a time"
                if name in CLOCKS or name.startswith("system/")
                else [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
                for name in run.data.metrics
            },
            "artifacts": {
                item.path: _artifact(Path(client.download_artifacts(run_id, item.path)), plain)
                for item in client.list_artifacts(run_id)
            },
        }
    return seen


def differences(found: Any, expected: Any, place: str = "") -> list[str]:
    """Where two values of `shown` differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        lines = []
        for key in sorted(found.keys() | expected.keys(), key=str):
            if key not in found or key not in expected:
                lines.append(f"{place}/{key}: only {'found' if key in found else 'expected'}")
            else:
                lines += differences(found[key], expected[key], f"{place}/{key}")
        return lines
    if found == pytest.approx(expected, nan_ok=True) if isinstance(found, float) else found == expected:
        return []
    return [f"{place}: {str(found)[:300]} instead of {str(expected)[:300]}"]


def _runs(uri: str, study: str) -> list[Any]:
    from mlflow import MlflowClient
    from mlflow.entities import ViewType

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None, f"MLflow has no experiment {study}"
    return list(client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL, max_results=1000))


def _key(run: Any) -> Key:
    tags = run.data.tags
    if "peftsearch.confirms" in tags:
        return ("reading", tags["peftsearch.confirms"], tags["seed"])
    if "peftsearch.number" in tags:
        return ("trial", tags["peftsearch.number"])
    return ("domain", tags["peftsearch.domain"])


def _artifact(path: Path, plain: Any) -> Any:
    content = path.read_bytes()
    if path.suffix == ".json":
        return _timeless(json.loads(plain(content.decode())))
    if path.suffix == ".parquet":
        import pandas

        frame = pandas.read_parquet(io.BytesIO(content))
        return _timeless(json.loads(plain(frame.to_json(orient="records"))))
    # Pictures and pages are drawn from the same numbers.
    assert content
    return "drawn"


def _without_times(note: str) -> str:
    """A page without what the clock fills: a column of its table, and how much longer a dearer trial trains."""
    lines = []
    column = None
    note = re.sub(r"; training takes (as long|[\d.,]+ times the time)", "", note)
    for line in note.splitlines():
        cells = line.split("|")
        if "train s" in line:
            column = [cell.strip() for cell in cells].index("train s")
        elif not line.startswith("|"):
            column = None
        lines.append(line if column is None else "|".join(cells[:column] + cells[column + 1 :]))
    return "\n".join(lines)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in CLOCKS}
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    if isinstance(value, str) and value[:1] in "[{":
        with contextlib.suppress(ValueError):
            return _timeless(json.loads(value))
    return value
