"""Predictions of exported adapters: they score what the study says, and no row of a file gets lost."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from card_code import run_card
from hub_server import card_errors
from task_data import task_domain
from tiny_models import SAMPLES, tiny_decoder, tiny_encoder, tiny_encoder_decoder
from trained_study import train_study

from peftsearch.cli.app import run_app
from peftsearch.domains import TASKS
from peftsearch.domains.tasks import get_task
from peftsearch.export import ExportedAdapter, Predictor, predict_file
from peftsearch.export.answers import csv_value
from peftsearch.export.usage import Use, usage
from peftsearch.spec import DomainFacts
from peftsearch.study import Study

pytestmark = pytest.mark.slow

WRITING = ("summarization", "instruction")
READING = tuple(task for task in TASKS if task not in WRITING)
INPUTS = {"question_answering": ("question", "context"), "multiple_choice": ("question", "choices")}


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory, quiet_machine: None) -> list[tuple[Study, Path]]:
    """Studies with a trained LoRA for every task, each in a domain of the task's name, and their folders."""
    found = []
    for name, make, tasks in (("encoder", tiny_encoder, READING), ("t5", tiny_encoder_decoder, WRITING)):
        folder = tmp_path_factory.mktemp(name)
        found.append((_train(make(folder / "model"), tasks, folder), folder))
    return found


@pytest.fixture(scope="module")
def exported(studies: list[tuple[Study, Path]]) -> dict[str, ExportedAdapter]:
    """The exported LoRAs, by task."""
    return {item.record.domain: item for study, folder in studies for item in study.export(folder / "adapters")}


@pytest.fixture(scope="module")
def merged(studies: list[tuple[Study, Path]]) -> dict[str, ExportedAdapter]:
    """The same as complete models. That they score what the ledger says is a part of exporting them."""
    return {
        item.record.domain: item for study, folder in studies for item in study.export(folder / "merged", form="merged")
    }


def _train(
    model: Path, tasks: tuple[str, ...], folder: Path, options: dict[str, dict[str, Any]] | None = None
) -> Study:
    document: dict[str, Any] = {
        "name": "tasks",
        "model": str(model),
        "domains": {task: task_domain(task, folder) for task in tasks},
        "methods": {"lora": {}},
        "search": {"trials": 1, "scheduler": "none", "seed": 3},
        "training": {"epochs": 4, "evaluations": 1, "batch_size": 12, "max_length": 48, "precision": "fp32"},
        "tracking": {"mlflow": "off"},
    }
    for task, own in (options or {}).items():
        document["domains"][task]["options"] = {**document["domains"][task].get("options", {}), **own}
    trials = {task: ("lora", SAMPLES["lora"] | {"learning_rate": 2e-2}) for task in tasks}
    return train_study(document, folder, folder / "storage", trials)


def validation(exported: dict[str, ExportedAdapter], task: str) -> tuple[Path, list[dict[str, Any]]]:
    """The file of a task's validation split, and its rows."""
    path = exported[task].folder.parents[2] / f"{task}-validation.jsonl"
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def clauses(exported: dict[str, ExportedAdapter], tmp_path: Path) -> Path:
    """A CSV of texts to classify, with two columns beside the text."""
    _, rows = validation(exported, "classification")
    path = tmp_path / "clauses.csv"
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["id", "text", "who"])
        lines.writerows([number, row["text"], 'a, "b"\nc'] for number, row in enumerate(rows))
    return path


# --- every task ---


