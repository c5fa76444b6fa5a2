"""Multiple choice: which of a question's choices is right."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from peftsearch.domains.splits import hash_order, normalise
from peftsearch.domains.tasks.base import (
    Guess,
    Head,
    LossOptions,
    Metric,
    Prediction,
    Task,
    TaskOptions,
    Tokenization,
    check_counts,
    text_batch,
)
from peftsearch.domains.tasks.classification import tokenize_texts
from peftsearch.domains.tasks.columns import find, texts
from peftsearch.spec import ColumnsSpec, DataSpec, StudyError
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets
    import torch
    from torch import nn

CHOICES = pa.list_(pa.large_string())
CHOICES_EXPECTED = 4
"""Choices of a question whose data is not at hand: as most published tests of this kind have."""


class MultipleChoiceOptions(TaskOptions):
    """How labels count."""

    first_index: int = Field(default=0, ge=0, le=1, description="Number of the first choice where labels are numbers")


class MultipleChoice(Task):
    """Which of a question's choices is right; questions may have different numbers of choices.

    A model scores each choice by itself, as a pair of texts: the context (where there is one), and question and choice.
    A softmax over a question's choices makes probabilities of the scores (Radford et al. 2018; Devlin et al. 2019,
    arXiv:1810.04805, section 4.4).
    """

    name: ClassVar[str] = "multiple_choice"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("accuracy", "maximize"),
        "macro_f1": Metric("macro_f1", "maximize"),
    }
    Options = MultipleChoiceOptions
    loss_options: ClassVar[frozenset[str]] = frozenset({"label_smoothing"})
    heads = dict.fromkeys(
        ("encoder", "encoder-decoder", "decoder"), Head("AutoModelForSequenceClassification", "SEQ_CLS")
    )
    hidden: ClassVar[frozenset[str]] = frozenset({"labels", "counts"})
    probe = "choice"

    def columns(self, data: DataSpec) -> tuple[str, ...]:
        """Question, choices and label. (The context is read where the data has that column.)"""
        choices = data.columns.choices
        return (data.columns.question, *([choices] if isinstance(choices, str) else choices), data.columns.label)

    def read(self, table: pa.Table, data: DataSpec, where: str, loc: Loc) -> pa.Table:
        """As `Task.read`; ``label`` becomes the right choice's number, from 0.

        A context is optional: it is read where the study file maps another column, or the data has one of that name.
        """
        if table.num_rows == 0:
            raise StudyError(f"{where} holds no rows", loc)
        name, place = data.columns.question, (*loc, "columns", "question")
        question = texts(find(table, name, where, place), name, where, place)
        name, place = data.columns.context, (*loc, "columns", "context")
        # Not "is mapped": a specification that was saved and read again names every column.
        if name in table.column_names or name != ColumnsSpec().context:
            context = [value or "" for value in find(table, name, where, place).cast(pa.large_string()).to_pylist()]
        else:
            context = [""] * table.num_rows
        choices, names = _choices(table, data, where, loc)
        name, place = data.columns.label, (*loc, "columns", "label")
        labels = find(table, name, where, place).to_pylist()
        numbers = _numbers(labels, choices, names, self.options.first_index, f"column {name!r} of {where}", place)
        return pa.table(
            {
                "question": question,
                "context": pa.chunked_array([pa.array(context, pa.large_string())]),
                "choices": pa.chunked_array([pa.array(choices, CHOICES)]),
                "label": pa.chunked_array([pa.array(numbers, pa.int64())]),
            }
        )

    def keys(self, table: pa.Table) -> list[str]:
        """Normalised context, question and choices."""
        return ["\0".join(map(normalise, (context, question, *choices))) for context, question, choices in _rows(table)]

    def content(self, table: pa.Table) -> list[tuple[str, ...]]:
        """Context, question, choices and label."""
        labels = table.column("label").to_pylist()
        return [
            (context, question, *choices, str(label))
            for (context, question, choices), label in zip(_rows(table), labels, strict=True)
        ]

    def texts_at_once(self, splits: Mapping[str, pa.Table], data: DataSpec) -> int:
        """One for each choice; of a column of lists that is not at hand, `CHOICES_EXPECTED` are taken."""
        choices = data.columns.choices
        if not splits:
            return CHOICES_EXPECTED if isinstance(choices, str) else len(choices)
        return max(int(pc.max(pc.list_value_length(table.column("choices"))).as_py()) for table in splits.values())

    def strata(self, table: pa.Table) -> list[str] | None:
        """The right choice's position."""
        return [str(label) for label in table.column("label").to_pylist()]

    def warnings(self, splits: Mapping[str, pa.Table], labels: Sequence[str]) -> list[str]:
        """One position that is always right."""
        found = []
        for split, table in splits.items():
            positions = set(table.column("label").to_pylist())
            if len(positions) == 1 and table.num_rows > 1:
                found.append(f"in {split} the right choice always stands in place {positions.pop() + 1}: shuffle them")
        return found

    def tokenize(self, table: pa.Table, labels: Sequence[str], how: Tokenization) -> datasets.Dataset:
        """As `Task.tokenize`; ``input_ids`` (and ``token_type_ids``) hold a list for each choice.

        Of a pair that is too long the longer text, which is the context as a rule, is cut off.
        """
        import datasets

        rows = _rows(table)
        counts = [len(choices) for _, _, choices in rows]
        first, second = [], []
        for context, question, choices in rows:
            for choice in choices:
                first.append(context or question)
                second.append(f"{question} {choice}" if context else choice)
        flat = tokenize_texts([first, second], how)
        lengths = np.array([len(tokens) for tokens in flat["input_ids"].to_pylist()])
        offsets = np.concatenate(([0], np.cumsum(counts)))
        full = int((lengths >= how.max_length).sum())
        if full:
            how.warnings.append(
                f"{full} of {len(lengths)} choices fill all {how.max_length} tokens of max_length with their question: "
                "texts may be cut off"
            )
        columns = {
            name: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values) for name, values in flat.items()
        }
        columns["length"] = pa.array(np.add.reduceat(lengths, offsets[:-1]), pa.int64())
        columns["labels"] = table.column("label").combine_chunks()
        columns["sizes"] = pa.array(
            [[len(choice) for choice in choices] for _, _, choices in rows], pa.list_(pa.int64())
        )
        return datasets.Dataset(pa.table(columns))

    def config_kwargs(self, labels: Sequence[str]) -> dict[str, Any]:
        """One output: how right a choice is."""
        return {"num_labels": 1}

    def collate(self, rows: Mapping[str, Sequence[Any]], pad_token_id: int, *, multiple_of: int = 8) -> dict[str, Any]:
        """As `Task.collate`, with a row for each choice of each question, one after another.

        ``labels`` is the number of each question's right choice, of shape (questions,) and type int64; ``counts`` is a
        list of how many choices each has.
        """
        import torch

        names = [name for name in ("input_ids", "token_type_ids") if name in rows]
        flat = {name: [tokens for choices in rows[name] for tokens in choices] for name in names}
        batch: dict[str, Any] = text_batch(flat, pad_token_id, multiple_of=multiple_of)
        batch["labels"] = torch.tensor(rows["labels"], dtype=torch.int64)
        batch["counts"] = [len(choices) for choices in rows["input_ids"]]
        return batch

    def losses(self, output: Any, batch: Mapping[str, Any], options: LossOptions | None = None) -> torch.Tensor:
        """Cross-entropy of each question over its choices; smoothed labels are spread over them alone."""
        import torch

        smoothing = options.label_smoothing if options else 0.0
        scores = _scores(output, batch)
        log_probabilities = torch.log_softmax(scores, dim=1)
        right = log_probabilities.gather(1, batch["labels"][:, None]).squeeze(1)
        there = torch.isfinite(scores.detach())
        everywhere = log_probabilities.masked_fill(~there, 0.0).sum(1) / there.sum(1)
        return -((1 - smoothing) * right + smoothing * everywhere)

    def predict(self, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction) -> list[Any]:
        """The number of the best choice of each question."""
        return list(_scores(output, batch).detach().argmax(dim=1).tolist())

    def references(self, rows: Mapping[str, Sequence[Any]]) -> list[Any]:
        """The number of the right choice of each question."""
        return [int(label) for label in rows["labels"]]

    def score(self, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str]) -> dict[str, float]:
        """Accuracy, and macro F1 over positions, for data whose positions mean something (yes, no, maybe)."""
        from sklearn.metrics import accuracy_score, f1_score

        check_counts(predictions, references)
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
        }

    def guesses(
        self, train: Mapping[str, Sequence[Any]], split: Mapping[str, Sequence[Any]], labels: Sequence[str]
    ) -> dict[str, Guess]:
        """Any choice, the most frequent position, and the longest choice."""
        sizes = split["sizes"]
        drawn = [
            int.from_bytes(hash_order(f"guess:{row}", 0)[:8], "big") % len(lengths) for row, lengths in enumerate(sizes)
        ]
        position, _ = Counter(train["labels"]).most_common(1)[0]
        longest = [max(range(len(lengths)), key=lambda n: lengths[n]) for lengths in sizes]
        return {
            "random": Guess("random choice", "any of the choices, drawn once", drawn),
            "majority": Guess(
                "most frequent position",
                f"always choice {position + 1}, or the last where there are fewer",
                [min(position, len(lengths) - 1) for lengths in sizes],
            ),
            "longest": Guess("longest choice", "the choice of most characters", longest),
        }

    def probes(self) -> list[tuple[str, Any]]:
        """Logistic regressions on differences of choices, which have no intercept."""
        from sklearn.linear_model import LogisticRegression

        return [
            (f"C = {c:g}", LogisticRegression(C=c, fit_intercept=False, max_iter=500, random_state=0))
            for c in (1.0, 10.0, 100.0)
        ]


