"""The classification task: checks, tokens, batches, losses and scores."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from domain_files import rows, write_json_lines
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoTokenizer

from peftsearch.domains import get_metric, get_task, load_domain, load_raw
from peftsearch.domains.tasks import Prediction, Tokenization
from peftsearch.spec import DataSpec, StudyError, StudyFile

Make = Callable[..., StudyFile]
TASK = get_task("classification")


def how(tokenizer: str, max_length: int) -> Tokenization:
    return Tokenization(AutoTokenizer.from_pretrained(tokenizer), max_length, "encoder")


DATA = DataSpec(source="x")


def bad(study: Make, path: Path, records: list[dict[str, Any]], **data: Any) -> str:
    """What a study says about a file of such records."""
    write_json_lines(path / "a.jsonl", records)
    file = study({"source": "a.jsonl", **data})
    with pytest.raises(StudyError) as caught:
        load_raw("d", file.spec, file.folder)
    assert caught.value.loc[:3] == ("domains", "d", "data")
    return file.explain(caught.value)


BAD_ROWS: list[tuple[dict[int, dict[str, Any]], str]] = [
    ({3: {"text": None}}, "column 'text' of a.jsonl holds no text in row 4: fill it in or drop the row"),
    (
        {3: {"text": None}, 5: {"text": " \n"}},
        "holds no text in 2 of 20 rows, first in row 4: fill it in or drop the rows",
    ),
    ({0: {"text": "\u00a0"}}, "column 'text' of a.jsonl holds no text in row 1"),
    ({7: {"label": None}}, "column 'label' of a.jsonl holds no label in row 8"),
    ({7: {"label": ""}}, "column 'label' of a.jsonl holds no label in row 8"),
    ({7: {"text": 5}}, "column 'text' mixes kinds of values (a text in row 1, a number in row 8)"),
    ({n: {"text": n} for n in range(20)}, "column 'text' of a.jsonl holds no texts but numbers: map another column"),
    ({n: {"text": True} for n in range(20)}, "column 'text' of a.jsonl holds no texts but true/false"),
    ({n: {"text": ["a"]} for n in range(20)}, "column 'text' of a.jsonl holds no texts but lists"),
    ({n: {"label": ["a"]} for n in range(20)}, "column 'label' of a.jsonl holds lists: classification needs one label"),
    ({n: {"label": {"a": 1}} for n in range(20)}, "column 'label' of a.jsonl holds objects"),
    ({n: {"label": n + 0.5} for n in range(20)}, "column 'label' of a.jsonl holds the number 0.5 in row 1"),
    ({n: {"label": "same"} for n in range(20)}, "have the label 'same' (column 'label'): there is nothing to learn"),
    (
        {n: {"text": "same"} for n in range(20)},
        "1 distinct text cannot be cut into train, validation and test: each needs at least one: add rows",
    ),
]


def test_balanced_weights_are_scikit_learns_up_to_a_hundred_times_the_lightest() -> None:
    """An example of a class that occurs once would otherwise be most of its batch's loss."""
    task = get_task("classification")
    weights = task.balanced_weights({"labels": [0] * 6 + [1] * 3}, ("a", "b", "c"))
    assert weights == pytest.approx([9 / (3 * 6), 9 / (3 * 3), 0.0])
    weights = task.balanced_weights({"labels": [0] * 5000 + [1] * 100 + [2]}, ("a", "b", "c"))
    assert weights is not None
    assert weights[1] / weights[0] == pytest.approx(50)
    assert weights[2] / weights[0] == pytest.approx(100)


@pytest.mark.parametrize(("changes", "sentence"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows(tmp_path: Path, study: Make, changes: dict[int, dict[str, Any]], sentence: str) -> None:
    records: list[dict[str, Any]] = [*rows(20)]
    for row, change in changes.items():
        records[row] = {**records[row], **change}
    assert sentence in bad(study, tmp_path, records)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            {"columns": {"text": "txet"}},
            "domains.d.data.columns.text: a.jsonl has no column 'txet'; did you mean 'text'? (its columns: "
            "text, label)",
        ),
        (
            {"columns": {"label": "category"}},
            "domains.d.data.columns.label: a.jsonl has no column 'category'; its columns: text, label",
        ),
        ({"columns": {"text_pair": "other"}}, "domains.d.data.columns.text_pair: a.jsonl has no column 'other'"),
        ({"columns": {"label": "text"}}, "the column 'text' cannot be both text and label"),
        ({"split": {"group": "labels"}}, "a.jsonl has no column 'labels' to group by; did you mean 'label'?"),
        ({"split": {"group": "label"}}, "2 distinct values in the column 'label' cannot be cut into train, validation"),
        ({"split": {"validation": 0}}, "domains.d.data.split.validation: the data has no validation split"),
    ],
)
def test_bad_columns(tmp_path: Path, study: Make, data: dict[str, Any], sentence: str) -> None:
    explained = bad(study, tmp_path, rows(20), **data)
    assert sentence in explained
    assert explained.startswith("study.yaml, line ")


