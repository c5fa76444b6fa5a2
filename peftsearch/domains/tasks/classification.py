"""Classification: one label for a text, or for a pair of texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from peftsearch.domains.models import Architecture
from peftsearch.domains.splits import normalise
from peftsearch.domains.tasks.base import (
    Guess,
    Head,
    LabelOptions,
    LossOptions,
    Metric,
    Prediction,
    Task,
    TaskOptions,
    Tokenization,
    check_counts,
    text_batch,
)
from peftsearch.domains.tasks.columns import find, in_order, is_text, kind_of, listed, refuse, refuse_untrained, texts
from peftsearch.spec import DataSpec, StudyError
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets
    import torch
    from torch import nn

# A share of the training rows from which accuracy says more about the data than about the model.
DOMINANT = 0.8
BETWEEN = "\n"
"""What a decoder reads between the texts of a pair."""
# Rows that are handed to the tokenizer at once: enough for its threads, little enough to stay in memory.
TOKENIZE_BATCH = 1000


class Classification(Task):
    """One label for a text, or for a pair of texts."""

    name: ClassVar[str] = "classification"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("accuracy", "maximize"),
        "macro_f1": Metric("macro_f1", "maximize"),
        "micro_f1": Metric("micro_f1", "maximize"),
        "weighted_f1": Metric("weighted_f1", "maximize"),
        "balanced_accuracy": Metric("balanced_accuracy", "maximize"),
        "mcc": Metric("mcc", "maximize"),
    }
    label_metrics: ClassVar[Mapping[str, Metric]] = {
        "f1": Metric("f1", "maximize"),
        "precision": Metric("precision", "maximize"),
        "recall": Metric("recall", "maximize"),
    }
    heads = dict.fromkeys(
        ("encoder", "encoder-decoder", "decoder"), Head("AutoModelForSequenceClassification", "SEQ_CLS")
    )
    Options: ClassVar[type[TaskOptions]] = LabelOptions
    loss_options: ClassVar[frozenset[str]] = frozenset({"label_smoothing", "class_weights"})
    probe: ClassVar[Literal["text", "token", "pair"] | None] = "text"

    def columns(self, data: DataSpec) -> tuple[str, ...]:
        """Text, the second text of pairs, and label."""
        pair = (data.columns.text_pair,) if data.columns.text_pair is not None else ()
        return (data.columns.text, *pair, data.columns.label)

    def read(self, table: pa.Table, data: DataSpec, where: str, loc: Loc) -> pa.Table:
        """As `Task.read`: texts stay as they are, labels become texts."""
        columns = read_texts(table, data, where, loc)
        name, place = data.columns.label, (*loc, "columns", "label")
        if name in self.columns(data)[:-1]:
            raise StudyError(f"the column {name!r} cannot be both text and label", place)
        columns["label"] = _labels(find(table, name, where, place), name, where, place)
        return pa.table(columns)

    def keys(self, table: pa.Table) -> list[str]:
        """The normalised text, or both texts of a pair."""
        return ["\0".join(map(normalise, row)) for row in zip(*text_columns(table), strict=True)]

    def content(self, table: pa.Table) -> list[tuple[str, ...]]:
        """The text or texts, then the label."""
        return list(zip(*text_columns(table), table.column("label").to_pylist(), strict=True))

    def strata(self, table: pa.Table) -> list[str] | None:
        """The labels."""
        return [str(label) for label in table.column("label").to_pylist()]

    def check(
        self, splits: Mapping[str, pa.Table], data: DataSpec, loc: Loc, *, cut: Collection[str] = ()
    ) -> tuple[str, ...]:
        """As `Task.check`; labels are sorted as texts, or as numbers where all are whole numbers."""
        counts = {split: Counter(table.column("label").to_pylist()) for split, table in splits.items()}
        place = (*loc, "columns", "label")
        known = set(counts["train"]).union(*(counts[split] for split in cut if split in counts))
        if len(known) == 1:
            raise StudyError(
                f"all {sum(counts['train'].values())} training rows have the label {next(iter(known))!r} "
                f"(column {data.columns.label!r}): there is nothing to learn",
                place,
            )
        refuse_untrained(counts, known, place)
        return in_order(known)

    def warnings(self, splits: Mapping[str, pa.Table], labels: Sequence[str]) -> list[str]:
        """Labels that a split lacks, labels that dominate, and inputs that carry several labels."""
        found = []
        counts = {split: Counter(table.column("label").to_pylist()) for split, table in splits.items()}
        for split, count in counts.items():
            missing = [label for label in labels if label not in count]
            if missing:
                found.append(f"{split} has no example of {listed(missing)}")
        rows = sum(counts["train"].values())
        label, largest = counts["train"].most_common(1)[0]
        if largest >= DOMINANT * rows:
            found.append(
                f"{largest / rows:.0%} of train has the label {label!r}: a model that always answers it looks "
                "accurate, and macro_f1 tells more"
            )
        by_input: dict[str, set[str]] = {}
        train = splits["train"]
        for key, label in zip(self.keys(train), train.column("label").to_pylist(), strict=True):
            by_input.setdefault(key, set()).add(label)
        ambiguous = sum(len(several) > 1 for several in by_input.values())
        if ambiguous:
            found.append(f"{ambiguous} text{'s' if ambiguous != 1 else ''} of train stand there with several labels")
        return found

    def tokenize(self, table: pa.Table, labels: Sequence[str], how: Tokenization) -> datasets.Dataset:
        """As `Task.tokenize`; of a pair the longer text is truncated first."""
        import datasets

        columns = tokenize_texts(text_columns(table), how)
        index = {label: number for number, label in enumerate(labels)}
        numbers = [index[label] for label in table.column("label").to_pylist()]
        columns["labels"] = pa.array(numbers, pa.int64())
        return datasets.Dataset(pa.table(columns))

    def config_kwargs(self, labels: Sequence[str]) -> dict[str, Any]:
        """``num_labels``, ``id2label`` and ``label2id``."""
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
        }

    def collate(self, rows: Mapping[str, Sequence[Any]], pad_token_id: int, *, multiple_of: int = 8) -> dict[str, Any]:
        """As `Task.collate`; ``labels`` has shape (rows,) and type int64."""
        import torch

        batch: dict[str, Any] = text_batch(rows, pad_token_id, multiple_of=multiple_of)
        batch["labels"] = torch.tensor(rows["labels"], dtype=torch.int64)
        return batch

    def losses(self, output: Any, batch: Mapping[str, Any], options: LossOptions | None = None) -> torch.Tensor:
        """Cross-entropy of each example."""
        from torch.nn import functional

        options = options or LossOptions()
        return functional.cross_entropy(
            output.logits.float(),
            batch["labels"],
            reduction="none",
            weight=options.class_weights,
            label_smoothing=options.label_smoothing,
        )

    def predict(self, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction) -> list[Any]:
        """The number of the most likely label of each example."""
        return list(output.logits.detach().argmax(dim=-1).tolist())

    def references(self, rows: Mapping[str, Sequence[Any]]) -> list[Any]:
        """The number of the true label of each example."""
        return [int(label) for label in rows["labels"]]

    def score(self, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str]) -> dict[str, float]:
        """Accuracy, F1 averages, Matthews correlation; and precision, recall and F1 of each label.

        As scikit-learn defines them. Macro F1 is the mean over the labels that occur among references or predictions,
        weighted F1 weighs them by their examples, micro F1 equals accuracy where each text has one label, and balanced
        accuracy is the mean recall over the labels that occur among references. A ratio without a denominator counts
        as 0.
        """
        from sklearn.metrics import confusion_matrix

        check_counts(predictions, references)
        # Rows are what is, columns what is predicted. One matrix for all: scores are asked for thousands of times where
        # differences are tested for significance.
        matrix = confusion_matrix(references, predictions, labels=range(len(labels))).astype(np.float64)
        right, wanted, guessed, total = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0), matrix.sum()
        precision, recall = _ratios(right, guessed), _ratios(right, wanted)
        f1 = _ratios(2 * right, wanted + guessed)
        counted = [number for number, label in enumerate(labels) if self._counts(label)]
        occurring = [number for number in counted if wanted[number] + guessed[number] > 0]
        spread = math.sqrt((total**2 - (guessed**2).sum()) * (total**2 - (wanted**2).sum()))
        scores = {
            "accuracy": right.sum() / total,
            "macro_f1": f1[occurring].mean() if occurring else 0.0,
            "micro_f1": _ratios(2 * right[counted].sum(), (wanted + guessed)[counted].sum()),
            "weighted_f1": _ratios((f1 * wanted)[counted].sum(), wanted[counted].sum()),
            "balanced_accuracy": recall[wanted > 0].mean(),
            "mcc": (right.sum() * total - (wanted * guessed).sum()) / spread if spread else 0.0,
        }
        for number, label in enumerate(labels):
            scores[f"f1/{label}"] = f1[number]
            scores[f"precision/{label}"] = precision[number]
            scores[f"recall/{label}"] = recall[number]
        return {name: float(value) for name, value in scores.items()}

    def _counts(self, label: str) -> bool:
        """Whether averages of F1 count a label."""
        return True

    def class_counts(self, rows: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> list[int] | None:
        """Examples of each label."""
        return list(np.bincount(rows["labels"], minlength=len(labels)).tolist())

    def guesses(
        self, train: Mapping[str, Sequence[Any]], split: Mapping[str, Sequence[Any]], labels: Sequence[str]
    ) -> dict[str, Guess]:
        """The majority class."""
        majority = int(np.bincount(train["labels"]).argmax())
        return {"majority": Guess("majority class", f"always {labels[majority]!r}", [majority] * len(split["labels"]))}

    def probes(self) -> list[tuple[str, Any]]:
        """Logistic regressions."""
        from sklearn.linear_model import LogisticRegression

        return [(f"C = {c:g}", LogisticRegression(C=c, max_iter=500, random_state=0)) for c in (1.0, 10.0, 100.0)]


def _ratios(numerator: Any, denominator: Any) -> Any:
    """Quotients, 0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=np.asarray(denominator) != 0)


