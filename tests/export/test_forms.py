"""What becomes of an adapter: merged, converted, timed, picked by error bars and latency, pushed, put into a store."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from card_code import code_of, run_card
from hub_server import TOKEN, Repository, card_errors, hub_server
from huggingface_hub import ModelCard
from pyarrow import fs
from s3_server import S3Server
from tiny_models import SAMPLES
from trained_study import CONFIGURATIONS, document, lively_base, train_study

from peftsearch.cli.app import run_app
from peftsearch.export import ExportedAdapter, Predictor, predict_file
from peftsearch.export.convert import check_form
from peftsearch.export.verify import Job, Score, score_folders
from peftsearch.files import names, place, write_bytes
from peftsearch.methods import METHODS
from peftsearch.spec import StudyError, TrialRecord, TrialState
from peftsearch.storage import read_json, write_json
from peftsearch.study import Study

pytestmark = pytest.mark.slow

TRIALS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", CONFIGURATIONS["lora"]),
    "rslora": ("lora", CONFIGURATIONS["lora"] | {"variant": "rslora", "targets": "all-linear", "learning_rate": 2e-3}),
    "dora": ("lora", CONFIGURATIONS["lora"] | {"variant": "dora"}),
    "ia3": ("ia3", SAMPLES["ia3"] | {"learning_rate": 5e-2}),
    "layer_norm": ("layer_norm", SAMPLES["layer_norm"]),
    "full": ("full", CONFIGURATIONS["full"]),
}


@pytest.fixture(scope="module")
def study(tiny_base: Path, topics_csv: Path, tmp_path_factory: pytest.TempPathFactory, quiet_machine: None) -> Study:
    """A finished trial for each of `TRIALS`, each in a domain of its own."""
    base = lively_base(tiny_base, tmp_path_factory.mktemp("base") / "model")
    data = document("forms", str(base), topics_csv, {domain: method for domain, (method, _) in TRIALS.items()})
    data["training"]["epochs"] = 6
    return train_study(data, topics_csv.parent, tmp_path_factory.mktemp("storage"), TRIALS)


def texts_of(study: Study) -> Path:
    return Path(read_json(study.folder.spec)["folder"]) / "topics.csv"


def predicted(folder: Path, study: Study, output: Path) -> tuple[list[str], list[float]]:
    """The label of every text, and its probability."""
    predict_file(folder, texts_of(study), output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return [row["prediction"] for row in rows], [row["prediction_probability"] for row in rows]


def assert_same_answers(one: Path, other: Path, study: Study, folder: Path) -> None:
    labels, probabilities = predicted(one, study, folder / "one.jsonl")
    found = predicted(other, study, folder / "other.jsonl")
    assert found[0] == labels
    assert found[1] == pytest.approx(probabilities, abs=1e-4)
    assert max(probabilities) - min(probabilities) > 1e-3, "answers that do not depend on the text would say little"


@pytest.fixture(scope="module")
def plain(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedAdapter]:
    """Every adapter as it was trained, by domain."""
    return {item.record.domain: item for item in study.export(tmp_path_factory.mktemp("plain"))}


@pytest.fixture(scope="module")
def merged(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedAdapter]:
    """Every adapter merged into its base."""
    return {item.record.domain: item for item in study.export(tmp_path_factory.mktemp("merged"), form="merged")}


def folder_of(item: ExportedAdapter) -> Path:
    assert isinstance(item.folder, Path)
    return item.folder


# --- merged ---


@pytest.mark.parametrize("domain", TRIALS)
def test_a_merged_model_is_the_adapters_equal(
    domain: str, plain: dict[str, ExportedAdapter], merged: dict[str, ExportedAdapter], study: Study, tmp_path: Path
) -> None:
    adapter, model = folder_of(plain[domain]), folder_of(merged[domain])
    assert model.name == f"{adapter.name}-merged"
    assert merged[domain].score == pytest.approx(plain[domain].score, abs=1e-3)
    there = {path.name for path in model.iterdir()}
    assert {"config.json", "model.safetensors", "labels.json", "provenance.json", "tokenizer.json"} <= there
    assert "adapter_config.json" not in there
    assert read_json(model / "config.json")["id2label"] == {"0": "contract", "1": "disease", "2": "market"}
    assert read_json(model / "provenance.json")["form"] == "merged"
    assert ModelCard.load(model / "README.md").data.library_name == "transformers"
    assert_same_answers(adapter, model, study, tmp_path)


def test_merged_models_need_nothing_but_transformers(merged: dict[str, ExportedAdapter], tmp_path: Path) -> None:
    lines = [
        "import sys",
        "from pathlib import Path",
        "for path in sys.argv[1:]:",
        "    exec(Path(path).read_text(), {})",
    ]
    lines.append("assert not any(name.split('.')[0] in ('peft', 'peftsearch') for name in sys.modules)")
    for domain, item in merged.items():
        (tmp_path / f"{domain}.py").write_text(code_of((folder_of(item) / "README.md").read_text()))
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), *(str(tmp_path / f"{domain}.py") for domain in merged)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    # Labels, and those of the pipeline.
    assert len(done.stdout.splitlines()) == 2 * len(TRIALS)


def test_merging_leaves_the_study_as_it_is(
    study: Study, merged: dict[str, ExportedAdapter], plain: dict[str, ExportedAdapter]
) -> None:
    for record in study.trials():
        assert plain[record.domain].score == pytest.approx(record.value, abs=1e-9)


def trial(method: str, **hyperparameters: Any) -> TrialRecord:
    return TrialRecord(
        number=7,
        model="m",
        domain="d",
        method=method,
        state=TrialState.COMPLETE,
        seed=0,
        trainable_parameters=1,
        hyperparameters=hyperparameters,
    )


def test_every_method_can_be_merged_or_says_why_not() -> None:
    reasons = {
        "adapter": "a bottleneck adapter is a layer of its own",
        "hybrid": "its bottleneck adapter is a layer of its own",
        "prompt": "its soft tokens stand in front of every text",
        "p_tuning": "its soft tokens stand in front of every text",
        "prefix": "its keys and values stand in front of every text",
        "p_tuning_v2": "its keys and values stand in front of every text",
        "bitfit": "its biases are kept beside the base's",
        "qlora": "its base is stored as nf4",
    }
    done = {method for method, _ in TRIALS.values()}
    assert done | set(reasons) == set(METHODS)
    for method, why in reasons.items():
        with pytest.raises(StudyError, match=rf"trial 7 \({method}\) cannot be merged: {why}"):
            check_form("merged", trial(method, **SAMPLES[method]))


def test_what_cannot_be_is_refused_before_any_work(study: Study, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"trial 3 \(ia3\) cannot become a plain LoRA: it is no low-rank update"):
        study.export(tmp_path / "out", domain="ia3", form="lora")
    with pytest.raises(StudyError, match="unknown form 'lore'; did you mean 'lora'"):
        study.export(tmp_path / "out", form="lore")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


# --- as a plain LoRA ---


def test_a_rank_stabilised_lora_becomes_a_plain_one(
    study: Study, plain: dict[str, ExportedAdapter], tmp_path: Path
) -> None:
    told: list[str] = []
    left_out: list[str] = []
    items = study.export(tmp_path / "lora", pick="best", form="lora", told=told.append, left_out=left_out.append)
    assert [item.record.domain for item in items] == ["lora", "rslora"]
    assert len(left_out) == 4
    assert [text for text in told if text.startswith("Left out: trial ")] == [f"Left out: {text}" for text in left_out]
    lora = items[1]
    adapter, converted = folder_of(plain["rslora"]), folder_of(lora)
    before, after = (read_json(folder / "adapter_config.json") for folder in (adapter, converted))
    assert (before["use_rslora"], after["use_rslora"]) == (True, False)
    assert (after["r"], after["lora_alpha"], after["task_type"]) == (4, 4, "SEQ_CLS")
    assert lora.score == pytest.approx(plain["rslora"].score, abs=1e-3)
    assert_same_answers(adapter, converted, study, tmp_path)
    printed, _ = run_card((converted / "README.md").read_text())
    assert printed.startswith("[")


def test_dora_is_no_plain_lora() -> None:
    with pytest.raises(StudyError, match="cannot become a plain LoRA: DoRA changes the length of weights too"):
        check_form("lora", trial("lora", variant="dora"))


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


def test_speed_is_measured_and_shown(plain: dict[str, ExportedAdapter]) -> None:
    folder, speed = folder_of(plain["lora"]), plain["lora"].speed
    assert speed is not None
    assert 0 < speed.latency_ms <= speed.latency_p95_ms < 1000 * 60
    assert speed.batch_size == 60
    assert speed.threads == 1
    # Many at a time are faster than one at a time.
    assert speed.examples_per_second > 1000 / speed.latency_p95_ms
    assert read_json(folder / "provenance.json")["speed"] == speed.as_json()
    card = (folder / "README.md").read_text()
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
    with pytest.raises(StudyError, match="unknown pick 'bets'; did you mean 'best'"):
        study.export(tmp_path / "out", pick="bets", max_latency=1e6)
    with pytest.raises(StudyError, match="must be above 0 ms"):
        study.export(tmp_path / "out", max_latency=0.0)


def test_a_folder_that_does_not_load_is_not_passed_over_as_slow(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(jobs: Sequence[Job], told: Any) -> list[Score]:
        first, *others = score_folders(jobs, told)
        return [replace(first, error="cannot load the model", measured=None), *others]

    monkeypatch.setattr("peftsearch.export.trials.score_folders", broken)
    left_out: list[str] = []
    study.export(tmp_path / "out", max_latency=1e6, left_out=left_out.append)
    (sentence,) = (text for text in left_out if "could not load its folder: cannot load the model" in text)
    assert re.match(r"trial \d+ \(\w+, \w+\) is not exported", sentence)


def test_the_command_prints_what_it_exported(study: Study, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    storage = str(study.folder.storage)
    command = ["export", "forms", "--to", str(tmp_path / "out"), "--domain", "lora", "--storage", storage]
    assert run_app([*command, "--pick", "smallest", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["left_out"] == []
    (item,) = printed["exported"]
    assert item["score"] == pytest.approx(item["ledger_score"])
    assert (item["trial"], item["form"], item["reason"], item["repository"]) == (0, "adapter", None, None)
    assert item["speed"]["latency_ms"] > 0
    assert run_app(command) == 0
    out, err = capfd.readouterr()
    assert out == f"{item['folder']}\n"
    assert f"peftsearch predict {item['folder']} --input YOURS.csv" in err
    assert "it reads the column 'text', or what --column names" in err
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
    fs.copy_files(str(item.folder), str(copy))
    code = code_of((copy / "README.md").read_text())
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[")
    assert Predictor.load(tmp_path / "00000-lora").predict([{"text": "fever"}])
    # Again: an earlier export is replaced; what is not one is left alone.
    study.export(to, domain="lora")
    write_bytes(item.folder / "provenance.json", b"{}")
    with pytest.raises(StudyError, match="exists and is not an earlier export"):
        study.export(to, domain="lora")
    with pytest.raises(StudyError, match="there is no bucket 'nobodys'"):
        study.export(s3_server.storage("x", bucket="nobodys"), domain="lora")


def test_an_export_goes_wherever_pyarrow_writes(study: Study) -> None:
    # A file system in this process's memory; Azure's and Hadoop's are asked in the same way.
    (item,) = study.export("fsspec+memory://exports/mine", domain="lora")
    assert str(item.folder) == "fsspec+memory://exports/mine/lora/00000-lora"
    assert item.folder is not None
    assert {"README.md", "adapter_model.safetensors", "labels.json", "provenance.json"} <= set(names(item.folder))
    study.export("fsspec+memory://exports/mine", domain="lora")
    write_bytes(item.folder / "provenance.json", b"{}")
    with pytest.raises(StudyError, match="exists and is not an earlier export"):
        study.export("fsspec+memory://exports/mine", domain="lora")
    with pytest.raises(StudyError, match="cannot write to 'ftp://host/a': Unrecognized filesystem type"):
        study.export("ftp://host/a", domain="lora")


PROGRAM = """
import contextlib, io, json, os, sys
from peftsearch.cli.app import run_app