def test_rows_without_a_group(tmp_path: Path, study: Make) -> None:
    records = [{**row, "g": None if number in (4, 6) else number} for number, row in enumerate(rows(20))]
    sentence = "the column 'g' is empty in 2 of 20 training rows, first in row 5"
    assert sentence in bad(study, tmp_path, records, split={"group": "g"})


def test_a_label_that_train_never_shows(tmp_path: Path, study: Make) -> None:
    write_json_lines(tmp_path / "train.jsonl", rows(10))
    write_json_lines(tmp_path / "test.jsonl", [{"text": "odd", "label": "C1"}, *rows(2)])
    file = study({"train": "train.jsonl", "test": "test.jsonl"})
    sentence = "the label 'C1' stands in 1 row of test but never in train; did you mean 'c1'"
    with pytest.raises(StudyError, match=sentence):
        load_raw("d", file.spec, file.folder)


def test_a_label_that_only_a_cut_takes_from_train_is_a_warning(tmp_path: Path, study: Make) -> None:
    """A rare label inside documents of a common one: the cut keeps documents together and may take it from train."""
    common = [{**row, "doc": f"{row['label']}-{number // 8}"} for number, row in enumerate(rows(80))]
    rare = [{"text": f"rare {n}", "label": "rare", "doc": common[16 * n]["doc"]} for n in range(1)]
    write_json_lines(tmp_path / "a.jsonl", [*common, *rare])
    warned = 0
    for seed in range(40):
        file = study({"source": "a.jsonl", "split": {"seed": seed, "group": "doc"}})
        raw = load_domain("d", file.spec, file.folder)
        assert raw.labels == ("c0", "c1", "rare")
        missing = "rare" not in raw.splits["train"].column("label").to_pylist()
        assert missing == ("train has no example of 'rare'" in raw.warnings)
        warned += missing
    assert warned


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        (["10", "9", "-2"], ("-2", "9", "10")),
        ([True, False], ("false", "true")),
        ([1.0, 0.0], ("0", "1")),
        (["b", "a", "10"], ("10", "a", "b")),
        (["01", "1"], ("01", "1")),
    ],
)
def test_labels_are_texts_in_a_fixed_order(
    tmp_path: Path, study: Make, values: list[Any], labels: tuple[str, ...]
) -> None:
    for order in (values, values[::-1]):
        records = [{"text": f"t{n}", "label": order[n % len(order)]} for n in range(30)]
        write_json_lines(tmp_path / "a.jsonl", records)
        file = study({"source": "a.jsonl"})
        raw = load_domain("d", file.spec, file.folder)
        assert raw.labels == labels
        kept = {
            text: label
            for table in raw.splits.values()
            for text, label in zip(*table.to_pydict().values(), strict=True)
        }
        assert len(kept) == 30
        assert set(kept.values()) == set(labels)


def test_numbers_as_labels_with_gaps_name_the_gap(tmp_path: Path, study: Make) -> None:
    records = [{"text": f"t{n}", "label": None if n == 3 else float(n % 2)} for n in range(10)]
    assert "column 'label' of a.jsonl holds no label in row 4" in bad(study, tmp_path, records)


def test_checking_checked_rows_changes_nothing() -> None:
    table = TASK.read(pa.table({"text": ["a", "b"], "label": [1, 0], "other": [1, 2]}), DATA, "x", ())
    assert table.column_names == ["text", "label"]
    assert table.column_names == ["text", "label"]
    assert TASK.check({"train": table, "validation": table}, DATA, ()) == ("0", "1")


