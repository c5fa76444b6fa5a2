"""No pickle is loaded: not as weights, not as an adapter, not from the storage or its cache."""

from __future__ import annotations

import ast
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_study import small_study, write_study
from security_files import Malicious, Outcome

import peftsearch as package

Cli = Callable[..., Outcome]


def plant(path: Path, marker: Path) -> None:
    """A pickle that makes the marker where it is loaded, by `pickle` or by `torch.load`."""
    torch.save({"weight": Malicious(marker)}, path)


def test_the_trap_works(tmp_path: Path) -> None:
    plant(tmp_path / "trap.bin", tmp_path / "marker")
    torch.load(tmp_path / "trap.bin", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("command", ["validate", "run"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused(
    command: str, name: str, peftsearch: Cli, base: Path, tmp_path: Path, project: Path, storage: Path
) -> None:
    model, marker = Path(shutil.copytree(base, tmp_path / "model")), tmp_path / "marker"
    (model / "model.safetensors").unlink()
    plant(model / name, marker)
    sentence = peftsearch(command, write_study(project, small_study(model)), "--storage", storage).sentence
    assert "holds no model.safetensors" in sentence
    assert "pickled weights such as pytorch_model.bin can run code and are not loaded" in sentence
    assert "save_pretrained" in sentence
    assert not marker.exists()


def test_a_pickle_beside_safetensors_is_not_read(
    peftsearch: Cli, base: Path, tmp_path: Path, project: Path, storage: Path
) -> None:
    from peftsearch.domains.tasks import Head
    from peftsearch.training.base_model import load_model

    model, marker = Path(shutil.copytree(base, tmp_path / "model")), tmp_path / "marker"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pickle", "tokenizer.model"):
        plant(model / name, marker)
    done = peftsearch("validate", write_study(project, small_study(model)), "--storage", storage)
    assert done.status == 0, done.err
    load_model(str(model), None, Head("AutoModelForSequenceClassification", "SEQ_CLS"), {"num_labels": 2})
    assert not marker.exists()


def test_weights_of_the_hub_are_safetensors_too(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that downloads a model takes no pickle: here the Hub's cache holds nothing else of it."""
    import huggingface_hub
    import transformers

    from peftsearch.domains.tasks import Head
    from peftsearch.training.base_model import load_model

    marker, commit = tmp_path / "marker", "0" * 40
    cached = tmp_path / "hub" / "models--somebody--model"
    shutil.copytree(base, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit / "model.safetensors").unlink()
    plant(cached / "snapshots" / commit / "pytorch_model.bin", marker)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(OSError, match="safetensors"):
        load_model("somebody/model", None, Head("AutoModelForSequenceClassification", "SEQ_CLS"), {"num_labels": 2})
    assert not marker.exists()


def test_a_pickled_adapter_is_refused(peftsearch: Cli, base: Path, tmp_path: Path, project: Path) -> None:
    adapter, marker = tmp_path / "adapter", tmp_path / "marker"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "base_model_name_or_path": "{base}"}}')
    (adapter / "labels.json").write_text('["no", "yes"]')
    plant(adapter / "adapter_model.bin", marker)
    study = write_study(project, small_study(base))
    sentence = peftsearch("evaluate", adapter, "--study", study, "--domain", "legal").sentence
    assert "holds no adapter_model.safetensors" in sentence
    assert not marker.exists()


def test_nothing_planted_in_the_storage_is_loaded(peftsearch: Cli, base: Path, tmp_path: Path, project: Path) -> None:
    """Whoever can write the storage can spoil a study, and cannot run code in it."""
    storage, marker = tmp_path / "storage", tmp_path / "marker"
    study = write_study(project, small_study(base))
    assert peftsearch("validate", study, "--storage", storage).status == 0
    folders = [storage, *(path for path in storage.rglob("*") if path.is_dir())]
    assert len(folders) > 3
    for folder in folders:
        for name in ("state.pkl", "cache.pickle", "dataset.arrow.pkl", "state.json.pkl", "weights.bin", "state.pt"):
            plant(folder / name, marker)
        for name in ("sitecustomize.py", "datasets.py", "torch.py", "conftest.py"):
            (folder / name).write_text(f"from pathlib import Path; Path({str(marker)!r}).touch()")
    assert peftsearch("validate", study, "--storage", storage).status == 0
    assert peftsearch("list", "--storage", storage).status == 0
    assert not marker.exists()


def test_a_cached_tokenizer_cannot_bring_code(peftsearch: Cli, base: Path, tmp_path: Path, project: Path) -> None:
    import json

    from peftsearch.domains.prepare import _open_tokenizer
    from peftsearch.spec import StudyError

    marker, folder = tmp_path / "marker", Path(shutil.copytree(base, tmp_path / "tokenizer"))
    (folder / "own.py").write_text(f"from pathlib import Path; Path({str(marker)!r}).touch()\nclass Own: pass")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").unlink()
    with pytest.raises(StudyError):
        _open_tokenizer(folder)
    assert not marker.exists()


FORBIDDEN = {
    "pickle": {"load", "loads", "Unpickler"},
    "cloudpickle": {"load", "loads"},
    "dill": {"load", "loads"},
    "joblib": {"load"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "torch": {"load"},
    "np": {"load"},
    "numpy": {"load"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load"},
    "pd": {"read_pickle"},
    "pandas": {"read_pickle"},
}


def test_the_package_calls_nothing_that_unpickles() -> None:
    found = []
    for path in sorted(Path(package.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.attr in FORBIDDEN.get(node.value.id, ()):
                    found.append(f"{path.name}: {node.value.id}.{node.attr}")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                found.append(f"{path.name}: {node.func.id}")
            elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                found.append(f"{path.name}: {node.arg}")
    assert found == []


def test_pickle_really_is_what_the_trap_needs(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists()
