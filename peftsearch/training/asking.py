"""Prompts of tasks that a language model answers by choosing: labels, yes or no, numbers, choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftsearch.domains import PreparedDomain
from peftsearch.domains.models import Architecture
from peftsearch.domains.tasks.base import Tokenization
from peftsearch.domains.tasks.generation import answer_tokens
from peftsearch.training.likelihood import Question, common

# Label names that a prompt lists; more would fill it.
LISTED = 30


@dataclass(frozen=True)
class Asked:
    """What a model is asked about some examples, and what its answers' likelihoods mean.

    Attributes:
        questions: One or several for each example, one example after another.
        shots: Training examples in each prompt.
        decide: From the mean log-probabilities of each question's answers to predictions as the task makes them.
        how: The decision in words.
    """

    questions: list[Question]
    shots: int
    decide: Callable[[list[np.ndarray]], list[Any]]
    how: str


@dataclass(frozen=True)
class _Form:
    """What is asked below a text, ending where the answer begins, and the answers to choose from."""

    ask: str
    answers: Sequence[str]


def _ask_label(
    domain: PreparedDomain, tokenizer: Any, asked_about: Mapping[str, Any], limit: int, shots: int
) -> Asked | None:
    """A question for each text, its answers the labels; None where no shot fits."""
    labels = [domain.task.options.said(label) for label in domain.labels]
    head = f"Classify the text as one of: {', '.join(labels)}.\n\n" if len(labels) <= LISTED else ""
    train = domain.split("train")["labels"]
    examples = [(row, 0, train[row]) for row in balanced(train, shots)]
    found = _about_texts(domain, tokenizer, asked_about, limit, head, [_Form("Label:", labels)], examples)
    return None if found is None else Asked(*found, _likeliest, _LIKELIEST.format("label"))


def _ask_labels(
    domain: PreparedDomain, tokenizer: Any, asked_about: Mapping[str, Any], limit: int, shots: int
) -> Asked | None:
    """For each text a question for each label, answered by yes or no; None where no shot fits."""
    labels = [domain.task.options.said(label) for label in domain.labels]
    train = domain.split("train")["labels"]
    forms = [_Form(f"Does the label {label} apply, yes or no?\nAnswer:", _YES_NO) for label in labels]
    examples = []
    for place, row in enumerate(balanced([tuple(numbers) for numbers in train], shots)):
        # As many that apply as that do not, where there are such.
        mine = set(train[row])
        others = [number for number in range(len(labels)) if number not in mine]
        number = (sorted(mine) or others)[0] if place % 2 == 0 else (others or sorted(mine))[0]
        examples.append((row, number, 0 if number in mine else 1))
    found = _about_texts(domain, tokenizer, asked_about, limit, "", forms, examples)

    def decide(scores: list[np.ndarray]) -> list[Any]:
        likelier = [int(yes > no) for yes, no in scores]
        return [likelier[first : first + len(labels)] for first in range(0, len(likelier), len(labels))]

    how = "the labels for which yes has a higher mean log-probability per token than no, each asked about by itself"
    return None if found is None else Asked(*found, decide, how)


def _ask_score(
    domain: PreparedDomain, tokenizer: Any, asked_about: Mapping[str, Any], limit: int, shots: int
) -> Asked | None:
    """A question for each pair, its answers numbers of the scale; None where no shot fits."""
    train = domain.split("train")["labels"]
    low, high = domain.task.options.range or (min(train), max(train))
    numbers = scale_numbers(low, high)
    head = f"How similar are the texts, from {low:g} (not at all) to {high:g} (the same)?\n\n"
    nearest = [int(np.argmin(np.abs(numbers - label))) for label in train]
    examples = [(row, 0, nearest[row]) for row in balanced(nearest, shots)]
    form = _Form("Similarity:", [f"{number:g}" for number in numbers])
    found = _about_texts(domain, tokenizer, asked_about, limit, head, [form], examples)

    def decide(scores: list[np.ndarray]) -> list[Any]:
        weights = [np.exp(own - own.max()) for own in scores]
        return [float(own @ numbers / own.sum()) for own in weights]

    how = (
        f"the mean of {form.answers[0]} to {form.answers[-1]}, weighted by their probabilities per token after a prompt"
    )
    return None if found is None else Asked(*found, decide, how)


def scale_numbers(low: float, high: float) -> np.ndarray:
    """The numbers of a scale that a model chooses from: its whole numbers, or eleven where they are too few or many."""
    whole = np.arange(np.ceil(low), np.floor(high) + 1)
    return whole if 3 <= len(whole) <= 11 else np.linspace(low, high, 11)


def _likeliest(scores: list[np.ndarray]) -> list[Any]:
    return [int(np.argmax(own)) for own in scores]


_LIKELIEST = "the {} of the highest mean log-probability per token after a prompt"
_YES_NO = ("yes", "no")


def _about_texts(
    domain: PreparedDomain,
    tokenizer: Any,
    asked_about: Mapping[str, Any],
    limit: int,
    head: str,
    forms: Sequence[_Form],
    examples: Sequence[tuple[int, int, int]],
) -> tuple[list[Question], int] | None:
    """Questions about texts, each form for each text, and how many examples they show.

    Args:
        domain: Shots are of its training split.
        tokenizer: The model's.
        asked_about: The texts.
        limit: Tokens that a prompt and its answer may have.
        head: What every prompt begins with.
        forms: What is asked about every text.
        examples: What may be shown, as far as it fits: training row, number of the form, number of the answer.

    Returns:
        None where examples are wanted and not even one fits.
    """

    def size(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    train = domain.split("train")
    longest = max(size(form.ask) + max(size(f" {answer}") for answer in form.answers) for form in forms)
    texts = _texts(asked_about, tokenizer)
    room = limit - len(tokenizer(f"{head}Text: \n")["input_ids"]) - longest - max(_lengths(asked_about))
    shown, count = "", 0
    for row, form, answer in examples:
        own = {name: [value] for name, value in train[row].items()}
        # White space and the tokens where texts meet.
        cost = _lengths(own)[0] + longest + 8
        if cost <= room:
            room -= cost
            shown += f"Text: {_texts(own, tokenizer)[0]}\n{forms[form].ask} {forms[form].answers[answer]}\n\n"
            count += 1
    if examples and not count:
        return None
    how = Tokenization(tokenizer, limit, domain.architecture)
    questions = []
    for text in texts:
        for form_ in forms:
            prompt = f"{head}{shown}Text: {text}\n{form_.ask}"
            tokens = without_end(list(tokenizer(prompt)["input_ids"]), tokenizer, domain.architecture)
            answers = [answer_tokens(answer, prompt, tokens, chat=False, how=how)[:-1] for answer in form_.answers]
            questions.append(Question(tokens, answers))
    return questions, count


def _texts(rows: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """Texts, or the texts of pairs on lines of their own."""
    if "first" in rows:
        return [
            "\n".join(_text(ids, tokenizer) for ids in pair) for pair in zip(rows["first"], rows["second"], strict=True)
        ]
    return [_text(ids, tokenizer) for ids in rows["input_ids"]]


def _lengths(rows: Mapping[str, Any]) -> list[int]:
    if "first" in rows:
        return [len(first) + len(second) for first, second in zip(rows["first"], rows["second"], strict=True)]
    return [len(ids) for ids in rows["input_ids"]]


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    """A tokenised text, or the texts of a pair on lines of their own."""
    special = set(tokenizer.all_special_ids)
    parts: list[list[int]] = [[]]
    for token in ids:
        if token in special:
            parts.append([])
        else:
            parts[-1].append(token)
    return "\n".join(tokenizer.decode(part).strip() for part in parts if part)


def without_end(ids: list[int], tokenizer: Any, architecture: Architecture) -> list[int]:
    """A decoder's prompt without the end token that some tokenizers put behind every text."""
    if architecture == "decoder" and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _ask_choice(
    domain: PreparedDomain, tokenizer: Any, asked_about: Mapping[str, Any], limit: int, shots: int
) -> Asked | None:
    """A question for each row: what its choices begin with in common, and how each goes on."""
    end = [tokenizer.eos_token_id]
    gap = blank_line(tokenizer)
    train = domain.split("train")

    def bare(ids: Sequence[int]) -> list[int]:
        return list(ids[:-1] if ids and ids[-1] == end[0] else ids)

    longest = max(len(ids) for choices in asked_about["input_ids"] for ids in choices)
    room = limit - longest - 1
    shown: list[int] = []
    count = 0
    for row in balanced(train["labels"], shots):
        right = bare(train[row]["input_ids"][train[row]["labels"]])
        if len(shown) + len(right) + len(gap) <= room:
            shown += without_start(right, tokenizer, bool(shown)) + gap
            count += 1
    if shots and not count:
        return None
    questions = []
    for choices in asked_about["input_ids"]:
        whole = [bare(ids) for ids in choices]
        # Every choice keeps a token to be judged by.
        cut = min(common(whole), min(len(ids) for ids in whole) - 1)
        prompt = [*shown, *without_start(whole[0][:cut], tokenizer, bool(shown))]
        questions.append(
            Question(prompt + (end if domain.architecture == "encoder-decoder" else []), [ids[cut:] for ids in whole])
        )
    return Asked(questions, count, _likeliest, _LIKELIEST.format("choice"))


def balanced(labels: Sequence[Any], count: int) -> list[int]:
    """So many rows, the same ones every time, taken from each label in turn."""
    waiting: dict[Any, list[int]] = {}
    for row in np.random.default_rng(0).permutation(len(labels)).tolist():
        waiting.setdefault(labels[row], []).append(row)
    found: list[int] = []
    depth = 0
    while len(found) < min(count, len(labels)):
        found += [rows[depth] for rows in waiting.values() if depth < len(rows)]
        depth += 1
    return found[:count]


def blank_line(tokenizer: Any) -> list[int]:
    """A blank line; empty for tokenizers that drop white space."""
    return list(tokenizer("\n\n", add_special_tokens=False)["input_ids"])


def without_start(ids: list[int], tokenizer: Any, drop: bool) -> list[int]:
    """A text begins with the start token only where a prompt does."""
    start = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    return ids[1:] if drop and ids and ids[0] in start else ids


ASKED = {
    "classification": _ask_label,
    "relation": _ask_label,
    "multi_label": _ask_labels,
    "similarity": _ask_score,
    "multiple_choice": _ask_choice,
}
"""How tasks are prompted that are answered by likelihood."""
