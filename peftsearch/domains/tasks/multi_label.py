"""Multi-label classification: any number of labels for a text, or for a pair of texts; none, too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from peftsearch.domains.tasks.base import (
    HEAVIEST,
    Guess,
    LabelOptions,
    LossOptions,
    Metric,
    Prediction,
    Tokenization,
    check_counts,
)
from peftsearch.domains.tasks.classification import Classification, read_texts, text_columns, tokenize_texts
from peftsearch.domains.tasks.columns import find, in_order, is_list, is_text, kind_of, listed, refuse, refuse_untrained
from peftsearch.spec import DataSpec, StudyError
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets
    import torch
    from torch import nn


class MultiLabelOptions(LabelOptions):
    """Settings of multi-label classification."""

    separator: str | None = Field(
        default=None, min_length=1, description="What stands between labels where the column holds them as one text"
    )
    threshold: float = Field(default=0.5, gt=0, lt=1, description="Labels at least this probable are predicted")


class MultiLabel(Classification):
    """Any number of labels for a text, or for a pair of texts.

    References and predictions are rows of zeros and ones, one for each label.
    """

    name: ClassVar[str] = "multi_label"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "micro_f1": Metric("micro_f1", "maximize"),
        "macro_f1": Metric("macro_f1", "maximize"),
        "example_f1": Metric("example_f1", "maximize"),
        "subset_accuracy": Metric("subset_accuracy", "maximize"),
    }
    Options = MultiLabelOptions
    loss_options: ClassVar[frozenset[str]] = frozenset({"label_smoothing", "class_weights"})

    def read(self, table: pa.Table, data: DataSpec, where: str, loc: Loc) -> pa.Table:
        """As `Task.read`: ``label`` holds lists of names, sorted and without repetitions."""
        columns = read_texts(table, data, where, loc)
        name, place = data.columns.label, (*loc, "columns", "label")
        if name in self.columns(data)[:-1]:
            raise StudyError(f"the column {name!r} cannot be both text and label", place)
        labels = self._label_lists(find(table, name, where, place), name, where, place)
        columns["label"] = pa.chunked_array([pa.array(labels, pa.list_(pa.large_string()))])
        return pa.table(columns)

    def _label_lists(self, column: pa.ChunkedArray, name: str, where: str, loc: Loc) -> list[list[str]]:
        kind, separator = column.type, self.options.separator
        if separator is not None:
            if pa.types.is_null(kind):
                column = column.cast(pa.string())
            elif not is_text(kind):
                raise StudyError(
                    f"column {name!r} of {where} holds {kind_of(kind)}, not texts that options.separator takes apart",
                    loc,
                )
            # An empty field is how a table writes no labels.
            parts = [(value or "").split(separator) for value in column.to_pylist()]
            return [sorted({label.strip() for label in row if label.strip()}) for row in parts]
        if not is_list(kind):
            hint = " (or set options.separator, if each text lists several)" if is_text(kind) else ""
            raise StudyError(
                f"column {name!r} of {where} holds {'no lists' if pa.types.is_null(kind) else kind_of(kind)}: "
                f"multi_label needs a list of labels in each row{hint}",
                loc,
            )
        values = column.to_pylist()
        refuse(
            [value is None for value in values], f"column {name!r} of {where} holds no list", loc, "write [] for none"
        )
        inner = kind.value_type
        if any(values) and not (is_text(inner) or pa.types.is_integer(inner)):
            raise StudyError(
                f"column {name!r} of {where} holds lists of {kind_of(inner)}: multi_label needs names or whole numbers",
                loc,
            )
        blank = [any(label is None or not str(label).strip() for label in row) for row in values]
        refuse(blank, f"column {name!r} of {where} holds a label without a name", loc, "name it or take it out")
        return [sorted({str(label) for label in row}) for row in values]

    def content(self, table: pa.Table) -> list[tuple[str, ...]]:
        """The text or texts, then the labels."""
        labels = [json.dumps(row) for row in table.column("label").to_pylist()]
        return list(zip(*text_columns(table), labels, strict=True))

    def strata(self, table: pa.Table) -> list[str] | None:
        """The rarest label of each row, so that every split sees every label."""
        rows = table.column("label").to_pylist()
        counts = Counter(label for row in rows for label in row)
        return [min(row, key=lambda label: (counts[label], label), default="") for row in rows]

    def check(
        self, splits: Mapping[str, pa.Table], data: DataSpec, loc: Loc, *, cut: Collection[str] = ()
    ) -> tuple[str, ...]:
        """As `Task.check`; labels are sorted as texts, or as numbers where all are whole numbers."""
        counts = {split: _counts(table) for split, table in splits.items()}
        place = (*loc, "columns", "label")
        known = set(counts["train"]).union(*(counts[split] for split in cut if split in counts))
        if not known:
            raise StudyError(
                f"no row of train has a label (column {data.columns.label!r}): there is nothing to learn", place
            )
        rows = [set(row) for row in splits["train"].column("label").to_pylist()]
        if all(row == known for row in rows) and not cut:
            raise StudyError(
                f"all {len(rows)} training rows have the same labels (column {data.columns.label!r}): there is nothing "
                "to learn",
                place,
            )
        refuse_untrained(counts, known, place)
        return in_order(known)

    def warnings(self, splits: Mapping[str, pa.Table], labels: Sequence[str]) -> list[str]:
        """Labels that a split lacks, and inputs that stand there with different labels."""
        found = []
        for split, table in splits.items():
            counts = _counts(table)
            missing = [label for label in labels if label not in counts]
            if missing:
                found.append(f"{split} has no example of {listed(missing)}")
        by_input: dict[str, set[tuple[str, ...]]] = {}
        train = splits["train"]
        for key, row in zip(self.keys(train), train.column("label").to_pylist(), strict=True):
            by_input.setdefault(key, set()).add(tuple(row))
        ambiguous = sum(len(several) > 1 for several in by_input.values())
        if ambiguous:
            found.append(
                f"{ambiguous} text{'s' if ambiguous != 1 else ''} of train stand there again with other labels"
            )
        return found

    def tokenize(self, table: pa.Table, labels: Sequence[str], how: Tokenization) -> datasets.Dataset:
        """As `Task.tokenize`; the column ``labels`` holds the numbers of each row's labels."""
        import datasets

        columns = tokenize_texts(text_columns(table), how)
        index = {label: number for number, label in enumerate(labels)}
        numbers = [[index[label] for label in row] for row in table.column("label").to_pylist()]
        columns["labels"] = pa.array(numbers, pa.list_(pa.int32()))
        columns["classes"] = pa.array([len(labels)] * len(numbers), pa.int32())
        return datasets.Dataset(pa.table(columns))

    def config_kwargs(self, labels: Sequence[str]) -> dict[str, Any]:
        """``num_labels``, ``id2label``, ``label2id`` and ``problem_type``."""
        return {**super().config_kwargs(labels), "problem_type": "multi_label_classification"}

    def collate(self, rows: Mapping[str, Sequence[Any]], pad_token_id: int, *, multiple_of: int = 8) -> dict[str, Any]:
        """As `Task.collate`; ``labels`` has shape (rows, labels) and type float32, 1 where a row has a label."""
        import torch

        batch = super().collate({**rows, "labels": [0] * len(rows["labels"])}, pad_token_id, multiple_of=multiple_of)
        batch["labels"] = torch.tensor(self.references(rows), dtype=torch.float32)
        return batch

    def losses(self, output: Any, batch: Mapping[str, Any], options: LossOptions | None = None) -> torch.Tensor:
        """Binary cross-entropy of each example, the mean over labels.

        ``class_weights`` weigh the examples that have a label; label smoothing moves both targets towards 1/2.
        """
        from torch.nn import functional

        options = options or LossOptions()
        targets = batch["labels"]
        smoothing = options.label_smoothing
        each = functional.binary_cross_entropy_with_logits(
            output.logits.float(),
            targets * (1 - smoothing) + smoothing / 2,
            reduction="none",
            pos_weight=options.class_weights,
        )
        return each.mean(dim=1)

    def predict(self, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction) -> list[Any]:
        """A row of zeros and ones for each example: 1 where a label's probability reaches the threshold."""
        probabilities = output.logits.detach().float().sigmoid()
        return list((probabilities >= self.options.threshold).int().tolist())

    def references(self, rows: Mapping[str, Sequence[Any]]) -> list[Any]:
        """A row of zeros and ones for each example."""
        found = []
        for numbers, classes in zip(rows["labels"], rows["classes"], strict=True):
            row = [0] * int(classes)
            for number in numbers:
                row[number] = 1
            found.append(row)
        return found

    def score(self, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str]) -> dict[str, float]:
        """Micro and macro F1, example-based F1, subset accuracy; and precision, recall and F1 of each label.

        Macro F1 is the mean over the labels that occur among references or predictions. ``example_f1`` is BLUE's for
        the Hallmarks of Cancer (eval_hoc.py): the harmonic mean of mean precision and mean recall over examples, where
        an example without predictions has precision 0; one that rightly has none counts as 1 in both (BLUE has no
        examples without labels), and one that wrongly has some as 0. ``subset_accuracy`` is the share of examples with
        exactly the right labels.
        """
        check_counts(predictions, references)
        ours, theirs = np.asarray(predictions, dtype=bool), np.asarray(references, dtype=bool)
        both, either = ours & theirs, ours | theirs
        scores = {
            "micro_f1": _ratio(2 * both.sum(), ours.sum() + theirs.sum()),
            "macro_f1": 0.0,
            "example_f1": _example_f1(ours, theirs),
            "subset_accuracy": float((ours == theirs).all(axis=1).mean()),
        }
        f1 = {}
        for number, label in enumerate(labels):
            right, guessed, wanted = (int(rows[:, number].sum()) for rows in (both, ours, theirs))
            f1[number] = _ratio(2 * right, guessed + wanted)
            scores[f"f1/{label}"] = f1[number]
            scores[f"precision/{label}"] = _ratio(right, guessed)
            scores[f"recall/{label}"] = _ratio(right, wanted)
        occurring = [f1[number] for number in f1 if either[:, number].any()]
        scores["macro_f1"] = float(np.mean(occurring)) if occurring else 0.0
        return scores

    def class_counts(self, rows: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> list[int] | None:
        """Examples with each label."""
        numbers = [number for row in rows["labels"] for number in row]
        return list(np.bincount(np.asarray(numbers, dtype=np.int64), minlength=len(labels)).tolist())

    def balanced_weights(self, rows: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> list[float] | None:
        """Examples without a label for each one with it, at most `HEAVIEST`: both kinds weigh the same in the loss."""
        count = len(rows["labels"])
        found = self.class_counts(rows, labels) or []
        return [min(HEAVIEST, (count - positive) / positive) if positive else 0.0 for positive in found]

    def guesses(
        self, train: Mapping[str, Sequence[Any]], split: Mapping[str, Sequence[Any]], labels: Sequence[str]
    ) -> dict[str, Guess]:
        """The same labels for every text: those that do best on train by micro F1."""
        counts = self.class_counts(train, labels) or []
        rows, total = len(train["labels"]), sum(counts)
        order = sorted(range(len(labels)), key=lambda number: (-counts[number], number))
        # Of the sets of one size the most frequent labels do best, so there are only as many candidates as labels.
        best = max(
            range(1, len(order) + 1),
            key=lambda size: (sum(2 * counts[number] for number in order[:size]) / (size * rows + total), -size),
        )
        chosen = sorted(order[:best])
        row = [int(number in chosen) for number in range(len(labels))]
        detail = (
            f"always {listed([labels[number] for number in chosen])}: the best constant answer on train by micro F1"
        )
        return {"majority": Guess("best constant labels", detail, [row] * len(split["labels"]))}

    def probes(self) -> list[tuple[str, Any]]:
        """Logistic regressions, one for each label."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier

        return [
            (f"C = {c:g}", OneVsRestClassifier(LogisticRegression(C=c, max_iter=500, random_state=0)))
            for c in (1.0, 10.0, 100.0)
        ]


def _counts(table: pa.Table) -> Counter[str]:
    return Counter(label for row in table.column("label").to_pylist() for label in row)


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator) / float(denominator) if denominator else 0.0


def _example_f1(ours: np.ndarray, theirs: np.ndarray) -> float:
    right, guessed, wanted = (rows.sum(axis=1) for rows in (ours & theirs, ours, theirs))
    empty = (guessed == 0) & (wanted == 0)
    precision = float(np.where(empty, 1.0, right / np.maximum(guessed, 1)).mean())
    recall = float(np.where(empty, 1.0, right / np.maximum(wanted, 1)).mean())
    return _ratio(2 * precision * recall, precision + recall)
