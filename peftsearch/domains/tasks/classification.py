"""Classification: one label for a text, or for a pair of texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from peftsearch.domains.splits import normalise
from peftsearch.domains.tasks.base import Ids, Metric, Task
from peftsearch.spec import DataSpec, StudyError, suggest
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets
    import torch

# A share of the training rows from which accuracy says more about the data than about the model.
DOMINANT = 0.8
# Rows that are handed to the tokenizer at once: enough for its threads, little enough to stay in memory.
TOKENIZE_BATCH = 1000


class Classification(Task):
    """One label for a text, or for a pair of texts."""

    name: ClassVar[str] = "classification"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("accuracy", "maximize", "accuracy"),
        "macro_f1": Metric("macro_f1", "maximize", "macro F1"),
    }
    label_metrics: ClassVar[Mapping[str, Metric]] = {
        "f1": Metric("f1", "maximize", "F1"),
        "precision": Metric("precision", "maximize", "precision"),
        "recall": Metric("recall", "maximize", "recall"),
    }
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"

    def read(self, table: pa.Table, data: DataSpec, where: str, loc: Loc) -> pa.Table:
        """As `Task.read`: texts stay as they are, labels become texts."""
        if table.num_rows == 0:
            raise StudyError(f"{where} holds no rows", loc)
        columns = {}
        for role, name in (("text", data.columns.text), ("text_pair", data.columns.text_pair)):
            if name is not None:
                column = _find(table, name, where, (*loc, "columns", role))
                columns[name] = _texts(column, name, where, (*loc, "columns", role))
        name, place = data.columns.label, (*loc, "columns", "label")
        if name in columns:
            raise StudyError(f"the column {name!r} cannot be both text and label", place)
        columns[name] = _labels(_find(table, name, where, place), name, where, place)
        group = data.split.group
        if group is not None and group in table.column_names and group not in columns:
            columns[group] = table.column(group)
        return pa.table(columns)

    def keys(self, table: pa.Table, data: DataSpec) -> list[str]:
        """The normalised text, or both texts of a pair."""
        return ["\0".join(map(normalise, texts)) for texts in zip(*_inputs(table, data), strict=True)]

    def content(self, table: pa.Table, data: DataSpec) -> list[tuple[str, ...]]:
        """The text or texts, then the label."""
        return list(zip(*_inputs(table, data), table.column(data.columns.label).to_pylist(), strict=True))

    def strata(self, table: pa.Table, data: DataSpec) -> list[str] | None:
        """The labels."""
        return [str(label) for label in table.column(data.columns.label).to_pylist()]

    def check(
        self, splits: Mapping[str, pa.Table], data: DataSpec, loc: Loc, *, cut: Collection[str] = ()
    ) -> tuple[str, ...]:
        """As `Task.check`; labels are sorted as texts, or as numbers where all are whole numbers."""
        counts = {}
        for split, table in splits.items():
            table = self.read(table, data, f"split {split!r}", loc)
            counts[split] = Counter(table.column(data.columns.label).to_pylist())
        place = (*loc, "columns", "label")
        known = set(counts["train"]).union(*(counts[split] for split in cut if split in counts))
        if len(known) == 1:
            raise StudyError(
                f"all {sum(counts['train'].values())} training rows have the label {next(iter(known))!r} "
                f"(column {data.columns.label!r}): there is nothing to learn",
                place,
            )
        for split, found in counts.items():
            for label in sorted(set(found) - known):
                rows = f"{found[label]} row{'s' if found[label] != 1 else ''}"
                raise StudyError(
                    f"the label {label!r} stands in {rows} of {split} but never in train{suggest(label, known)}",
                    place,
                )
        if all(re.fullmatch(r"-?[0-9]+", label) for label in known):
            return tuple(sorted(known, key=lambda label: (int(label), label)))
        return tuple(sorted(known))

    def warnings(self, splits: Mapping[str, pa.Table], data: DataSpec, labels: Sequence[str]) -> list[str]:
        """Labels that a split lacks, labels that dominate, and inputs that carry several labels."""
        found = []
        counts = {split: Counter(table.column(data.columns.label).to_pylist()) for split, table in splits.items()}
        for split, count in counts.items():
            missing = [label for label in labels if label not in count]
            if missing:
                found.append(f"{split} has no example of {_listed(missing)}")
        rows = sum(counts["train"].values())
        label, largest = counts["train"].most_common(1)[0]
        if largest >= DOMINANT * rows:
            found.append(
                f"{largest / rows:.0%} of train has the label {label!r}: a model that always answers it looks "
                "accurate, and macro_f1 tells more"
            )
        by_input: dict[str, set[str]] = {}
        train = splits["train"]
        for key, label in zip(self.keys(train, data), train.column(data.columns.label).to_pylist(), strict=True):
            by_input.setdefault(key, set()).add(label)
        ambiguous = sum(len(several) > 1 for several in by_input.values())
        if ambiguous:
            found.append(f"{ambiguous} text{'s' if ambiguous != 1 else ''} of train stand there with several labels")
        return found

    def tokenize(
        self, table: pa.Table, data: DataSpec, labels: Sequence[str], tokenizer: Any, max_length: int
    ) -> datasets.Dataset:
        """As `Task.tokenize`; of a pair the longer text is truncated first."""
        import datasets

        inputs = _inputs(table, data)
        ids: list[list[int]] = []
        types: list[list[int]] = []
        for start in range(0, table.num_rows, TOKENIZE_BATCH):
            batch = [texts[start : start + TOKENIZE_BATCH] for texts in inputs]
            encoded = tokenizer(*batch, truncation=True, max_length=max_length, padding=False)
            ids.extend(encoded["input_ids"])
            types.extend(encoded.get("token_type_ids") or [])
        for row, tokens in enumerate(ids, 1):
            if not tokens:
                raise ValueError(f"the tokenizer makes no token of the text {inputs[0][row - 1]!r}")
        index = {label: number for number, label in enumerate(labels)}
        columns = {"input_ids": pa.array(ids, pa.list_(pa.int32()))}
        # Models take zeros for absent ones, so a column of zeros would only cost memory.
        if any(any(row) for row in types):
            columns["token_type_ids"] = pa.array(types, pa.list_(pa.int32()))
        numbers = [index[label] for label in table.column(data.columns.label).to_pylist()]
        columns["labels"] = pa.array(numbers, pa.int64())
        return datasets.Dataset(pa.table(columns))

    def config_kwargs(self, labels: Sequence[str]) -> dict[str, Any]:
        """``num_labels``, ``id2label`` and ``label2id``."""
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
        }

    def collate(
        self, rows: Mapping[str, Sequence[Any]], pad_token_id: int, *, multiple_of: int = 8
    ) -> dict[str, torch.Tensor]:
        """As `Task.collate`; ``labels`` has shape (rows,) and type int64."""
        import torch

        lengths = [len(tokens) for tokens in rows["input_ids"]]
        width = -(-max(lengths) // multiple_of) * multiple_of
        filled = {"input_ids": pad_token_id} | ({"token_type_ids": 0} if "token_type_ids" in rows else {})
        batch: dict[str, torch.Tensor] = {}
        for name, fill in filled.items():
            padded = np.full((len(lengths), width), fill, dtype=np.int64)
            for row, values in enumerate(rows[name]):
                padded[row, : lengths[row]] = values
            batch[name] = torch.from_numpy(padded)
        mask = np.arange(width) < np.asarray(lengths)[:, None]
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        batch["labels"] = torch.from_numpy(self.references(rows))
        return batch

    def losses(self, output: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of each example."""
        from torch.nn import functional

        return functional.cross_entropy(output.logits.float(), batch["labels"], reduction="none")

    def predictions(self, output: Any, batch: Mapping[str, torch.Tensor]) -> Ids:
        """The number of the most likely label of each example."""
        return np.asarray(output.logits.detach().argmax(dim=-1).cpu().numpy(), dtype=np.int64)

    def references(self, rows: Mapping[str, Sequence[Any]]) -> Ids:
        """The number of the true label of each example."""
        return np.array(rows["labels"], dtype=np.int64)

    def score(self, predictions: Ids, references: Ids, labels: Sequence[str]) -> dict[str, float]:
        """Accuracy, macro F1, and precision, recall and F1 of each label.

        Macro F1 is scikit-learn's: the mean over the labels that occur among references or predictions. A ratio
        without a denominator counts as 0.
        """
        from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

        if len(references) == 0 or len(predictions) != len(references):
            raise ValueError(f"cannot score {len(predictions)} predictions against {len(references)} references")
        scores = {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
        }
        precision, recall, f1, _ = precision_recall_fscore_support(
            references, predictions, labels=range(len(labels)), average=None, zero_division=0
        )
        for number, label in enumerate(labels):
            scores[f"f1/{label}"] = float(f1[number])
            scores[f"precision/{label}"] = float(precision[number])
            scores[f"recall/{label}"] = float(recall[number])
        return scores


