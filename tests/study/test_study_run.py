"""Whole studies on a real Ray cluster of this machine, over a tiny model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import command
from study_runs import run

from peftsearch.holder import hold
from peftsearch.spec import TrialRecord, TrialState
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, topics_csv: Path) -> tuple[Path, Path]:
    """A finished study of all four methods, tracked in MLflow: its storage and its file."""
    import yaml

    storage = tmp_path_factory.mktemp("storage")
    path = storage / "tiny.yaml"
    document = {
        "name": "tiny",
        "model": str(tiny_base),
        "domains": {
            "topics": {"data": {"source": str(topics_csv), "split": {"group": "document", "validation": 0.25}}},
        },
        "methods": {
            "lora": {"rank": {"low": 1, "high": 8, "log": True}},
            "adapter": {"bottleneck": [2, 4, 8]},
            "prompt": {"tokens": [2, 4, 8]},
            "full": {},
        },
        "search": {"trials": 4},
        "training": {"epochs": 2, "evaluations": 6, "batch_size": 16, "max_length": 16},
        "resources": {"cpus_per_worker": 1, "slots": 1},
    }
    path.write_text(yaml.safe_dump(document))
    run(path, storage)
    return storage, path


def test_every_cell_has_its_trials_and_every_trial_its_end(finished: tuple[Path, Path]) -> None:
    records = Study.open("tiny", finished[0]).trials()
    assert [record.number for record in records] == list(range(16))
    for method in ("lora", "adapter", "prompt", "full"):
        assert sum(record.method == method for record in records) == 4
    states = {record.state for record in records}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}
    for record in records:
        if record.state is TrialState.COMPLETE:
            assert record.rungs[-1].step == record.total_steps
            assert len(record.rungs) == 6
        else:
            assert record.rungs[-1].step < record.total_steps
    # Each method is seen at the full budget.
    assert {r.method for r in records if r.state is TrialState.COMPLETE} == {"lora", "adapter", "prompt", "full"}


def test_published_defaults_are_tried_first(finished: tuple[Path, Path]) -> None:
    first = {record.method: record for record in reversed(Study.open("tiny", finished[0]).trials())}
    assert first["full"].hyperparameters["learning_rate"] == 5e-5
    assert first["prompt"].hyperparameters["learning_rate"] == 3e-2
    assert first["lora"].hyperparameters["learning_rate"] == 3e-4


def test_the_front_holds_complete_trials_and_none_is_dominated(finished: tuple[Path, Path]) -> None:
    done = command("frontier", "tiny", "--json", "--storage", finished[0])
    assert done.returncode == 0, done.stderr
    domain = json.loads(done.stdout)["domains"]["topics"]
    trials = json.loads(command("trials", "tiny", "--json", "--storage", finished[0]).stdout)["trials"]
    complete = [trial for trial in trials if trial["state"] == "COMPLETE"]

    def dominates(a: dict[str, Any], b: dict[str, Any]) -> bool:
        better = a["value"] > b["value"] or a["trainable_parameters"] < b["trainable_parameters"]
        return better and a["value"] >= b["value"] and a["trainable_parameters"] <= b["trainable_parameters"]

    expected = {b["number"] for b in complete if not any(dominates(a, b) for a in complete)}
    assert {trial["number"] for trial in domain["front"]} == expected
    for trial in domain["front"]:
        assert trial["state"] == "COMPLETE"
        assert trial["rungs"][-1]["step"] == trial["total_steps"]
        assert trial["mlflow_run_id"]
        assert trial["hyperparameters"]
    assert domain["metric"] == "accuracy"
    assert domain["counts"]["complete"] == len(complete)
    assert 0 < domain["hypervolume"] < 1


def test_mlflow_shows_every_trial_once_and_with_its_state(finished: tuple[Path, Path]) -> None:
    from mlflow import MlflowClient

    study = Study.open("tiny", finished[0])
    client = MlflowClient(tracking_uri=study.mlflow_tracking_uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    records = study.trials()
    assert len(runs) == len(records) + 1
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs.values()} - {None}
    assert len(parents) == 1
    expected = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAILED": "FAILED"}
    for record in records:
        found = runs[record.mlflow_run_id or ""]
        assert found.info.status == expected[record.state]
        assert found.data.metrics["accuracy"] == pytest.approx(record.value)
        history = client.get_metric_history(found.info.run_id, "accuracy")
        assert [(m.step, m.value) for m in history] == [(r.step, r.value) for r in record.rungs]
    parent = parents.pop()
    artifacts = {item.path for item in client.list_artifacts(parent)}
    assert {"front.html", "front.png", "front.json", "front.parquet"} <= artifacts
    assert "peftsearch export" in runs[parent].data.tags["mlflow.note.content"]


def test_running_again_changes_nothing(finished: tuple[Path, Path]) -> None:
    storage, path = finished
    before = Study.open("tiny", storage).trials()
    began = time.monotonic()
    run(path, storage)
    assert Study.open("tiny", storage).trials() == before
    assert time.monotonic() - began < 60
    assert Study.open("tiny", storage).status()["state"] == "finished"


def test_weights_are_kept_for_each_methods_front_alone(finished: tuple[Path, Path]) -> None:
    """Those of the domain's front are among them, and whatever `export --method` would ask for."""
    study = Study.open("tiny", finished[0])
    kept = {int(item.name) for item in (study.folder.path / "trials").iterdir()}
    complete = [record for record in study.trials() if record.state is TrialState.COMPLETE]

    def dominated(a: TrialRecord, b: TrialRecord) -> bool:
        assert a.value is not None
        assert b.value is not None
        return (
            a.method == b.method
            and b.value >= a.value
            and b.trainable_parameters <= a.trainable_parameters
            and (b.value > a.value or b.trainable_parameters < a.trainable_parameters)
        )

    expected = {a.number for a in complete if not any(dominated(a, b) for b in complete)}
    assert {record.number for record in study.frontier()["topics"].front} <= expected
    assert kept == expected
    assert len(expected) < len(study.trials())


