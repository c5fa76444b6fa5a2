"""Exported folders: what is in them, who can load them, what they score, and when they are refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from card_code import blocks_of, code_of
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from trained_study import CONFIGURATIONS, document, lively_base, train_study

from peftsearch.domains import load_raw
from peftsearch.export import ExportedAdapter, evaluate_adapter
from peftsearch.export.card import OWN_METHODS
from peftsearch.export.contents import _without_passwords
from peftsearch.export.folder import CARD
from peftsearch.export.verify import Job, score_folders
from peftsearch.frontier import escape_markdown
from peftsearch.spec import StudyError, StudyFile, TrialState
from peftsearch.storage import read_json, write_json
from peftsearch.study import Study
from peftsearch.training.checkpoint import WEIGHTS, read_checkpoint, trial_folder, write_checkpoint

METHODS = tuple(CONFIGURATIONS)
PACKAGE = "peftsearch_test_tiny_base"
LABELS = ["contract", "disease", "market"]


@pytest.fixture(scope="module")
def trained(
    tiny_base: Path, topics_csv: Path, tmp_path_factory: pytest.TempPathFactory, quiet_machine: None
) -> Iterator[Study]:
    """One finished trial of each method, each in a domain of its own that has the method's name; the base model is
    inside an installed package.
    """
    root = tmp_path_factory.mktemp("packages")
    package = root / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    lively_base(tiny_base, package / "model")
    data = document("tiny", f"package:{PACKAGE}/model", topics_csv, {method: method for method in METHODS})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        patch.setenv("PYTHONPATH", str(root), prepend=os.pathsep)
        trials = {method: (method, CONFIGURATIONS[method]) for method in METHODS}
        yield train_study(data, topics_csv.parent, tmp_path_factory.mktemp("storage"), trials)


@pytest.fixture
def study(trained: Study, tmp_path: Path) -> Study:
    """A copy of the study, to be harmed."""
    shutil.copytree(trained.folder.storage, tmp_path / "storage")
    return Study.open("tiny", tmp_path / "storage")


@pytest.fixture(scope="module")
def exported(trained: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedAdapter]:
    """Every trial, exported and verified."""
    told: list[str] = []
    found = trained.export(tmp_path_factory.mktemp("out") / "new" / "adapters", tolerance=0.0, told=told.append)
    assert len([text for text in told if "from disk" in text]) == len(METHODS)
    return {item.record.method: item for item in found}


def weights(study: Study, number: int) -> Path:
    return trial_folder(study.folder.path, f"{number:05d}") / WEIGHTS


def number(study: Study, method: str) -> int:
    return next(record.number for record in study.trials() if record.method == method)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what is in a folder ---


def test_every_method_is_exported_with_the_ledgers_score(trained: Study, exported: dict[str, ExportedAdapter]) -> None:
    records = {record.method: record for record in trained.trials()}
    assert {record.state for record in records.values()} == {TrialState.COMPLETE}
    assert exported.keys() == records.keys() == set(METHODS)
    for method, item in exported.items():
        assert item.record == records[method]
        assert item.score == records[method].value
        assert item.folder.name == f"{item.record.number:05d}-{method}"
        assert item.folder.parent.name == method
    parent = exported["lora"].folder.parents[1]
    assert {path.name for path in parent.iterdir()} == set(METHODS), "nothing is left beside the folders"
    # Always the same answer would be 1/6, and would say little about what was loaded.
    assert min(item.score for item in exported.values()) > 0.2


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_holds_all_that_its_reader_needs(
    method: str, trained: Study, exported: dict[str, ExportedAdapter]
) -> None:
    folder = exported[method].folder
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "labels.json", "provenance.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert json.loads((folder / "labels.json").read_text()) == LABELS
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "who can read one file can read all"
    if method == "full":
        assert {"config.json", "model.safetensors"} <= names
        assert read_json(folder / "config.json")["id2label"] == {str(i): label for i, label in enumerate(LABELS)}
    else:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        assert "config.json" not in names
        config = read_json(folder / "adapter_config.json")
        assert Path(config["base_model_name_or_path"]).name == "model"
        assert config["task_type"] == "SEQ_CLS"
        tensors = load_file(folder / "adapter_model.safetensors")
        assert any(name.endswith("classifier.weight") for name in tensors)
        # The base's checkpoint has no pooler: it was drawn for the trial, trained, and is exported with it.
        assert any(name.endswith("bert.pooler.dense.weight") for name in tensors)
        assert sum(t.numel() for t in tensors.values()) == exported[method].record.exported_parameters
    provenance = read_json(folder / "provenance.json")
    assert provenance["study"] == "tiny"
    assert provenance["trial"] == exported[method].record.model_dump(mode="json")
    assert provenance["domain"]["fingerprint"] == trained.facts().domains[method].fingerprint
    assert provenance["model"]["path"] == f"package:{PACKAGE}/model"
    assert provenance["specification"]["training"]["max_length"] == 16
    assert provenance["ledger"].startswith("sqlite:///")
    assert provenance["verified"]["score"] == exported[method].score
    assert provenance["verified"]["examples"] == trained.facts().domains[method].rows["validation"]


@pytest.mark.parametrize("method", METHODS)
def test_the_card_is_one_that_the_hub_reads(method: str, exported: dict[str, ExportedAdapter]) -> None:
    item = exported[method]
    card = ModelCard.load(item.folder / "README.md")
    assert card.data.library_name == ("transformers" if method == "full" else "peft")
    assert card.data.base_model is None, "the Hub takes only its own models there"
    assert escape_markdown(f"package:{PACKAGE}/model") in card.text
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.metrics == ["accuracy", "f1", "micro_f1", "weighted_f1", "balanced_accuracy", "mcc"]
    assert "peftsearch" in card.data.tags
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {name: value for name, value in item.record.scores.items() if "/" not in name}
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    for label in LABELS:
        shown = [f"{item.record.scores[f'{kind}/{label}']:.4f}" for kind in ("f1", "precision", "recall")]
        assert f"| {' | '.join([label, *shown])} |" in card.text
    assert f"| macro\\_f1 | {item.score:.4f} |" in card.text
    # The way back to the study.
    assert f"`front.html#{item.record.domain}/{item.record.number}`" in card.text
    assert item.record.mlflow_run_id is None or f"MLflow run `{item.record.mlflow_run_id}`" in card.text
    assert len(blocks_of(card.text)) == (2 if method == "full" else 3)
    compile(code_of(card.text), "card", "exec")


def test_the_tokenised_data_of_the_study_is_used_again(trained: Study, exported: dict[str, ExportedAdapter]) -> None:
    assert len(list(trained.folder.cache.iterdir())) == len(METHODS)


# --- who can load it ---

STRANGER = """
import contextlib, io, json, sys
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification
import torch

