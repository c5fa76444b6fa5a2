"""Bad input ends with status 2 and one sentence that names the place and the fix, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_study import Result, rows, small_study, tree, write_rows, write_study
from tiny_models import tiny_encoder

from peftsearch.holder import hold
from peftsearch.preparing import plan_facts, save_facts, write_files
from peftsearch.study import Study

Cli = Callable[..., Result]
PROGRAM = (sys.executable, "-c", "from peftsearch.cli import main; main()")
Edit = Callable[[dict[str, Any], Path], None]


def check(result: Result, *parts: str) -> None:
    """Status 2, nothing on standard output, and one line on standard error with all these parts."""
    assert (result.status, result.out) == (2, ""), result
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0]


def no_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is None or not ray.is_initialized()


def setting(path: str, value: object) -> Edit:
    """Set a key of the study file."""

    def edit(study: dict[str, Any], folder: Path) -> None:
        *sections, key = path.split(".")
        place = study
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value

    return edit


def data(name: str, text: str | bytes, **settings: object) -> Edit:
    """Give the domain ``clinical`` another file, and its data section further settings."""

    def edit(study: dict[str, Any], folder: Path) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        study["domains"]["clinical"]["data"] = {"source": name, **settings}

    return edit


def test_split(rows_of_test: list[tuple[str, str]]) -> Edit:
    def edit(study: dict[str, Any], folder: Path) -> None:
        write_rows(folder / "test.csv", rows_of_test)

    return edit


test_split.__test__ = False  # type: ignore[attr-defined]

MANY = "text,label\n" + "".join(f"the patient {n},{'ab'[n % 2]}\n" for n in range(20))

WRONG: dict[str, tuple[Edit, tuple[str, ...]]] = {
    # keys, types and ranges
    "unknown key": (setting("serach", {}), ("serach", "did you mean 'search'?")),
    "unknown key in a section": (setting("training.epohcs", 1), ("training.epohcs", "did you mean 'epochs'?")),
    "unknown key of a domain": (
        setting("domains.clinical.metrics", "accuracy"),
        ("domains.clinical.metrics", "did you mean 'metric'?"),
    ),
    "wrong type": (setting("search.trials", "many"), ("search.trials", "must be a whole number, not 'many'")),
    "a value for a section": (setting("methods", "lora"), ("methods", "must be a section")),
    "no methods": (setting("methods", {}), ("methods", "must not be empty")),
    "no trials": (setting("search.trials", 0), ("search.trials", "greater than or equal to 1")),
    "rank 0": (setting("methods.lora.rank", 0), ("methods.lora.rank", "from 1 to")),
    "rank from 0": (
        setting("methods.lora.rank", {"low": 0, "high": 4}),
        ("methods.lora.rank.low", "low of rank must be a whole number from 1"),
    ),
    "rank among choices": (setting("methods.lora.rank", [8, 0]), ("methods.lora.rank", "from 1 to")),
    "half a rank": (setting("methods.lora.rank", 1.5), ("methods.lora.rank", "whole number")),
    "low above high": (
        setting("methods.lora.rank", {"low": 9, "high": 4}),
        ("methods.lora.rank", "low (9) is above high (4)", "swap them"),
    ),
    "log from 0": (
        setting("methods.lora.learning_rate", {"low": 0, "high": 1, "log": True}),
        ("methods.lora.learning_rate", "needs low > 0"),
    ),
    # words
    "unknown method": (setting("methods.LoRa", {}), ("methods.LoRa", "unknown method", "did you mean 'lora'?")),
    "unknown hyperparameter": (
        setting("methods.lora.ranks", 4),
        ("methods.lora.ranks", "no hyperparameter 'ranks'", "did you mean 'rank'?"),
    ),
    "unknown task": (
        setting("domains.legal.task", "classify"),
        ("domains.legal.task", "unknown task 'classify'", "classification"),
    ),
    "unknown metric": (
        setting("domains.legal.metric", "macro_f2"),
        ("domains.legal.metric", "no metric 'macro_f2'", "did you mean 'macro_f1'?"),
    ),
    "metric of an unknown label": (
        setting("domains.legal.metric", "f1/maybe"),
        ("domains.legal.metric", "'maybe', which the data lacks"),
    ),
    "unknown scheduler": (setting("search.scheduler", "ahsa"), ("search.scheduler", "'asha'")),
    "no domain's name": (setting("domains.cli nical", {}), ("domains", "'cli nical' is not a name")),
    "name with a slash": (setting("name", "a/b"), ("name", "'a/b' is not a name", "no slash")),
    "name that climbs": (setting("name", ".."), ("name", "'..' is not a name")),
    # data
    "missing file": (
        setting("domains.clinical.data.source", "note.csv"),
        ("domains.clinical.data.source", "no file or folder 'note.csv'", "did you mean 'notes.csv'?"),
    ),
    "missing column": (
        setting("domains.clinical.data.columns", {"text": "txt"}),
        ("domains.clinical.data.columns.text", "no column 'txt'", "did you mean 'text'?"),
    ),
    "missing group": (
        setting("domains.clinical.data.split", {"group": "author"}),
        ("domains.clinical.data.split.group", "no column 'author'"),
    ),
    "unknown format": (data("notes.xyz", MANY), ("domains.clinical.data.source", "write 'format: csv'")),
    "broken CSV": (data("a.csv", MANY + '"no end\n'), ("domains.clinical.data.source", "a.csv, line 22")),
    "broken JSON": (data("a.jsonl", '{"text": "a"\n'), ("domains.clinical.data.source", "a.jsonl, line 1")),
    "not UTF-8": (data("a.csv", b"text,label\n\xff\xfe,a\n"), ("domains.clinical.data.source", "save it as UTF-8")),
    "null texts": (
        data("a.jsonl", MANY_JSON := "".join(json.dumps({"text": t, "label": "a"}) + "\n" for t in ("x", None, "y"))),
        ("domains.clinical.data.columns.text", "holds no text in row 2", "drop the row"),
    ),
    "empty texts": (data("a.csv", MANY + ",a\n"), ("domains.clinical.data.columns.text", "no text in row 21")),
    "null labels": (data("a.csv", MANY + "x,\n"), ("domains.clinical.data.columns.label", "no label in row 21")),
    "numbers for texts": (
        data("a.jsonl", MANY_JSON.replace("null", '"z"'), columns={"text": "label", "label": "label"}),
        ("domains.clinical.data.columns.label", "cannot be both text and label"),
    ),
    "one label": (
        data("a.csv", "text,label\n" + "".join(f"t{n},a\n" for n in range(9))),
        ("domains.clinical.data.columns.label", "nothing to learn"),
    ),
    "label that train never saw": (
        test_split([*rows(4, "landlord"), ("a court", "perhaps")]),
        ("domains.legal.data.columns.label", "the label 'perhaps' stands in 1 row of test but never in train"),
    ),
    "empty test split": (test_split([]), ("domains.legal.data", "test.csv holds no rows")),
    "empty file": (data("a.csv", ""), ("domains.clinical.data", "a.csv holds no rows")),
    "too few rows to cut": (
        data("a.csv", "text,label\nx,a\ny,b\n"),
        ("domains.clinical.data.split", "cannot be cut into train, validation and test"),
    ),
    "no validation split": (
        setting("domains.clinical.data.split", {"validation": 0}),
        ("domains.clinical.data.split.validation", "give it a share"),
    ),
    "too long": (
        setting("domains.clinical.max_length", 4096),
        ("domains.clinical.max_length", "more than the 32 that the model takes"),
    ),
    # models
    "no such folder": (setting("model", "./nowhere"), ("model", "no model folder './nowhere'", "check the path")),
    "no such package": (
        setting("model", "package:no_such_package/model"),
        ("model", "'no_such_package' is not installed", "pip"),
    ),
    # limits, grids, warm starts
    "fewer parameters than anything has": (
        setting("search.max_parameters", 50),
        ("search.max_parameters", "the smallest configuration of lora in domain 'legal' trains", "more than 50"),
    ),
    "parameters that full fine-tuning exceeds": (
        setting("search.max_parameters", 1000),
        ("search.max_parameters", "the smallest configuration of full", "leave the method out"),
    ),
    "less memory than anything takes": (
        setting("search.max_memory", 0.01),
        ("search.max_memory", "the smallest configuration of lora", "GiB per worker, more than 0.01"),
    ),
    "grid of a range without a step": (
        setting("search.sampler", "grid"),
        ("methods.lora.", "grid needs a list of values", "or a range with a step"),
    ),
    "warm start from nowhere": (
        setting("search.warm_start", "smal"),
        ("search.warm_start", "no study 'smal'"),
    ),
    "warm start from itself": (
        setting("search.warm_start", "small"),
        ("search.warm_start", "cannot start from its own front"),
    ),
    "warm start of a grid": (
        lambda study, _: study.update(
            methods={"full": {"learning_rate": [1e-3]}}, search={"sampler": "grid", "warm_start": "other"}
        ),
        ("search.warm_start", "warm_start has no place in it"),
    ),
    "targets that the model lacks": (
        setting("methods.lora.targets", "nothing_like_it"),
        ("methods.lora", "no configuration fits the model"),
    ),
}


@pytest.mark.parametrize("command", ["validate", "run"])
@pytest.mark.parametrize("case", WRONG)
def test_study_file(case: str, command: str, peftsearch: Cli, base: Path, project: Path, storage: Path) -> None:
    edit, parts = WRONG[case]
    study = small_study(base)
    edit(study, project)
    path = write_study(project, study)
    before = tree(storage)
    check(peftsearch(command, path, "--storage", storage), "study.yaml", *parts)
    assert tree(storage) == before
    assert no_ray()


def test_the_line_of_the_mistake_is_named(peftsearch: Cli, base: Path, project: Path, storage: Path) -> None:
    study = small_study(base)
    study["domains"]["clinical"]["data"]["columns"] = {"label": "lable"}
    path = write_study(project, study)
    line = path.read_text().splitlines().index("        label: lable") + 1
    check(peftsearch("validate", path, "--storage", storage), f"study.yaml, line {line}: ", "did you mean 'label'?")


def no_weights(model: Path) -> str:
    (model / "model.safetensors").unlink()
    return "holds no model.safetensors"


def truncated_weights(model: Path) -> str:
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return "cannot read the weights"


def empty_weights(model: Path) -> str:
    (model / "model.safetensors").write_bytes(b"")
    return "cannot read the weights"


def broken_config(model: Path) -> str:
    (model / "config.json").write_text('{"model_type": "bert",')
    return "cannot load the model"


def unknown_architecture(model: Path) -> str:
    (model / "config.json").write_text('{"model_type": "no-such-architecture"}')
    return "cannot load the model"


def no_config(model: Path) -> str:
    (model / "config.json").unlink()
    return "cannot load the model"


def wrong_kind_of_model(model: Path) -> str:
    from transformers import ViTConfig

    ViTConfig().save_pretrained(model)
    return "cannot do classification"


def no_tokenizer(model: Path) -> str:
    for file in model.glob("tokenizer*"):
        file.unlink()
    return "brings no vocabulary: save its tokenizer"


@pytest.mark.parametrize("command", ["validate", "run"])
@pytest.mark.parametrize(
    "breaks",
    [
        no_weights,
        truncated_weights,
        empty_weights,
        broken_config,
        unknown_architecture,
        no_config,
        wrong_kind_of_model,
        no_tokenizer,
    ],
)
def test_model_that_cannot_be_loaded(
    breaks: Callable[[Path], str], command: str, peftsearch: Cli, own_base: Path, project: Path, storage: Path
) -> None:
    sentence = breaks(own_base)
    path = write_study(project, small_study(own_base))
    before = tree(storage)
    check(peftsearch(command, path, "--storage", storage), "study.yaml, line 2: model: ", str(own_base), sentence)
    assert tree(storage) == before
    assert no_ray()


@pytest.mark.parametrize("breaks", [no_tokenizer, wrong_kind_of_model, no_weights])
def test_the_second_of_two_models(
    breaks: Callable[[Path], str], peftsearch: Cli, base: Path, own_base: Path, project: Path, storage: Path
) -> None:
    sentence = breaks(own_base)
    study = {key: value for key, value in small_study(base).items() if key != "model"}
    path = write_study(project, {**study, "models": [str(base), str(own_base)]})
    check(peftsearch("validate", path, "--storage", storage), "models.1: ", str(own_base), sentence)
    assert list(tree(storage)) == ["note.txt"]


def test_tokenizer_that_cannot_be_made(peftsearch: Cli, own_base: Path, project: Path, storage: Path) -> None:
    (own_base / "tokenizer.json").write_text("{")
    path = write_study(project, small_study(own_base))
    wanted = ("model: cannot load the tokenizer", str(own_base), "save_pretrained")
    check(peftsearch("validate", path, "--storage", storage), *wanted)


def test_model_on_a_hub_that_cannot_be_reached(
    peftsearch: Cli, project: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    path = write_study(project, small_study("no-such-organisation/no-such-model"))
    check(peftsearch("run", path, "--storage", storage), "model: cannot load the model", "a Hub id that this machine")


@pytest.mark.parametrize("text", ["name: [", "a: 1\na: 2", "\tname: x", "", "- a list", "name: \x00", "&a [*a]"])
def test_text_that_is_no_study(text: str, peftsearch: Cli, project: Path, storage: Path) -> None:
    path = project / "study.yaml"
    path.write_text(text)
    check(peftsearch("run", path, "--storage", storage), "study.yaml")
    assert list(tree(storage)) == ["note.txt"]


def test_study_file_that_cannot_be_read(peftsearch: Cli, project: Path, storage: Path) -> None:
    (project / "study.yaml").write_bytes(b"\xff\xfe\x00name")
    check(peftsearch("run", project / "nothing.yaml"), "no study file", "nothing.yaml", "check the path")
    check(peftsearch("run", project), "is a folder")
    check(peftsearch("run", project / "study.yaml"), "cannot read the study file")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("search.trials", ("--set 'search.trials'", "write key=value")),
        ("=4", ("--set '=4'", "write key=value")),
        ("search..trials=4", ("--set", "write key=value")),
        ("search.trials=many", ("search.trials", "must be a whole number")),
        ("serach.trials=4", ("serach", "did you mean 'search'?")),
        ("name.x=1", ("--set 'name.x=1'", "holds a value")),
        ("methods=[", ("--set", "not valid YAML")),
        ("methods.lora.rank=0", ("methods.lora.rank", "from 1 to")),
    ],
)
def test_overrides(
    override: str, parts: tuple[str, ...], peftsearch: Cli, base: Path, project: Path, storage: Path
) -> None:
    path = write_study(project, small_study(base))
    check(peftsearch("run", path, "--storage", storage, "--set", override), *parts)
    assert list(tree(storage)) == ["note.txt"]


@pytest.mark.parametrize("name", ["a/b", "", "..", "a b"])
def test_names_on_the_command_line(name: str, peftsearch: Cli, base: Path, project: Path, storage: Path) -> None:
    path = write_study(project, small_study(base))
    check(peftsearch("run", path, "--storage", storage, "--name", name), "is not a name: use letters, digits")
    assert list(tree(storage)) == ["note.txt"]


@pytest.mark.parametrize("command", ["validate", "run"])
@pytest.mark.parametrize("place", ["note.txt", "note.txt/below"])
def test_storage_that_cannot_be_written(
    place: str, command: str, peftsearch: Cli, base: Path, project: Path, storage: Path
) -> None:
    path = write_study(project, small_study(base))
    wanted = ("cannot write to the storage", str(storage / place), "--storage")
    check(peftsearch(command, path, "--storage", storage / place), *wanted)
    assert list(tree(storage)) == ["note.txt"]


def test_storage_that_only_the_kernel_writes(peftsearch: Cli, base: Path, project: Path) -> None:
    path = write_study(project, small_study(base))
    check(peftsearch("run", path, "--storage", "/proc/peftsearch"), "cannot write", "/proc/peftsearch")


def test_ledger_that_cannot_be_opened(peftsearch: Cli, base: Path, project: Path, storage: Path) -> None:
    for url in ("nonsense", "sqlite:////no/such/folder/ledger.db", "nosuchdatabase://host/db"):
        path = write_study(project, {**small_study(base), "tracking": {"mlflow": "off", "ledger": url}})
        check(peftsearch("run", path, "--storage", storage), "study.yaml", "tracking.ledger", "cannot open the ledger")
        assert not (storage / "studies").exists()
        assert no_ray()


@pytest.mark.parametrize("command", [["status"], ["trials"], ["frontier"], ["sync"], ["export", "--to", "adapters"]])
def test_unknown_study(command: list[str], peftsearch: Cli, storage: Path, started: Study) -> None:
    before = tree(storage)
    first, *options = command
    check(
        peftsearch(first, "smal", *options, "--storage", storage), "no study 'smal'", str(storage), "there are: small"
    )
    check(peftsearch(first, "../small", *options, "--storage", storage), "'../small' is not a name")
    assert tree(storage) == before


def test_unknown_domain(peftsearch: Cli, storage: Path, started: Study, tmp_path: Path) -> None:
    before = tree(storage)
    place = ("--storage", storage, "--domain", "leagl")
    check(peftsearch("frontier", "small", *place), "no domain 'leagl'", "did you mean 'legal'?")
    check(peftsearch("export", "small", "--to", tmp_path / "adapters", *place), "'leagl'", "'legal'")
    assert tree(storage) == before
    assert not (tmp_path / "adapters").exists()


def test_file_that_cannot_be_written(peftsearch: Cli, storage: Path, started: Study) -> None:
    place = ("--storage", storage, "--csv", storage / "note.txt" / "front.csv")
    check(peftsearch("frontier", "small", *place), "cannot write", "front.csv")
    check(peftsearch("trials", "small", *place), "cannot write", "front.csv")


def test_study_that_was_begun_differently(
    peftsearch: Cli, base: Path, project: Path, storage: Path, started: Study
) -> None:
    before = tree(storage)
    path = write_study(project, {**small_study(base), "training": {"epochs": 7, "max_length": 16}})
    for command in ("run", "validate"):
        result = peftsearch(command, path, "--storage", storage)
        assert (result.status, result.out) == (2, "")
        assert result.err.splitlines() == [
            "Error: the study 'small' was begun with other settings than the file has now:",
            "  - training.epochs: 1.0",
            "  + training.epochs: 7.0",
            "  - training.evaluations: 2",
            "  + training.evaluations: 9",
            "  - training.batch_size: 4",
            "  + training.batch_size: 16",
            "Put them back, or start a new study with --name NEW; --name NEW --fork small takes over the trials of "
            "cells that have not changed",
        ]
        assert tree(storage) == before
        assert peftsearch("validate", path, "--storage", storage, "--name", "other").status == 0


def test_fewer_trials_than_before(peftsearch: Cli, base: Path, project: Path, storage: Path, started: Study) -> None:
    path = write_study(project, {**small_study(base), "search": {"trials": 1}})
    for command in ("run", "validate"):
        result = peftsearch(command, path, "--storage", storage)
        assert (result.status, result.out) == (2, "")
        assert "search.trials can grow but not shrink: what was run stays in the ledger" in result.err


def test_validate_says_what_a_file_adds_to_its_study(
    peftsearch: Cli, base: Path, project: Path, storage: Path, started: Study
) -> None:
    wider = {**small_study(base), "search": {"trials": 5}, "resources": {"slots": 1}, "description": "more"}
    wider["methods"] = {**wider["methods"], "prompt": {"tokens": [2]}}
    before = tree(storage / "studies")
    done = peftsearch("validate", write_study(project, wider), "--storage", storage)
    assert done.status == 0
    assert "extends the study small" in done.out
    assert "the method prompt; trials per cell: 5 instead of 2" in done.out
    done = peftsearch("validate", write_study(project, small_study(base)), "--storage", storage)
    assert "continues the study small" in done.out
    assert tree(storage / "studies") == before


def test_fork_of_itself_or_of_nothing(
    peftsearch: Cli, base: Path, project: Path, storage: Path, started: Study
) -> None:
    path = write_study(project, small_study(base))
    run = ("run", path, "--storage", storage)
    check(peftsearch(*run, "--fork", "small"), "give this one another name with --name")
    check(peftsearch(*run, "--name", "new", "--fork", "smal"), "no study 'smal'", "there are: small")
    changed = write_study(project, {**small_study(base), "training": {"epochs": 7, "max_length": 16}})
    check(
        peftsearch("run", changed, "--storage", storage, "--name", "new", "--fork", "small"),
        "no cell of the study 'small' can be taken over",
        "training.epochs",
    )
    assert [item.name for item in (storage / "studies").iterdir()] == ["small"]
    assert no_ray()


def test_data_that_has_changed(peftsearch: Cli, base: Path, project: Path, storage: Path, started: Study) -> None:
    before = tree(storage / "studies" / "small")
    write_rows(project / "notes.csv", rows(44, "patient"))
    path = write_study(project, {**small_study(base), "search": {"trials": 3}})
    for command in ("run", "validate"):
        result = peftsearch(command, path, "--storage", storage)
        wanted = "the data of domain 'clinical' (notes.csv) has changed since the study 'small' began; other numbers of"
        check(result, wanted, "--name")
    assert tree(storage / "studies" / "small") == before


def test_a_further_model_that_would_change_the_steps_of_those_there(
    peftsearch: Cli, base: Path, project: Path, storage: Path, tmp_path: Path
) -> None:
    """Its tokenizer cuts words into pieces, which fill batches of so many tokens sooner."""
    other = tiny_encoder(tmp_path / "pieces")
    training = {"epochs": 1, "evaluations": 2, "batch_size": 16, "tokens_per_batch": 64, "max_length": 16}
    document = {**small_study(base), "training": training}
    study = Study.from_file(write_study(project, document), storage=storage)
    plan = study.validate()
    study.folder.create()
    write_files(study)
    save_facts(study, plan_facts(study, plan))
    before = tree(storage / "studies")
    del document["model"]
    path = write_study(project, {**document, "models": [str(base), str(other)]})
    for command in ("run", "validate"):
        check(peftsearch(command, path, "--storage", storage), "trials of legal/lora take", "--name")
    assert tree(storage / "studies") == before
    # Nor are trials of other steps taken over.
    check(
        peftsearch("run", path, "--storage", storage, "--name", "new", "--fork", "small"),
        "no cell of the study 'small' can be taken over",
    )


def test_study_that_is_running(peftsearch: Cli, base: Path, project: Path, storage: Path, started: Study) -> None:
    with hold(started.folder.path, "small"):
        path = write_study(project, small_study(base))
        wanted = ("'small' is being run by process", str(os.getpid()), "another --name")
        check(peftsearch("run", path, "--storage", storage), *wanted)
    assert no_ray()


def test_port_in_use(peftsearch: Cli, storage: Path) -> None:
    from peftsearch.tracking.mlflow_tracker import default_tracking_uri

    check(peftsearch("ui", "--storage", storage), "no study", str(storage), "--storage")
    Path(default_tracking_uri(storage).removeprefix("sqlite:///")).touch()
    before = tree(storage)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check(peftsearch("ui", "--storage", storage, "--port", port), f"127.0.0.1 port {port}", "--port")
    assert tree(storage) == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["frobnicate"], ("No such command 'frobnicate'", "peftsearch --help")),
        (["run"], ("Missing argument 'STUDY.yaml'", "peftsearch run --help")),
        (["run", "x.yaml", "--trials", "4"], ("No such option: --trials", "peftsearch run --help")),
        (["ui", "--port", "http"], ("'--port'", "peftsearch ui --help")),
        (["ui", "--port", "0"], ("'--port'", "peftsearch ui --help")),
        (["export", "small", "--to", "x", "--pick", "worst"], ("'worst'", "'knee'")),
        (["evaluate", "x", "--study", "y"], ("--domain", "peftsearch evaluate --help")),
    ],
)
def test_wrong_use_of_the_command_line(arguments: list[str], parts: tuple[str, ...], peftsearch: Cli) -> None:
    check(peftsearch(*arguments), *parts)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("foo:bar", "write HOST:PORT of its head"),
        ("foo", "write HOST:PORT of its head"),
        (":6379", "write HOST:PORT of its head"),
        ("foo:70000", "write HOST:PORT of its head"),
        ("me:pa55word@head:6379", "write HOST:PORT of its head"),
        ("http://127.0.0.1:8265", "a URL of a dashboard is for 'peftsearch submit'; write HOST:PORT"),
        ("https://me:pa55word@head:8265", "a URL of a dashboard is for 'peftsearch submit'; write HOST:PORT"),
        ("ray://127.0.0.1:10001", "Ray Client (ray://) is not used; write HOST:PORT"),
    ],
)
def test_what_is_no_address_of_a_cluster(
    address: str, why: str, peftsearch: Cli, base: Path, project: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(project, small_study(base))
    result = peftsearch("run", path, "--storage", storage, "--address", address)
    check(result, "cannot reach a Ray cluster at '", why)
    monkeypatch.setenv("RAY_ADDRESS", address)
    variable = peftsearch("run", path, "--storage", storage, "--address", "auto")
    check(variable, "cannot reach a Ray cluster at '", "(RAY_ADDRESS)", why)
    assert "pa55word@head:8265" not in result.err + variable.err
    assert list(tree(storage)) == ["note.txt"]


def test_ray_client_is_not_for_submitting(peftsearch: Cli, base: Path, project: Path, storage: Path) -> None:
    path = write_study(project, small_study(base))
    submit = ("submit", path, "--storage", storage, "--address")
    check(peftsearch(*submit, "ray://127.0.0.1:10001"), "Ray Client (ray://) is not used; write the dashboard's URL")
    check(peftsearch(*submit, "foo:bar"), "cannot reach a Ray cluster at 'foo:bar'", "write HOST:PORT of its head")
    check(peftsearch(*submit, "foo:bar", "--stop"), "cannot reach a Ray cluster at 'foo:bar'")


@pytest.mark.parametrize("place", ["note.txt", "note.txt/below"])
@pytest.mark.parametrize(
    "command",
    [
        ["list"],
        ["list", "--json"],
        ["status", "small"],
        ["trials", "small"],
        ["frontier", "small"],
        ["report", "small", "--to", "report"],
        ["export", "small", "--to", "adapters"],
        ["sync", "small"],
    ],
)
def test_a_file_is_no_storage(command: list[str], place: str, peftsearch: Cli, storage: Path) -> None:
    result = peftsearch(*command, "--storage", storage / place)
    check(result, "the storage", str(storage / place), "Not a directory", "--storage")
    check(peftsearch("ui", "--storage", storage / place), str(storage / place), "--storage")
    assert list(tree(storage)) == ["note.txt"]


def test_a_storage_that_is_not_there_yet_is_empty(peftsearch: Cli, storage: Path) -> None:
    result = peftsearch("list", "--storage", storage / "new" / "below")
    assert result.status == 0
    assert "yet" in result.out


def test_a_fresh_process_says_one_sentence_too(project: Path, storage: Path, base: Path) -> None:
    study = small_study(base)
    study["methods"]["lora"]["targets"] = "nothing_like_it"
    done = subprocess.run(
        [*PROGRAM, "run", str(write_study(project, study)), "--storage", str(storage)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = done.stderr.splitlines()
    # On a slow machine a log says what takes so long.
    assert [line for line in lines if not line.startswith("checking the study")] == lines[-1:]
    check(Result(done.returncode, done.stdout, lines[-1]), "methods.lora", "no configuration fits the model")
    assert list(tree(storage)) == ["note.txt"]
