"""Confirmation of a whole study: when the test split is read, how often, and what a dead driver changes about that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import command
from study_runs import ledger, run

from peftsearch.domains.prepare import MANIFEST, _described
from peftsearch.spec import Baseline, Confirmed, Reading, TrialState
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SEEDS = 2


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, topics_csv: Path) -> Path:
    path = tmp_path_factory.mktemp("file") / "confirmed.yaml"
    document = {
        "name": "confirmed",
        "model": str(tiny_base),
        "domains": {"topics": {"data": {"source": str(topics_csv), "split": {"group": "document", "test": 0.2}}}},
        "methods": {"lora": {"rank": [1, 2, 4]}, "prompt": {"tokens": [2, 4]}},
        "search": {"trials": 3},
        "confirm": {"seeds": SEEDS},
        "training": {"epochs": 2, "evaluations": 4, "batch_size": 16, "max_length": 16},
        "resources": {"cpus_per_worker": 1, "slots": 1},
    }
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, study_file: Path) -> Path:
    """The storage of the finished study, whose test split could not be read before the confirmation."""
    storage = tmp_path_factory.mktemp("storage")
    prepared = command("validate", study_file, "--storage", storage)
    assert prepared.returncode == 0, prepared.stderr
    files = [file for file in (storage / "cache").rglob("test/*") if file.is_file()]
    assert files
    contents = {file: file.read_bytes() for file in files}
    for file, content in contents.items():
        # As long as before, which is what the cache goes by.
        file.write_bytes(b"?" * len(content))
    run(study_file, storage, "--set", "confirm.seeds=0")
    searched = Study.open("confirmed", storage)
    assert all(record.confirmed is None for record in searched.trials())
    assert not list((searched.folder.path / "trials").glob("*-seed*"))
    assert searched.status()["confirmations"] == {"done": 0, "failed": 0, "planned": 0}
    assert not any(item.test_scores for item in baselines(searched).values())
    for file, content in contents.items():
        file.write_bytes(content)
    run(study_file, storage)
    return storage


def baselines(study: Study) -> dict[str, Baseline]:
    """Of the only model."""
    (found,) = study.facts().domains["topics"].baselines.values()
    return found


def test_the_baselines_are_scored_on_the_test_split_beside_the_confirmations(finished: Path) -> None:
    found = baselines(Study.open("confirmed", finished))
    assert {"majority", "linear_probe"} <= set(found)
    for baseline in found.values():
        assert baseline.test_value == baseline.test_scores["accuracy"]
        assert 0 < baseline.test_value < 1


def confirmations(storage: Path) -> dict[int, Confirmed]:
    trials = Study.open("confirmed", storage).trials()
    return {record.number: record.confirmed for record in trials if record.confirmed is not None}


def readings(storage: Path) -> dict[tuple[int, int], Reading]:
    found = confirmations(storage)
    return {(number, item.seed): item for number, mine in found.items() for item in mine.readings}


def test_every_finalist_is_read_once_per_seed_and_after_the_search(finished: Path) -> None:
    study = Study.open("confirmed", finished)
    records = {record.number: record for record in study.trials()}
    front = {record.number for record in study.frontier()["topics"].front}
    found = confirmations(finished)
    assert front <= set(found)
    assert {records[number].method for number in found} == {"lora", "prompt"}
    last = max(record.finished or "" for record in records.values())
    for number, confirmed in found.items():
        assert records[number].state is TrialState.COMPLETE
        assert confirmed.seeds == SEEDS
        assert [item.seed for item in confirmed.readings] == [1, 2]
        for item in confirmed.readings:
            assert item.read_at is not None
            assert item.read_at > last
            assert item.steps == records[number].total_steps
            # The predictions are kept, one line for each example of the test split; the weights are not.
            assert item.predictions == f"trials/{number:05d}-seed{item.seed}/test.jsonl"
            file = study.folder.path / item.predictions
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            assert len(lines) == item.test_examples == study.facts().domains["topics"].rows["test"]
            assert {other.name for other in file.parent.iterdir()} == {"test.json", "test.jsonl"}
            accuracy = sum(line["prediction"] == line["reference"] for line in lines) / len(lines)
            assert item.test == pytest.approx(accuracy)
    # The trials' own weights are there to be exported.
    for number in front:
        assert (study.folder.path / "trials" / f"{number:05d}" / "weights.safetensors").exists()
    status = study.status()
    assert status["confirmations"] == {"done": SEEDS * len(found), "failed": 0, "planned": SEEDS * len(found)}
    assert status["state"] == "finished"


def test_mlflow_shows_the_retrainings_below_their_trials(finished: Path) -> None:
    study = Study.open("confirmed", finished)
    assert mlflow_runs(study) == {
        (record.number, item.seed, record.mlflow_run_id, round(item.test or 0, 6))
        for record in study.trials()
        for item in (record.confirmed.readings if record.confirmed else ())
    }


def mlflow_runs(study: Study) -> set[tuple[int, int, str | None, float]]:
    """Trial, seed, parent and test score of every re-training's run."""
    import mlflow

    client = mlflow.MlflowClient(study.mlflow_tracking_uri)
    experiment = client.get_experiment_by_name(study.name)
    assert experiment is not None
    runs = [
        run
        for run in client.search_runs([experiment.experiment_id], max_results=1000)
        if "peftsearch.confirms" in run.data.tags
    ]
    found = {
        (
            int(run.data.tags["peftsearch.confirms"]),
            int(run.data.tags["seed"]),
            run.data.tags["mlflow.parentRunId"],
            round(run.data.metrics["test"], 6),
        )
        for run in runs
    }
    assert len(found) == len(runs)
    return found


