"""Predictions of an exported adapter: for rows in memory, and for a file of any size.

Examples:
    >>> from peftsearch.export import Predictor
    >>> Predictor.load("adapters/legal/00012-lora").predict([{"text": "The tenant pays."}])
    [{'': 'lease', 'probability': 0.93}]
"""

from __future__ import annotations

import ast
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from peftsearch.domains.tasks import Tokenization
from peftsearch.domains.tasks.base import EXAMPLE, Prediction
from peftsearch.domains.tasks.question_answering import ANSWERS
from peftsearch.export.answers import Answer, answers_of, csv_value
from peftsearch.export.contents import load_tokenizer
from peftsearch.export.folder import ExportedFolder
from peftsearch.export.purpose import Purpose, markers_of, marking
from peftsearch.export.tables import format_of, open_table, writing_rows
from peftsearch.files import writing
from peftsearch.spec import StudyError, first_line, suggest

if TYPE_CHECKING:
    import datasets
    import torch
    from torch import nn

PART = 2048
"""Rows of a file that are in memory at a time; texts of similar length among them share a batch."""
_SHOWN = 5

Device = Literal["auto", "cpu", "cuda"]


class Problem(str):
    """Why an example has no prediction."""


@dataclass
class Predictor:
    """A loaded adapter that predicts.

    Attributes:
        exported: What its folder says.
        purpose: What it is for.
        model: In evaluation mode.
        tokenizer: The exported one.
        device: Where the model is.
        full: How many texts so far filled all the tokens that the adapter sees, so that they may have been cut off.
    """

    exported: ExportedFolder
    purpose: Purpose
    model: nn.Module
    tokenizer: Any
    device: torch.device
    full: int = field(default=0)

    @classmethod
    def load(
        cls, adapter: str | os.PathLike[str], *, device: Device = "auto", trust_remote_code: bool = False
    ) -> Predictor:
        """Load an exported folder.

        Args:
            adapter: The folder.
            device: ``auto`` is a GPU where there is one.
            trust_remote_code: Whether code that the base model brings along may run.

        Raises:
            StudyError: It is none, or a file is missing or damaged, or there is no such device.
        """
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise StudyError("this machine has no CUDA device: leave --device out, or write cpu")
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
        place = torch.device(chosen if device == "auto" else device)
        exported = ExportedFolder.read(Path(adapter))
        purpose = Purpose.read(exported, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(str(exported.folder), None)
        model = exported.load(purpose, place, trust_remote_code=trust_remote_code)
        return cls(exported, purpose, model, tokenizer, place)

    @property
    def columns(self) -> Mapping[str, pa.DataType]:
        """Names (beside the prediction's own, ``""``) and types of what is predicted."""
        return answers_of(self.purpose.task).columns

    def predict(self, examples: Sequence[Mapping[str, Any]], *, batch_size: int = 64) -> list[Answer | Problem]:
        """Predict some examples.

        Args:
            examples: By role: ``text``, ``text_pair``, ``tokens``, ...
            batch_size: Examples per forward pass.

        Returns:
            For each example its answer (see `columns`), or why there is none.
        """
        if not examples:
            return []
        try:
            data = self._tokenized(examples)
        except ValueError as error:
            # One text of nothing but characters that the tokenizer does not know keeps no other from its prediction.
            if len(examples) == 1:
                return [Problem(str(error))]
            half = len(examples) // 2
            return [
                *self.predict(examples[:half], batch_size=batch_size),
                *self.predict(examples[half:], batch_size=batch_size),
            ]
        shown = answers_of(self.purpose.task)
        rows: dict[int, list[Any]] = {}
        for example, value in self._rows(data, batch_size):
            rows.setdefault(example, []).append(value)
        return [
            shown.of_example(self.purpose.task, example, rows[number], self.exported.labels)
            if number in rows
            else Problem("the text is too short to say anything about")
            for number, example in enumerate(examples)
        ]

    def _tokenized(self, examples: Sequence[Mapping[str, Any]]) -> datasets.Dataset:
        purpose = self.purpose
        how = Tokenization(
            self.tokenizer,
            purpose.max_length,
            purpose.architecture,
            decoder_start_token_id=purpose.decoder_start_token_id,
        )
        data = purpose.task.tokenize(_unlabelled(purpose, examples, self.exported.labels), self.exported.labels, how)
        # Windows and blocks lose nothing.
        if EXAMPLE not in data.column_names:
            self.full += sum(length >= purpose.max_length for length in _lengths(data))
        return data

    def _rows(self, data: datasets.Dataset, batch_size: int) -> list[tuple[int, Any]]:
        """The example of each row, and what the model makes of the row; the windows of an example in their order."""
        import torch

        from peftsearch.training.batches import collated

        task = self.purpose.task
        how = Prediction(self.purpose.architecture, tokenizer=self.tokenizer)
        pad = self.tokenizer.pad_token_id
        order = np.argsort([_size(row) for row in data["input_ids"]], kind="stable").tolist()
        values: dict[int, Any] = {}
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = collated(task, data[chosen], 0 if pad is None else pad, self.device)
                seen = {name: value for name, value in batch.items() if name not in task.hidden}
                # What writes its answer needs no pass over the (unknown) answer.
                output = None if task.decodes else self.model(**seen)
                found = answers_of(task).of_rows(task, self.model, output, batch, how)
                values.update(zip(chosen, found, strict=True))
        example_of = list(data[EXAMPLE]) if EXAMPLE in data.column_names else range(len(data))
        return [(example_of[row], values[row]) for row in range(len(data))]


def _size(tokens: Any) -> int:
    return sum(map(len, tokens)) if tokens and isinstance(tokens[0], list) else len(tokens)


def _lengths(data: datasets.Dataset) -> list[int]:
    return [max(map(len, row)) if row and isinstance(row[0], list) else len(row) for row in data["input_ids"]]


def _unlabelled(purpose: Purpose, examples: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> pa.Table:
    """The examples as the task reads them, with answers that say nothing."""
    count, texts, task = len(examples), pa.large_string(), purpose.task.name
    lists = pa.list_(texts)
    columns = {
        role: pa.array([row[role] for row in examples], lists if role in ("tokens", "choices") else texts)
        for role in examples[0]
    }
    if task == "multi_label":
        columns["label"] = pa.array([[]] * count, lists)
    elif task == "similarity":
        columns["label"] = pa.array([0.0] * count, pa.float64())
    elif task == "multiple_choice":
        columns["label"] = pa.array([0] * count, pa.int64())
    elif task == "token_classification":
        columns["tags"] = pa.array([["O"] * len(row["tokens"]) for row in examples], lists)
    elif task == "question_answering":
        columns["answers"] = pa.array([[]] * count, ANSWERS)
    elif purpose.task.decodes:
        columns["target"] = pa.array([""] * count, texts)
    elif labels:
        columns["label"] = pa.array([labels[0]] * count, texts)
    return pa.table(columns)


@dataclass(frozen=True)
class Predicted:
    """What came of a file.

    Attributes:
        output: The file that was written.
        rows: Its rows.
        problems: Why rows have no prediction, by their numbers from 1; the first 1000.
        unpredicted: How many have none.
        full: How many texts filled all the tokens that the adapter sees.
        max_length: How many tokens that are.
        columns: Names of the columns that were added.
        seconds: What predicting took, loading not included.
        device: Where it was done.
        markers: What marks the two things in the texts of a relation that the adapter was trained on.
        unmarked: How many texts that have a prediction lack one of them.
    """

    output: Path
    rows: int
    problems: dict[int, str]
    unpredicted: int
    full: int
    max_length: int
    columns: tuple[str, ...]
    seconds: float
    device: str
    markers: tuple[str, ...] = ()
    unmarked: int = 0

    def sentences(self) -> list[str]:
        """What somebody who waits for the predictions should know."""
        found = []
        if self.unpredicted:
            shown = "; ".join(f"row {row}: {why}" for row, why in list(self.problems.items())[:_SHOWN])
            more = f"; and {self.unpredicted - _SHOWN:,} more" if self.unpredicted > _SHOWN else ""
            found.append(f"{self.unpredicted:,} of {self.rows:,} rows have no prediction: {shown}{more}")
        if self.full:
            found.append(
                f"{self.full:,} of {self.rows:,} texts fill all {self.max_length} tokens that the adapter sees: "
                "their ends may be cut off"
            )
        if self.unmarked:
            found.append(
                f"{self.unmarked:,} of {self.rows:,} texts do not hold {marking(self.markers)} in the texts that the "
                "adapter was trained on: their predictions say little"
            )
        return found


def predict_file(
    adapter: str | os.PathLike[str],
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    columns: Sequence[str] = (),
    name: str = "prediction",
    batch_size: int = 64,
    device: Device = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    begun: Callable[[int], None] | None = None,
    done: Callable[[int], None] | None = None,
) -> Predicted:
    """Predict every row of a file; the output has its columns and rows in their order, and the predictions after them.

    A row without a text gets an empty prediction and is reported; none is left out.

    Args:
        adapter: An exported folder.
        source: CSV, JSON Lines or Parquet, by its suffix.
        output: The same; appears when it is complete.
        columns: ``ROLE=COLUMN``, or ``COLUMN`` alone for the task's first role, where the file calls its columns
            otherwise than the study's data did.
        name: Column of the predictions; further ones are called ``NAME_probability``, ...
        batch_size: Examples per forward pass.
        device: ``auto`` is a GPU where there is one.
        overwrite: Whether an output that exists is replaced.
        trust_remote_code: Whether code that the base model brings along may run.
        begun: Told how many rows there are, once that is known and the model is loaded.
        done: Told how many more rows are done, again and again.

    Raises:
        StudyError: The folder is no adapter, the file has no such column or is damaged, the output exists, cannot be
            written, or cannot hold what is in the file, or a batch does not fit into memory.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    if batch_size < 1:
        raise StudyError(f"--batch-size must be at least 1, not {batch_size}")
    kind = format_of(output, "--output")
    if os.path.lexists(output) and not overwrite:
        raise StudyError(f"--output {str(output)!r} exists: name another file, or replace it with --overwrite")
    from peftsearch.training.memory import within_memory

    # Cheap things first: a wrong column is not found out after a model was loaded.
    exported = ExportedFolder.read(Path(adapter))
    purpose = Purpose.read(exported, trust_remote_code=trust_remote_code)
    table = open_table(source)
    mapped = purpose.chosen(columns, table.names)
    _check_columns(mapped, table.names, source.name)
    parts = answers_of(purpose.task).columns
    added = {f"{name}_{part}" if part else name: type_ for part, type_ in parts.items()}
    for column in added:
        if column in table.names:
            raise StudyError(
                f"{source.name} has a column {column!r} already: call the predictions otherwise with --name"
            )
    predictor = Predictor.load(adapter, device=device, trust_remote_code=trust_remote_code)
    if begun is not None:
        begun(table.rows)
    problems: dict[int, str] = {}
    unpredicted = unmarked = row = 0
    markers = markers_of(purpose.task)
    start = time.perf_counter()
    try:
        with writing(output) as temporary, writing_rows(temporary, kind, table, added) as write:
            for records in table.parts(PART):
                examples = [_example(purpose, record, mapped) for record in records]
                good = [example for example in examples if not isinstance(example, Problem)]
                with within_memory(_less_memory(batch_size, predictor.device)):
                    answers = iter(predictor.predict(good, batch_size=batch_size) if good else [])
                for record, example in zip(records, examples, strict=True):
                    row += 1
                    answer = example if isinstance(example, Problem) else next(answers)
                    if isinstance(answer, Problem):
                        unpredicted += 1
                        if len(problems) < 1000:
                            problems[row] = str(answer)
                        answer = {}
                    elif not isinstance(example, Problem) and any(marker not in example["text"] for marker in markers):
                        unmarked += 1
                    for suffix, column in zip(parts, added, strict=True):
                        value = answer.get(suffix)
                        record[column] = csv_value(purpose.task, value) if kind == "csv" else value
                write(records)
                if done is not None:
                    done(len(records))
    except (OSError, pa.ArrowException, UnicodeEncodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise StudyError(f"cannot write {str(output)!r}: {reason}") from None
    return Predicted(
        output,
        row,
        problems,
        unpredicted,
        predictor.full,
        purpose.max_length,
        tuple(added),
        time.perf_counter() - start,
        str(predictor.device),
        markers,
        unmarked,
    )


def _less_memory(batch_size: int, device: torch.device) -> str:
    """What to do about a batch for which memory is too small."""
    advice = [f"lower --batch-size, which is {batch_size}"] if batch_size > 1 else ["shorten the texts"]
    return ", or ".join([*advice, *(["predict with --device cpu"] if device.type != "cpu" else [])])


def _check_columns(mapped: Mapping[str, str | tuple[str, ...]], names: Sequence[str], where: str) -> None:
    for role, column in mapped.items():
        for wanted in (column,) if isinstance(column, str) else column:
            if wanted not in names:
                raise StudyError(
                    f"{where} has no column {wanted!r}{suggest(wanted, names)} "
                    f"(--column {role}=NAME says which one holds the {role})"
                )


def _example(
    purpose: Purpose, record: Mapping[str, Any], mapped: Mapping[str, str | tuple[str, ...]]
) -> dict[str, Any] | Problem:
    """What the task reads of a row, by role; or what is wrong with it."""
    found: dict[str, Any] = {}
    for role, column in mapped.items():
        reads: Callable[[Any, str], Any] = _READERS.get(role, _text)
        if isinstance(column, str):
            value: Any = record.get(column)
            where = f"the column {column!r}"
        else:
            value = [record.get(name) for name in column]
            # Questions with fewer choices leave their last columns empty.
            while value and value[-1] in (None, ""):
                value.pop()
            where = "its choices"
        if role == "context" and purpose.task.name == "multiple_choice" and value in (None, ""):
            found[role] = ""
            continue
        read = reads(value, where)
        if isinstance(read, Problem):
            return read
        found[role] = read
    if purpose.task.name == "multiple_choice":
        found.setdefault("context", "")
    return found


def _text(value: Any, where: str) -> str | Problem:
    if value is None or (isinstance(value, str) and not value.strip()):
        return Problem(f"{where} is empty")
    if not isinstance(value, str):
        return Problem(f"{where} holds {type(value).__name__} and no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        return Problem(f"{where} holds broken Unicode (half of a surrogate pair)")
    return value


def _words(value: Any, where: str) -> list[str] | Problem:
    """A list of words; of a plain text its words, split at white space."""
    return _texts(value, where, str.split)


def _choices(value: Any, where: str) -> list[str] | Problem:
    if isinstance(value, dict):
        value = value.get("text")
    found = _texts(value, where, lambda text: [text])
    if not isinstance(found, Problem) and len(found) < 2:
        return Problem(f"{where} holds {len(found)} choice and needs two")
    return found


def _texts(value: Any, where: str, split: Callable[[str], list[str]]) -> list[str] | Problem:
    if isinstance(value, str):
        value = value.strip()
        listed = _listed(value) if value.startswith("[") else None
        if listed is None and value.startswith("[") and (value.endswith("]") or _QUOTED.match(value)):
            return Problem(f'{where} looks like a list and is none: write it as ["one", "two"]')
        value = split(value) if listed is None else listed
    if not value:
        return Problem(f"{where} is empty")
    if not isinstance(value, list):
        return Problem(f"{where} holds {type(value).__name__} and no list of texts")
    for item in value:
        read = _text(item, where)
        if isinstance(read, Problem):
            return Problem(f"{where} holds an empty or unusable text")
    return list(value)


def _listed(text: str) -> list[Any] | None:
    """The list that a text spells: in JSON, as this module writes lists into a CSV file, or in Python, as pandas does.

    NumPy leaves the commas out, and Python would make one word of all.
    """
    readers = (json.loads,) if _NUMPY.search(text) else (json.loads, ast.literal_eval)
    for read in readers:
        # ValueError and SyntaxError say that it is no list, the others that it is too deep a one.
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = read(text)
            return found if isinstance(found, list) else None
    return None


_QUOTED = re.compile(r"\[\s*['\"]")
_NUMPY = re.compile(r"['\"]\s+['\"]")

_READERS: dict[str, Callable[[Any, str], Any]] = {"tokens": _words, "choices": _choices}