def test_the_front_is_exported_and_verified(finished: tuple[Path, Path], tmp_path: Path) -> None:
    done = command("export", "tiny", "--to", tmp_path / "adapters", "--storage", finished[0])
    assert done.returncode == 0, done.stderr[-3000:]
    front = Study.open("tiny", finished[0]).frontier()["topics"].front
    folders = [Path(line) for line in done.stdout.split()]
    assert len(folders) == len(front)
    for folder in folders:
        assert (folder / "README.md").exists()
        assert json.loads((folder / "provenance.json").read_text())


def test_a_changed_question_is_refused_and_more_trials_extend(finished: tuple[Path, Path]) -> None:
    storage, path = finished
    done = command("run", path, "--storage", storage, "--set", "training.epochs=3")
    assert done.returncode == 2
    assert "training.epochs" in done.stderr
    assert "--name" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_driver_is_told_who_holds_the_study(finished: tuple[Path, Path]) -> None:
    storage, path = finished
    with hold(Study.open("tiny", storage).folder.path, "tiny"):
        done = command("run", path, "--storage", storage)
    assert done.returncode == 2
    assert "is being run by process" in done.stderr


def test_models_with_different_tokenizers_are_compared_in_one_study(
    write_study: Callable[..., Path], tmp_path: Path, tiny_base: Path
) -> None:
    """Each model reads the texts through its own tokenizer: the second one's word ids are all shifted."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other-base"
    shutil.copytree(tiny_base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {word for word in vocabulary if word.startswith("[")}
    words = [word for word in vocabulary if word not in special]
    moved = dict(zip(words, [*words[1:], words[0]], strict=True))
    tokenizer["model"]["vocab"] = {w: vocabulary[w] if w in special else vocabulary[moved[w]] for w in vocabulary}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = load_file(other / "model.safetensors")
    name = next(key for key in weights if key.endswith("word_embeddings.weight"))
    table = weights[name].clone()
    for word in words:
        table[vocabulary[moved[word]]] = weights[name][vocabulary[word]]
    save_file({**weights, name: table}, other / "model.safetensors", metadata={"format": "pt"})
    assert not torch.equal(table, weights[name])

    # The same model under other word ids: with its own tokenizer, every number is the same.
    import yaml

    path = write_study("two-models", methods={"lora": {"rank": 4, "learning_rate": 5e-3}}, search={"trials": 1})
    document = yaml.safe_load(path.read_text())
    document["models"] = [document.pop("model"), str(other)]
    path.write_text(yaml.safe_dump(document))
    run(path, tmp_path)
    first, second = Study.open("two-models", tmp_path).trials()
    assert first.model != second.model
    assert [r.loss for r in second.rungs] == pytest.approx([r.loss for r in first.rungs], rel=1e-5)
