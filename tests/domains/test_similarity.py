"""Similarity: scores that are numbers, their scale, correlations, and learning."""

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
from tiny_models import WORDS, tiny_decoder, tiny_encoder, tiny_encoder_decoder
from writing_study import plan_and_worker, prepare, train
from writing_study import study as written_study

from peftsearch.domains import get_task, load_domain
from peftsearch.domains.tasks import Prediction
from peftsearch.spec import StudyError, StudyFile
from peftsearch.training.segment import Probe, ProbeResult

Make = Callable[..., StudyFile]
TASK = get_task("similarity")
PAIR = {"columns": {"text_pair": "other"}}
DOMAIN = {"task": "similarity"}


def rows(count: int = 40) -> list[dict[str, Any]]:
    return [{"text": f"t{n}", "other": f"u{n}", "label": n % 5 + 0.5} for n in range(count)]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    (path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_scores_are_numbers_however_they_are_written(tmp_path: Path, study: Make, suffix: str) -> None:
    write(tmp_path, rows())
    lines = [f"{row['text']},{row['other']},{row['label']:.2f}" for row in rows()]
    (tmp_path / "a.csv").write_text("\n".join(["text,other,label", *lines]))
    file = study({"source": f"a.{suffix}", **PAIR}, domain=DOMAIN)
    raw = load_domain("d", file.spec, file.folder)
    kept = {
        text: score
        for table in raw.splits.values()
        for text, score in zip(table.column("text").to_pylist(), table.column("label").to_pylist(), strict=True)
    }
    assert kept == {row["text"]: row["label"] for row in rows()}
    assert raw.metric.name == "pearson"
    train_scores = raw.splits["train"].column("label").to_numpy()
    assert raw.labels == (f"score = {train_scores.mean():.6g} + {train_scores.std():.6g} * output",)


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({3: "high"}, {}, "column 'label' mixes kinds of values"),
        (
            dict.fromkeys(range(40), "high"),
            {},
            "column 'label' of a.jsonl holds 'high' in row 1, which is not a number",
        ),
        ({3: None}, {}, "column 'label' of a.jsonl holds no finite number in row 4: fill it in or drop the row"),
        ({3: float("nan"), 5: float("inf")}, {}, "holds no finite number in 2 of 40 rows, first in row 4"),
        ({row: [1.0] for row in range(40)}, {}, "column 'label' of a.jsonl holds lists: similarity needs a number"),
        (dict.fromkeys(range(40), True), {}, "column 'label' of a.jsonl holds true/false: similarity needs a number"),
        (dict.fromkeys(range(40), 2), {}, "have the score 2 (column 'label'): there is nothing to learn"),
        ({3: 5.5}, {"range": [0, 5]}, "holds a score outside of 0 to 5 (options.range) in row 4"),
        ({}, {"range": [4, 0]}, "domains.d.options.range: range is [lowest, highest], and 4 is not below 0"),
        ({}, {"range": [4]}, "domains.d.options.range"),
    ],
)
def test_bad_scores(
    tmp_path: Path, study: Make, change: dict[int, Any], options: dict[str, Any], sentence: str
) -> None:
    records = rows()
    for row, value in change.items():
        records[row]["label"] = value
    write(tmp_path, records)
    file = study({"source": "a.jsonl", **PAIR}, domain={**DOMAIN, "options": options})
    with pytest.raises(StudyError) as caught:
        load_domain("d", file.spec, file.folder)
    assert sentence in file.explain(caught.value)


def test_a_score_of_a_csv_file_that_is_no_number_names_its_row(tmp_path: Path, study: Make) -> None:
    (tmp_path / "a.csv").write_text("text,other,label\na,b,1\nc,d,three\n")
    file = study({"source": "a.csv", **PAIR}, domain=DOMAIN)
    with pytest.raises(StudyError, match="holds 'three' in row 2, which is not a number"):
        load_domain("d", file.spec, file.folder)


def test_every_split_sees_the_whole_scale(tmp_path: Path, study: Make) -> None:
    write(tmp_path, [{**row, "label": float(n)} for n, row in enumerate(rows(100))])
    file = study({"source": "a.jsonl", **PAIR}, domain=DOMAIN)
    for table in load_domain("d", file.spec, file.folder).splits.values():
        scores = table.column("label").to_numpy()
        assert scores.min() < 25
        assert scores.max() > 75


