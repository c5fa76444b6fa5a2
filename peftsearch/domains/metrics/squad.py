"""Exact match and token F1 of extractive answers, as the official evaluation script of SQuAD v2.0 computes them.

Rajpurkar et al. 2018, arXiv:1806.03822. The script's thresholds on the probability of "no answer" are not part of it:
an empty prediction is "no answer". All scores are shares from 0 to 1 (the script prints percentages).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, and with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 where both texts are the same up to `normalise_answer`, 0 elsewhere."""
    return float(normalise_answer(prediction) == normalise_answer(gold))


def token_f1(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall over words; where either text has none, 1 if the other has none, too."""
    predicted, wanted = normalise_answer(prediction).split(), normalise_answer(gold).split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = (Counter(predicted) & Counter(wanted)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def best_over_answers(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and token F1 of a prediction, each the best over the right answers.

    Args:
        prediction: The predicted text; empty for "no answer".
        answers: The right answers; none where the question has no answer. Those that `normalise_answer` leaves empty do
            not count.
    """
    wanted = [answer for answer in answers if normalise_answer(answer)] or [""]
    return max(exact_match(prediction, gold) for gold in wanted), max(token_f1(prediction, gold) for gold in wanted)


def squad_v2_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The script's scores of some questions.

    Args:
        predictions: The predicted text for each question.
        references: The right answers of each question; none where it has no answer.

    Returns:
        ``exact_match`` and ``f1`` of all questions; ``has_answer_exact_match`` and ``has_answer_f1`` of those with an
        answer and ``no_answer_exact_match`` and ``no_answer_f1`` of the others, where there are such questions.
    """
    pairs = [best_over_answers(text, answers) for text, answers in zip(predictions, references, strict=True)]
    groups = {
        "": pairs,
        "has_answer_": [pair for pair, answers in zip(pairs, references, strict=True) if len(answers)],
        "no_answer_": [pair for pair, answers in zip(pairs, references, strict=True) if not len(answers)],
    }
    scores = {}
    for prefix, found in groups.items():
        if found:
            scores[f"{prefix}exact_match"] = sum(exact for exact, _ in found) / len(found)
            scores[f"{prefix}f1"] = sum(f1 for _, f1 in found) / len(found)
    return scores