def _scores(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Each choice's score, of shape (questions, most choices); -inf where a question has no such choice."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    each = output.logits.float().squeeze(-1).split(batch["counts"])
    return pad_sequence(list(each), batch_first=True, padding_value=-torch.inf)


def _rows(table: pa.Table) -> list[tuple[str, str, list[str]]]:
    """Context, question and choices of each row."""
    return list(zip(*(table.column(name).to_pylist() for name in ("context", "question", "choices")), strict=True))


def _choices(table: pa.Table, data: DataSpec, where: str, loc: Loc) -> tuple[list[list[str]], list[list[str]] | None]:
    """The choices of each row and, where the data names them, their names (as in {text: [...], label: [...]})."""
    named, place = data.columns.choices, (*loc, "columns", "choices")
    names: list[list[str]] | None = None
    if isinstance(named, str):
        what = f"column {named!r} of {where}"
        found = find(table, named, where, place).to_pylist()
        if any(isinstance(value, dict) for value in found):
            names = [list((value or {}).get("label") or ()) for value in found]
            found = [(value or {}).get("text") for value in found]
    else:
        what = f"the choices of {where}"
        columns = [find(table, name, where, place).to_pylist() for name in named]
        found = []
        for values in zip(*columns, strict=True):
            row = list(values)
            # Questions with fewer choices leave their last columns empty.
            while row and (row[-1] is None or row[-1] == ""):
                row.pop()
            found.append(row)
    for number, row in enumerate(found, 1):
        if not isinstance(row, list):
            raise StudyError(
                f"{what} has no list of choices in row {number}: map one column with lists, or list one column for "
                "each choice",
                place,
            )
        for choice in row:
            if not isinstance(choice, str) or not choice.strip():
                raise StudyError(f"{what} holds a choice without text in row {number}", place)
        if len(row) < 2:
            raise StudyError(
                f"{what} has {len(row)} choice{'s' * (len(row) != 1)} in row {number}: two are needed", place
            )
        if len(set(row)) < len(row):
            raise StudyError(f"{what} names a choice twice in row {number}", place)
        if names is not None and len(names[number - 1]) != len(row):
            raise StudyError(f"{what} has as many labels as choices in every row but row {number}", place)
    return found, names


def _numbers(
    labels: Sequence[Any],
    choices: Sequence[Sequence[str]],
    names: Sequence[Sequence[str]] | None,
    first_index: int,
    what: str,
    loc: Loc,
) -> list[int]:
    """The number of each row's right choice, from 0: of a number, or of a text that is a choice, a choice's name in the
    data, a letter or a number, decided for all rows at once.

    Raises:
        StudyError: A row has no label, or one that names none of its choices.
    """
    for number, label in enumerate(labels, 1):
        if label is None or label == "" or label == -1:
            raise StudyError(f"{what} holds no label in row {number}: fill it in or drop the row", loc)
    readings: list[tuple[str, Callable[[Any, int], int | None]]] = [
        ("a number", lambda label, row: _of_number(label, len(choices[row]), first_index))
    ]
    if all(isinstance(label, str) for label in labels):
        readings = [
            ("the text of a choice", lambda label, row: _place(label, choices[row])),
            ("a letter", lambda label, row: _of_letter(label, len(choices[row]))),
            *readings,
        ]
        if names is not None:
            readings.insert(0, ("the label of a choice", lambda label, row: _place(label, names[row])))
    found = [[reading(label, row) for row, label in enumerate(labels)] for _, reading in readings]
    complete = next((numbers for numbers in found if None not in numbers), None)
    if complete is not None:
        return [number for number in complete if number is not None]
    # Judged by the reading that fits most rows.
    best = max(range(len(found)), key=lambda index: sum(number is not None for number in found[index]))
    row = found[best].index(None)
    several = [known for number, known in enumerate(choices[row]) if number < 5]
    hint = (
        "; where the first choice is number 1, write the option first_index: 1"
        if readings[best][0] == "a number" and first_index == 0
        else ""
    )
    raise StudyError(
        f"{what} holds {labels[row]!r} in row {row + 1}, which is none of its {len(choices[row])} choices ("
        f"{', '.join(repr(choice[:30]) for choice in several)}): write a choice's text, number or letter{hint}",
        loc,
    )


def _place(label: str, known: Sequence[str]) -> int | None:
    return list(known).index(label) if label in known else None


def _of_letter(label: str, count: int) -> int | None:
    letters = string.ascii_uppercase[:count]
    letter = label.strip().strip("().").upper()
    return letters.index(letter) if len(letter) == 1 and letter in letters else None


def _of_number(label: Any, count: int, first_index: int) -> int | None:
    try:
        number = float(label) - first_index
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() and 0 <= number < count and not isinstance(label, bool) else None
