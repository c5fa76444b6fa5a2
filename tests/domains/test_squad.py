"""SQuAD v2's scores, by the official script's definition worked out by hand; and SQuAD's own file format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftsearch.domains.metrics.squad import best_over_answers, normalise_answer, squad_v2_scores, token_f1
from peftsearch.domains.sources import read_source
from peftsearch.domains.squad_file import is_squad, squad_records
from peftsearch.spec import DataSpec, StudyError


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The  Cat's\thats.", "cats hats"),
        ("an apple, a day", "apple day"),
        ("theatre Anna", "theatre anna"),
        # Punctuation goes first: what is left of "a-b" is no article.
        ("a-b", "ab"),
        ("U.S.A.", "usa"),
        ("a the an", ""),
        ("\u00a75 \u2013 b", "\u00a75 \u2013 b"),
    ],
)
def test_normalised_answers(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        # One of two predicted words, one of three right ones: P = 1/2, R = 1/3.
        ("red car", "red big house", 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),
        # Words count as often as they stand there: two of three, two of two.
        ("no no no", "no no", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("the cat", "cat", 1.0),
        ("dog", "cat", 0.0),
        ("", "", 1.0),
        ("", "cat", 0.0),
        ("the", "", 1.0),
        ("cat", "", 0.0),
    ],
)
def test_token_f1(prediction: str, gold: str, f1: float) -> None:
    assert token_f1(prediction, gold) == pytest.approx(f1)


def test_the_best_of_several_answers_counts() -> None:
    assert best_over_answers("big red car", ["house", "red car", "big car"]) == (0.0, pytest.approx(0.8))
    assert best_over_answers("Big car!", ["house", "a big car"]) == (1.0, 1.0)
    # Answers without a word, such as "the", do not count; a question without others wants the empty answer.
    assert best_over_answers("", ["the", "cat"]) == (0.0, 0.0)
    assert best_over_answers("", ["the"]) == (1.0, 1.0)
    assert best_over_answers("", []) == (1.0, 1.0)
    assert best_over_answers("cat", []) == (0.0, 0.0)


def test_scores_of_answerable_and_unanswerable_questions() -> None:
    scores = squad_v2_scores(["red car", "cat", "", "x"], [["red car"], ["cat dog"], [], []])
    assert scores == {
        "exact_match": 0.5,
        "f1": pytest.approx((1 + 2 / 3 + 1 + 0) / 4),
        "has_answer_exact_match": 0.5,
        "has_answer_f1": pytest.approx((1 + 2 / 3) / 2),
        "no_answer_exact_match": 0.5,
        "no_answer_f1": 0.5,
    }
    assert "no_answer_f1" not in squad_v2_scores(["a b"], [["b"]])


DOCUMENT: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "The dog runs.",
                    "qas": [
                        {"id": 1, "question": "Who?", "answers": [{"text": "dog", "answer_start": 4}]},
                        {
                            "id": "b",
                            "question": "Where?",
                            "is_impossible": True,
                            "answers": [],
                            "plausible_answers": [{"text": "runs", "answer_start": 8}],
                        },
                    ],
                }
            ],
        }
    ],
}


def test_squads_own_file(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(DOCUMENT))
    raw = read_source(DataSpec(train="train.json"), tmp_path, (), ("question", "context", "answers"))
    assert raw["train"].table.to_pylist() == [
        {
            "id": "1",
            "title": "T",
            "context": "The dog runs.",
            "question": "Who?",
            "answers": {"text": ["dog"], "answer_start": [4]},
        },
        {
            "id": "b",
            "title": "T",
            "context": "The dog runs.",
            "question": "Where?",
            "answers": {"text": [], "answer_start": []},
        },
    ]


def test_records_under_data_are_not_taken_for_squad() -> None:
    assert not is_squad({"data": [{"text": "a"}]})
    assert not is_squad({"data": []})
    assert not is_squad([DOCUMENT])


@pytest.mark.parametrize(
    ("paragraph", "sentence"),
    [
        ({"context": "c"}, "paragraph 1 of article 1 lacks 'qas'"),
        ({"context": "c", "qas": [{"question": "q"}]}, "paragraph 1 of article 1 lacks 'answers'"),
        ({"context": "c", "qas": [3]}, "paragraph 1 of article 1 is not of SQuAD's form"),
    ],
)
def test_broken_squad_files(tmp_path: Path, paragraph: dict[str, Any], sentence: str) -> None:
    document = {"data": [{"title": "t", "paragraphs": [paragraph]}]}
    with pytest.raises(ValueError, match=sentence):
        squad_records(document)
    (tmp_path / "train.json").write_text(json.dumps(document))
    with pytest.raises(StudyError, match=f"cannot read train.json as json: {sentence}"):
        read_source(DataSpec(train="train.json"), tmp_path, (), ())
