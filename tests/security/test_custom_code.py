"""Code that a model brings along runs only where the study file says so, and then says so everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_study import small_study, write_study
from security_files import Outcome

Cli = Callable[..., Outcome]

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import BertConfig, BertForSequenceClassification, BertModel


class OwnConfig(BertConfig):
    model_type = {kind!r}


class OwnModel(BertModel):
    config_class = OwnConfig


class OwnClassifier(BertForSequenceClassification):
    config_class = OwnConfig
"""
AUTO_MAP = {
    "AutoConfig": "own_code.OwnConfig",
    "AutoModel": "own_code.OwnModel",
    "AutoModelForSequenceClassification": "own_code.OwnClassifier",
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that appears when the model's code runs."""
    return tmp_path / "code-ran"


@pytest.fixture
def with_code(base: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a copy of the base with code of its own, under an architecture's name."""
    # Where transformers copies such code to, and runs it from.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(kind: str) -> Path:
        folder = Path(shutil.copytree(base, tmp_path / "own"))
        (folder / "own_code.py").write_text(CODE.format(marker=str(marker), kind=kind))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": AUTO_MAP}))
        return folder

    return make


def study_of(model: Path, project: Path, **keys: object) -> Path:
    study = small_study(model)
    study["model"] = {"path": str(model), **keys} if keys else str(model)
    return write_study(project, study)


@pytest.mark.parametrize("command", ["validate", "run"])
def test_refused_unless_trusted(
    command: str, peftsearch: Cli, with_code: Any, marker: Path, project: Path, storage: Path
) -> None:
    path = study_of(with_code("own-architecture"), project)
    sentence = peftsearch(command, path, "--storage", storage).sentence
    assert "study.yaml, line 2: model: " in sentence
    assert "needs Python code that it brings along, which is not run" in sentence
    assert "trust_remote_code: true" in sentence
    assert not marker.exists()
    assert not storage.exists()


def test_an_architecture_of_transformers_runs_without_the_code(
    peftsearch: Cli, with_code: Any, marker: Path, project: Path, storage: Path
) -> None:
    path = study_of(with_code("bert"), project)
    done = peftsearch("validate", path, "--storage", storage)
    assert done.status == 0, done.err
    assert "Warning" not in done.out
    assert not marker.exists()


def test_trusted_code_runs_and_warns(
    peftsearch: Cli, with_code: Any, marker: Path, project: Path, storage: Path
) -> None:
    model = with_code("own-architecture")
    done = peftsearch("validate", study_of(model, project, trust_remote_code=True), "--storage", storage)
    assert done.status == 0, done.err
    assert marker.exists()
    warning = next(line for line in done.out.splitlines() if line.startswith("Warning: "))
    assert str(model) in warning
    assert "runs Python code that it brings along" in warning


def test_a_run_warns_too(with_code: Any, project: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftsearch.events import SilentEvents
    from peftsearch.study import Study

    class Listener(SilentEvents):
        def warning(self, text: str) -> None:
            warnings.append(text)

    warnings: list[str] = []
    monkeypatch.setattr("peftsearch.driver.run_study", lambda *_, **__: None)
    model = with_code("own-architecture")
    Study.from_file(study_of(model, project, trust_remote_code=True), storage=storage).run(events=Listener())
    assert any(str(model) in text and "runs Python code" in text for text in warnings)


def test_code_of_a_tokenizer_never_runs(
    peftsearch: Cli, with_code: Any, marker: Path, base: Path, tmp_path: Path, project: Path, storage: Path
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "own-tokenizer"))
    (folder / "own_tokenizer.py").write_text(CODE.format(marker=str(marker), kind="x") + "\nOwnTokenizer = None\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own_tokenizer.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for keys in ({}, {"trust_remote_code": True}):
        peftsearch("validate", study_of(folder, project, **keys), "--storage", storage)
        assert not marker.exists()


def test_a_kernel_of_the_hub_is_code_too(
    peftsearch: Cli, base: Path, tmp_path: Path, project: Path, storage: Path
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "own"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "somebody/kernel"}))
    sentence = peftsearch("validate", study_of(folder, project), "--storage", storage).sentence
    assert "the attention kernel 'somebody/kernel' of the Hub, which is code that is not run" in sentence


def test_a_trusted_model_is_trained_exported_and_recorded(
    with_code: Any, marker: Path, topics_csv: Path, tmp_path: Path
) -> None:
    """Trained in this process, exported through a fresh one; every place that outlives the study says it."""
    import trained_study

    from peftsearch.spec import StudyError, StudyFile
    from peftsearch.study import Study

    model = with_code("own-architecture")
    data = trained_study.document("trusted", str(model), topics_csv, {"topics": "lora"})
    data["model"] = {"path": str(model), "trust_remote_code": True}
    data["domains"]["topics"]["data"]["source"] = str(topics_csv)
    data["training"] |= {"epochs": 1}
    chosen = {"topics": ("lora", trained_study.CONFIGURATIONS["lora"])}
    study: Study = trained_study.train_study(data, tmp_path, tmp_path / "storage", chosen)
    facts = study.facts()
    assert facts.provenance["trust_remote_code"] == str(model)
    assert facts.models[str(model)].trust_remote_code

    (exported,) = study.export(tmp_path / "adapters")
    card = (exported.folder / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "runs Python code that comes with the base model" in card

    from peftsearch.export import evaluate_adapter

    score = evaluate_adapter(exported.folder, StudyFile(data, folder=tmp_path), "topics", "validation")
    assert score["examples"] > 0
    # An exported folder cannot say about itself that its base's code may run: only the reader's study file can.
    with pytest.raises(StudyError, match="needs Python code that it brings along"):
        evaluate_adapter(
            exported.folder, StudyFile({**data, "model": str(model)}, folder=tmp_path), "topics", "validation"
        )


def test_changed_code_is_a_changed_model(with_code: Any, marker: Path, project: Path, storage: Path) -> None:
    from peftsearch.study import Study

    model = with_code("own-architecture")
    path = study_of(model, project, trust_remote_code=True)

    def fingerprint() -> str:
        (facts,) = Study.from_file(path, storage=storage).validate().model_facts.values()
        return facts.fingerprint

    before = fingerprint()
    (model / "own_code.py").write_text((model / "own_code.py").read_text() + "\n# changed\n")
    assert fingerprint() != before