def read_texts(table: pa.Table, data: DataSpec, where: str, loc: Loc) -> dict[str, pa.ChunkedArray]:
    """The columns ``text`` and, for pairs, ``text_pair``, checked.

    Raises:
        StudyError: No rows, or a missing, blank or unusable text.
    """
    if table.num_rows == 0:
        raise StudyError(f"{where} holds no rows", loc)
    found = {}
    for role, name in (("text", data.columns.text), ("text_pair", data.columns.text_pair)):
        if name is not None:
            place = (*loc, "columns", role)
            found[role] = texts(find(table, name, where, place), name, where, place)
    return found


def text_columns(table: pa.Table) -> list[list[str]]:
    """The texts of each row: ``text`` and, for pairs, ``text_pair``."""
    return [table.column(name).to_pylist() for name in ("text", "text_pair") if name in table.column_names]


def apart(inputs: Sequence[Sequence[str]], architecture: Architecture) -> list[list[str]]:
    """Texts or pairs as a kind of model reads them: for decoders the second text of a pair begins on a line of its own.

    Few decoders' tokenizers put anything between the texts of a pair. The line break is the second text's, as it is
    the first one's end that is cut off where both are too long.
    """
    first, *others = map(list, inputs)
    if architecture == "decoder":
        others = [[f"{BETWEEN}{text}" for text in column] for column in others]
    return [first, *others]


