"""Multi-label classification: lists of labels, their checks, losses, scores, and learning."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from tiny_models import tiny_decoder, tiny_encoder, tiny_encoder_decoder
from writing_study import plan_and_worker, train
from writing_study import study as written_study

from peftsearch.domains import get_task, load_domain
from peftsearch.domains.tasks import LossOptions, Prediction
from peftsearch.spec import StudyError, StudyFile
from peftsearch.training.segment import Probe, ProbeResult

Make = Callable[..., StudyFile]
TASK = get_task("multi_label")
DOMAIN = {"task": "multi_label"}
LABELS = ("a", "b", "c")


def write(path: Path, records: list[dict[str, Any]], name: str = "a.jsonl") -> str:
    (path / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return name


def rows(count: int = 24) -> list[dict[str, Any]]:
    return [{"text": f"t{n}", "label": ["a"] * (n % 2) + ["b"] * (n % 3 == 0)} for n in range(count)]


def test_labels_are_sets_of_names_and_may_be_empty(tmp_path: Path, study: Make) -> None:
    records = [*rows(), {"text": "x", "label": ["b", "a", "b"]}, {"text": "y", "label": []}]
    write(tmp_path, records)
    file = study({"source": "a.jsonl"}, domain=DOMAIN)
    raw = load_domain("d", file.spec, file.folder)
    assert raw.labels == ("a", "b")
    assert raw.metric.name == "micro_f1"
    kept = {
        text: labels
        for table in raw.splits.values()
        for text, labels in zip(table.column("text").to_pylist(), table.column("label").to_pylist(), strict=True)
    }
    assert (kept["x"], kept["y"], len(kept)) == (["a", "b"], [], 26)


def test_numbers_are_labels_in_order(tmp_path: Path, study: Make) -> None:
    write(tmp_path, [{"text": f"t{n}", "label": [n % 3 + 8]} for n in range(24)])
    file = study({"source": "a.jsonl"}, domain=DOMAIN)
    assert load_domain("d", file.spec, file.folder).labels == ("8", "9", "10")


def test_a_text_with_a_separator_is_a_list(tmp_path: Path, study: Make) -> None:
    lines = [f"t{n},{'; '.join(['a'] * (n % 2) + ['b'] * (n % 3 == 0))}" for n in range(24)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *lines]))
    write(tmp_path, rows())
    written = study({"source": "a.csv"}, domain={**DOMAIN, "options": {"separator": ";"}})
    listed = study({"source": "a.jsonl"}, domain=DOMAIN)
    found = [load_domain("d", file.spec, file.folder) for file in (written, listed)]
    assert found[0].fingerprint == found[1].fingerprint


@pytest.mark.parametrize(
    ("records", "options", "sentence"),
    [
        (
            [{"label": "a"}],
            {},
            "column 'label' of a.jsonl holds texts: multi_label needs a list of labels in each row (or set "
            "options.separator",
        ),
        ([{"label": 1}], {}, "column 'label' of a.jsonl holds numbers: multi_label needs a list"),
        ([{"label": None}], {}, "column 'label' of a.jsonl holds no lists: multi_label needs a list"),
        ([{"label": [1.5]}], {}, "column 'label' of a.jsonl holds lists of numbers: multi_label needs names or whole"),
        ([{"label": [["a"]]}], {}, "holds lists of lists"),
        ([{"label": ["a"]}], {}, "training rows have the same labels"),
        ([{"label": []}], {}, "no row of train has a label"),
        ([{"label": ["a"]}, {"label": ["b"]}, {"label": None}], {}, "holds no list in 8 of 24 rows, first in row 3"),
        ([{"label": ["a"]}, {"label": [" "]}], {}, "holds a label without a name in 12 of 24 rows, first in row 2"),
        (
            [{"label": ["a"]}, {"label": "a"}],
            {},
            "column 'label' mixes kinds of values (a list in row 1, a text in row 2)",
        ),
        ([{"label": ["a"]}], {"separator": ";"}, "holds lists, not texts that options.separator takes apart"),
        ([{"label": ["a"]}], {"separator": ""}, "domains.d.options.separator: "),
        ([{"label": ["a"]}], {"threshold": 1}, "domains.d.options.threshold: "),
        ([{"label": ["a"]}], {"treshold": 0.3}, "multi_label has no such option; did you mean 'threshold'"),
    ],
)
def test_bad_input(
    tmp_path: Path, study: Make, records: list[dict[str, Any]], options: dict[str, Any], sentence: str
) -> None:
    many = [{"text": f"t{n}", **records[n % len(records)]} for n in range(24)]
    write(tmp_path, many)
    data: dict[str, Any] = {"source": "a.jsonl"}
    if "same labels" in sentence:
        data = {"train": "a.jsonl", "validation": "a.jsonl", "test": "a.jsonl"}
    file = study(data, domain={**DOMAIN, "options": options})
    with pytest.raises(StudyError) as caught:
        load_domain("d", file.spec, file.folder)
    assert sentence in file.explain(caught.value)


def test_a_label_that_train_never_shows(tmp_path: Path, study: Make) -> None:
    write(tmp_path, rows(), "train.jsonl")
    write(tmp_path, [{"text": "u", "label": ["a", "bb"]}, {"text": "v", "label": ["bb"]}], "test.jsonl")
    file = study({"train": "train.jsonl", "test": "test.jsonl"}, domain=DOMAIN)
    with pytest.raises(StudyError, match="the label 'bb' stands in 2 rows of test but never in train"):
        load_domain("d", file.spec, file.folder)


def test_cuts_keep_rare_labels_in_every_split(tmp_path: Path, study: Make) -> None:
    records = [{"text": f"t{n}", "label": ["common", *(["rare"] if n % 20 == 0 else [])]} for n in range(200)]
    write(tmp_path, records)
    file = study({"source": "a.jsonl"}, domain=DOMAIN)
    for table in load_domain("d", file.spec, file.folder).splits.values():
        assert any("rare" in row for row in table.column("label").to_pylist())


def columns(*labels: list[int]) -> dict[str, list[Any]]:
    return {"input_ids": [[5]] * len(labels), "labels": list(labels), "classes": [3] * len(labels)}


def test_losses_by_hand() -> None:
    batch = TASK.collate(columns([0, 2], []), 0)
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0]]
    logits = torch.tensor([[0.0, 2.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    output = SimpleNamespace(logits=logits)
    losses = TASK.losses(output, batch)
    assert losses.dtype == torch.float32
    soft = lambda x: np.log1p(np.exp(x))  # noqa: E731
    assert losses.tolist() == pytest.approx([(soft(0) + soft(2) + soft(1)) / 3, np.log(2)], rel=1e-5)
    weighted = TASK.losses(output, batch, LossOptions(class_weights=torch.tensor([1.0, 1.0, 4.0])))
    assert weighted.tolist() == pytest.approx([(soft(0) + soft(2) + 4 * soft(1)) / 3, np.log(2)], rel=1e-5)
    smoothed = TASK.losses(output, batch, LossOptions(label_smoothing=0.2))
    expected = (soft(0) + 0.9 * soft(2) + 0.1 * soft(-2) + 0.9 * soft(1) + 0.1 * soft(-1)) / 3
    assert smoothed[0].item() == pytest.approx(expected, rel=1e-5)


def test_balanced_weights_are_negatives_for_each_positive() -> None:
    split = columns(*([[0]] * 10 + [[0, 1]] * 10 + [[]] * 20))
    assert TASK.balanced_weights(split, LABELS) == [1.0, 3.0, 0.0]


def test_the_threshold_decides() -> None:
    logits = torch.tensor([[2.0, 0.0, -0.5]])
    output = SimpleNamespace(logits=logits)
    how = Prediction("encoder")
    assert TASK.predict(torch.nn.Identity(), output, {}, how) == [[1, 1, 0]]
    strict = get_task("multi_label", options={"threshold": 0.8})
    assert strict.predict(torch.nn.Identity(), output, {}, how) == [[1, 0, 0]]


def test_scores_by_hand() -> None:
    references = [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]]
    predictions = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    scores = TASK.score(predictions, references, LABELS)
    # BLUE: precisions 1, 1/2, (rightly none: 1), 0; recalls 1/2, 1, 1, 0.
    precision = recall = 2.5 / 4
    assert scores == pytest.approx(
        {
            "micro_f1": 2 * 2 / (3 + 4),
            "macro_f1": (1 + 0) / 2,
            "example_f1": 2 * precision * recall / (precision + recall),
            "subset_accuracy": 1 / 4,
            "f1/a": 1,
            "precision/a": 1,
            "recall/a": 1,
            **dict.fromkeys([f"{metric}/{label}" for metric in TASK.label_metrics for label in "bc"], 0.0),
        }
    )


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 6), min_size=1, max_size=20))
def test_scores_are_scikit_learns(pairs: list[tuple[int, ...]]) -> None:
    predictions, references = [list(pair[:3]) for pair in pairs], [list(pair[3:]) for pair in pairs]
    scores = TASK.score(predictions, references, LABELS)
    truth, guess = np.array(references), np.array(predictions)
    assert scores["micro_f1"] == pytest.approx(f1_score(truth, guess, average="micro", zero_division=0))
    assert scores["subset_accuracy"] == pytest.approx(accuracy_score(truth, guess))
    occurring = [n for n in range(3) if truth[:, n].any() or guess[:, n].any()]
    if occurring:
        macro = f1_score(truth, guess, average="macro", labels=occurring, zero_division=0)
        assert scores["macro_f1"] == pytest.approx(macro)


def test_the_guess_is_the_best_constant_answer() -> None:
    split = columns([0, 1], [0], [0, 1], [0, 2], [1])
    guess = TASK.guesses(split, columns([0], []), LABELS)["majority"]
    best = max(
        ([int(n in chosen) for n in range(3)] for chosen in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))),
        key=lambda row: TASK.score([row] * 5, TASK.references(split), LABELS)["micro_f1"],
    )
    assert guess.predictions == [best, best] == [[1, 1, 0]] * 2


@pytest.mark.parametrize("make", [tiny_encoder, tiny_encoder_decoder, tiny_decoder])
def test_every_kind_of_model_learns(make: Callable[[Path], Path], tmp_path: Path) -> None:
    draw = random.Random(0)
    signs = {"law": "court", "care": "fever", "money": "bond"}

    def example() -> dict[str, Any]:
        labels = [label for label in signs if draw.random() < 0.4]
        words = [*(signs[label] for label in labels), *draw.choices(["the", "no", "red", "dog"], k=4)]
        draw.shuffle(words)
        return {"text": " ".join(words), "label": labels}

    splits = {"train": [example() for _ in range(128)], "validation": [example() for _ in range(32)]}
    training = {
        "epochs": 6,
        "batch_size": 8,
        "evaluations": 2,
        "head_learning_rate": 0.005,
        "class_weights": "balanced",
    }
    file = written_study(tmp_path, make(tmp_path / "model"), DOMAIN, splits, training=training)
    plan, worker = plan_and_worker(file, tmp_path)
    # At 1e-2 a third of the seeds of the encoder end where they began.
    rate = 3e-3 if make is tiny_encoder else 1e-2
    first, last = train(plan, worker, "lora", rank=4, targets="all-linear", learning_rate=rate)
    assert last.loss < first.loss
    baselines = worker.do(Probe(next(iter(plan.models)), "d"))
    assert isinstance(baselines, ProbeResult)
    assert last.scores["micro_f1"] > max(0.65, baselines.scores["majority"]["micro_f1"])
    if make is tiny_encoder:
        assert baselines.scores["linear_probe"]["micro_f1"] > baselines.scores["majority"]["micro_f1"]
        assert baselines.parameters["linear_probe"] == 33 * 3


def test_a_single_label_is_a_yes_or_no(tmp_path: Path) -> None:
    records = [{"text": f"{'fever' if n % 2 else 'dog'} {n}", "label": ["ill"] * (n % 2)} for n in range(40)]
    splits = {"train": records[:30], "validation": records[30:]}
    file = written_study(tmp_path, tiny_encoder(tmp_path / "model"), DOMAIN, splits)
    plan, worker = plan_and_worker(file, tmp_path)
    assert train(plan, worker, "full", learning_rate=1e-3)[-1].scores.keys() >= {"micro_f1", "f1/ill"}
    baselines = worker.do(Probe(next(iter(plan.models)), "d"))
    assert isinstance(baselines, ProbeResult)
    assert baselines.scores["linear_probe"]["f1/ill"] > 0.6