job = json.load(open(sys.argv[1]))
found = {}
for method, item in job["items"].items():
    if method not in job["own"]:
        assert not any(name.split(".")[0] == "peftsearch" for name in sys.modules)
    space, found[method] = {}, {}

    def score(labels=None):
        return f1_score(job["labels"], labels or space["classify"](job["texts"]), average="macro")

    for number, block in enumerate(item["blocks"]):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(block, space)
        # The first, and the one that loads an AutoPeftModel, load a model.
        found[method][f"block {number}"] = score()
    rows = space["pipe"](job["texts"], truncation=True, max_length=16)
    found[method]["pipeline"] = score([row["label"] for row in rows])
    if method == "lora":
        space["model"] = AutoModelForSequenceClassification.from_pretrained(item["folder"], num_labels=3).eval()
        found[method]["AutoModel"] = score()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_stranger_with_transformers_and_peft_gets_the_recorded_score(
    trained: Study, exported: dict[str, ExportedAdapter], tmp_path: Path
) -> None:
    rows = load_raw("lora", trained.spec, Path(read_json(trained.folder.spec)["folder"]))["validation"]
    # Their turn comes last: their cards import peftsearch.
    own = [method for method in METHODS if method in OWN_METHODS]
    order = [*(method for method in METHODS if method not in own), *own]
    items = {
        method: {
            "blocks": blocks_of((exported[method].folder / "README.md").read_text()),
            "folder": str(exported[method].folder),
        }
        for method in order
    }
    job = {
        "texts": rows.column("text").to_pylist(),
        "labels": rows.column("label").to_pylist(),
        "items": items,
        "own": own,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "job.json")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == set(METHODS)
    for method, scores in found.items():
        assert len(scores) == (3 if method == "full" else 5 if method == "lora" else 4)
        for way, score in scores.items():
            assert score == pytest.approx(exported[method].score, abs=1e-9), (method, way)


def test_lora_on_a_layer_that_the_checkpoint_lacks_is_exported_too(
    tiny_base: Path, topics_csv: Path, tmp_path: Path
) -> None:
    # all-linear adapts the pooler as well, which the base does not hold and PEFT would not save.
    data = document("linear", str(tiny_base), topics_csv, {"topics": "lora"})
    trial = ("lora", CONFIGURATIONS["lora"] | {"targets": "all-linear"})
    study = train_study(data, topics_csv.parent, tmp_path / "storage", {"topics": trial})
    (item,) = study.export(tmp_path / "out", tolerance=1e-6)
    assert item.score == pytest.approx(study.trials()[0].value)
    assert f"base = '{tiny_base}'" in (item.folder / "README.md").read_text()