def test_running_again_reads_nothing_again(finished: Path, study_file: Path) -> None:
    before = Study.open("confirmed", finished).trials()
    run(study_file, finished)
    assert Study.open("confirmed", finished).trials() == before


def test_a_driver_killed_while_confirming_goes_on_with_the_same_readings(
    finished: Path, study_file: Path, tmp_path: Path
) -> None:
    """SIGKILL to the driver and all of its processes; the same seed gives the same ledger as the quiet study's."""
    arguments = [sys.executable, "-m", "peftsearch", "run", str(study_file), "--storage", str(tmp_path)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 480
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        try:
            if readings(tmp_path):
                break
        except Exception:  # the ledger is being created
            continue
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    study = Study.open("confirmed", tmp_path)
    early = readings(tmp_path)
    expected = readings(finished)
    assert 0 < len(early) < len(expected)
    status = study.status()
    assert status["state"] == "interrupted"
    assert status["confirmations"] == {"done": len(early), "failed": 0, "planned": len(expected)}
    run(study_file, tmp_path)
    late = readings(tmp_path)
    # With their times: what had been read was not read again.
    assert {key: late[key] for key in early} == early
    assert len({item.read_at for item in late.values()}) == len(late)
    assert ledger("confirmed", tmp_path) == ledger("confirmed", finished)
    assert len(mlflow_runs(study)) == len(expected)


def test_a_retraining_that_cannot_go_on_is_recorded_and_the_study_ends(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_study("doomed", methods={"lora": {"rank": 2}}, search={"trials": 1}, confirm={"seeds": 2})
    run(path, tmp_path, "--set", "confirm.seeds=0")
    # A damaged test split is an error of whoever reads it; with a wrong checksum it would be made anew.
    for manifest in (tmp_path / "cache").rglob(MANIFEST):
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        for file in manifest.parent.glob("test/*.arrow"):
            damaged = b"?" * file.stat().st_size
            file.write_bytes(damaged)
            facts["files"][f"test/{file.name}"] = [len(damaged), zlib.crc32(damaged)]
        del facts["checksum"]
        facts["checksum"] = _described(facts)
        manifest.write_text(json.dumps(facts), encoding="utf-8")
    done = command("run", path, "--storage", tmp_path, "--set", "resources.max_retries=0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "could not be confirmed with seed 1" in done.stderr
    study = Study.open("doomed", tmp_path)
    assert study.status()["confirmations"] == {"done": 0, "failed": 2, "planned": 2}
    assert study.status()["state"] == "finished"
    assert study.trials()[0].confirmed is None
    said = command("status", "doomed", "--storage", tmp_path).stdout
    assert "0 re-trainings, 2 failed of 2 planned" in said


def test_a_study_starts_from_anothers_front(finished: Path, study_file: Path, tmp_path: Path) -> None:
    document: dict[str, Any] = yaml.safe_load(study_file.read_text())
    document |= {"name": "warm", "confirm": {"seeds": 0}, "tracking": {"mlflow": "off"}}
    document["search"] = {"trials": 2, "warm_start": "confirmed", "scheduler": "none"}
    document["training"]["epochs"] = 1
    path = tmp_path / "warm.yaml"
    path.write_text(yaml.safe_dump(document))
    run(path, finished)
    front = Study.open("confirmed", finished).frontier()["topics"].front
    study = Study.open("warm", finished)
    methods = {record.method for record in front}
    assert methods
    for method in methods:
        best = max((r for r in front if r.method == method), key=lambda r: (r.value or 0, -r.number))
        first = next(record for record in study.trials() if record.method == method)
        assert first.hyperparameters == best.hyperparameters
    numbers = ", ".join(str(number) for number in sorted(record.number for record in front))
    assert study.facts().provenance["warm_start"] == f"confirmed: {numbers}"
    # It goes on with what it began with, when the other study is gone: also where a new method comes to it.
    before = [record.hyperparameters for record in study.trials()]
    gone = finished / "studies" / "confirmed"
    gone.rename(tmp_path / "gone")
    try:
        document["search"]["trials"] = 3
        path.write_text(yaml.safe_dump(document))
        run(path, finished)
    finally:
        (tmp_path / "gone").rename(gone)
    study = Study.open("warm", finished)
    assert [record.hyperparameters for record in study.trials()][: len(before)] == before
    assert len(study.trials()) > len(before)
    assert study.facts().provenance["warm_start"] == f"confirmed: {numbers}"


def test_a_grid_within_limits_is_tried_in_order_with_its_methods_budgets_and_early_stopping(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_study(
        "grid",
        methods={
            "lora": {"rank": [4, 64, 2], "targets": "attention", "learning_rate": [1e-3], "training": {"epochs": 1}},
            # Such small steps change no answer: early stopping ends this one after its second evaluation.
            "prompt": {"tokens": [2], "init": "vocabulary", "learning_rate": [1e-8]},
        },
        training={"epochs": 2, "evaluations": 4, "batch_size": 16, "max_length": 16, "patience": 1},
        confirm={"seeds": 1},
        resources={"cpus_per_worker": 1, "slots": 2},
        search={"trials": 5, "sampler": "grid", "scheduler": "none", "max_parameters": 5000},
    )
    run(path, tmp_path)
    study = Study.open("grid", tmp_path)
    records = study.trials()
    tried = [(record.method, record.hyperparameters.get("rank")) for record in records]
    assert sorted(tried, key=str) == [("lora", 2), ("lora", 4), ("prompt", None)]
    assert [rank for method, rank in tried if method == "lora"] == [4, 2]
    assert {record.state for record in records} == {TrialState.COMPLETE}
    steps = {record.method: record.total_steps for record in records}
    assert steps["prompt"] == 2 * steps["lora"]
    assert all(record.trainable_parameters <= 5000 for record in records)
    assert all((record.estimated_seconds or 0) > 0 for record in records)
    assert all((record.estimated_memory_bytes or 0) > 0 for record in records)
    assert study.status()["planned"] == 3
    confirmed = [record for record in records if record.confirmed]
    assert {record.method for record in confirmed} == {"lora", "prompt"}
    assert study.status()["confirmations"] == {"done": len(confirmed), "failed": 0, "planned": len(confirmed)}
    prompt = next(record for record in records if record.method == "prompt")
    assert (prompt.stopped_early, len(prompt.rungs)) == (True, 2)
    assert prompt.rungs[-1].step < prompt.total_steps
    assert prompt.confirmed is not None
    assert prompt.confirmed.readings[0].test is not None
    assert prompt.confirmed.readings[0].steps < prompt.total_steps