found = []
for token, arguments in json.load(sys.stdin):
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_app(arguments)
    found.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def run_exports(
    study: Study, url: str, cases: Sequence[tuple[str | None, Sequence[str]]]
) -> list[tuple[int, str, str]]:
    """Exports with a token each, in a process of their own: huggingface_hub reads its server's address when it is
    imported. Their exit statuses and what they wrote."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(study.folder.storage) + "-hf"}
    command = ["export", "forms", "--storage", str(study.folder.storage)]
    given = json.dumps([[token, [*command, *options]] for token, options in cases])
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=given, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [tuple(item) for item in json.loads(done.stdout)]


def assert_names_no_place(pushed: Repository, study: Study) -> None:
    """That no text of a repository holds a folder of this machine."""
    places = (
        study.folder.storage,
        texts_of(study).parent,
        Path(study.spec.models[0].path).parent,
        Path.home(),
        "/tmp/",
    )
    for name, content in pushed.files.items():
        if not name.endswith(".safetensors"):
            assert [str(place) for place in places if str(place) in content.decode()] == [], name


def test_an_export_is_pushed_to_a_repository(study: Study, tmp_path: Path) -> None:
    push = ("--push", "me/legal", "--domain", "lora")
    with hub_server() as hub:
        ((status, out, err),) = run_exports(study, hub.url, [(TOKEN, [*push, "--json"])])
        assert status == 0, err
        (item,) = json.loads(out)["exported"]
        assert (item["folder"], item["repository"]) == (None, f"{hub.url}/me/legal")
        assert TOKEN not in out + err
        pushed = hub.repositories["me/legal"]
        assert pushed.private
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "labels.json"} <= set(pushed.files)
        assert pushed.commits == ["Trial 0 (lora) of the peftsearch study forms"]
        card = pushed.files["README.md"].decode()
        assert "snapshot_download('me/legal')" in card
        assert "## Speed" in card
        assert TOKEN.encode() not in b"".join(pushed.files.values())
        known = json.loads(pushed.files["provenance.json"])
        assert set(known["pushed"]["files"]) == set(pushed.files)
        assert "ledger" not in known
        assert "tracking" not in known["specification"]
        assert known["verified"]["score"] == item["score"]
        assert_names_no_place(pushed, study)
        base = Path(study.spec.models[0].path)
        assert f"\nbase = './{base.name}'  # replace it" in card
        config = json.loads(pushed.files["adapter_config.json"])
        assert config["base_model_name_or_path"] == f"./{base.name}"
        # What somebody puts beside it stays, below.
        pushed.files["examples.md"] = b"Mine"
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
        # The base is nowhere on the Hub, and nothing else of that name is taken for it.
        arguments: dict[str, Any] = {"capture_output": True, "text": True, "env": environment, "cwd": tmp_path}
        loaded = subprocess.run([sys.executable, "-c", code_of(card)], **arguments)
        assert loaded.returncode != 0
        replaced = code_of(card).replace(f"'./{base.name}'", repr(str(base)))
        loaded = subprocess.run([sys.executable, "-c", replaced], **arguments)
        assert loaded.returncode == 0, loaded.stderr
        assert loaded.stdout.startswith("[")
        # Nor by our own commands, which take the place from where the sentence says.
        copy = tmp_path / "downloaded"
        copy.mkdir()
        for name, content in pushed.files.items():
            (copy / name).write_bytes(content)
        with pytest.raises(
            StudyError, match=rf"base model '\./{base.name}' .* write its .*place as base_model_name_or"
        ):
            Predictor.load(copy)
        write_json(copy / "adapter_config.json", {**config, "base_model_name_or_path": str(base)})
        assert Predictor.load(copy).predict([{"text": "fever"}])

        # Another form of it is a further commit; its files take the place of the others.
        options = [*push, "--merge", "--to", str(tmp_path / "out")]
        ((status, _, err),) = run_exports(study, hub.url, [(TOKEN, options)])
        assert status == 0, err
        assert "adapter_model.safetensors" not in pushed.files
        assert "model.safetensors" in pushed.files
        assert pushed.files["examples.md"] == b"Mine"
        assert len(pushed.commits) == 2
        assert_names_no_place(pushed, study)
        local = (tmp_path / "out" / "lora" / "00000-lora-merged" / "README.md").read_text()
        assert f"folder = '{tmp_path}/out/lora/00000-lora-merged'" in local


def test_a_repository_is_not_taken_from_anybody(study: Study) -> None:
    with hub_server() as hub:
        ours = json.dumps({"study": "forms", "domain": {"name": "lora"}}).encode()
        hub.repositories["me/legal"] = Repository(True, {"provenance.json": ours})
        hub.repositories["me/mine"] = Repository(True, {"model.bin": b"x"})
        other = "hf_of_somebody_else"
        cases: list[tuple[str | None, Sequence[str], str]] = [
            (TOKEN, ("me/legal", "--domain", "ia3"), "is taken: it holds an adapter of the study 'forms' for 'lora'"),
            (TOKEN, ("me/mine", "--domain", "lora"), "is taken: it holds something else"),
            (TOKEN, ("me/new",), "holds one adapter, and 6 trials are picked"),
            (TOKEN, ("legal", "--domain", "lora"), "does not say whose repository it is: write OWNER/legal"),
            (TOKEN, ("me/le gal", "--domain", "lora"), "is no name of a repository"),
            (other, ("you/new", "--domain", "lora"), "set HF_TOKEN to a token that may"),
            (None, ("you/new", "--domain", "lora"), "set HF_TOKEN to a token that may"),
        ]
        found = run_exports(study, hub.url, [(token, ("--push", *options)) for token, options, _ in cases])
        for (_, options, message), (status, out, err) in zip(cases, found, strict=True):
            assert (status, out) == (2, ""), (options, err)
            assert message in err, (options, err)
            assert other not in err
            # Before any work.
            assert "Exporting" not in err
        assert set(hub.repositories) == {"me/legal", "me/mine"}
    ((status, _, err),) = run_exports(study, hub.url, [(TOKEN, ("--push", "me/legal", "--domain", "lora"))])
    assert status == 2
    assert "cannot be reached" in err


def test_cards_are_what_the_hub_takes(plain: dict[str, ExportedAdapter], merged: dict[str, ExportedAdapter]) -> None:
    for item in (*plain.values(), *merged.values()):
        card = (folder_of(item) / "README.md").read_text()
        assert card_errors(card) == []
        loaded = ModelCard(card)
        assert ModelCard(str(loaded)).data.to_dict() == loaded.data.to_dict()
        assert len(loaded.data.eval_results) == 6
    # The check can fail.
    assert card_errors(card.replace("type: full", "type: a b")) != []
    assert card_errors(card.replace("tags:", "base_model: /here\ntags:", 1)) != []