def test_warnings(tmp_path: Path, study: Make) -> None:
    train = [{"text": f"t{n}", "label": "big" if n else "small"} for n in range(10)]
    write_json_lines(tmp_path / "train.jsonl", [*train, {"text": "T1 ", "label": "small"}])
    write_json_lines(tmp_path / "validation.jsonl", [{"text": "t2", "label": "big"}, {"text": "new", "label": "big"}])
    write_json_lines(tmp_path / "test.jsonl", [{"text": "u", "label": "big"}, {"text": "v", "label": "small"}])
    file = study({split: f"{split}.jsonl" for split in ("train", "validation", "test")})
    assert load_domain("d", file.spec, file.folder).warnings == (
        "1 of 2 texts of validation stand in train too, up to case and white space: scores on validation flatter",
        "validation has no example of 'small'",
        "82% of train has the label 'big': a model that always answers it looks accurate, and macro_f1 tells more",
        "1 text of train stand there with several labels",
    )


def test_groups_that_cross_splits_are_a_warning(tmp_path: Path, study: Make) -> None:
    records = [{**row, "doc": number % 5} for number, row in enumerate(rows(20))]
    write_json_lines(tmp_path / "train.jsonl", records)
    write_json_lines(
        tmp_path / "test.jsonl", [{"text": "x", "label": "c0", "doc": 3}, {"text": "y", "label": "c1", "doc": 9}]
    )
    file = study({"train": "train.jsonl", "test": "test.jsonl", "split": {"group": "doc"}})
    warnings = load_domain("d", file.spec, file.folder).warnings
    assert any(warning.startswith("1 of 2 rows of test belong to a 'doc' that") for warning in warnings)
    assert not any("validation belong" in warning for warning in warnings)


def test_tokenize(tokenizer: str) -> None:
    table = pa.table({"text": ["the tenant pays rent .", "fever"], "label": ["legal", "clinical"]})
    tokens = TASK.tokenize(table, ("clinical", "legal"), how(tokenizer, 6))
    assert tokens[:] == {"input_ids": [[2, 4, 5, 6, 7, 3], [2, 10, 3]], "labels": [1, 0]}


def test_tokenize_pairs(tokenizer: str) -> None:
    table = pa.table({"text": ["the tenant pays"], "text_pair": ["no fever"], "label": ["a"]})
    tokens = TASK.tokenize(table, ("a", "b"), how(tokenizer, 7))
    assert tokens[:] == {
        "input_ids": [[2, 4, 5, 3, 11, 10, 3]],
        "token_type_ids": [[0, 0, 0, 0, 1, 1, 1]],
        "labels": [0],
    }


def test_collate() -> None:
    tokens = {"input_ids": [[5, 6, 7], [8]], "token_type_ids": [[0, 0, 1], [0]], "labels": [1, 0]}
    batch = TASK.collate(tokens, 9, multiple_of=4)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 9], [8, 9, 9, 9]],
        "token_type_ids": [[0, 0, 1, 0], [0, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0]],
        "labels": [1, 0],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert TASK.collate(tokens, 9)["input_ids"].shape == (2, 8)
    assert TASK.collate(tokens, 9, multiple_of=1)["input_ids"].shape == (2, 3)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=20), min_size=1, max_size=6), st.integers(1, 9))
def test_collate_loses_nothing(ids: list[list[int]], multiple_of: int) -> None:
    batch = TASK.collate({"input_ids": ids, "labels": [0] * len(ids)}, 0, multiple_of=multiple_of)
    assert [
        row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ] == ids
    assert batch["input_ids"].shape[1] % multiple_of == 0
    assert batch["input_ids"].shape[1] < max(map(len, ids)) + multiple_of


def test_losses_and_predictions() -> None:
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]], dtype=torch.bfloat16, requires_grad=True)
    batch = {"labels": torch.tensor([0, 1, 1])}
    output = SimpleNamespace(logits=logits)
    losses = TASK.losses(output, batch)
    assert losses.dtype == torch.float32
    expected = [np.log(2), np.log(1 + np.exp(2)), np.log(1 + np.exp(-3))]
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-5)
    losses.mean().backward()
    assert logits.grad is not None
    predictions = TASK.predict(torch.nn.Identity(), output, batch, Prediction("encoder"))
    assert predictions == [0, 0, 1]
    assert TASK.references({"labels": [0]}) == [0]