def tokenize_texts(inputs: Sequence[Sequence[str]], how: Tokenization) -> dict[str, pa.Array]:
    """``input_ids`` and, where a model tells the texts of a pair apart, ``token_type_ids``; pairs as `apart`.

    Encoder-decoders score a text at its end token, and refuse batches whose texts have different numbers of them
    (`T5ForSequenceClassification`): for them an end token that is written in the data is left out.

    Raises:
        ValueError: A text has no tokens.
    """
    inputs = apart(inputs, how.architecture)
    ids: list[list[int]] = []
    types: list[list[int]] = []
    for start in range(0, len(inputs[0]), TOKENIZE_BATCH):
        batch = [list(column[start : start + TOKENIZE_BATCH]) for column in inputs]
        encoded = _encode(batch, how)
        ids.extend(encoded["input_ids"])
        types.extend(encoded.get("token_type_ids") or [])
    for row, tokens in enumerate(ids):
        if not tokens:
            raise ValueError(f"the tokenizer makes no token of the text {inputs[0][row]!r}")
    columns = {"input_ids": pa.array(ids, pa.list_(pa.int32()))}
    # Models take zeros for absent ones, so a column of zeros would only cost memory.
    if any(any(row) for row in types):
        columns["token_type_ids"] = pa.array(types, pa.list_(pa.int32()))
    return columns


def _encode(texts: Sequence[Sequence[str]], how: Tokenization) -> Any:
    """Tokens of texts or pairs; for encoder-decoders without the end tokens that the texts hold.

    Asking for plain text (``split_special_tokens``) is not enough: a Unigram vocabulary, T5's, holds the end token as a
    piece, and finds it again. For other models it would also take apart the markers that people have added to theirs.
    """
    tokenizer = how.tokenizer
    settings: dict[str, Any] = {"truncation": True, "max_length": how.max_length, "padding": False}
    if how.architecture != "encoder-decoder" or tokenizer.eos_token is None:
        return tokenizer(*texts, **settings)
    if not tokenizer.is_fast:
        # These add none to a text that ends with one, and do not say so in their masks (ByT5).
        return tokenizer(*([text.replace(tokenizer.eos_token, " ") for text in column] for column in texts), **settings)
    encoded = tokenizer(*texts, **settings, return_special_tokens_mask=True)
    for row, (ids, added) in enumerate(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)):
        keep = [own or number != tokenizer.eos_token_id for number, own in zip(ids, added, strict=True)]
        if not all(keep):
            for name in {"input_ids", "token_type_ids"} & set(encoded):
                encoded[name][row] = [value for value, kept in zip(encoded[name][row], keep, strict=True) if kept]
    return encoded


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
    elif pa.types.is_integer(kind) or is_text(kind):
        column = column.cast(pa.large_string())
    else:
        raise StudyError(
            f"column {name!r} of {where} holds {kind_of(kind)}: classification needs one label per text", loc
        )
    column = column.cast(pa.large_string())
    refuse(
        [value is None or not value.strip() for value in column.to_pylist()],
        f"column {name!r} of {where} holds no label",
        loc,
    )
    return column
