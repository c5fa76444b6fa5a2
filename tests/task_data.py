"""A small, learnable data set for every task, made of words that the tiny models know."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TOPICS = {
    "law": ["party", "agreement", "clause", "breach", "liability", "notice", "court", "contract"],
    "medicine": ["fever", "infection", "lesion", "anemia", "fracture", "syndrome", "disease", "patient"],
    "finance": ["share", "dividend", "bond", "yield", "equity", "hedge", "market", "price"],
}
FILLER = ["the", "a", "of", "and", "with", "for", "is", "was"]
SIZES = {"train": 36, "validation": 15, "test": 12}


def _words(generator: random.Random, topic: str, count: int = 6) -> list[str]:
    return [generator.choice(TOPICS[topic] if generator.random() < 0.6 else FILLER) for _ in range(count)]


def _text(generator: random.Random, topic: str, count: int = 6) -> str:
    return " ".join(_words(generator, topic, count))


def _classification(generator: random.Random, row: int) -> dict[str, Any]:
    topic = sorted(TOPICS)[row % 3]
    return {"text": f"{_text(generator, topic)} {row}", "label": topic}


def _relation(generator: random.Random, row: int) -> dict[str, Any]:
    label = ("none", "treats", "causes")[row % 3]
    middle = {"none": "and", "treats": "with", "causes": "from"}[label]
    return {"text": f"drug {middle} {_text(generator, 'medicine', 3)} {row}", "label": label}


def _multi_label(generator: random.Random, row: int) -> dict[str, Any]:
    chosen = [topic for number, topic in enumerate(sorted(TOPICS)) if (row >> number) & 1 or row % 3 == number]
    return {"text": f"{' '.join(_text(generator, topic, 3) for topic in chosen)} {row}", "label": chosen}


def _similarity(generator: random.Random, row: int) -> dict[str, Any]:
    topics = sorted(TOPICS)
    first, second = topics[row % 3], topics[(row // 3) % 3]
    return {
        "text": f"{_text(generator, first)} {row}",
        "text_pair": _text(generator, second),
        "label": 4.0 * (first == second) + generator.random(),
    }


def _token_classification(generator: random.Random, row: int) -> dict[str, Any]:
    words = _words(generator, sorted(TOPICS)[row % 3], 7)
    tags = []
    for number, word in enumerate(words):
        kind = next((topic for topic, known in TOPICS.items() if word in known), None)
        if kind is None:
            tags.append("O")
        else:
            tags.append(f"I-{kind}" if number and tags[-1].endswith(kind) else f"B-{kind}")
    return {"tokens": [*words, str(row)], "tags": [*tags, "O"]}


def _question_answering(generator: random.Random, row: int) -> dict[str, Any]:
    topic = sorted(TOPICS)[row % 3]
    before, answer = _text(generator, topic, 4), f"{generator.choice(TOPICS[topic])} {row}"
    context = f"{before} question {answer} and {_text(generator, topic, 3)}"
    found = row % 4 != 0
    return {
        "question": "what is the answer ?",
        "context": context,
        "answers": {"text": [answer] if found else [], "answer_start": [context.index(answer)] if found else []},
    }


def _multiple_choice(generator: random.Random, row: int) -> dict[str, Any]:
    topics = sorted(TOPICS)
    right = topics[row % 3]
    choices = [generator.choice(TOPICS[topic]) for topic in topics]
    return {"question": f"{_text(generator, right)} {row}", "choices": choices, "label": row % 3}


def _language_modeling(generator: random.Random, row: int) -> dict[str, Any]:
    return {"text": f"{_text(generator, sorted(TOPICS)[row % 3], 12)} {row}"}


def _summarization(generator: random.Random, row: int) -> dict[str, Any]:
    topic = sorted(TOPICS)[row % 3]
    return {"text": f"{_text(generator, topic, 8)} {row}", "target": f"the {TOPICS[topic][0]}"}


_ROWS = {
    "classification": _classification,
    "relation": _relation,
    "multi_label": _multi_label,
    "similarity": _similarity,
    "token_classification": _token_classification,
    "question_answering": _question_answering,
    "multiple_choice": _multiple_choice,
    "language_modeling": _language_modeling,
    "summarization": _summarization,
    "instruction": _summarization,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "relation": {"negative": "none", "markers": ["drug"]},
    "summarization": {"target_length": 8},
    "instruction": {"target_length": 8},
}


def task_domain(task: str, folder: Path) -> dict[str, Any]:
    """The section ``domains.NAME`` of a study file for a task, its data written into a folder."""
    generator = random.Random(0)
    files = {}
    for split, size in SIZES.items():
        path = folder / f"{task}-{split}.jsonl"
        path.write_text("".join(json.dumps(_ROWS[task](generator, row)) + "\n" for row in range(size)))
        files[split] = str(path)
    columns = {"text_pair": "text_pair"} if task == "similarity" else {}
    return {"task": task, "options": _OPTIONS.get(task, {}), "data": {**files, "columns": columns}}
