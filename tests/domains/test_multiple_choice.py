"""Multiple choice: what may be a label, batches of choices, losses, guesses, learning, bad input."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from task_runs import TaskRun
from tiny_models import tiny_decoder, tiny_encoder, tiny_encoder_decoder
from transformers import AutoTokenizer

from peftsearch.domains import get_task
from peftsearch.domains.tasks import LossOptions, Prediction, Task, Tokenization
from peftsearch.spec import DataSpec, StudyError

MAKERS = {"encoder": tiny_encoder, "encoder-decoder": tiny_encoder_decoder, "decoder": tiny_decoder}
DATA = DataSpec(source="x")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make(folder / kind) for kind, make in MAKERS.items()}


def task(**options: Any) -> Task:
    return get_task("multiple_choice", options=options)


def read(records: list[dict[str, Any]], columns: dict[str, Any] | None = None, **options: Any) -> pa.Table:
    data = DataSpec.model_validate({"source": "x", "columns": columns or {}})
    names = list(dict.fromkeys(name for record in records for name in record))
    table = pa.table({name: [record.get(name) for record in records] for name in names})
    return task(**options).read(table, data, "a.json", ("data",))


def row(label: Any, choices: Any = ("dog", "cat", "red bird"), **more: Any) -> dict[str, Any]:
    choices = list(choices) if isinstance(choices, tuple) else choices
    return {"question": "what?", "choices": choices, "label": label, **more}


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ([0, 2], {}),
        ([1, 3], {"first_index": 1}),
        (["0", "2"], {}),
        (["A", "C"], {}),
        (["a", "(c)"], {}),
        (["dog", "red bird"], {}),
        ([0.0, 2.0], {}),
    ],
)
def test_what_may_be_a_label(labels: list[Any], options: dict[str, Any]) -> None:
    assert read([row(label) for label in labels], **options).column("label").to_pylist() == [0, 2]


def test_a_choice_that_looks_like_a_number_is_read_as_text() -> None:
    assert read([row("2", ("1", "2")), row("1", ("2", "1"))]).column("label").to_pylist() == [1, 1]


def test_choices_with_labels_of_their_own() -> None:
    """As ARC has them on the Hub; some of its questions have numbers for letters."""
    records = [
        row("B", {"text": ["dog", "cat"], "label": ["A", "B"]}),
        row("1", {"text": ["dog", "cat", "bird"], "label": ["1", "2", "3"]}),
    ]
    assert read(records).column("label").to_pylist() == [1, 0]


def test_one_column_for_each_choice() -> None:
    records = [
        {"question": "what?", "c1": "dog", "c2": "cat", "c3": "bird", "label": 2},
        {"question": "what?", "c1": "dog", "c2": "cat", "c3": None, "label": 0},
    ]
    found = read(records, {"choices": ["c1", "c2", "c3"]})
    assert found.column("choices").to_pylist() == [["dog", "cat", "bird"], ["dog", "cat"]]


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"label": 3},
        "column 'label' of a.json holds 3 in row 2, which is none of its 3 choices ('dog', 'cat', 'red bird')",
    ),
    ({"label": 3}, "where the first choice is number 1, write the option first_index: 1"),
    ({"label": None}, "column 'label' of a.json holds no label in row 2"),
    ({"choices": ["dog"]}, "has 1 choice in row 2: two are needed"),
    ({"choices": ["dog", ""]}, "column 'choices' of a.json holds a choice without text in row 2"),
    ({"choices": ["dog", "dog"]}, "names a choice twice in row 2"),
    ({"choices": None}, "has no list of choices in row 2"),
    ({"question": ""}, "column 'question' of a.json holds no text in row 2"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=range(len(BAD)))
def test_bad_rows(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(StudyError) as caught:
        read([row(0), {**row(1), **change}])
    assert sentence in str(caught.value)


def test_a_label_that_is_no_choice() -> None:
    with pytest.raises(StudyError, match=r"holds 'fox' in row 2, which is none of its 3 choices"):
        read([row("dog"), row("fox"), row("cat")])


def test_a_context_is_optional() -> None:
    assert read([row(0)]).column("context").to_pylist() == [""]
    assert read([row(0, context="the house")]).column("context").to_pylist() == ["the house"]
    with pytest.raises(StudyError, match=r"a\.json has no column 'passage'"):
        read([row(0)], {"context": "passage"})


@pytest.mark.parametrize("kind", MAKERS)
def test_each_choice_is_a_text_of_its_own(kind: Any, models: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models[kind])
    how = Tokenization(tokenizer, 32, kind)
    found = task().tokenize(read([row(0), row(1, ("yes", "no"), context="the house")]), (), how)
    texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in choices] for choices in found["input_ids"]]
    assert texts == [
        ["what? dog", "what? cat", "what? red bird"],
        ["the house what? yes", "the house what? no"],
    ]
    assert found["length"] == [sum(map(len, choices)) for choices in found["input_ids"]]
    batch = task().collate(found[:], tokenizer.pad_token_id, multiple_of=1)
    assert batch["input_ids"].shape == (5, max(len(ids) for choices in found["input_ids"] for ids in choices))
    assert batch["counts"] == [3, 2]
    assert batch["labels"].tolist() == [0, 1]
    assert how.warnings == []


def test_long_contexts_are_cut_off_and_choices_are_not(models: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["encoder"])
    how = Tokenization(tokenizer, 12, "encoder")
    found = task().tokenize(read([row(0, context="house " * 20)]), (), how)
    assert [tokenizer.decode(ids, skip_special_tokens=True).split()[-1] for ids in found["input_ids"][0]] == [
        "dog",
        "cat",
        "bird",
    ]
    assert how.warnings == ["3 of 3 choices fill all 12 tokens of max_length with their question: texts may be cut off"]


def test_losses_and_predictions_are_over_a_questions_own_choices() -> None:
    output = SimpleNamespace(logits=torch.tensor([[1.0], [3.0], [2.0], [7.0], [5.0]]))
    batch = {"counts": [3, 2], "labels": torch.tensor([2, 1])}
    first = math.log(math.e + math.e**3 + math.e**2)
    second = math.log(math.e**7 + math.e**5)
    assert task().losses(output, batch).tolist() == pytest.approx([first - 2, second - 5], rel=1e-6)
    smoothed = task().losses(output, batch, LossOptions(label_smoothing=0.2)).tolist()
    assert smoothed == pytest.approx([0.8 * (first - 2) + 0.2 * (first - 2), 0.8 * (second - 5) + 0.2 * (second - 6)])
    assert task().predict(torch.nn.Module(), output, batch, Prediction("encoder")) == [1, 0]


def test_scores() -> None:
    # Position 0: precision 1/2, recall 1; 1: 1, 1/2; 2: 1, 1. F1: 2/3, 2/3, 1.
    assert task().score([0, 0, 1, 2], [0, 1, 1, 2], ()) == {"accuracy": 0.75, "macro_f1": pytest.approx(7 / 9)}


def test_guesses(models: dict[str, Path]) -> None:
    how = Tokenization(AutoTokenizer.from_pretrained(models["encoder"]), 32, "encoder")
    train = task().tokenize(read([row(2), row(2), row(0)]), (), how)[:]
    split = task().tokenize(read([row(1), row(0, ("the house", "no")), *[row(0) for _ in range(60)]]), (), how)[:]
    found = task().guesses(train, split, ())
    assert found["majority"].predictions[:2] == [2, 1]
    assert found["longest"].predictions[:2] == [2, 0]
    assert {0, 1, 2} == set(found["random"].predictions)


def test_one_place_for_all_answers_is_told() -> None:
    tables = {"train": read([row(0), row(0)]), "test": read([row(0), row(1)])}
    assert task().warnings(tables, ()) == ["in train the right choice always stands in place 1: shuffle them"]


def questions(count: int) -> list[dict[str, Any]]:
    """The colour among three to five things."""
    draw, records = random.Random(0), []
    for number in range(count):
        choices = ["dog", "cat", "bird", "tree", "house"][: 3 + number % 3]
        draw.shuffle(choices)
        place = draw.randrange(len(choices))
        choices[place] = draw.choice(["red", "green"])
        records.append({"question": f"what color is {number}", "choices": choices, "label": place})
    return records


@pytest.mark.parametrize("kind", MAKERS)
def test_learning_beats_the_guesses(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    run = TaskRun.make(tmp_path, models[kind], {"task": "multiple_choice"}, questions(160), epochs=5)
    results = run.train("lora", rank=16, learning_rate=1e-2, targets="all-linear")
    # Where the first half has taught everything already, what is left of the loss is noise.
    assert results[-1].loss < max(results[0].loss, 1e-3)
    baselines = run.probe()
    linear = baselines.pop("linear_probe", None)
    guessed = max(guess["accuracy"] for guess in baselines.values())
    assert results[-1].scores["accuracy"] > guessed + 0.3
    assert (linear is not None) == (kind == "encoder")
    if linear is not None:
        assert linear["accuracy"] > guessed + 0.1