# --- what is refused ---


def test_a_damaged_folder_does_not_pass(trained: Study, exported: dict[str, ExportedAdapter], tmp_path: Path) -> None:
    folders = {}
    for name in ("intact", "altered", "cut", "headless"):
        folders[name] = Path(shutil.copytree(exported["lora"].folder, tmp_path / name))
    file = folders["altered"] / "adapter_model.safetensors"
    save_file({name: -3 * tensor for name, tensor in load_file(file).items()}, file)
    file = folders["cut"] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (folders["headless"] / "labels.json").unlink()
    (data,) = [path for path in trained.folder.cache.iterdir() if read_json(path / "manifest.json")["name"] == "lora"]
    intact, altered, cut, headless = score_folders(
        [Job(str(folder), str(data), "validation", 64, "cpu") for folder in folders.values()]
    )
    assert intact.scores["macro_f1"] == exported["lora"].score
    assert altered.scores["macro_f1"] != exported["lora"].score
    assert cut.error is not None
    assert "cannot load the model" in cut.error
    assert headless.error is not None
    assert "labels.json" in headless.error


def test_weights_that_score_otherwise_than_the_ledger_are_refused(study: Study, tmp_path: Path) -> None:
    path = weights(study, number(study, "lora"))
    tensors, meta = read_checkpoint(path)
    write_checkpoint(path, {name: -3 * tensor for name, tensor in tensors.items()}, meta)
    with pytest.raises(StudyError, match=r"its folder scores macro_f1 0\.\d+ and the ledger says 0\.\d+") as error:
        study.export(tmp_path / "out", max_parameters=10**9)
    assert f"trial {number(study, 'lora')} (lora, lora)" in str(error.value)
    assert "--tolerance" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_methods_own_best_is_exported_though_another_beats_it(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = study.trials()
    lora = next(record for record in records if record.method == "lora")
    rival = lora.model_copy(update={"number": 99, "method": "adapter", "trainable_parameters": 1, "checkpoint": None})
    gone = lora.model_copy(update={"number": 98, "trainable_parameters": 2, "checkpoint": None})
    monkeypatch.setattr(Study, "trials", lambda _: [*records, gone, rival])
    with pytest.raises(StudyError, match=r"the weights of trial 99 \(adapter\) are not there"):
        study.export(tmp_path / "out", domain="lora")
    left_out: list[str] = []
    (exported,) = study.export(tmp_path / "out", domain="lora", method="lora", pick="best", left_out=left_out.append)
    assert left_out == ["the weights of trial 98 (lora, lora) are not there any more"]
    assert exported.record.number == lora.number
    card = (exported.folder / CARD).read_text()
    assert ", among the trials of LoRA (one of another method is no worse, with no more parameters)." in card
    with pytest.raises(StudyError, match=r"lora: no trial of adapter that has its weights has reached the full budget"):
        study.export(tmp_path / "out", domain="lora", method="adapter")
    with pytest.raises(StudyError, match=r"no trial of a method 'lorra'; did you mean 'lora'\?"):
        study.export(tmp_path / "out", method="lorra")


@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "other"])
def test_damaged_weights_are_one_sentence_and_leave_nothing(study: Study, tmp_path: Path, harm: str) -> None:
    path = weights(study, number(study, "prompt"))
    data = path.read_bytes()
    if harm == "cut":
        path.write_bytes(data[:-50])
    elif harm == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "missing":
        path.unlink()
    else:
        shutil.copy(weights(study, number(study, "lora")), path)
    with pytest.raises(StudyError, match=rf"trial {number(study, 'prompt')} \(prompt\)") as error:
        study.export(tmp_path / "a" / "b", domain="prompt")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_a_folder_that_is_taken_is_left_alone(
    study: Study, exported: dict[str, ExportedAdapter], tmp_path: Path
) -> None:
    target = tmp_path / "out" / "lora" / exported["lora"].folder.name
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(StudyError, match="exists and is not an earlier export"):
        study.export(tmp_path / "out")
    assert content(tmp_path / "out") == {f"lora/{target.name}/notes.txt": b"mine"}

    # The trial of a study of the same name that began at another time is another trial.
    shutil.rmtree(target)
    shutil.copytree(exported["lora"].folder, target)
    known = read_json(target / "provenance.json")
    known["trial"]["started"] = "2020-01-01T00:00:00.000+00:00"
    write_json(target / "provenance.json", known)
    before = content(target)
    with pytest.raises(StudyError, match="not an earlier export"):
        study.export(tmp_path / "out", domain="lora")
    assert content(target) == before


