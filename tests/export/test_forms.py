"""What becomes of an adapter: merged, converted, timed, picked by error bars and latency, pushed, put into a store."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, card_errors, hub_server
from huggingface_hub import ModelCard
from s3_server import S3Server
from tiny_models import SAMPLES
from trained_study import CONFIGURATIONS, document, train_study

from peftsearch.cli.app import run_app
from peftsearch.export import ExportedAdapter, Predictor, predict_file
from peftsearch.files import names, place
from peftsearch.spec import StudyError
from peftsearch.storage import read_json
from peftsearch.study import Study

TRIALS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", CONFIGURATIONS["lora"]),
    "rslora": ("lora", CONFIGURATIONS["lora"] | {"variant": "rslora", "targets": "all-linear"}),
    "dora": ("lora", CONFIGURATIONS["lora"] | {"variant": "dora"}),
    "ia3": ("ia3", SAMPLES["ia3"] | {"learning_rate": 5e-2}),
    "layer_norm": ("layer_norm", SAMPLES["layer_norm"]),
    "full": ("full", CONFIGURATIONS["full"]),
    "qlora": ("qlora", SAMPLES["qlora"]),
    "adapter": ("adapter", CONFIGURATIONS["adapter"]),
    "prompt": ("prompt", CONFIGURATIONS["prompt"]),
    "bitfit": ("bitfit", SAMPLES["bitfit"]),
}
MERGED = ("lora", "rslora", "dora", "ia3", "layer_norm", "full")


@pytest.fixture(scope="module", autouse=True)
def quiet_machine() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def study(tiny_base: Path, topics_csv: Path, tmp_path_factory: pytest.TempPathFactory, quiet_machine: None) -> Study:
    """A finished trial for each of `TRIALS`, each in a domain of its own."""
    data = document("forms", str(tiny_base), topics_csv, {domain: method for domain, (method, _) in TRIALS.items()})
    data["training"]["epochs"] = 4
    return train_study(data, topics_csv.parent, tmp_path_factory.mktemp("storage"), TRIALS)


def code_of(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    return str(code)


def texts_of(study: Study) -> Path:
    return Path(read_json(study.folder.spec)["folder"]) / "topics.csv"


def predicted(folder: Path, study: Study, output: Path) -> list[str]:
    predict_file(folder, texts_of(study), output)
    return [json.loads(line)["prediction"] for line in output.read_text().splitlines()]


# --- merged ---


@pytest.mark.parametrize("domain", MERGED)
def test_a_merged_model_needs_nothing_but_transformers(domain: str, study: Study, tmp_path: Path) -> None:
    (plain,) = study.export(tmp_path / "plain", domain=domain)
    (merged,) = study.export(tmp_path / "merged", domain=domain, form="merged")
    assert isinstance(plain.folder, Path)
    assert isinstance(merged.folder, Path)
    assert merged.folder.name == f"{plain.folder.name}-merged"
    assert merged.score == pytest.approx(plain.score, abs=1e-3)
    there = {path.name for path in merged.folder.iterdir()}
    assert {"config.json", "model.safetensors"} <= there
    assert "adapter_config.json" not in there
    config = read_json(merged.folder / "config.json")
    assert config["id2label"] == {"0": "contract", "1": "disease", "2": "market"}
    card = ModelCard.load(merged.folder / "README.md")
    assert card.data.library_name == "transformers"
    code = code_of(merged.folder)
    assert "peft" not in code.replace(str(merged.folder), "").replace("peftsearch", "")
    program = (
        f"{code}\nimport sys\nassert not any(name.split('.')[0] in ('peft', 'peftsearch') for name in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    own = predicted(plain.folder, study, tmp_path / "plain.jsonl")
    assert predicted(merged.folder, study, tmp_path / "merged.jsonl") == own
    assert len(set(own)) > 1, "an answer that never changes would say little"


def test_merging_leaves_the_study_as_it_is(study: Study, tmp_path: Path) -> None:
    for form in ("merged", "adapter"):
        exported = study.export(tmp_path / form, domain="lora", form=form, tolerance=1e-6)  # type: ignore[arg-type]
    assert exported[0].score == pytest.approx(study.trials()[0].value, abs=1e-9)


@pytest.mark.parametrize(
    ("domain", "why"),
    [
        ("adapter", "a bottleneck adapter is a layer of its own"),
        ("prompt", "its soft tokens stand in front of every text"),
        ("bitfit", "its biases are kept beside the base's"),
        ("qlora", "its base is stored as nf4"),
    ],
)
def test_what_cannot_be_merged_is_refused(domain: str, why: str, study: Study, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=rf"trial \d+ \({domain}\) cannot be merged: {why}"):
        study.export(tmp_path / "out", domain=domain, form="merged")
    assert not (tmp_path / "out").exists()


# --- as a plain LoRA ---


def test_a_rank_stabilised_lora_becomes_a_plain_one(study: Study, tmp_path: Path) -> None:
    (plain,) = study.export(tmp_path / "plain", domain="rslora")
    (lora,) = study.export(tmp_path / "lora", domain="rslora", form="lora")
    assert isinstance(plain.folder, Path)
    assert isinstance(lora.folder, Path)
    before, after = (read_json(folder / "adapter_config.json") for folder in (plain.folder, lora.folder))
    assert (before["use_rslora"], after["use_rslora"]) == (True, False)
    assert (after["r"], after["lora_alpha"], after["task_type"]) == (4, 4, "SEQ_CLS")
    assert lora.score == pytest.approx(plain.score, abs=1e-3)
    own = predicted(plain.folder, study, tmp_path / "plain.jsonl")
    assert predicted(lora.folder, study, tmp_path / "lora.jsonl") == own
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code_of(lora.folder), "card", "exec"), {})
    assert printed.getvalue().startswith("[")


@pytest.mark.parametrize(
    ("domain", "why"), [("dora", "DoRA changes the length of weights too"), ("ia3", "it is no low-rank update")]
)
def test_what_cannot_become_a_plain_lora_is_refused(domain: str, why: str, study: Study, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=rf"cannot become a plain LoRA: {why}"):
        study.export(tmp_path / "out", domain=domain, form="lora")


def test_peft_drops_the_magnitudes_of_dora() -> None:
    """Why DoRA is refused; when this fails, PEFT has learned it."""
    from peft import LoraConfig, convert_to_lora, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = get_peft_model(
        BertForSequenceClassification(config), LoraConfig(r=2, use_dora=True, target_modules=["query"])
    )
    assert model.supports_lora_conversion()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(3.0)
    _, tensors = convert_to_lora(model, rank=2)
    assert not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


# --- timed and picked ---


@pytest.fixture(scope="module")
def exported(study: Study, tmp_path_factory: pytest.TempPathFactory) -> ExportedAdapter:
    return study.export(tmp_path_factory.mktemp("exported"), domain="lora")[0]


def test_speed_is_measured_and_shown(exported: ExportedAdapter) -> None:
    assert isinstance(exported.folder, Path)
    speed = exported.speed
    assert speed is not None
    assert 0 < speed.latency_ms <= speed.latency_p95_ms < 1000 * 60
    assert speed.batch_size == 60
    assert speed.threads == 1
    # Many at a time are faster than one at a time.
    assert speed.examples_per_second > 1000 / speed.latency_p95_ms
    assert read_json(exported.folder / "provenance.json")["speed"] == speed.as_json()
    card = (exported.folder / "README.md").read_text()
    assert f"{speed.latency_ms:.3g} ms for one example by itself" in card
    assert speed.hardware in card.replace("\\", "")


def test_a_latency_is_a_limit(study: Study, tmp_path: Path) -> None:
    with pytest.raises(
        StudyError, match=r"takes at most 1e-06 ms for an example: the fastest, trial 0 \(lora\), takes"
    ):
        study.export(tmp_path / "out", domain="lora", pick="best", max_latency=1e-6)
    assert not (tmp_path / "out").exists()
    (item,) = study.export(tmp_path / "out", domain="lora", pick="best", max_latency=1e6)
    assert item.record.number == 0
    with pytest.raises(StudyError, match="must be above 0 ms"):
        study.export(tmp_path / "out", max_latency=0.0)


def test_the_command_prints_what_it_exported(study: Study, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    storage = str(study.folder.storage)
    command = ["export", "forms", "--to", str(tmp_path / "out"), "--domain", "lora", "--storage", storage]
    assert run_app([*command, "--pick", "smallest", "--json"]) == 0
    (item,) = json.loads(capfd.readouterr().out)["exported"]
    assert item["score"] == pytest.approx(item["ledger_score"])
    assert (item["trial"], item["form"], item["reason"], item["repository"]) == (0, "adapter", None, None)
    assert item["speed"]["latency_ms"] > 0
    assert run_app(command) == 0
    out, err = capfd.readouterr()
    assert out == f"{item['folder']}\n"
    assert f"peftsearch predict {item['folder']} --input YOURS.csv" in err
    assert run_app([*command, "--merge", "--as-lora"]) == 2
    assert run_app(["export", "forms", "--storage", storage]) == 2
    assert "--to, or a repository of the Hub with --push" in capfd.readouterr().err


def test_three_commands_lead_to_predictions(
    study: Study, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a finished study, doing what each command says next."""
    monkeypatch.setenv("PEFTSEARCH_STORAGE", str(study.folder.storage))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("who,text\nme,party breach\nyou,fever\n")
    assert run_app(["frontier", "forms", "--domain", "lora"]) == 0
    assert run_app(["export", "forms", "--to", "adapters", "--domain", "lora", "--pick", "knee"]) == 0
    (said,) = re.findall(r"peftsearch (predict .*)", capfd.readouterr().err)
    assert run_app([word.replace("YOURS.csv", "mine.csv") for word in said.split()]) == 0
    lines = (tmp_path / "predicted.csv").read_text().splitlines()
    assert lines[0] == "who,text,prediction,prediction_probability"
    assert [line.split(",")[:2] for line in lines[1:]] == [["me", "party breach"], ["you", "fever"]]


