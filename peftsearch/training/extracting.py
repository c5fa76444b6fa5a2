"""Prompts of tasks whose answers are stretches of the text: a language model writes them down.

Entities that it lists are sought in the text; an answer to a question is scored as it was written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftsearch.domains import PreparedDomain
from peftsearch.domains.metrics.squad import normalise_answer
from peftsearch.domains.tasks.base import EXAMPLE
from peftsearch.domains.tasks.token_classification import LOST, OUTSIDE
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
    columns = {name: list(train[name]) for name in ("start", "null", "answers")}
    unanswerable = [not answers for answers in columns["answers"]]
    head, most = "Answer the question with words of the text", domain.task.options.max_answer_length
    if any(unanswerable):
        head += f', or with "{NO_ANSWER}" where the text does not say'
        most = max(most, _size(f" {NO_ANSWER}", tokenizer))
    head += ".\n\n"

    def example(question: str, text: str, answer: str = "") -> str:
        return f"Text: {text}\nQuestion: {question}\nAnswer:{answer}"

    def shot(row: int) -> str:
        own = train[row]
        stretch = own["passage"][own["first"][own["start"]] : own["last"][own["end"]]]
        answer = NO_ANSWER if unanswerable[row] else " ".join(stretch.split())
        return example(own["question"], own["passage"], f" {answer}\n\n")

    # A window that does not hold its question's answer teaches nothing here.
    usable = [
        row
        for row, (start, null) in enumerate(zip(columns["start"], columns["null"], strict=True))
        if start != null or unanswerable[row]
    ]
    windows: dict[int, list[int]] = {}
    for row, number in enumerate(asked_about[EXAMPLE]):
        windows.setdefault(number, []).append(row)
    questions = [asked_about["question"][rows[0]] for rows in windows.values()]
    stride = domain.task.options.stride
    shared = domain.max_length // 4 if stride is None else stride
    contexts = [
        together([(asked_about["passage"][n], asked_about["last"][n]) for n in rows], shared)
        for rows in windows.values()
    ]
    room = limit - max(_size(f"{head}{example(question, '')}", tokenizer) for question in questions) - most
    if room <= 0:
        raise ValueError(f"the question and its answer fill the {limit} tokens that a prompt may have")
    longest = max(_size(context, tokenizer) for context in contexts)
    order = [usable[place] for place in balanced([unanswerable[row] for row in usable], len(usable))]
    # Shots take what the contexts leave, or half of the room: then the longest contexts are cut.
    shown = _shown(shot, order, shots, max(room - longest, room // 2), tokenizer)
    if shots and not shown:
        return None
    before = head + "".join(shown)
    left = room - _size("".join(shown), tokenizer)
    cut = [_cut(context, left, tokenizer) for context in contexts]
    shortened = sum(len(whole) > len(short) for whole, short in zip(contexts, cut, strict=True))

    def decide(written: list[str]) -> list[Any]:
        return ["" if normalise_answer(text) == NO_ANSWER else text for text in written]

    prompts = [before + example(question, text) for question, text in zip(questions, cut, strict=True)]
    how = "the frozen model writes the answer" + (f" ({shortened} contexts cut to fit)" if shortened else "")
    return Extraction(prompts, len(shown), most, decide, how)


def together(windows: Sequence[tuple[str, Sequence[int]]], shared: int) -> str:
    """A text from its windows, of which neighbours share some tokens.

    Args:
        windows: Of each the stretch that it shows, and where in it each token ends (0 for tokens of something else).
        shared: How many tokens.
    """
    whole = windows[0][0]
    for passage, ends in windows[1:]:
        own = [end for end in ends if end]
        whole += passage[own[min(shared, len(own)) - 1] :] if shared else f" {passage}"
    return whole


def _ask_entities(
    domain: PreparedDomain, tokenizer: Any, asked_about: Mapping[str, Any], limit: int, shots: int
) -> Extraction | None:
    """For each sentence and each type of entity: which there are; None where no shot fits."""
    labels, train, said = domain.labels, domain.split("train"), domain.task.options.said
    types = list(domain.task.metric_labels(labels))
    tags = list(train["tags"])

    def head(kind: str) -> str:
        wanted = f"List what the text names of the type {said(kind)}, separated by semicolons"
        return f"{wanted}; write {NONE} if there is none.\n\n"

    def example(kind: str, words: Sequence[str], answer: str = "") -> str:
        return f"Text: {' '.join(words)}\n{said(kind)}:{answer}"

    def shot(row: int, kind: str) -> str:
        words = train[row]["words"]
        found = [" ".join(words[first : last + 1]) for first, last in _stretches(tags[row], labels, kind)]
        return example(kind, words, f" {'; '.join(dict.fromkeys(found)) or NONE}\n\n")

    # Of a long sentence the words that trials see.
    sentences = [
        words[: max((place + 1 for place, position in enumerate(positions) if position != LOST), default=1)]
        for words, positions in zip(asked_about["words"], asked_about["positions"], strict=True)
    ]
    longest = max(_size(example(types[0], words), tokenizer) for words in sentences)
    shown: dict[str, list[str]] = {}
    for kind in types:
        room = limit - longest - _size(head(kind) + said(kind), tokenizer) - ENTITY_TOKENS
        number = labels.index(f"B-{kind}")
        order = balanced([number in row for row in tags], len(tags))
        shown[kind] = _shown(functools.partial(shot, kind=kind), order, shots, room, tokenizer)
    count = min(map(len, shown.values()))
    if shots and not count:
        return None
    before = {kind: head(kind) + "".join(texts[:count]) for kind, texts in shown.items()}

    def decide(written: list[str]) -> list[Any]:
        answers = iter(written)
        found = []
        for words, whole in zip(sentences, asked_about["words"], strict=True):
            listed = {kind: next(answers).split(";") for kind in types}
            unseen = [OUTSIDE] * (len(whole) - len(words))
            found.append(entity_tags(words, listed, labels) + unseen)
        return found

    asked = [before[kind] + example(kind, words) for words in sentences for kind in types]
    how = "the frozen model lists the entities of each type, which are sought in the text"
    return Extraction(asked, count, ENTITY_TOKENS, decide, how)


def entity_tags(words: Sequence[str], listed: Mapping[str, Sequence[str]], labels: Sequence[str]) -> list[int]:
    """Numbers of IOB2 tags for entities that were written down.

    An entity is found wherever whole words of the sentence spell it, whatever its case and blanks, and without a full
    stop or comma at its end unless it is spelled with it. Where several overlap, the longest is taken.

    Args:
        words: The sentence.
        listed: Type -> entities.
        labels: The tags.
    """
    spelled = [_plain(word) for word in words]
    wanted: set[tuple[str, str]] = set()
    for kind, texts in listed.items():
        for text in map(_plain, texts):
            if text.rstrip(".") in ("", NONE):
                continue
            bare = text.rstrip(".,")
            # An abbreviation may end in its stop; a list does, too.
            wanted.add((bare if bare and _places(spelled, bare) else text, kind))
    tags = [OUTSIDE] * len(words)
    for text, kind in sorted(wanted, key=lambda item: (-len(item[0]), item)):
        for first, last in _places(spelled, text):
            if all(tag == OUTSIDE for tag in tags[first:last]):
                tags[first:last] = [labels.index(f"B-{kind}"), *[labels.index(f"I-{kind}")] * (last - first - 1)]
    return tags


def _plain(text: str) -> str:
    return "".join(text.casefold().split())


def _places(spelled: Sequence[str], text: str) -> list[tuple[int, int]]:
    """First words, and those behind the last ones, where whole words spell a text."""
    found = []
    for first in range(len(spelled)):
        last, rest = first, text
        while rest and last < len(spelled) and spelled[last] and rest.startswith(spelled[last]):
            rest = rest[len(spelled[last]) :]
            last += 1
        if not rest:
            found.append((first, last))
    return found


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
    """As many training examples as fit, up to ``shots``, each into an even share of the room."""
    # Where none of hundreds fits, the next will not, either.
    texts = [shot(row) for row in order[: 50 * shots]]
    sizes = [_size(text, tokenizer) for text in texts]
    for count in range(shots, 0, -1):
        found = [text for text, size in zip(texts, sizes, strict=True) if size <= room // count][:count]
        if len(found) == count:
            return found
    return []


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
    if len(spans) <= tokens:
        return text
    return text[: spans[tokens - 1][1]] if tokens > 0 else ""


EXTRACTED = {"question_answering": _ask_answer, "token_classification": _ask_entities}
"""How tasks are prompted whose answers the model writes down."""