def test_the_model_learns_standardised_scores_and_answers_on_the_datas_scale() -> None:
    columns = {"input_ids": [[5], [6]], "labels": [1.0, 4.0], "mean": [2.0, 2.0], "deviation": [0.5, 0.5]}
    batch = TASK.collate(columns, 0)
    output = SimpleNamespace(logits=torch.tensor([[-2.0], [1.0]], dtype=torch.bfloat16))
    losses = TASK.losses(output, batch)
    assert losses.dtype == torch.float32
    assert losses.tolist() == [0.0, 9.0]
    how = Prediction("encoder")
    assert TASK.predict(torch.nn.Identity(), output, batch, how) == [1.0, 2.5]
    assert TASK.references(columns) == [1.0, 4.0]
    limited = get_task("similarity", options={"range": [1.5, 2.25]})
    assert limited.predict(torch.nn.Identity(), output, batch, how) == [1.5, 2.25]


def test_scores_by_hand() -> None:
    # Deviations (-1, 0, 1) and (-1, 1, 0): covariance 1 over variances 2 and 2. Ranks are the same numbers.
    scores = TASK.score([1, 2, 3], [10, 30, 20], ())
    assert scores["pearson"] == pytest.approx(0.5)
    assert scores["spearman"] == pytest.approx(0.5)
    assert scores["mse"] == pytest.approx((81 + 784 + 289) / 3)
    assert scores["rmse"] == pytest.approx(np.sqrt((81 + 784 + 289) / 3))
    # Spearman sees only the order.
    scores = TASK.score([1, 2, 300], [1, 2, 3], ())
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] < 0.9


@pytest.mark.parametrize("predictions", [[2.0, 2.0, 2.0], [0.1 + 0.2, 0.3, 0.3], [float("nan"), 1.0, 2.0]])
def test_a_correlation_with_a_constant_is_zero(predictions: list[float]) -> None:
    scores = TASK.score(predictions, [1.0, 2.0, 3.0], ())
    assert (scores["pearson"], scores["spearman"]) == (0.0, 0.0)


def test_errors_are_minimised() -> None:
    assert [metric.direction for metric in TASK.metrics.values()] == ["maximize", "maximize", "minimize", "minimize"]