def test_an_earlier_export_is_replaced(study: Study, exported: dict[str, ExportedAdapter], tmp_path: Path) -> None:
    target = tmp_path / "out" / "lora" / exported["lora"].folder.name
    shutil.copytree(exported["lora"].folder, target)
    (target / "adapter_model.safetensors").write_bytes(b"worn")
    (item,) = study.export(tmp_path / "out", domain="lora", pick="best")
    assert item.folder == target
    file = "adapter_model.safetensors"
    assert (target / file).read_bytes() == (exported["lora"].folder / file).read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_parameters": 1}, "no trial on the front trains at most 1 parameters"),
        ({"min_metric": 1.1}, r"no trial on the front reaches 1\.1"),
        ({"domain": "adpater"}, "did you mean 'adapter'"),
        ({"pick": "cheapest"}, "unknown pick"),
        ({"tolerance": -1.0}, "tolerance must be at least 0"),
        ({"tolerance": float("nan")}, "tolerance must be at least 0"),
    ],
)
def test_nothing_to_export_is_an_error(trained: Study, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        trained.export(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_an_error_before_any_work(trained: Study, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(StudyError, match="cannot write to"):
            trained.export(place)


def test_without_the_data_nothing_is_verified(study: Study, tmp_path: Path) -> None:
    known = read_json(study.folder.spec)
    source = known["study"]["domains"]["lora"]["data"]
    folder = tmp_path / "data"
    folder.mkdir()
    original = Path(known["folder"]) / source["source"]
    write_json(study.folder.spec, known | {"folder": str(folder)})
    with pytest.raises(StudyError, match="exports of domain 'lora' cannot be verified, as its data cannot be prepared"):
        study.export(tmp_path / "out", domain="lora")

    (folder / original.name).write_text(original.read_text().replace("fever", "breach"))
    with pytest.raises(StudyError, match="has changed since the study 'tiny'"):
        study.export(tmp_path / "out", domain="lora")
    assert not (tmp_path / "out").exists()


def test_passwords_stay_out_of_the_provenance() -> None:
    tracking = {"ledger": "postgresql://me:secret@db/studies", "mlflow": "https://me:secret@mlflow.example"}
    found = json.dumps(_without_passwords({"tracking": tracking}))
    assert "secret" not in found
    assert "mlflow.example" in found


# --- scoring from disk ---


def evaluation_file(trained: Study) -> StudyFile:
    known = read_json(trained.folder.spec)
    return StudyFile(known["study"], folder=Path(known["folder"]))


def test_evaluate_gives_the_ledgers_score(trained: Study, exported: dict[str, ExportedAdapter]) -> None:
    file = evaluation_file(trained)
    for method, split in (("lora", "validation"), ("full", "validation"), ("adapter", "test")):
        found = evaluate_adapter(exported[method].folder, file, method, split)
        assert found["metric"] == "macro_f1"
        assert found["value"] == found["scores"]["macro_f1"]
        assert found["examples"] == trained.facts().domains[method].rows[split]
        if split == "validation":
            assert found["scores"] == exported[method].record.scores


def test_evaluate_says_what_is_wrong(trained: Study, exported: dict[str, ExportedAdapter], tmp_path: Path) -> None:
    file, folder = evaluation_file(trained), exported["lora"].folder
    with pytest.raises(StudyError, match="no adapter folder"):
        evaluate_adapter(tmp_path / "nowhere", file, "lora", "test")
    with pytest.raises(StudyError, match="is no adapter"):
        evaluate_adapter(tmp_path, file, "lora", "test")
    with pytest.raises(StudyError, match="has no domain 'lore'"):
        evaluate_adapter(folder, file, "lore", "test")
    with pytest.raises(StudyError, match="no split 'dev'; its splits: train, validation, test"):
        evaluate_adapter(folder, file, "lora", "dev")


def test_evaluate_refuses_other_labels(
    trained: Study, exported: dict[str, ExportedAdapter], topics_csv: Path, tmp_path: Path
) -> None:
    (tmp_path / topics_csv.name).write_text(topics_csv.read_text().replace(",market,", ",finance,"))
    known = read_json(trained.folder.spec)
    file = StudyFile(known["study"], folder=tmp_path)
    with pytest.raises(StudyError, match="the data has 'finance', which the adapter does not know; the adapter has"):
        evaluate_adapter(exported["lora"].folder, file, "lora", "test")
