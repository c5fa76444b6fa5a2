"""An export that is registered: trained, written to MLflow, exported, asked for by its alias, and used."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from trained_study import CONFIGURATIONS, document, lively_base, train_study

from peftsearch.cli.app import run_app
from peftsearch.export import Predictor
from peftsearch.spec import StudyError
from peftsearch.study import Study

pytestmark = pytest.mark.slow


def test_a_registered_export_is_used_by_its_alias(tiny_base: Path, topics_csv: Path, tmp_path: Path) -> None:
    import mlflow

    base = lively_base(tiny_base, tmp_path / "model")
    data = document("registered", str(base), topics_csv, {"legal": "lora"}) | {"tracking": {"mlflow": "auto"}}
    storage = tmp_path / "storage"
    train_study(data, topics_csv.parent, storage, {"legal": ("lora", CONFIGURATIONS["lora"])})
    study = Study.open("registered", storage)
    with pytest.raises(StudyError, match=r"not in MLflow yet.*peftsearch sync registered"):
        study.export(tmp_path / "out", register=True)
    assert not (tmp_path / "out").exists()
    study.sync()
    (record,) = study.trials()
    run = mlflow.MlflowClient(study.mlflow_tracking_uri).get_run(str(record.mlflow_run_id))
    for name, value in record.rungs[-1].usage.items():
        assert run.data.metrics[f"system/{name}"] == value

    printed = io.StringIO()
    command = ["export", "registered", "--to", str(tmp_path / "out"), "--register", "--json"]
    with contextlib.redirect_stdout(printed):
        assert run_app([*command, "--storage", str(storage)]) == 0
    (item,) = json.loads(printed.getvalue())["exported"]
    assert item["registered"]["name"] == "legal"
    assert item["registered"]["aliases"] == ["best", "knee", "smallest"]
    mlflow.set_tracking_uri(study.mlflow_tracking_uri)
    try:
        folder = Path(mlflow.artifacts.download_artifacts("models:/legal@best", dst_path=str(tmp_path / "loaded")))
    finally:
        mlflow.set_tracking_uri(None)
    assert {file.name for file in folder.iterdir()} == {file.name for file in Path(item["folder"]).iterdir()}
    asked = [{"text": "any breach of the agreement"}]
    assert Predictor.load(folder).predict(asked) == Predictor.load(Path(item["folder"])).predict(asked)

    # What was measured stands with the version, and where the folder is with the trial's run.
    client = mlflow.MlflowClient(study.mlflow_tracking_uri, study.mlflow_tracking_uri)
    before = client.get_model_version_by_alias("legal", "best")
    assert before.tags["latency_ms"] == f"{item['speed']['latency_ms']:.4g}"
    assert before.tags["examples_per_second"] == f"{item['speed']['examples_per_second']:.4g}"
    assert client.get_run(str(record.mlflow_run_id)).data.tags["exported"] == item["folder"]
    # Both are no business of sync.
    study.sync()
    assert dict(client.get_model_version_by_alias("legal", "best")) == dict(before)
    assert client.get_run(str(record.mlflow_run_id)).data.tags["exported"] == item["folder"]

    # An export is none the worse for what MLflow does not take.
    client.delete_run(str(record.mlflow_run_id))
    told: list[str] = []
    study.export(tmp_path / "again", told=told.append)
    assert "does not know of the exports" in told[-1]
    assert (tmp_path / "again" / "legal" / "00000-lora" / "README.md").is_file()
