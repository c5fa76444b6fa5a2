"""Prompts of tasks whose answers are stretches of the text: a language model writes them, and they are sought in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftsearch.domains import PreparedDomain
from peftsearch.domains.metrics.squad import normalise_answer
from peftsearch.domains.tasks.base import EXAMPLE
from peftsearch.training.asking import balanced

NO_ANSWER, NONE = "no answer", "none"
ENTITY_TOKENS = 64
"""Tokens of a list of entities at most."""


@dataclass(frozen=True)
class Extraction:
    """What a model is asked to write, and what is made of it.

    Attributes:
        prompts: One or several for each example, one example after another.
        shots: Training examples in each prompt.
        most: Tokens that are written at most.
        decide: From what was written (its first line) after each prompt to predictions as the task makes them.
        how: In words.
    """

    prompts: list[str]
    shots: int
    most: int
    decide: Callable[[list[str]], list[Any]]
    how: str


def _ask_answer(
    domain: PreparedDomain, tokenizer: Any, asked_about: Mapping[str, Any], limit: int, shots: int
) -> Extraction | None:
    """A question below its context, all windows put together; None where no shot fits."""
    train = domain.split("train")
    unanswerable = [start == null for start, null in zip(train["start"], train["null"], strict=True)]
    head = "Answer the question with words of the text"
    head += f', or with "{NO_ANSWER}" where the text does not say.\n\n' if any(unanswerable) else ".\n\n"
    most = domain.task.options.max_answer_length

    def example(question: str, text: str, answer: str = "") -> str:
        return f"Text: {text}\nQuestion: {question}\nAnswer:{answer}"

    def shot(row: int) -> str:
        own = train[row]
        stretch = own["passage"][own["first"][own["start"]] : own["last"][own["end"]]]
        return example(own["question"], own["passage"], f" {NO_ANSWER if unanswerable[row] else stretch}\n\n")

    windows: dict[int, list[int]] = {}
    for row, number in enumerate(asked_about[EXAMPLE]):
        windows.setdefault(number, []).append(row)
    questions = [asked_about["question"][rows[0]] for rows in windows.values()]
    contexts = [_together([asked_about["passage"][row] for row in rows]) for rows in windows.values()]
    bare = max(_size(f"{head}{example(question, '')}", tokenizer) for question in questions) + most
    longest = max(_size(context, tokenizer) for context in contexts)
    shown = _shown(shot, balanced(unanswerable, len(unanswerable)), shots, limit - bare - longest, tokenizer)
    if shots and not shown:
        return None
    cut = [_cut(context, limit - bare - _size("".join(shown), tokenizer), tokenizer) for context in contexts]
    shortened = sum(len(whole) > len(short) for whole, short in zip(contexts, cut, strict=True))

    def decide(written: list[str]) -> list[Any]:
        return ["" if normalise_answer(text) == NO_ANSWER else text for text in written]

    prompts = [
        f"{head}{''.join(shown)}{example(question, text)}" for question, text in zip(questions, cut, strict=True)
    ]
    how = "the frozen model writes the answer" + (f" ({shortened} contexts cut to fit)" if shortened else "")
    return Extraction(prompts, len(shown), most, decide, how)


def _together(passages: Sequence[str]) -> str:
    """A text from stretches of it that overlap."""
    whole = passages[0]
    for passage in passages[1:]:
        overlap = next((size for size in range(len(passage), 0, -1) if whole.endswith(passage[:size])), 0)
        whole += passage[overlap:] if overlap else f" {passage}"
    return whole


def _ask_entities(
    domain: PreparedDomain, tokenizer: Any, asked_about: Mapping[str, Any], limit: int, shots: int
) -> Extraction | None:
    """For each sentence and each type of entity: which there are; None where no shot fits."""
    labels, train = domain.labels, domain.split("train")
    types = list(domain.task.metric_labels(labels))
    tags = train["tags"]

    def head(kind: str) -> str:
        return (
            f"List what the text names of the type {kind}, separated by semicolons; write {NONE} if there is none.\n\n"
        )

    def example(kind: str, words: Sequence[str], answer: str = "") -> str:
        return f"Text: {' '.join(words)}\n{kind}:{answer}"

    def shot(row: int, kind: str) -> str:
        words = train[row]["words"]
        found = [" ".join(words[first : last + 1]) for first, last in _stretches(tags[row], labels, kind)]
        return example(kind, words, f" {'; '.join(dict.fromkeys(found)) or NONE}\n\n")

    sentences = asked_about["words"]
    longest = max(_size(example(types[0], words), tokenizer) for words in sentences)
    prompts: dict[str, list[str]] = {}
    counts = set()
    for kind in types:
        room = limit - longest - _size(head(kind) + kind, tokenizer) - ENTITY_TOKENS
        number = labels.index(f"B-{kind}")
        order = balanced([number in row for row in tags], len(tags))
        shown = _shown(lambda row, kind=kind: shot(row, kind), order, shots, room, tokenizer)  # type: ignore[misc]
        if shots and not shown:
            return None
        counts.add(len(shown))
        prompts[kind] = [f"{head(kind)}{''.join(shown)}{example(kind, words)}" for words in sentences]

    def decide(written: list[str]) -> list[Any]:
        answers = iter(written)
        found = []
        for words in sentences:
            listed = {kind: next(answers).split(";") for kind in types}
            found.append(entity_tags(words, listed, labels))
        return found

    asked = [prompts[kind][number] for number in range(len(sentences)) for kind in types]
    how = "the frozen model lists the entities of each type, which are sought in the text"
    return Extraction(asked, min(counts), ENTITY_TOKENS, decide, how)


def entity_tags(words: Sequence[str], listed: Mapping[str, Sequence[str]], labels: Sequence[str]) -> list[int]:
    """Numbers of IOB2 tags for entities that were written down.

    An entity is found wherever whole words of the sentence spell it, whatever its case and blanks. Where several
    overlap, the longest is taken.

    Args:
        words: The sentence.
        listed: Type -> entities.
        labels: The tags.
    """
    spelled = [word.casefold() for word in words]
    wanted = sorted(
        {("".join(text.casefold().split()), kind) for kind, texts in listed.items() for text in texts},
        key=lambda item: (-len(item[0]), item),
    )
    tags = [labels.index("O")] * len(words)
    taken = [False] * len(words)
    for text, kind in wanted:
        for first in range(len(words)):
            last, rest = first, text
            while rest and last < len(words) and rest.startswith(spelled[last]):
                rest = rest[len(spelled[last]) :]
                last += 1
            if text and not rest and not any(taken[first:last]):
                tags[first:last] = [labels.index(f"B-{kind}"), *[labels.index(f"I-{kind}")] * (last - first - 1)]
                taken[first:last] = [True] * (last - first)
    return tags


def _stretches(tags: Sequence[int], labels: Sequence[str], kind: str) -> list[tuple[int, int]]:
    """First and last words of the entities of a type, from numbers of IOB2 tags."""
    found: list[tuple[int, int]] = []
    for place, number in enumerate(tags):
        if labels[number] == f"B-{kind}":
            found.append((place, place))
        elif labels[number] == f"I-{kind}" and found:
            found[-1] = (found[-1][0], place)
    return found


def _shown(shot: Callable[[int], str], order: Sequence[int], shots: int, room: int, tokenizer: Any) -> list[str]:
    """The first training examples that fit, each into an even share of the room."""
    found: list[str] = []
    # Where hundreds do not fit, the next will not, either.
    for row in order[: 100 * shots]:
        text = shot(row)
        if _size(text, tokenizer) <= room // shots:
            found.append(text)
        if len(found) == shots:
            break
    return found


@functools.lru_cache(maxsize=4)
def line_ends(tokenizer: Any) -> frozenset[int]:
    """Tokens that end a line."""
    text_of = tokenizer.convert_tokens_to_string
    return frozenset(number for token, number in tokenizer.get_vocab().items() if "\n" in text_of([token]))


def _size(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2


def _cut(text: str, tokens: int, tokenizer: Any) -> str:
    """The beginning of a text."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(spans) <= tokens else text[: spans[max(tokens, 1) - 1][1]]


EXTRACTED = {"question_answering": _ask_answer, "token_classification": _ask_entities}
"""How tasks are prompted whose answers the model writes down."""
