"""Relation classification: the negative class, markers, and the averages of classification."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, matthews_corrcoef
from tiny_models import tiny_encoder
from writing_study import plan_and_worker, prepare, train
from writing_study import study as written_study

from peftsearch.domains import get_task, load_domain
from peftsearch.spec import StudyError, StudyFile

Make = Callable[..., StudyFile]
DOMAIN = {"task": "relation"}
LABELS = ("effect", "false", "int")
TASK = get_task("relation", options={"negative": "false"})


def rows(count: int = 30) -> list[dict[str, str]]:
    return [{"text": f"@A$ and @B$ {n}", "label": LABELS[n % 3]} for n in range(count)]


def refused(study: Make, path: Path, **options: Any) -> str:
    (path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    file = study({"source": "a.jsonl"}, domain={**DOMAIN, "options": options})
    with pytest.raises(StudyError) as caught:
        load_domain("d", file.spec, file.folder)
    return file.explain(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"names": {"False": "none"}}, "options.names.False: the data has no label 'False' to name; did you mean"),
        ({"names": {"false": " "}}, "options.names.false: the label 'false' is given no name"),
        ({"names": dict.fromkeys(("false", "effect"), "one")}, "options.names: 2 labels are called 'one'"),
        ({"negative": "False"}, "options.negative: the negative class 'False' is no label of the data; did you mean"),
        ({"markers": ["@A$", "@C$"]}, "options.markers: no text of train holds the marker '@C$': write it as the data"),
        ({"negative": False}, "must be a text, not False: write it in quotes"),
        ({"markers": "@A$"}, "must be a list, not '@A$'"),
        ({"negatives": "false"}, "relation has no such option; did you mean 'negative'"),
        ({"negative": 3}, "options.negative: "),
    ],
)
def test_bad_options(tmp_path: Path, study: Make, options: dict[str, Any], sentence: str) -> None:
    assert sentence in refused(study, tmp_path, **options)


def test_the_negative_class_is_not_counted() -> None:
    """As SemEval-2013 task 9.2: a wrong type is a false positive and a false negative, a right negative is nothing."""
    references = [0, 0, 2, 1, 1, 1, 1, 1]
    predictions = [0, 2, 2, 1, 1, 1, 0, 1]
    scores = TASK.score(predictions, references, LABELS)
    # Right: 2 of 4 found and of 3 wanted.
    assert scores["micro_f1"] == pytest.approx(2 * 2 / (4 + 3))
    assert scores["f1/effect"] == pytest.approx(1 / 2)
    assert scores["f1/int"] == pytest.approx(2 / 3)
    assert scores["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores["weighted_f1"] == pytest.approx((2 * 1 / 2 + 2 / 3) / 3)
    assert scores["accuracy"] == pytest.approx(6 / 8)
    everything = get_task("relation").score(predictions, references, LABELS)
    assert everything["micro_f1"] == everything["accuracy"]
    assert everything["macro_f1"] == pytest.approx(f1_score(references, predictions, average="macro"))


def test_only_negatives_score_zero() -> None:
    scores = TASK.score([1, 1], [1, 1], LABELS)
    assert (scores["micro_f1"], scores["macro_f1"], scores["accuracy"]) == (0.0, 0.0, 1.0)
    assert set(scores) == {*TASK.metrics, *(f"{kind}/{label}" for kind in TASK.label_metrics for label in LABELS)}


PAIRS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)


@given(PAIRS)
@pytest.mark.filterwarnings("ignore")
def test_averages_of_classification_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    predictions, references = [list(side) for side in zip(*pairs, strict=True)]
    scores = get_task("classification").score(predictions, references, LABELS)
    for average in ("micro", "macro", "weighted"):
        expected = f1_score(references, predictions, average=average, zero_division=0)
        assert scores[f"{average}_f1"] == pytest.approx(float(expected))
    assert scores["mcc"] == pytest.approx(float(matthews_corrcoef(references, predictions)))
    assert scores["balanced_accuracy"] == pytest.approx(float(balanced_accuracy_score(references, predictions)))
    assert scores["micro_f1"] == pytest.approx(scores["accuracy"])


def test_texts_that_are_cut_off_before_a_marker_are_counted(tmp_path: Path) -> None:
    texts = [
        "@A$ dog @B$",
        "@A$ dog " + "the " * 20 + "@B$",
        "@A$ @B$ " + "the " * 40,
        "dog " * 40 + "@A$ @B$",
        # The second of a pair of marks just fits, or just does not.
        "the " * 7 + "@A$ @B$ dog dog",
        "the " * 8 + "@A$ @B$ dog dog",
    ]
    many = [{"text": f"{text} {n}", "label": LABELS[n % 3]} for n, text in enumerate(texts * 5)]
    options = {"negative": "false", "markers": ["@A$", "@B$"]}
    # [CLS], seven words, "@ a $ @ b $" and [SEP] are 15 tokens.
    domain = {**DOMAIN, "options": options, "max_length": 15}
    file = written_study(tmp_path, tiny_encoder(tmp_path / "model"), domain, {"train": many, "validation": many[:6]})
    warnings = " ".join(prepare(file, tmp_path / "cache").warnings)
    assert "train: 15 of 30 texts are cut off before they show '@A$' or '@B$': raise max_length (15 tokens)" in warnings
    assert "validation: 3 of 6 texts are cut off" in warnings


def test_a_relation_is_learned(tmp_path: Path) -> None:
    words = {"effect": "fever", "false": "dog", "int": "bond"}

    def examples(start: int, count: int) -> list[dict[str, str]]:
        labels = [LABELS[n % 3] for n in range(start, start + count)]
        return [{"text": f"@A$ {words[label]} @B$ {n}", "label": label} for n, label in enumerate(labels, start)]

    domain = {**DOMAIN, "options": {"negative": "false", "markers": ["@A$", "@B$"]}}
    training = {"epochs": 5, "batch_size": 8, "evaluations": 1, "head_learning_rate": 0.02}
    splits = {"train": examples(0, 96), "validation": examples(96, 30)}
    file = written_study(tmp_path, tiny_encoder(tmp_path / "model"), domain, splits, training=training)
    plan, worker = plan_and_worker(file, tmp_path)
    assert train(plan, worker, "lora", rank=4, targets="all-linear", learning_rate=1e-2)[-1].scores["micro_f1"] > 0.8
    assert np.isclose(get_task("relation").guesses({"labels": [1]}, {"labels": [0]}, LABELS)["majority"].predictions, 1)
