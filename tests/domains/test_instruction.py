"""Instruction following: prompts, labels among responses, and scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from writing_study import MODELS, plan_and_worker, prepare, study, train

from peftsearch.domains import PreparedDomain, get_task
from peftsearch.domains.tasks.instruction import plain
from peftsearch.spec import StudyError

ASKED = {"red": "yes", "blue": "no"}


def rows_of(count: int) -> list[dict[str, str]]:
    """Whether a colour is good; red is, blue is not."""
    things = ("dog", "cat", "house", "tree", "river", "city", "man", "woman")
    return [
        {
            "text": f"is the {things[number // 2 % len(things)]} good ?",
            "input": f"it is {'red' if number % 2 else 'blue'} and {things[number % len(things)]}",
            "target": "yes" if number % 2 else "no",
        }
        for number in range(count)
    ]


ROWS = {"train": rows_of(16), "validation": rows_of(6)}
Make = Callable[..., PreparedDomain]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MODELS.items()}


@pytest.fixture
def make(places: dict[str, Path], tmp_path: Path) -> Make:
    def prepared(
        kind: str, options: dict[str, Any], rows: Any = None, pair: bool = True, **more: Any
    ) -> PreparedDomain:
        data = {"columns": {"text_pair": "input"}} if pair else {}
        domain = {"task": "instruction", "options": {"target_length": 8, **options}, "data": data, **more}
        return prepare(
            study(tmp_path, places[kind], domain, rows or ROWS, training={"max_length": 64}), tmp_path / "cache"
        )

    return prepared


@pytest.mark.parametrize("kind", MODELS)
def test_what_the_model_reads(kind: str, make: Make) -> None:
    def read(domain: PreparedDomain) -> str:
        text = domain.tokenizer.decode(domain.split("train")[0]["input_ids"], skip_special_tokens=True)
        return str(text).replace(" :", ":")

    short = {"train": [{"text": "Go", "input": "a cat", "target": "run"}], "validation": ROWS["validation"]}
    assert read(make(kind, {}, short)) == "# # # instruction: go # # # input: a cat # # # response:"
    assert read(make(kind, {}, short, pair=False)) == "# # # instruction: go # # # response:"
    assert read(make(kind, {"template": "{text_pair} : {text}"}, short)) == "a cat: go"


def test_a_response_is_the_label_that_it_is_or_begins_with() -> None:
    task: Any = get_task("instruction", options={"labels": ["Yes", "No", "No idea"]})
    assert task.label("yes.") == "Yes"
    assert task.label("  NO , never") == "No"
    assert task.label("No idea, sorry") == "No idea"
    assert task.label("yesterday") is None
    assert task.label("I say yes") is None
    scores = task.score(["yes!", "no idea at all", "maybe", "No"], ["Yes", "No", "No", "No"], ())
    assert scores["label_accuracy"] == 0.5
    assert scores["exact_match"] == 0.5
    # ROUGE-1: 1, 2 * 1 * 1/4 / (1 + 1/4), 0 and 1.
    assert scores["rouge1"] == pytest.approx((1 + 2 * 0.25 / 1.25 + 0 + 1) / 4)


def test_texts_are_compared_without_case_white_space_and_punctuation() -> None:
    assert plain(' "The  Dog" -- ran!\n') == "the dog ran"
    assert plain("3.5 mg, b-cell") == "3.5 mg b-cell"
    task = get_task("instruction")
    assert task.score(["The dog."], ["the  dog"], ())["exact_match"] == 1.0
    assert "label_accuracy" not in task.metrics
    assert "label_accuracy" not in task.score(["a"], ["a"], ())


def test_the_most_frequent_response_is_a_guess(make: Make) -> None:
    rows = {"train": [*ROWS["train"], {"text": "a", "input": "b", "target": "yes"}], "validation": ROWS["validation"]}
    domain = make("decoder", {}, rows)
    guess = domain.task.guesses(domain.split("train")[:], domain.split("validation")[:], ())["majority"]
    assert guess.predictions == ["yes"] * 6
    assert guess.detail == "always 'yes', 9 of 17 responses of train"
    rows["train"] = [{"text": word, "input": "b", "target": word} for word in "abc"]
    domain = make("decoder", {}, rows)
    assert domain.task.guesses(domain.split("train")[:], domain.split("validation")[:], ()) == {}


@pytest.mark.parametrize("kind", MODELS)
def test_a_tiny_model_learns_to_follow(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    domain = {
        "task": "instruction",
        "metric": "label_accuracy",
        "options": {"target_length": 4, "labels": ["yes", "no"]},
        "data": {"columns": {"text_pair": "input"}},
    }
    rows = {"train": rows_of(48), "validation": rows_of(16)}
    training = {"epochs": 12, "evaluations": 1, "batch_size": 8, "max_length": 48}
    plan, worker = plan_and_worker(study(tmp_path, places[kind], domain, rows, training=training), tmp_path)
    assert train(plan, worker, "full", learning_rate=3e-3)[-1].scores["label_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"labels": ["yes"]}, {}, "list at least two labels"),
        ({"labels": ["yes", "Yes."]}, {}, "list at least two labels"),
        (
            {"labels": ["yes", "maybe"]},
            {},
            "column 'target' of train holds a response that options.labels does not list",
        ),
        ({"labels": "yes"}, {}, "must be a list, not 'yes'"),
        (
            {},
            {"metric": "label_accuracy"},
            "no metric 'label_accuracy' without the option 'labels': set options.labels",
        ),
        ({"template": "{text}"}, {}, "has no {text_pair}, which columns.text_pair maps"),
    ],
)
def test_bad_input_gets_one_sentence(options: dict[str, Any], more: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(StudyError) as raised:
        make("decoder", options, **more)
    assert message in str(raised.value)
    assert "\n" not in raised.value.message