# --- elsewhere ---


def test_an_export_goes_into_an_object_store(study: Study, s3_server: S3Server, tmp_path: Path) -> None:
    to = s3_server.storage("exports")
    (item,) = study.export(to, domain="lora")
    assert str(item.folder) == str(place(to) / "lora" / "00000-lora")
    assert item.folder is not None
    assert {"README.md", "adapter_model.safetensors", "labels.json", "provenance.json"} <= set(names(item.folder))
    # The card's code brings it here and loads it.
    copy = tmp_path / "card"
    copy.mkdir()
    from pyarrow import fs

    fs.copy_files(str(item.folder), str(copy))
    code = code_of(copy)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[")
    assert Predictor.load(tmp_path / "00000-lora").predict([{"text": "fever"}])
    # Again: an earlier export is replaced; what is not one is left alone.
    study.export(to, domain="lora")
    from peftsearch.files import write_bytes

    write_bytes(item.folder / "provenance.json", b"{}")
    with pytest.raises(StudyError, match="exists and is not an earlier export"):
        study.export(to, domain="lora")
    with pytest.raises(StudyError, match="there is no bucket 'nobodys'"):
        study.export(s3_server.storage("x", bucket="nobodys"), domain="lora")


def run_export(study: Study, url: str, *options: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its server's address when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(study.folder.storage / "hf")}
    if token is not None:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-m", "peftsearch", "export", "forms", "--storage", str(study.folder.storage)]
    return subprocess.run([*command, *options], capture_output=True, text=True, env=environment)


def test_an_export_is_pushed_to_a_repository(study: Study, tmp_path: Path) -> None:
    with hub_server() as hub:
        done = run_export(study, hub.url, "--push", "me/legal", "--domain", "lora", "--json")
        assert done.returncode == 0, done.stderr
        (item,) = json.loads(done.stdout)["exported"]
        assert (item["folder"], item["repository"]) == (None, f"{hub.url}/me/legal")
        assert TOKEN not in done.stdout + done.stderr
        pushed = hub.repositories["me/legal"]
        assert pushed.private
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "labels.json"} <= set(pushed.files)
        assert pushed.commits == ["Trial 0 (lora) of the peftsearch study forms"]
        card = pushed.files["README.md"].decode()
        assert "snapshot_download('me/legal')" in card
        assert "## Speed" in card
        assert TOKEN.encode() not in b"".join(pushed.files.values())
        (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert loaded.returncode == 0, loaded.stderr
        assert loaded.stdout.startswith("[")

        # Another trial of the same domain is a further commit; its own files take the place of the others.
        done = run_export(
            study, hub.url, "--push", "me/legal", "--domain", "lora", "--merge", "--to", str(tmp_path / "o")
        )
        assert done.returncode == 0, done.stderr
        assert "adapter_model.safetensors" not in pushed.files
        assert "model.safetensors" in pushed.files
        assert len(pushed.commits) == 2
        assert "snapshot_download" not in (tmp_path / "o/lora/00000-lora-merged/README.md").read_text().split("# or")[0]


def test_a_repository_is_not_taken_from_anybody(study: Study) -> None:
    with hub_server() as hub:
        assert run_export(study, hub.url, "--push", "me/legal", "--domain", "lora").returncode == 0
        cases: list[tuple[tuple[str, ...], str | None, str]] = [
            (("me/legal", "--domain", "ia3"), TOKEN, "is taken: it holds an adapter of the study 'forms' for 'lora'"),
            (("me/legal", "--domain", "ia3", "--pick", "best"), "hf_of_somebody_else", "is taken"),
            (("you/new", "--domain", "lora"), "hf_of_somebody_else", "set HF_TOKEN to a token that may"),
            (("you/new", "--domain", "lora"), None, "set HF_TOKEN to a token that may"),
            (("me/new",), TOKEN, "holds one adapter, and 10 trials are picked"),
            (("legal", "--domain", "lora"), TOKEN, "does not say whose repository it is: write OWNER/legal"),
            (("me/le gal", "--domain", "lora"), TOKEN, "is no name of a repository"),
        ]
        for (repo, *options), token, message in cases:
            done = run_export(study, hub.url, "--push", repo, *options, token=token)
            assert done.returncode == 2, done.stderr
            assert message in done.stderr
            assert "hf_of_somebody_else" not in done.stderr
        hub.repositories["me/mine"] = type(hub.repositories["me/legal"])(True, {"model.bin": b"x"})
        done = run_export(study, hub.url, "--push", "me/mine", "--domain", "lora")
        assert "is taken: it holds something else" in done.stderr
        assert set(hub.repositories) == {"me/legal", "me/mine"}
    done = run_export(study, hub.url, "--push", "me/legal", "--domain", "lora")
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr


def test_cards_are_what_the_hub_takes(study: Study, exported: ExportedAdapter) -> None:
    assert isinstance(exported.folder, Path)
    card = (exported.folder / "README.md").read_text()
    assert card_errors(card) == []
    loaded = ModelCard(card)
    again = ModelCard(str(loaded))
    assert again.data.to_dict() == loaded.data.to_dict()
    assert len(loaded.data.eval_results) == 6
    # The check can fail.
    assert card_errors(card.replace("type: lora", "type: a b")) != []
    assert card_errors(card.replace("tags:", "base_model: /here\ntags:", 1)) != []
