"""An export that is registered: trained, written to MLflow, exported, asked for by its alias, and used."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from trained_study import CONFIGURATIONS, document, lively_base, train_study

from peftsearch.cli.app import run_app
from peftsearch.export import Predictor
from peftsearch.spec import StudyError
from peftsearch.study import Study

pytestmark = pytest.mark.slow


def test_a_registered_export_is_used_by_its_alias(
    tiny_base: Path, topics_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
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
    (answer,) = Predictor.load(folder).predict([{"text": "any breach of the agreement"}])
    assert "contract" in str(answer)

    # What has been registered is no business of sync.
    client = mlflow.MlflowClient(study.mlflow_tracking_uri, study.mlflow_tracking_uri)
    before = client.get_model_version_by_alias("legal", "best")
    study.sync()
    assert dict(client.get_model_version_by_alias("legal", "best")) == dict(before)
