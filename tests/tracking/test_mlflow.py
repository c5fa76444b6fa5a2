"""MLflow as a projection of the ledger, on a real server and on a SQLite store."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from s3_server import free_port
from tracking_study import MODEL, Server, study_facts, trial, wait_for

from peftsearch.frontier import domain_report
from peftsearch.spec import Confirmed, Reading, Rung, StudyError, StudyFacts, TrialRecord, TrialState
from peftsearch.tracking.mlflow_mirror import Mirror
from peftsearch.tracking.mlflow_tracker import (
    NOTE_LENGTH,
    DomainReport,
    MlflowTracker,
    default_artifacts,
    default_tracking_uri,
    sync,
)
from peftsearch.tracking.names import configuration_text, mlflow_names, run_name
from peftsearch.tracking.ui import check_port, serve_ui

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


class Store:
    """Where to write, and how to look at what was written."""

    def __init__(self, uri: str, artifacts: str | None) -> None:
        from mlflow import MlflowClient

        self.uri = uri
        self.artifacts = artifacts
        self.client: MlflowClient = MlflowClient(tracking_uri=uri)

    def sync(
        self, records: list[TrialRecord], facts: StudyFacts, reports: dict[str, DomainReport] | None = None
    ) -> dict[int, str]:
        return sync(self.uri, records, facts, reports, self.artifacts)

    def tracker(
        self, facts: StudyFacts, told: Callable[[int, str], None] = lambda number, run_id: None
    ) -> MlflowTracker:
        return MlflowTracker(self.uri, self.artifacts, facts, told)

    def runs(self, study: str) -> list[Run]:
        experiment = self.client.get_experiment_by_name(study)
        assert experiment is not None
        return list(self.client.search_runs([experiment.experiment_id], max_results=1000))

    def children(self, study: str) -> dict[int, Run]:
        found = [run for run in self.runs(study) if "peftsearch.number" in run.data.tags]
        numbers = Counter(int(run.data.tags["peftsearch.number"]) for run in found)
        assert all(count == 1 for count in numbers.values()), f"duplicates: {numbers}"
        return {int(run.data.tags["peftsearch.number"]): run for run in found}

    def parents(self, study: str) -> dict[str, Run]:
        trials = {"peftsearch.number", "peftsearch.confirms"}
        found = [run for run in self.runs(study) if not trials & set(run.data.tags)]
        assert len({run.data.tags["peftsearch.domain"] for run in found}) == len(found)
        return {run.data.tags["peftsearch.domain"]: run for run in found}

    def confirmations(self, study: str) -> dict[tuple[int, int], Run]:
        found = [run for run in self.runs(study) if "peftsearch.confirms" in run.data.tags]
        keys = [(int(run.data.tags["peftsearch.confirms"]), int(run.data.tags["seed"])) for run in found]
        assert len(set(keys)) == len(keys), f"duplicates: {keys}"
        return dict(zip(keys, found, strict=True))

    def history(self, run: Run, metric: str) -> list[tuple[int, float]]:
        return [(item.step, item.value) for item in self.client.get_metric_history(run.info.run_id, metric)]

    def everything(self, study: str) -> dict[str, Any]:
        """All that can be seen of a study, to compare before and after."""
        return {
            run.info.run_id: (
                run.info.status,
                run.info.start_time,
                run.info.end_time,
                dict(run.data.params),
                dict(run.data.tags),
                {
                    metric: [
                        (m.step, m.value, m.timestamp) for m in self.client.get_metric_history(run.info.run_id, metric)
                    ]
                    for metric in run.data.metrics
                },
            )
            for run in self.runs(study)
        }


@pytest.fixture(params=["server", "sqlite"])
def store(request: pytest.FixtureRequest, sqlite_storage: Path) -> Store:
    if request.param == "server":
        return Store(request.getfixturevalue("server").uri, None)
    uri = default_tracking_uri(sqlite_storage)
    sync(uri, [], study_facts("warm-up"), {}, default_artifacts(sqlite_storage))
    return Store(uri, default_artifacts(sqlite_storage))


@pytest.fixture
def study(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return re.sub(r"[^\w.-]+", "-", request.node.name)


def four_states() -> list[TrialRecord]:
    return [
        trial(0),
        trial(1, 1, TrialState.PRUNED),
        trial(2, 2, TrialState.RUNNING),
        trial(3, 0, TrialState.FAILED),
    ]


def reports(records: list[TrialRecord], facts: StudyFacts) -> dict[str, DomainReport]:
    return {domain: domain_report(records, facts, domain) for domain in facts.domains}


def test_states_tags_params_and_metrics(store: Store, study: str) -> None:
    ids = store.sync(four_states(), study_facts(study))
    children, parents = store.children(study), store.parents(study)
    assert {number: run.info.run_id for number, run in children.items()} == ids
    assert {number: run.info.status for number, run in children.items()} == {
        0: "FINISHED",
        1: "KILLED",
        2: "RUNNING",
        3: "FAILED",
    }
    assert {domain: run.info.status for domain, run in parents.items()} == {"clinical": "RUNNING", "legal": "FINISHED"}
    for number, run in children.items():
        domain = "clinical" if number % 2 == 0 else "legal"
        assert run.data.tags["mlflow.parentRunId"] == parents[domain].info.run_id
        assert run.data.tags["peftsearch.study"] == study
    first = children[0]
    expected_tags = {
        "peftsearch.domain": "clinical",
        "peftsearch.number": "0",
        "domain": "clinical",
        "method": "lora",
        "model": MODEL,
        "state": "COMPLETE",
        "on_front": "false",
        "pick": "",
        "provenance.python": "3.11.9",
        "provenance.data_fingerprint": "clinical-fingerprint",
        "provenance.model_fingerprint": "weights",
        "mlflow.source.git.commit": "0123abcd",
        "mlflow.runName": "0 lora rank=8 lr=3.1e-04",
    }
    assert expected_tags.items() <= first.data.tags.items()
    assert first.info.run_name == "0 lora rank=8 lr=3.1e-04"
    assert first.data.params == {
        "rank": "8",
        "targets": "attention",
        "init_text": "",
        "learning_rate": "0.00031",
        "model": MODEL,
        "seed": "7",
        "total_steps": "90",
    }
    assert store.history(first, "accuracy") == [(10, 0.5), (20, 0.52), (30, 0.54)]
    assert store.history(first, "loss") == [(10, 1.0), (20, 0.9), (30, 0.8)]
    assert [step for step, _ in store.history(first, "train_loss")] == [10, 20, 30]
    assert store.history(first, "system/cpu_utilization_percentage") == [(10, 40.0), (20, 41.0), (30, 42.0)]
    expected = {"value": 0.54, "trainable_parameters": 1000, "exported_parameters": 1000, "train_seconds": 1.5}
    expected |= {"evaluation_seconds": 0.75, "macro_f1": 0.42, "f1/a": 0.3, "f1/b _x_": 0.2}
    assert expected.items() <= first.data.metrics.items()
    assert first.info.start_time == 1767268800000
    assert first.info.end_time == 1767268830000
    assert children[3].data.tags["error"] == "ValueError: the loss became NaN"
    assert "value" not in children[2].data.metrics
    assert children[2].info.end_time is None


def test_writing_twice_changes_nothing(store: Store, study: str) -> None:
    records, facts = four_states(), study_facts(study)
    pages = reports(records, facts)
    ids = store.sync(records, facts, pages)
    before = store.everything(study)
    assert store.sync(records, facts, pages) == ids
    assert store.everything(study) == before


def test_a_sync_with_nothing_to_do_writes_no_batch(
    sqlite_storage: Path, study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    store = Store(default_tracking_uri(sqlite_storage), default_artifacts(sqlite_storage))
    records, facts = four_states(), study_facts(study)
    pages = reports(records, facts)
    written: list[Any] = []
    log_batch = MlflowClient.log_batch

    def counted(*given: Any) -> None:
        written.append(given[1])
        log_batch(*given)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    store.sync(records, facts, pages)
    assert len(written) > len(records)
    written.clear()
    store.sync(records, facts, pages)
    assert written == []


def test_only_what_is_new_is_added(store: Store, study: str) -> None:
    facts = study_facts(study)
    ids = store.sync([trial(0, 1, TrialState.RUNNING)], facts)
    run = store.children(study)[0]
    assert [step for step, _ in store.history(run, "loss")] == [10]
    assert store.sync([trial(0, 3)], facts) == ids
    run = store.children(study)[0]
    assert [step for step, _ in store.history(run, "loss")] == [10, 20, 30]
    assert run.info.status == "FINISHED"
    confirmed = Confirmed(seeds=3, mean=0.6, std=0.01, test_mean=0.58, test_std=0.02)
    store.sync([trial(0, 3, confirmed=confirmed)], facts)
    metrics = store.children(study)[0].data.metrics
    assert metrics["confirmed_mean"] == 0.6
    assert metrics["confirmed_test_std"] == 0.02
    # A study that goes on: what had ended otherwise runs again under the same run.
    store.client.set_terminated(ids[0], "KILLED")
    store.sync([trial(0, 3, TrialState.RUNNING)], facts)
    run = store.children(study)[0]
    assert (run.info.run_id, run.info.status, len(store.history(run, "loss"))) == (ids[0], "RUNNING", 3)


def reading(seed: int) -> Reading:
    return Reading(
        seed=seed,
        value=0.6 + seed / 100,
        loss=0.9,
        test=0.55,
        test_loss=1.0,
        test_scores={"accuracy": 0.55, "macro_f1": 0.5, "f1/b <x>": 0.2},
        test_examples=50,
        read_at="2026-01-01T13:00:00.000+00:00",
        predictions=f"trials/00000-seed{seed}/test.jsonl",
        steps=90,
        train_seconds=2.0,
        evaluation_seconds=1.0,
        examples_per_second=100.0,
    )


def test_each_retraining_has_a_run_below_its_trials(store: Store, study: str) -> None:
    facts = study_facts(study)
    store.sync([trial(0), trial(1)], facts)
    half = trial(0, confirmed=Confirmed.of([reading(1)]))
    store.sync([half, trial(1)], facts)
    first = store.confirmations(study)[0, 1].info.run_id
    record = trial(0, confirmed=Confirmed.of([reading(1), reading(2)]))
    ids = store.sync([record, trial(1)], facts, reports([record, trial(1)], facts))
    found = store.confirmations(study)
    assert set(found) == {(0, 1), (0, 2)}
    assert found[0, 1].info.run_id == first
    run = found[0, 2]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "0 lora rank=8 lr=3.1e-04 seed=2"
    assert run.data.tags["mlflow.parentRunId"] == ids[0]
    assert run.data.tags["predictions"] == "trials/00000-seed2/test.jsonl"
    assert run.data.params["seed"] == "2"
    assert {"value": 0.62, "test": 0.55, "test_macro_f1": 0.5}.items() <= run.data.metrics.items()
    assert store.history(run, "test") == [(90, 0.55)]
    assert run.info.end_time == 1767272400000
    assert run.info.start_time == 1767272400000 - 3000
    metrics = store.children(study)[0].data.metrics
    assert metrics["confirmed_mean"] == pytest.approx(0.615)
    assert metrics["confirmed_test_mean"] == pytest.approx(0.55)
    # Again, and by a tracker that knows nothing: nothing changes and nothing is doubled.
    before = store.everything(study)
    store.sync([record, trial(1)], facts, reports([record, trial(1)], facts))
    tracker = store.tracker(facts)
    tracker.update(record)
    tracker.update(trial(1))
    assert tracker.close(60)
    assert store.everything(study) == before
    assert set(store.parents(study)) == {"clinical", "legal"}


def test_means_that_fall_with_further_seeds_are_shown_as_they_are(store: Store, study: str) -> None:
    facts = study_facts(study)
    seeds = [reading(1), reading(2), reading(3)]
    lower = [item.model_copy(update={"value": 0.6 - 0.1 * i, "test": 0.5 - 0.1 * i}) for i, item in enumerate(seeds)]
    # The last one was made before the others, and arrives after them.
    lower[2] = lower[2].model_copy(update={"read_at": "2026-01-01T12:59:00.000+00:00"})
    for count in (1, 2, 3):
        confirmed = Confirmed.of(lower[:count])
        store.sync([trial(0, confirmed=confirmed)], facts)
        metrics = store.children(study)[0].data.metrics
        assert metrics["confirmed_seeds"] == count
        assert metrics["confirmed_mean"] == pytest.approx(confirmed.mean)
        assert metrics["confirmed_std"] == pytest.approx(confirmed.std)
        assert metrics["confirmed_test_mean"] == pytest.approx(confirmed.test_mean)


def test_deleted_things_come_back(store: Store, study: str) -> None:
    records, facts = [trial(number) for number in range(4)], study_facts(study)
    pages = reports(records, facts)
    ids = store.sync(records, facts, pages)
    before = store.everything(study)
    store.client.delete_run(ids[1])
    store.client.delete_run(store.parents(study)["clinical"].info.run_id)
    assert len(store.runs(study)) == 4
    assert store.sync(records, facts, pages) == ids
    assert store.everything(study) == before
    experiment = store.client.get_experiment_by_name(study)
    assert experiment is not None
    store.client.delete_experiment(experiment.experiment_id)
    assert store.sync(records, facts, pages) == ids
    restored = store.client.get_experiment_by_name(study)
    assert restored is not None
    assert restored.lifecycle_stage == "active"
    assert store.everything(study) == before


def test_of_a_trial_that_has_ended_little_is_kept_and_the_rest_is_asked_for(
    sqlite_storage: Path, study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(default_tracking_uri(sqlite_storage), default_artifacts(sqlite_storage))
    mirror = Mirror(store.uri, default_artifacts(sqlite_storage), study_facts(study))
    mirror.connect()
    mirror.write(trial(0))
    known = mirror._trials[0]
    assert (known.params, known.metrics, len(known.tags) <= 7) == ({}, {}, True)
    before = store.everything(study)
    mirror.write(trial(0))
    assert store.everything(study) == before
    mirror.write(trial(0, confirmed=Confirmed(seeds=3, mean=0.6, std=0.01)))
    run = store.children(study)[0]
    assert run.data.metrics["confirmed_mean"] == 0.6
    assert [step for step, _ in store.history(run, "loss")] == [10, 20, 30]


def test_two_studies_of_one_name_on_one_server(store: Store, study: str) -> None:
    ours, theirs = (study_facts(study, id=f"{word}-0000-4000-8000-000000000000") for word in ("11111111", "22222222"))
    told: list[tuple[str, str]] = []
    first = store.sync([trial(0), trial(1, 1, TrialState.PRUNED)], ours)
    before = store.everything(study)

    def tell(name: str, experiment: str) -> None:
        told.append((name, experiment))

    tracker = MlflowTracker(store.uri, store.artifacts, theirs, lambda number, run_id: None, tell)
    tracker.update(trial(0, 2))
    assert tracker.close(60)
    assert store.everything(study) == before
    other = f"{study} 22222222"
    assert told == [(other, store.children(other)[0].info.experiment_id)]
    assert set(store.children(other)) == {0}
    # Both find their own again, whoever comes first.
    again = store.children(other)[0].info.run_id
    assert store.sync([trial(0, 2)], theirs) == {0: again}
    assert store.sync([trial(0), trial(1, 1, TrialState.PRUNED)], ours) == first
    assert not set(first.values()) & {again}


def test_an_experiment_that_somebody_renamed_is_still_the_studys(store: Store, study: str) -> None:
    facts = study_facts(study, id="33333333-0000-4000-8000-000000000000")
    ids = store.sync([trial(0)], facts)
    experiment = store.client.get_experiment_by_name(study)
    assert experiment is not None
    store.client.rename_experiment(experiment.experiment_id, f"{study}, spring")
    assert store.sync([trial(0)], facts) == ids
    assert store.client.get_experiment_by_name(study) is None


def test_an_experiment_of_an_earlier_version_is_taken_over(store: Store, study: str) -> None:
    ids = store.sync([trial(0)], study_facts(study))
    assert store.sync([trial(0)], study_facts(study, id="44444444-0000-4000-8000-000000000000")) == ids
    # And is nobody else's from then on.
    assert store.sync([trial(0)], study_facts(study, id="55555555-0000-4000-8000-000000000000")) != ids


def test_a_run_deleted_while_the_study_runs(store: Store, study: str) -> None:
    tracker = store.tracker(study_facts(study))
    tracker.update(trial(0, 1, TrialState.RUNNING))
    assert tracker.flush(60)
    run_id = store.children(study)[0].info.run_id
    store.client.delete_run(run_id)
    tracker.update(trial(0))
    assert tracker.close(60)
    run = store.children(study)[0]
    assert (run.info.run_id, run.info.status, len(store.history(run, "loss"))) == (run_id, "FINISHED", 3)


def test_runs_gone_for_good_are_made_again(sqlite_storage: Path, study: str) -> None:
    store = Store(default_tracking_uri(sqlite_storage), default_artifacts(sqlite_storage))
    records, facts = [trial(number) for number in range(4)], study_facts(study)
    ids = store.sync(records, facts)
    backend = store.client._tracking_client.store
    for run_id in (ids[0], store.parents(study)["clinical"].info.run_id):
        store.client.delete_run(run_id)
        backend._hard_delete_run(run_id)
    again = store.sync(records, facts)
    assert {number for number in ids if ids[number] != again[number]} == {0}
    parent = store.parents(study)["clinical"].info.run_id
    children = store.children(study)
    assert {children[number].data.tags["mlflow.parentRunId"] for number in (0, 2)} == {parent}
    assert len(store.history(children[0], "loss")) == 3


def test_of_two_runs_the_ledgers_counts(store: Store, study: str) -> None:
    facts = study_facts(study)
    old = store.sync([trial(0)], facts)[0]
    experiment = store.client.get_experiment_by_name(study)
    assert experiment is not None
    # Two drivers at once, say.
    twin = store.client.create_run(
        experiment.experiment_id, tags={"peftsearch.study": study, "peftsearch.number": "0"}
    ).info.run_id
    assert store.sync([trial(0, mlflow_run_id=twin)], facts) == {0: twin}
    assert store.sync([trial(0, mlflow_run_id=old)], facts) == {0: old}
    store.client.delete_run(twin)
    assert store.sync([trial(0)], facts) == {0: old}
    assert set(store.children(study)) == {0}


def test_the_domains_run(store: Store, study: str, tmp_path: Path) -> None:
    records, facts = [trial(number) for number in range(4)], study_facts(study)
    pages = reports(records, facts)
    store.sync(records, facts, pages)
    parent = store.parents(study)["clinical"]
    assert parent.info.run_name == "clinical"
    assert parent.info.status == "FINISHED"
    note = parent.data.tags["mlflow.note.content"]
    assert f"peftsearch export {study} --to adapters --domain clinical --pick knee" in note
    assert {
        "metric": "accuracy",
        "rows_train": "100",
        "labels": "2",
        "fingerprint": "clinical-fingerprint",
    }.items() <= (parent.data.params.items())
    expected = {"baseline_majority": 0.3, "baseline_linear_probe": 0.6, "trials_complete": 2.0, "trials_pruned": 0.0}
    assert expected.items() <= parent.data.metrics.items()
    assert 0 < parent.data.metrics["hypervolume"] < 1
    names = {item.path for item in store.client.list_artifacts(parent.info.run_id)}
    assert names == {"front.html", "front.png", "front.json", "front.parquet", "trials.parquet"}
    loaded = Path(store.client.download_artifacts(parent.info.run_id, "front.png", str(tmp_path)))
    assert loaded.read_bytes() == pages["clinical"].files["front.png"]
    on_front = {number for number, run in store.children(study).items() if run.data.tags["on_front"] == "true"}
    assert on_front == pages["clinical"].on_front | pages["legal"].on_front
    # The front moves on: its tags and numbers follow, and its curve has one point per report.
    records.append(trial(4, trainable_parameters=10))
    store.sync(records, facts, reports(records, facts))
    children = store.children(study)
    assert children[4].data.tags["on_front"] == "true"
    assert children[0].data.tags["on_front"] == "false"
    assert [step for step, _ in store.history(store.parents(study)["clinical"], "trials_complete")] == [2, 3]


def test_limits(store: Store, study: str) -> None:
    labels = [f'Krankheit <{number}>/"ü" 🩺 {"x" * (number * 3)}' for number in range(150)]
    scores = {"accuracy": 0.5} | {
        f"{score}/{label}": number / 150
        for score in ("f1", "precision", "recall", "support", "specificity", "auc", "brier")
        for number, label in enumerate(labels)
    }
    rung = Rung(step=10, epoch=1, value=0.5, loss=1, train_loss=1, scores=scores)
    many = {f"option_{number}": "v" * 500 for number in range(250)}
    record = trial(
        0,
        rungs=[rung],
        hyperparameters={"rank": 8, "prompt": "ä" * 10_000, "odd name: <b>": "x", **many},
        state=TrialState.FAILED,
        error="Traceback\n" + "e" * 20_000,
    )
    facts = study_facts(study, provenance={f"key {number}!": "" if number == 0 else "w" * 200 for number in range(150)})
    page = DomainReport("n" * (3 * NOTE_LENGTH), {}, {f"baseline_linear_probe/{MODEL}": 0.5, "never": float("nan")})
    store.sync([record], facts, {"clinical": page})
    before = [repr(run) for run in store.runs(study)]
    store.sync([record], facts, {"clinical": page})
    assert [repr(run) for run in store.runs(study)] == before
    run = store.children(study)[0]
    assert len(run.data.params["prompt"]) == 6000
    assert run.data.params["prompt"].endswith("…")
    assert run.data.params["odd name: _b_"] == "x"
    assert len(run.data.params) == 3 + 250 + 3
    assert len(run.data.tags["error"]) == 8000
    assert sum(key.startswith("provenance.key") for key in run.data.tags) == 150
    per_class = [key for key in run.data.metrics if "/" in key]
    assert len(per_class) == 7 * 150
    assert len(store.parents(study)["clinical"].data.tags["mlflow.note.content"]) == NOTE_LENGTH


def test_live(store: Store, study: str) -> None:
    told: list[tuple[int, str, int]] = []
    facts = study_facts(study)
    tracker = store.tracker(facts, lambda number, run_id: told.append((number, run_id, threading.get_ident())))
    for evaluations in (0, 1, 2, 3):
        for number in range(6):
            start = time.perf_counter()
            tracker.update(trial(number, evaluations, TrialState.RUNNING))
            assert time.perf_counter() - start < 0.1
        time.sleep(0.4)
    assert tracker.flush(60)
    assert tracker.backlog == 0
    assert {run.info.status for run in store.children(study).values()} == {"RUNNING"}
    assert {run.info.status for run in store.parents(study).values()} == {"RUNNING"}
    records = [trial(number) for number in range(6)]
    for record in records:
        tracker.update(record)
    for domain, page in reports(records, facts).items():
        tracker.report(domain, page)
    assert tracker.close(60)
    assert tracker.close(60)
    children = store.children(study)
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert {run.info.status for run in store.parents(study).values()} == {"FINISHED"}
    assert all(len(store.history(run, "loss")) == 3 for run in children.values())
    assert {number: run_id for number, run_id, _ in told} == {n: run.info.run_id for n, run in children.items()}
    assert len(told) == 6
    # The ledger is written by whoever calls, never by the tracker's thread.
    assert {thread for _, _, thread in told} == {threading.get_ident()}
    assert any(run.data.tags["on_front"] == "true" for run in children.values())
    with pytest.raises(RuntimeError, match="closed"):
        tracker.update(records[0])
    # Another driver goes on where this one stopped: nothing is written twice.
    before = store.everything(study)
    second = store.tracker(facts)
    for record in records:
        second.update(record)
    assert second.close(60)
    assert store.everything(study) == before


def test_followed_live_or_written_afterwards_it_is_the_same(sqlite_storage: Path, tmp_path: Path, study: str) -> None:
    """To the millisecond, though a tracker that was there saw each trial grow, and learned of the study bit by bit."""
    live = Store(default_tracking_uri(sqlite_storage), default_artifacts(sqlite_storage))
    later = Store(default_tracking_uri(tmp_path), default_artifacts(tmp_path))
    facts = study_facts(study)
    tracker = live.tracker(facts)
    for evaluations in (0, 1, 2, 3):
        tracker.update(trial(0, evaluations, TrialState.RUNNING))
        assert tracker.flush(60)
    facts.provenance["threads per worker"] = "2"
    records = [trial(0, confirmed=Confirmed.of([reading(1)])), trial(1, 2, TrialState.PRUNED)]
    pages = reports(records, facts)
    for record in records:
        tracker.update(record)
    for domain, page in pages.items():
        tracker.report(domain, page)
    assert tracker.close(60)
    later.sync(records, facts, pages)
    parents = {run.info.run_id: name for store in (live, later) for name, run in store.parents(study).items()}
    trials = {run.info.run_id: str(number) for store in (live, later) for number, run in store.children(study).items()}

    def seen(store: Store) -> dict[Any, Any]:
        everything = store.everything(study)
        keys = {**store.parents(study), **store.children(study), **store.confirmations(study)}
        found: dict[Any, Any] = {}
        for key, run in keys.items():
            status, began, ended, params, tags, metrics = everything[run.info.run_id]
            names = parents | trials
            tags["mlflow.parentRunId"] = names.get(tags.get("mlflow.parentRunId", ""), "")
            # The page of a domain shows its own run's picture.
            tags["mlflow.note.content"] = tags.get("mlflow.note.content", "").replace(run.info.run_id, "THIS RUN")
            # A domain's run has no times of its own.
            times = (
                (began, ended, metrics)
                if not isinstance(key, str)
                else {name: m[-1][:2] for name, m in metrics.items()}
            )
            found[key] = (status, params, tags, times)
        return found

    assert seen(live) == seen(later)


def test_a_trial_that_mlflow_refuses_blocks_nobody(sqlite_storage: Path, study: str, monkeypatch: Any) -> None:
    from peftsearch.tracking import mlflow_tracker

    monkeypatch.setattr(mlflow_tracker, "_HOPELESS", 2.0)
    store = Store(default_tracking_uri(sqlite_storage), default_artifacts(sqlite_storage))
    tracker = store.tracker(study_facts(study))
    tracker.update(trial(0, domain="unheard-of"))
    for number in range(1, 4):
        tracker.update(trial(number))
    assert not tracker.close(60)
    assert "unheard-of" in str(tracker.last_error)
    assert set(store.children(study)) == {1, 2, 3}


def test_a_lost_answer_is_asked_for_again_and_nothing_else(
    sqlite_storage: Path, study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(default_tracking_uri(sqlite_storage), default_artifacts(sqlite_storage))
    facts, records = study_facts(study), [trial(number) for number in range(13)]
    mirror = Mirror(store.uri, default_artifacts(sqlite_storage), facts)
    mirror.connect()
    for record in records[:12]:
        mirror.write(record)
    client, read = mirror.client, []
    search, create = client.search_runs, client.create_run

    def counted(*arguments: Any, **options: Any) -> Any:
        page = search(*arguments, **options)
        read.extend(run.info.run_id for run in page)
        return page

    def lost(*arguments: Any, **options: Any) -> Any:
        create(*arguments, **options)
        raise ConnectionError("the answer was lost")

    monkeypatch.setattr(client, "search_runs", counted)
    with monkeypatch.context() as patched:
        patched.setattr(client, "create_run", lost)
        with pytest.raises(ConnectionError):
            mirror.write(records[12])
    mirror.connect()
    mirror.write(records[12])
    assert read == [mirror.run_id(12)]
    # `children` sees that no trial has two.
    assert set(store.children(study)) == set(range(13))
    assert [step for step, _ in store.history(store.children(study)[12], "loss")] == [10, 20, 30]


def test_what_somebody_deletes_while_the_study_runs_stops_no_page(sqlite_storage: Path, study: str) -> None:
    store = Store(default_tracking_uri(sqlite_storage), default_artifacts(sqlite_storage))
    facts, records = study_facts(study), [trial(number) for number in range(4)]
    tracker = store.tracker(facts)
    for record in records:
        tracker.update(record)
    assert tracker.flush(60)
    store.client.delete_run(store.children(study)[2].info.run_id)
    store.client.delete_run(store.parents(study)["clinical"].info.run_id)
    for domain, page in reports(records, facts).items():
        tracker.report(domain, page)
    assert tracker.flush(60), tracker.last_error
    assert set(store.parents(study)) == {"clinical", "legal"}
    experiment = store.client.get_experiment_by_name(study)
    assert experiment is not None
    store.client.delete_experiment(experiment.experiment_id)
    tracker.update(trial(4))
    assert tracker.close(60), tracker.last_error
    assert 4 in store.children(study)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "storage")
    yield running
    if running.process is not None:
        running.kill()


@pytest.mark.slow
def test_server_killed_and_started_again(own_server: Server, study: str) -> None:
    own_server.start()
    facts = study_facts(study)
    ids: dict[int, str] = {}
    tracker = MlflowTracker(own_server.uri, None, facts, ids.__setitem__)
    for number in range(20):
        tracker.update(trial(number, 1, TrialState.RUNNING))
    # In the middle of writing.
    while tracker.backlog > 12:
        time.sleep(0.01)
    own_server.kill()
    for number in range(20):
        start = time.perf_counter()
        tracker.update(trial(number, 2, TrialState.RUNNING))
        assert time.perf_counter() - start < 0.1
    assert not tracker.flush(3)
    assert tracker.backlog == 20
    assert tracker.last_error
    own_server.start()
    records = [trial(number) for number in range(20)]
    for record in records:
        tracker.update(record)
    for domain, page in reports(records, facts).items():
        tracker.report(domain, page)
    assert tracker.close(60)
    store = Store(own_server.uri, None)
    children = store.children(study)
    assert set(children) == set(range(20))
    assert set(store.parents(study)) == {"clinical", "legal"}
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert all([step for step, _ in store.history(run, "loss")] == [10, 20, 30] for run in children.values())
    assert {number: run.info.run_id for number, run in children.items()} == ids


@pytest.mark.slow
def test_server_away_to_the_end_then_sync(own_server: Server, study: str, monkeypatch: Any) -> None:
    from peftsearch.tracking import mlflow_tracker

    monkeypatch.setattr(mlflow_tracker, "_HOPELESS", 3.0)
    facts = study_facts(study)
    tracker = MlflowTracker(own_server.uri, None, facts, lambda number, run_id: None)
    records = [trial(number) for number in range(4)]
    for record in records:
        tracker.update(record)
    start = time.monotonic()
    assert not tracker.close(120)
    assert time.monotonic() - start < 30
    with pytest.raises(StudyError, match=r"MLflow at http://127\.0\.0\.1.* could not be brought up to date"):
        sync(own_server.uri, records, facts)
    own_server.start()
    ids = sync(own_server.uri, records, facts, reports(records, facts))
    assert set(ids) == set(Store(own_server.uri, None).children(study)) == set(range(4))


def test_the_global_tracking_uri_is_left_alone(sqlite_storage: Path, study: str) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    sync(default_tracking_uri(sqlite_storage), [trial(0)], study_facts(study), {}, default_artifacts(sqlite_storage))
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None


def test_the_driver_is_not_slowed(sqlite_storage: Path, study: str) -> None:
    """64 trials of 9 evaluations, each told at every evaluation: the caller waits for nothing."""
    tracker = MlflowTracker(
        default_tracking_uri(sqlite_storage), default_artifacts(sqlite_storage), study_facts(study), lambda *_: None
    )
    start = time.perf_counter()
    for number in range(64):
        for evaluations in range(9):
            tracker.update(trial(number, evaluations, TrialState.RUNNING))
        tracker.update(trial(number, 9))
    told = time.perf_counter() - start
    assert tracker.close(120)
    written = time.perf_counter() - start
    print(f"telling {1000 * told / 64:.2f} ms per trial, written {1000 * written / 64:.1f} ms per trial")
    assert written / 64 < 0.25


def test_nothing_is_printed(store: Store, study: str, capfd: pytest.CaptureFixture[str]) -> None:
    facts = study_facts(study)
    store.sync(four_states(), facts, reports(four_states(), facts))
    assert capfd.readouterr() == ("", "")


# --- names ---


def test_names_are_accepted_by_mlflow_and_stay_distinct() -> None:
    from mlflow.utils.validation import _validate_metric_name

    names = [
        "f1/a",
        "f1/a<",
        "f1/a>",
        "f1/A",
        "f1/..",
        "f1/.",
        "f1/",
        "f1//x",
        "/",
        "",
        "..",
        "a/b/c",
        "a/b_c",
        "é/ü 🩺",
    ]
    names += ["f1/" + "x" * 300, "f1/" + "x" * 301, " f1/ padded ", "a\nb", "f1/C00-C97: Neoplasms (malignant)"]
    found = mlflow_names(names)
    assert set(found) == set(names)
    assert len({name.lower() for name in found.values()}) == len(names)
    for name in found.values():
        _validate_metric_name(name)
        assert len(name) <= 250
    assert found["f1/A"] == "f1/A"
    assert mlflow_names(reversed(names)) == found


def test_run_names_are_short() -> None:
    assert run_name(trial(12)) == "12 lora rank=8 lr=3.1e-04"
    assert run_name(trial(3, method="full", hyperparameters={"learning_rate": 2e-5})) == "3 full lr=2.0e-05"
    assert run_name(trial(3, method="full", hyperparameters={})) == "3 full"
    assert len(run_name(trial(3, hyperparameters={"init_text": "x" * 1000}))) == 250
    assert configuration_text({"rank": 8, "dropout": 0.1, "learning_rate": 0.001}) == "rank=8 dropout=0.1 lr=1.0e-03"


# --- the UI ---


def test_ui_refuses_an_empty_storage_and_a_taken_port(tmp_path: Path, sqlite_storage: Path, server: Server) -> None:
    with pytest.raises(StudyError, match="no study"):
        serve_ui(tmp_path)
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(StudyError, match=f"port {server.port}.*--port"):
        serve_ui(tmp_path, port=server.port)
    with pytest.raises(StudyError, match="cannot listen"):
        check_port("192.0.2.1", server.port)
    (tmp_path / "mlflow.db").write_text("no database at all, and long enough to be looked at" * 100)
    with pytest.raises(StudyError, match=r"mlflow.db' is damaged"):
        serve_ui(tmp_path, port=free_port())


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ui_serves_until_it_is_stopped(sqlite_storage: Path, study: str, ending: signal.Signals) -> None:
    store = Store(default_tracking_uri(sqlite_storage), default_artifacts(sqlite_storage))
    facts = study_facts(study)
    store.sync([trial(0)], facts, reports([trial(0)], facts))
    parent = store.parents(study)["clinical"].info.run_id
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = "from pathlib import Path; from peftsearch.tracking.ui import serve_ui; "
    script += f"raise SystemExit(serve_ui(Path({str(sqlite_storage)!r}), port={port}))"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/health", process)
        # The pictures that the study logged are shown, though it wrote the store without a server.
        with urllib.request.urlopen(f"{url}/get-artifact?path=front.png&run_uuid={parent}", timeout=30) as answer:
            assert answer.read().startswith(b"\x89PNG")
        process.send_signal(ending)
        assert process.wait(30) == 0
    finally:
        process.kill()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{url}/health", timeout=5)