def test_score_by_hand() -> None:
    references = np.array([0, 0, 0, 1, 1, 2])
    predictions = np.array([0, 0, 1, 1, 0, 0])
    scores = TASK.score(predictions, references, ("a", "b", "c"))
    assert scores == pytest.approx(
        {
            "accuracy": 3 / 6,
            "precision/a": 2 / 4,
            "recall/a": 2 / 3,
            "f1/a": 4 / 7,
            "precision/b": 1 / 2,
            "recall/b": 1 / 2,
            "f1/b": 1 / 2,
            "precision/c": 0.0,
            "recall/c": 0.0,
            "f1/c": 0.0,
            "macro_f1": (4 / 7 + 1 / 2 + 0) / 3,
            "micro_f1": 3 / 6,
            "weighted_f1": (3 * 4 / 7 + 2 * 1 / 2 + 0) / 6,
            "balanced_accuracy": (2 / 3 + 1 / 2 + 0) / 3,
            # Of 6 examples 3 are right; there are 3, 2, 1 of the labels, and 4, 2, 0 are predicted.
            "mcc": (3 * 6 - (3 * 4 + 2 * 2)) / ((36 - 20) * (36 - 14)) ** 0.5,
        }
    )
    assert list(scores)[: len(TASK.metrics)] == list(TASK.metrics)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_scores_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predictions, references = (np.array(column) for column in zip(*pairs, strict=True))
    scores = TASK.score(predictions, references, tuple("abcd"))
    assert scores["accuracy"] == accuracy_score(references, predictions)
    assert scores["macro_f1"] == pytest.approx(f1_score(references, predictions, average="macro", zero_division=0))
    # The correlation may be negative.
    assert all(type(score) is float and -(name == "mcc") <= score <= 1 for name, score in scores.items())


def test_score_refuses_nothing_and_unequal_lengths() -> None:
    for predictions, references in (([], []), ([0], [0, 1])):
        with pytest.raises(ValueError, match="cannot score"):
            TASK.score(np.array(predictions), np.array(references), ("a", "b"))


def test_config_kwargs_build_the_head() -> None:
    from transformers import BertConfig

    config = BertConfig(**TASK.config_kwargs(("no", "yes")))
    assert config.num_labels == 2
    assert config.id2label == {0: "no", 1: "yes"}
    assert config.label2id == {"no": 0, "yes": 1}


def test_metrics_of_a_domain() -> None:
    assert get_metric(TASK, None).name == "accuracy"
    assert get_metric(TASK, "macro_f1").name == "macro_f1"
    metric = get_metric(TASK, "f1/yes", labels=("no", "yes"))
    assert (metric.name, metric.direction) == ("f1/yes", "maximize")
    for name, sentence in (
        ("acuracy", "classification has no metric 'acuracy'; did you mean 'accuracy'?"),
        ("rouge", "classification has no metric 'rouge'; known: accuracy, balanced_accuracy, f1/LABEL, macro_f1, mcc"),
        ("f1/yess", "metric 'f1/yess' is about the label 'yess', which the data lacks; did you mean 'yes'?"),
    ):
        with pytest.raises(StudyError) as caught:
            get_metric(TASK, name, ("domains", "d", "metric"), labels=("no", "yes"))
        assert sentence in caught.value.message
        assert caught.value.loc == ("domains", "d", "metric")


@pytest.mark.parametrize(
    ("domain", "sentence"),
    [
        ({"task": "clasification"}, "domains.d.task: unknown task 'clasification'; did you mean 'classification'?"),
        ({"metric": "acc"}, "domains.d.metric: classification has no metric 'acc'"),
    ],
)
def test_wrong_words_are_found_before_any_data(study: Make, domain: dict[str, Any], sentence: str) -> None:
    file = study({"source": "absent.csv"}, domain=domain)
    with pytest.raises(StudyError) as caught:
        load_raw("d", file.spec, file.folder)
    assert sentence in file.explain(caught.value)


def test_unknown_domain(study: Make) -> None:
    file = study({"source": "absent.csv"})
    with pytest.raises(StudyError, match="the study has no domain 'e'"):
        load_raw("e", file.spec, file.folder)


def test_reading_data_does_not_import_torch() -> None:
    program = "import sys, json, peftsearch.domains; print(json.dumps('torch' in sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) is False