def right_labels(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> float:
    assert all(0 < row["prediction_probability"] <= 1 for row in found)
    return sum(row["label"] == own["prediction"] for row, own in zip(rows, found, strict=True)) / len(rows)


def score_of(task: str, rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> float:
    """The score that the study's own metric gives to the predictions in a file."""
    known = TASKS[task]()
    predictions = [row["prediction"] for row in found]
    if task == "classification":
        return right_labels(rows, found)
    if task == "relation":
        labels = sorted({row["label"] for row in rows})
        wanted = [[labels.index(row["label"]) for row in rows], [labels.index(value) for value in predictions]]
        positive = [n for n, label in enumerate(labels) if label != "none"]
        right = sum(a == b and a in positive for a, b in zip(*wanted, strict=True))
        return 2 * right / sum(value in positive for own in wanted for value in own)
    if task == "multi_label":
        right = sum(len(set(row["label"]) & set(own)) for row, own in zip(rows, predictions, strict=True))
        return 2 * right / sum(len(row["label"]) + len(own) for row, own in zip(rows, predictions, strict=True))
    if task == "token_classification":
        from seqeval.metrics import f1_score

        return float(f1_score([row["tags"] for row in rows], predictions))
    if task == "similarity":
        from scipy.stats import pearsonr

        return float(pearsonr([row["label"] for row in rows], predictions)[0])
    if task == "question_answering":
        return known.score(predictions, [row["answers"]["text"] for row in rows], ())["f1"]
    if task == "multiple_choice":
        right = [row["choices"][row["label"]] == value for row, value in zip(rows, predictions, strict=True)]
        assert [row["choices"][own["prediction_number"]] for row, own in zip(rows, found, strict=True)] == predictions
        return sum(right) / len(right)
    assert task in WRITING
    return known.score(predictions, [row["target"] for row in rows], ())["rouge1" if task == WRITING[0] else "rougeL"]


@pytest.mark.parametrize("task", [task for task in TASKS if task != "language_modeling"])
def test_predictions_score_what_the_study_says(task: str, exported: dict[str, ExportedAdapter], tmp_path: Path) -> None:
    source, rows = validation(exported, task)
    found = predict_file(exported[task].folder, source, tmp_path / "out.jsonl", batch_size=4)
    assert (found.rows, found.unpredicted) == (len(rows), 0)
    predicted = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    names = {f"prediction_{part}" if part else "prediction" for part in Predictor.load(exported[task].folder).columns}
    assert [{key: row[key] for key in row if key not in names} for row in predicted] == rows
    assert score_of(task, rows, predicted) == pytest.approx(exported[task].score, abs=1e-6)


def test_spans_are_where_they_say(exported: dict[str, ExportedAdapter], tmp_path: Path) -> None:
    source, _ = validation(exported, "question_answering")
    predict_file(exported["question_answering"].folder, source, tmp_path / "answers.jsonl")
    answered = 0
    for line in (tmp_path / "answers.jsonl").read_text().splitlines():
        row = json.loads(line)
        start, text = row["prediction_start"], row["prediction"]
        assert (start is None) == (text == "")
        if text:
            answered += 1
            assert row["context"][start : start + len(text)] == text
    source, _ = validation(exported, "token_classification")
    predict_file(exported["token_classification"].folder, source, tmp_path / "tags.jsonl")
    for line in (tmp_path / "tags.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert len(row["prediction"]) == len(row["tokens"])
        for entity in row["prediction_entities"]:
            words = slice(entity["start"], entity["end"])
            assert entity["text"] == " ".join(row["tokens"][words])
            assert {tag[2:] for tag in row["prediction"][words]} == {entity["type"]}
    assert answered, "a test of spans needs some"


def test_each_text_has_a_perplexity_of_its_own(exported: dict[str, ExportedAdapter]) -> None:
    predictor = Predictor.load(exported["language_modeling"].folder)
    texts = ["the contract is a breach", "the the the the the the the", "dog"]
    together = predictor.predict([{"text": text} for text in texts])
    apart = [predictor.predict([{"text": text}])[0] for text in texts]
    assert [row[""] for row in together] == pytest.approx([row[""] for row in apart], rel=1e-4)
    assert len({round(row[""], 6) for row in together}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_code_of_a_merged_models_card_runs(task: str, merged: dict[str, ExportedAdapter]) -> None:
    card = (Path(str(merged[task].folder)) / "README.md").read_text()
    printed, _ = run_card(card)
    # How well an encoder fills in words takes more than a card can show. (A tiny model may well write an empty text.)
    assert bool(printed) == (task != "language_modeling")
    assert ("pipeline_tag: fill-mask" in card) == (task == "language_modeling")
    assert card_errors(card) == []


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("task", ["classification", "relation", "multi_label"])
def test_a_cards_pipeline_gives_the_labels_that_predict_gives(
    task: str, form: str, exported: dict[str, ExportedAdapter], merged: dict[str, ExportedAdapter]
) -> None:
    item = (exported if form == "adapter" else merged)[task]
    _, rows = validation(exported, task)
    found = Predictor.load(Path(str(item.folder))).predict([{"text": row["text"]} for row in rows])
    _, space = run_card((Path(str(item.folder)) / "README.md").read_text())
    more = {"top_k": None, "function_to_apply": "sigmoid"} if task == "multi_label" else {}
    answers = space["pipe"]([row["text"] for row in rows], truncation=True, max_length=48, **more)
    if task == "multi_label":
        labels = [{one["label"] for one in answer if one["score"] >= 0.5} for answer in answers]
        assert labels == [set(row[""]) for row in found]
    else:
        assert [answer["label"] for answer in answers] == [row[""] for row in found]
        assert [answer["score"] for answer in answers] == pytest.approx([row["probability"] for row in found], abs=1e-4)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_cards_pipeline_finds_the_entities_that_predict_finds(
    form: str, exported: dict[str, ExportedAdapter], merged: dict[str, ExportedAdapter]
) -> None:
    item = (exported if form == "adapter" else merged)["token_classification"]
    _, rows = validation(exported, "token_classification")
    found = Predictor.load(Path(str(item.folder))).predict([{"tokens": row["tokens"]} for row in rows])
    _, space = run_card((Path(str(item.folder)) / "README.md").read_text())
    texts = [" ".join(row["tokens"]) for row in rows]
    assert [
        [(one["entity_group"], text[one["start"] : one["end"]]) for one in answer]
        for text, answer in zip(texts, space["pipe"](texts), strict=True)
    ] == [[(one["type"], one["text"]) for one in row["entities"]] for row in found]
    assert any(row["entities"] for row in found)


def test_a_decoders_card_does_what_the_study_did(tmp_path: Path) -> None:
    template = {"instruction": {"template": 'the {"clause": "{text}"} is'}}
    study = _train(tiny_decoder(tmp_path / "model"), ("instruction", "language_modeling"), tmp_path, template)
    items = {item.record.domain: Path(str(item.folder)) for item in study.export(tmp_path / "adapters")}
    _, space = run_card((items["instruction"] / "README.md").read_text())
    assert space["written"][0]["generated_text"].strip() == space["write"]("A text.")
    texts = ["the contract is a breach", "the {text} {of} the {contract", "dog"]
    rows = [{"text": text} for text in texts]
    found = Predictor.load(items["instruction"]).predict(rows)
    assert [row[""] for row in found] == [space["write"](text) for text in texts]

    # Of a text that is too long, what stands around it is kept.
    model, tokenizer = space["model"], space["tokenizer"]
    prompts: list[str] = []

    def generate(**arguments: Any) -> Any:
        prompts.append(tokenizer.decode(arguments["input_ids"][0]))
        assert 40 < arguments["input_ids"].shape[1] <= 48
        return arguments["input_ids"]

    space["model"] = SimpleNamespace(generate=generate)
    space["write"]("the contract " * 100)
    short, end = (tokenizer.decode(tokenizer(text)["input_ids"]) for text in ("x", '"} is'))
    assert prompts[0].endswith(end.removeprefix(short[: -len("x")])), prompts
    space["model"] = model

    _, space = run_card((items["language_modeling"] / "README.md").read_text())
    found = Predictor.load(items["language_modeling"]).predict(rows)
    assert [space["perplexity"](text) for text in texts] == pytest.approx([row[""] for row in found], rel=1e-3)


# --- files ---


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet"])
def test_a_file_keeps_its_columns_and_rows(
    source: str, kind: str, exported: dict[str, ExportedAdapter], clauses: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = list(read_csv(clauses))
    path = tmp_path / f"in.{source}"
    if source == "csv":
        shutil.copy(clauses, path)
    else:
        rows = [{**row, "id": int(row["id"]), "tree": {"a": [1, None]}} for row in rows]
        if source == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
    output = tmp_path / f"out.{kind}"
    predict_file(exported["classification"].folder, path, output, name="topic")
    if kind == "csv":
        found: list[dict[str, Any]] = list(read_csv(output))
        rows = [{k: json.dumps(v) if isinstance(v, dict) else str(v) for k, v in row.items()} for row in rows]
    elif kind == "jsonl":
        found = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        found = pq.read_table(output).to_pylist()
    assert list(found[0]) == [*rows[0], "topic", "topic_probability"]
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    assert {row["topic"] for row in found} <= {"finance", "law", "medicine"}


def test_what_a_model_wrote_is_no_formula_in_a_csv(
    exported: dict[str, ExportedAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["=1+1", "@x", "- the", "-5", "the - court"]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    # No tiny model can be made to write these.
    monkeypatch.setattr(
        Predictor, "predict", lambda self, examples, **_: [{"": example["text"]} for example in examples]
    )

    def written(task: str, kind: str) -> list[dict[str, Any]]:
        output = tmp_path / f"{task}.{kind}"
        predict_file(exported[task].folder, source, output)
        return read_csv(output) if kind == "csv" else [json.loads(line) for line in output.read_text().splitlines()]

    summaries = written("summarization", "csv")
    assert [row["prediction"] for row in summaries] == ["'=1+1", "'@x", "'- the", "-5", "the - court"]
    assert [row["text"] for row in summaries] == texts
    assert [row["prediction"] for row in written("summarization", "jsonl")] == texts
    # Labels are compared with those of the data.
    assert [row["prediction"] for row in written("classification", "csv")] == texts
    assert csv_value(get_task("instruction", options={"labels": ["+ good", "- bad"]}), "+ good") == "+ good"


def test_a_file_is_read_in_parts(
    exported: dict[str, ExportedAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftsearch.export import predict

    source, _ = validation(exported, "classification")
    folder = exported["classification"].folder
    predict_file(folder, source, tmp_path / "whole.jsonl")
    monkeypatch.setattr(predict, "PART", 4)
    told: list[int] = []
    predict_file(folder, source, tmp_path / "parts.jsonl", done=told.append)
    assert told == [4, 4, 4, 3]
    whole, parts = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("whole", "parts"))
    labels = [[json.loads(line)["prediction"] for line in lines] for lines in (whole, parts)]
    assert labels[0] == labels[1]


def test_rows_without_a_text_are_reported_and_kept(exported: dict[str, ExportedAdapter], tmp_path: Path) -> None:
    rows = [{"text": "court notice"}, {"text": None}, {"text": "  "}, {"other": 1}, {"text": 7}, {"text": "\ud800"}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "fever"}]))
    found = predict_file(exported["classification"].folder, source, tmp_path / "out.jsonl")
    assert (found.rows, found.unpredicted) == (7, 5)
    assert found.problems == {
        2: "the column 'text' is empty",
        3: "the column 'text' is empty",
        4: "the column 'text' is empty",
        5: "the column 'text' holds int and no text",
        6: "the column 'text' holds broken Unicode (half of a surrogate pair)",
    }
    (sentence,) = found.sentences()
    assert sentence.startswith("5 of 7 rows have no prediction: row 2: the column 'text' is empty; row 3:")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prediction"] is None for row in written] == [False, True, True, True, True, True, False]
    assert [row.get("text") for row in written] == [row.get("text") for row in [*rows, {"text": "fever"}]]


def test_no_examples_have_no_predictions(exported: dict[str, ExportedAdapter]) -> None:
    assert Predictor.load(exported["classification"].folder).predict([]) == []


def test_words_are_read_from_every_spelling_of_a_list(exported: dict[str, ExportedAdapter], tmp_path: Path) -> None:
    spelled = {
        '["the", "court\'s"]': 2,
        "['the', \"court's\"]": 2,
        "the court": 2,
        "[1] the court": 3,
        "['the' 'court']": None,
        "['the'\n 'court']": None,
        "['the', court]": None,
        "[the, court]": None,
        "['the', 'cou": None,
        "[" * 100_000 + "]" * 100_000: None,
    }
    source = tmp_path / "in.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([["tokens"], *([text] for text in spelled)])
    found = predict_file(exported["token_classification"].folder, source, tmp_path / "out.jsonl")
    written = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [tags and len(tags) for tags in written] == list(spelled.values())
    assert set(found.problems.values()) == {
        'the column \'tokens\' looks like a list and is none: write it as ["one", "two"]'
    }


def test_a_text_without_tokens_keeps_no_other_from_its_prediction(
    exported: dict[str, ExportedAdapter], tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    texts = ["the court", "\u200b\ufeff", "fever"]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = predict_file(exported["language_modeling"].folder, source, tmp_path / "out.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prediction"] is not None for row in written] == [True, 2 not in found.problems, True]


def test_texts_that_are_too_long_are_counted(exported: dict[str, ExportedAdapter], tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": "court " * 200}) + "\n" + json.dumps({"text": "court"}) + "\n")
    found = predict_file(exported["classification"].folder, source, tmp_path / "out.jsonl")
    assert found.sentences() == ["1 of 2 texts fill all 48 tokens that the adapter sees: their ends may be cut off"]


def test_texts_without_a_relations_markers_are_counted(exported: dict[str, ExportedAdapter], tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    texts = ["drug with fever", "the fever", "", "fever and lesion"]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = predict_file(exported["relation"].folder, source, tmp_path / "out.jsonl")
    assert (found.markers, found.unmarked, found.unpredicted) == (("drug",), 2, 1)
    assert found.sentences()[1:] == [
        "2 of 4 texts do not hold 'drug', which marks the two things in the texts that the adapter was trained on: "
        "their predictions say little"
    ]
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prediction"] is not None for row in written] == [True, True, False, True]
    assert predict_file(exported["classification"].folder, source, tmp_path / "topics.jsonl").unmarked == 0


def test_export_says_what_marks_the_two_things_of_a_relation(
    studies: list[tuple[Study, Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    storage = str(studies[0][0].folder.storage)
    command = ["export", "tasks", "--storage", storage, "--to", str(tmp_path / "out"), "--domain", "relation"]
    assert run_app(command) == 0
    told = " ".join(capfd.readouterr().err.split())
    assert "or what --column names; its texts must hold 'drug', which marks the two things: peftsearch predict" in told
    card = next((tmp_path / "out" / "relation").glob("*/README.md")).read_text()
    assert "# Texts hold 'drug', which marks the two things.\nprint(classify(['A text with drug.']))" in card


def test_a_card_shows_both_markers_of_a_relation() -> None:
    task = get_task("relation", options={"markers": ["@DRUG1$", "@DRUG2$"]})
    rows = {"train": 1, "validation": 1}
    facts = DomainFacts(
        task="relation", metric="micro_f1", direction="maximize", rows=rows, max_length=8, fingerprint="f", source="s"
    )
    shown = "\n".join(usage(Use(task, facts, "encoder", False)))
    assert "# Texts hold '@DRUG1$' and '@DRUG2$', which mark the two things.\n" in shown
    assert shown.endswith("print(classify(['A text with @DRUG1$ and @DRUG2$.']))")


# --- the command ---

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run_app(["predict", *map(str, arguments)])
        return (status, *capfd.readouterr())

    return run


def test_the_command_says_what_it_wrote(
    call: Call, exported: dict[str, ExportedAdapter], clauses: Path, tmp_path: Path
) -> None:
    folder, output = exported["classification"].folder, tmp_path / "out.csv"
    status, out, err = call(folder, "--input", clauses, "--output", output)
    assert (status, out) == (0, f"{output}\n")
    assert "15 rows in" in err
    status, out, err = call(folder, "--input", clauses, "--output", output, "--json", "--overwrite")
    assert (status, err) == (0, "")
    assert json.loads(out)["columns"] == ["prediction", "prediction_probability"]

    lines = clauses.read_text().splitlines(keepends=True)
    clauses.write_text("".join(lines[:1]) + '1,,x\n2,"court",y\n')
    status, out, err = call(folder, "--input", clauses, "--output", output, "--overwrite")
    assert status == 1
    assert "1 of 2 rows have no prediction: row 1: the column 'text' is empty" in err
    assert [row["prediction"] == "" for row in read_csv(output)] == [True, False]


def test_a_batch_that_does_not_fit_is_one_sentence(
    call: Call,
    exported: dict[str, ExportedAdapter],
    clauses: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    monkeypatch.setattr(Predictor, "_rows", fail)
    output = tmp_path / "out" / "found.csv"
    status, out, err = call(exported["classification"].folder, "--input", clauses, "--output", output)
    assert (status, out) == (2, "")
    assert "out of GPU memory: 2.50 GiB more were wanted; lower --batch-size, which is 64" in err
    assert not output.exists()
    single = ["--input", clauses, "--output", output, "--batch-size", 1, "--device", "cpu"]
    assert call(exported["classification"].folder, *single)[0] == 2


def test_bad_input_is_one_sentence_and_leaves_nothing(
    call: Call, exported: dict[str, ExportedAdapter], clauses: Path, tmp_path: Path
) -> None:
    folder = exported["classification"].folder
    output = tmp_path / "results" / "out.csv"
    (tmp_path / "texts.txt").touch()
    (tmp_path / "empty.csv").touch()
    (tmp_path / "broken.csv").write_text("id,text\n1\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n[1]\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "latin.csv").write_bytes(b"text\nf\xfcr\n")
    (tmp_path / "taken.csv").write_text("text,prediction\na,b\n")
    (tmp_path / "there.csv").touch()
    (tmp_path / "digits.jsonl").write_text('{"text": "a"}\n{"text": "a", "n": ' + "1" * 5000 + "}\n")
    (tmp_path / "hollow.jsonl").write_text('{"text": "a", "tree": {}}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "a", "who": "\\ud83d"}\n')
    parquet = tmp_path / "results" / "out.parquet"
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "adapter_model.safetensors").unlink()
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / "adapter_model.safetensors").write_bytes(b"x")
    lost = Path(shutil.copytree(folder, tmp_path / "lost"))
    (lost / "provenance.json").unlink()
    odd: dict[str, Path] = {}
    for number, (name, content) in enumerate(
        (("adapter_config.json", "[]"), ("provenance.json", "null"), ("provenance.json", '{"model": 1}'))
    ):
        odd[content] = Path(shutil.copytree(folder, tmp_path / f"odd-{number}"))
        (odd[content] / name).write_text(content)
    cases: list[tuple[list[object], str]] = [
        ([folder, "--input", tmp_path / "none.csv"], "no file"),
        ([folder, "--input", tmp_path / "texts.txt"], "must end in .csv, .jsonl or .parquet"),
        ([folder, "--input", tmp_path / "empty.csv"], "needs a line with the names"),
        ([folder, "--input", tmp_path / "broken.csv"], "line 2: 1 fields where the header names 2 (id, text)"),
        ([folder, "--input", tmp_path / "broken.jsonl"], "line 2: not an object"),
        ([folder, "--input", tmp_path / "broken.parquet"], "cannot read broken.parquet"),
        ([folder, "--input", tmp_path / "latin.csv"], "is not UTF-8 text"),
        ([folder, "--input", tmp_path / "taken.csv"], "has a column 'prediction' already"),
        ([folder, "--input", clauses, "--column", "texts"], "has no column 'texts'; did you mean 'text'"),
        ([folder, "--input", clauses, "--column", "txet=id"], "reads no 'txet'; did you mean 'text'"),
        ([folder, "--input", clauses, "--column", "text="], "names no column"),
        # The adapter has never seen a second text.
        ([folder, "--input", clauses, "--column", "text_pair=who"], "the adapter was trained without a text_pair"),
        ([folder, "--input", clauses, "--column", "text=text", "--column", "who"], "names the text twice"),
        ([folder, "--input", clauses, "--output", tmp_path / "out.xlsx"], "--output 'out.xlsx' must end in"),
        ([folder, "--input", clauses, "--output", tmp_path / "there.csv"], "exists: name another file"),
        ([folder, "--input", clauses, "--output", tmp_path / "there.csv" / "x.csv"], "cannot write"),
        ([folder, "--input", clauses, "--batch-size", 0], "batch-size"),
        ([folder, "--input", tmp_path / "digits.jsonl"], "line 2: an integer of more than 4300 digits"),
        ([folder, "--input", tmp_path / "hollow.jsonl", "--output", parquet], "out.parquet': Cannot write struct type"),
        ([folder, "--input", tmp_path / "half.jsonl", "--output", parquet], "column 'who' of half.jsonl holds broken"),
        ([tmp_path / "nowhere", "--input", clauses], "no adapter folder"),
        ([bare, "--input", clauses], "holds no adapter_model.safetensors"),
        ([lost, "--input", clauses], "holds no provenance.json"),
        ([damaged, "--input", clauses], "cannot load the model"),
        ([odd["[]"], "--input", clauses], "holds no JSON object"),
        ([odd["null"], "--input", clauses], "holds no JSON object"),
        ([odd['{"model": 1}'], "--input", clauses], "is damaged"),
        ([tmp_path / ("x" * 300), "--input", clauses], "no adapter folder"),
        ([folder, "--input", tmp_path / f"{'x' * 300}.csv"], "no file"),
        # What is wrong with the file is said before a model is loaded.
        ([damaged, "--input", tmp_path / "taken.csv"], "has a column 'prediction' already"),
    ]
    for arguments, message in cases:
        given = arguments if "--output" in arguments else [*arguments, "--output", output]
        status, out, err = call(*given)
        assert (status, out) == (2, ""), (arguments, err)
        assert message in err, (arguments, err)
        assert len(err.strip().splitlines()) == 1
        assert not output.parent.exists() or not list(output.parent.iterdir())
    assert (tmp_path / "there.csv").read_bytes() == b""
