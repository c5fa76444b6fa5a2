"""What a model's output says of an example, in words and numbers: for each task, the columns of a prediction.

The prediction itself is `Task.predict`'s, the very one that the study's scores rest on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from peftsearch.domains.iob import entities
from peftsearch.domains.tasks.base import Prediction, Task
from peftsearch.frontier.tables import csv_cell

if TYPE_CHECKING:
    from torch import nn

Example = Mapping[str, Any]
"""What was read of an example, by role."""
Answer = dict[str, Any]
"""A prediction: the value of each column, ``""`` being the one that carries the prediction's own name."""

ENTITY = pa.struct([("type", pa.string()), ("text", pa.string()), ("start", pa.int64()), ("end", pa.int64())])


@dataclass(frozen=True)
class Answers:
    """How a task's predictions are shown.

    Attributes:
        columns: The type of each column, by what is added to the prediction's name.
        of_rows: From model, output and batch to one value for each row of the batch.
        of_example: From an example and the values of its rows (windows) to the answer; None where there is none.
        free: Whether its texts may be anything, rather than a label or a choice.
    """

    columns: Mapping[str, pa.DataType]
    of_rows: Callable[[Task, nn.Module, Any, Mapping[str, Any], Prediction], list[Any]]
    of_example: Callable[[Task, Example, list[Any], Sequence[str]], Answer]
    free: bool = False


def answers_of(task: Task) -> Answers:
    """How a task's predictions are shown."""
    return _ANSWERS[task.name]


def csv_value(task: Task, value: Any) -> Any:
    """A value of an answer as a CSV file holds it: what a model wrote or cut out is no formula (see `csv_cell`).

    Labels and choices stay as they are, so that they can be compared with those of the data; so do numbers.
    """
    closed = getattr(task.options, "labels", None) or ()
    if not answers_of(task).free or not isinstance(value, str) or value in closed:
        return value
    try:
        float(value)
    except ValueError:
        return csv_cell(value)
    return value


def _predicted(task: Task, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction) -> list[Any]:
    return task.predict(model, output, batch, how)


def _with_probabilities(
    task: Task, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction
) -> list[Any]:
    found = output.logits.float()
    shares = found.sigmoid() if task.name == "multi_label" else found.softmax(dim=-1)
    return list(zip(task.predict(model, output, batch, how), shares.tolist(), strict=True))


def _choices_with_probabilities(
    task: Task, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction
) -> list[Any]:
    scores = output.logits.float().squeeze(-1).split(batch["counts"])
    shares = [own.softmax(dim=0).tolist() for own in scores]
    return list(zip(task.predict(model, output, batch, how), shares, strict=True))


def _label(task: Task, example: Example, values: list[Any], labels: Sequence[str]) -> Answer:
    ((number, shares),) = values
    return {"": labels[number], "probability": shares[number]}


def _labels(task: Task, example: Example, values: list[Any], labels: Sequence[str]) -> Answer:
    ((there, shares),) = values
    chosen = [number for number, one in enumerate(there) if one]
    return {"": [labels[number] for number in chosen], "probability": [shares[number] for number in chosen]}


def _tags(task: Task, example: Example, values: list[Any], labels: Sequence[str]) -> Answer:
    (numbers,) = values
    words = example["tokens"]
    tags = _iob2([labels[number] for number in numbers])
    found = [
        {"type": kind, "text": " ".join(words[start:end]), "start": start, "end": end}
        for kind, start, end in entities(tags)
    ]
    return {"": tags, "entities": found}


def _iob2(tags: list[str]) -> list[str]:
    """Tags in which whatever a model began with ``I-`` begins with ``B-``, as conlleval (and the study's score) reads
    it."""
    found, before = [], "O"
    for tag in tags:
        starts = tag.startswith("I-") and before[2:] != tag[2:]
        found.append(f"B-{tag[2:]}" if starts else tag)
        before = tag
    return found


def _number(task: Task, example: Example, values: list[Any], labels: Sequence[str]) -> Answer:
    return {"": float(values[0])}


def _text(task: Task, example: Example, values: list[Any], labels: Sequence[str]) -> Answer:
    return {"": str(values[0])}


def _span(task: Task, example: Example, values: list[Any], labels: Sequence[str]) -> Answer:
    windows = [{**window, "passage": passage} for window, passage in values]
    text = task.merge(windows)
    best = max(windows, key=lambda window: window["score"])
    if not text:
        return {"": "", "start": None}
    # A window is a long stretch: where it stands twice in a context, so does the answer.
    begin = example["context"].find(best["passage"])
    return {"": text, "start": begin + best["start"]}


def _with_passages(task: Task, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction) -> list[Any]:
    return list(zip(task.predict(model, output, batch, how), batch["passage"], strict=True))


def _choice(task: Task, example: Example, values: list[Any], labels: Sequence[str]) -> Answer:
    ((number, shares),) = values
    return {"": example["choices"][number], "number": number + task.options.first_index, "probability": shares[number]}


def _perplexity(task: Task, example: Example, values: list[Any], labels: Sequence[str]) -> Answer:
    nats, tokens, size = task.merge(values)
    # Of a text of one token, which nothing stands before, a decoder predicts no byte: only that it ends.
    return {"": math.exp(min(nats / tokens, 700.0)), "bits_per_byte": nats / math.log(2) / size if size else None}


_CLASSIFICATION = Answers({"": pa.string(), "probability": pa.float64()}, _with_probabilities, _label)
_WRITING = Answers({"": pa.string()}, _predicted, _text, free=True)

_ANSWERS: dict[str, Answers] = {
    "classification": _CLASSIFICATION,
    "relation": _CLASSIFICATION,
    "multi_label": Answers(
        {"": pa.list_(pa.string()), "probability": pa.list_(pa.float64())}, _with_probabilities, _labels
    ),
    "token_classification": Answers({"": pa.list_(pa.string()), "entities": pa.list_(ENTITY)}, _predicted, _tags),
    "similarity": Answers({"": pa.float64()}, _predicted, _number),
    "question_answering": Answers({"": pa.string(), "start": pa.int64()}, _with_passages, _span, free=True),
    "multiple_choice": Answers(
        {"": pa.string(), "number": pa.int64(), "probability": pa.float64()}, _choices_with_probabilities, _choice
    ),
    "summarization": _WRITING,
    "instruction": _WRITING,
    "language_modeling": Answers({"": pa.float64(), "bits_per_byte": pa.float64()}, _predicted, _perplexity),
}