def overlapping(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of six words, scored by how many they share."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        shared = number % 5
        words = draw.sample(WORDS[40:100], 8)
        first, second = words[:4], [*words[:shared], *words[4 : 8 - shared]]
        draw.shuffle(second)
        found.append({"text": " ".join(first), "other": " ".join(second), "label": shared * 10})
    return found


def test_baselines_of_pairs(tmp_path: Path) -> None:
    splits = {"train": overlapping(150, 0), "validation": overlapping(40, 1)}
    file = written_study(tmp_path, tiny_encoder(tmp_path / "model"), {**DOMAIN, "data": PAIR}, splits)
    plan, worker = plan_and_worker(file, tmp_path)
    found = worker.do(Probe(next(iter(plan.models)), "d"))
    assert isinstance(found, ProbeResult)
    assert found.scores["mean"]["pearson"] == 0.0
    # Random weights still tell apart texts of different words.
    assert found.scores["cosine"]["pearson"] > 0.6
    assert found.parameters["cosine"] == 0
    assert found.scores["linear_probe"]["pearson"] > 0.3
    assert found.parameters["linear_probe"] == 4 * 32 + 1


@pytest.mark.parametrize("make", [tiny_encoder, tiny_encoder_decoder, tiny_decoder])
def test_every_kind_of_model_learns(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """A score on a scale of its own, which the text names."""
    values = {"one": 1000.0, "two": 1010.0, "three": 1020.0, "four": 1030.0}

    def examples(count: int, seed: int) -> list[dict[str, Any]]:
        draw = random.Random(seed)
        words = [draw.choice(list(values)) for _ in range(count)]
        return [{"text": f"the {word}", "other": draw.choice(["dog", "cat"]), "label": values[word]} for word in words]

    splits = {"train": examples(128, 0), "validation": examples(32, 1)}
    training = {"epochs": 5, "batch_size": 8, "evaluations": 2, "head_learning_rate": 0.02}
    file = written_study(tmp_path, make(tmp_path / "model"), {**DOMAIN, "data": PAIR}, splits, training=training)
    plan, worker = plan_and_worker(file, tmp_path)
    first, last = train(plan, worker, "lora", rank=4, targets="all-linear", learning_rate=1e-2)
    assert last.loss < max(first.loss, 0.5)
    assert last.scores["pearson"] > 0.8
    # The deviation of the scores is about 11: what the mean would get.
    assert last.scores["rmse"] < 9


def test_the_scale_is_that_of_train(tmp_path: Path) -> None:
    """What is prepared holds all that scoring needs."""
    splits = {"train": overlapping(30, 0), "validation": overlapping(10, 1)}
    file = written_study(tmp_path, tiny_encoder(tmp_path / "model"), {**DOMAIN, "data": PAIR}, splits)
    domain = prepare(file, tmp_path / "cache")
    validation = domain.split("validation")[:]
    assert validation["mean"] == pytest.approx([20.0] * 10)
    assert validation["deviation"][0] == pytest.approx(np.std([0, 10, 20, 30, 40]), rel=1e-5)
    assert domain.task.references(validation) == [float(row["label"]) for row in splits["validation"]]


SEPARATE = {
    "task": "similarity",
    "options": {"encoding": "separate", "range": [0, 4]},
    "data": {"columns": {"text_pair": "other"}},
}


@pytest.mark.parametrize("builder", [tiny_encoder, tiny_decoder])
def test_texts_embedded_each_by_itself_learn_to_be_as_near_as_they_are_alike(
    tmp_path: Path, builder: Callable[[Path], Path]
) -> None:
    generator = random.Random(0)
    topics = (["dog", "cat", "bird"], ["court", "law", "clause"], ["fever", "drug", "lesion"])
    records = []
    for number in range(120):
        first, second = topics[number % 3], topics[(number // 3) % 3]
        texts = [" ".join(generator.choice(words) for _ in range(4)) for words in (first, second)]
        records.append({"text": f"{texts[0]} {number}", "other": texts[1], "label": 4.0 * (first is second)})
    splits = {"train": records[:90], "validation": records[90:]}
    training = {"epochs": 8, "evaluations": 8, "batch_size": 10}
    file = written_study(tmp_path, builder(tmp_path / "model"), SEPARATE, splits, training=training)
    results = train(*plan_and_worker(file, tmp_path), "lora", rank=8, learning_rate=1e-2)
    assert results[-1].scores["pearson"] > 0.8
    assert results[-1].loss < results[0].loss


def test_a_pair_scores_the_same_beside_any_other(tmp_path: Path) -> None:
    task = get_task("similarity", options={"encoding": "separate", "range": [0, 4]})
    pairs = {"first": [[1, 2, 3], [4]], "second": [[5], [6, 7]]}
    batch = task.collate({**pairs, "labels": [1.0, 4.0], "mean": [0, 0], "deviation": [1, 1]}, 0)
    assert batch["input_ids"][:, :3].tolist() == [[1, 2, 3], [4, 0, 0], [5, 0, 0], [6, 7, 0]]
    hidden = torch.randn(4, batch["input_ids"].shape[1], 5)
    soft = torch.cat([torch.randn(4, 2, 5), hidden], dim=1)
    found = [
        task.predict(torch.nn.Identity(), SimpleNamespace(last_hidden_state=states), batch, Prediction("encoder"))
        for states in (hidden, soft)
    ]
    u, v = hidden[0, :3].mean(0), hidden[2, :1].mean(0)
    expected = 4.0 * max(0.0, float(torch.cosine_similarity(u, v, dim=0)))
    assert found[0][0] == pytest.approx(expected, abs=1e-5)
    assert found[0] == pytest.approx(found[1])


def test_separate_embeddings_need_a_range(tmp_path: Path, study: Make) -> None:
    write(tmp_path, rows())
    file = study({"source": "a.jsonl", **PAIR}, domain={**DOMAIN, "options": {"encoding": "separate"}})
    with pytest.raises(StudyError, match="encoding: separate needs range"):
        load_domain("d", file.spec, file.folder)