def _inputs(table: pa.Table, data: DataSpec) -> list[list[str]]:
    names = [data.columns.text] + ([data.columns.text_pair] if data.columns.text_pair is not None else [])
    return [table.column(name).to_pylist() for name in names]


def _find(table: pa.Table, name: str, where: str, loc: Loc) -> pa.ChunkedArray:
    if name not in table.column_names:
        close = suggest(name, table.column_names)
        listed = ", ".join(table.column_names)
        hint = f"{close} (its columns: {listed})" if close.startswith("; did you mean") else f"; its columns: {listed}"
        raise StudyError(f"{where} has no column {name!r}{hint}", loc)
    column = table.column(name)
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _texts(column: pa.ChunkedArray, name: str, where: str, loc: Loc) -> pa.ChunkedArray:
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if not _is_text(column.type):
        raise StudyError(f"column {name!r} of {where} holds no texts but {_kind(column.type)}: map another column", loc)
    column = column.cast(pa.large_string())
    blank = [value is None or not value.strip() for value in column.to_pylist()]
    _refuse(blank, f"column {name!r} of {where} holds no text", loc)
    return column


def _labels(column: pa.ChunkedArray, name: str, where: str, loc: Loc) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_null(kind):
        column = column.cast(pa.string())
    elif pa.types.is_boolean(kind):
        column = pc.if_else(column, "true", "false")
    elif pa.types.is_floating(kind):
        # Whole numbers arrive as floats where a table had gaps, from pandas above all.
        values = [None if value is None or value != value else value for value in column.to_pylist()]
        for row, value in enumerate(values, 1):
            if value is not None and not float(value).is_integer():
                raise StudyError(
                    f"column {name!r} of {where} holds the number {value:g} in row {row}: classification needs names "
                    "or whole numbers as labels",
                    loc,
                )
        column = pa.chunked_array(
            [pa.array([None if value is None else str(int(value)) for value in values], pa.string())]
        )
    elif pa.types.is_integer(kind) or _is_text(kind):
        column = column.cast(pa.large_string())
    else:
        raise StudyError(
            f"column {name!r} of {where} holds {_kind(kind)}: classification needs one label per text", loc
        )
    column = column.cast(pa.large_string())
    _refuse(
        [value is None or not value.strip() for value in column.to_pylist()],
        f"column {name!r} of {where} holds no label",
        loc,
    )
    return column


def _refuse(bad: Sequence[bool], message: str, loc: Loc) -> None:
    count = sum(bad)
    if count:
        first = bad.index(True) + 1
        rows = f"in row {first}" if count == 1 else f"in {count} of {len(bad)} rows, first in row {first}"
        raise StudyError(f"{message} {rows}: fill it in or drop the row{'s' if count != 1 else ''}", loc)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "true/false"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "numbers"
    if pa.types.is_nested(kind):
        return "objects" if pa.types.is_struct(kind) or pa.types.is_map(kind) else "lists"
    return f"values of type {kind}"


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(repr(label) for label in labels[:5])
    return shown if len(labels) <= 5 else f"{shown} and {len(labels) - 5} more labels"
