"""Similarity: a number for a pair of texts, such as how much they mean the same."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from peftsearch.domains.tasks.base import (
    Guess,
    Head,
    LossOptions,
    Metric,
    Prediction,
    TaskOptions,
    Tokenization,
    check_counts,
    text_batch,
)
from peftsearch.domains.tasks.classification import Classification, read_texts, text_columns, tokenize_texts
from peftsearch.domains.tasks.columns import find, is_text, kind_of, refuse
from peftsearch.spec import DataSpec, StudyError
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets
    import torch
    from torch import nn

# The one label of such a domain: what the model's output means, so that an exported model says it too.
_SCALE = re.compile(r"score = (\S+) \+ (\S+) \* output")
# Bins of the score, each of which every split should see.
BINS = 4


class SimilarityOptions(TaskOptions):
    """Settings of similarity."""

    range: tuple[float, float] | None = Field(
        default=None,
        description="Lowest and highest score there can be, for example [0, 4]: others are refused, predictions are "
        "kept within; where absent scores are scaled by mean and deviation of train",
    )

    encoding: Literal["joint", "separate"] = Field(
        default="joint",
        description="joint: one pass over both texts, and a new head; separate: the cosine of two mean-pooled "
        "embeddings, which starts from what an embedding model knows (needs range)",
    )

    @field_validator("range")
    @classmethod
    def _range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError(f"range is [lowest, highest], and {value[0]:g} is not below {value[1]:g}")
        return value

    @model_validator(mode="after")
    def _scale(self) -> Self:
        if self.encoding == "separate" and self.range is None:
            raise ValueError("encoding: separate needs range: a cosine of 0 and 1 are its lowest and highest score")
        return self


class Similarity(Classification):
    """A number for a pair of texts (or for one text).

    The model learns standardised scores, (score - mean) / deviation, whatever their scale; references and predictions
    are scores as the data has them. With ``encoding: separate`` it embeds each text by itself, and the cosine of the
    embeddings is trained to be the score on a scale from 0 to 1 (Reimers and Gurevych 2019, arXiv:1908.10084).
    """

    name: ClassVar[str] = "similarity"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "pearson": Metric("pearson", "maximize"),
        "spearman": Metric("spearman", "maximize"),
        "mse": Metric("mse", "minimize"),
        "rmse": Metric("rmse", "minimize"),
    }
    label_metrics: ClassVar[Mapping[str, Metric]] = {}
    Options = SimilarityOptions
    hidden = frozenset({"labels", "mean", "deviation"})
    probe: ClassVar[Literal["text", "token", "pair"] | None] = "pair"
    # It has no classes, as its parent has.
    loss_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: TaskOptions | None = None) -> None:
        super().__init__(options)
        self.separate = self.options.encoding == "separate"
        if self.separate:
            # An encoder-decoder has no embedding of a text without a target.
            self.heads = dict.fromkeys(("encoder", "decoder"), Head("AutoModel", "FEATURE_EXTRACTION"))  # type: ignore[misc]

    def read(self, table: pa.Table, data: DataSpec, where: str, loc: Loc) -> pa.Table:
        """As `Task.read`: ``label`` holds float64."""
        columns = read_texts(table, data, where, loc)
        name, place = data.columns.label, (*loc, "columns", "label")
        if name in self.columns(data)[:-1]:
            raise StudyError(f"the column {name!r} cannot be both text and label", place)
        scores = _scores(find(table, name, where, place), name, where, place)
        if self.options.range is not None:
            low, high = self.options.range
            refuse(
                [not low <= score <= high for score in scores],
                f"column {name!r} of {where} holds a score outside of {low:g} to {high:g} (options.range)",
                place,
                "correct it or the range",
            )
        columns["label"] = pa.chunked_array([pa.array(scores, pa.float64())])
        return pa.table(columns)

    def content(self, table: pa.Table) -> list[tuple[str, ...]]:
        """The texts, then the score."""
        return list(zip(*text_columns(table), map(repr, table.column("label").to_pylist()), strict=True))

    def texts_at_once(self, splits: Mapping[str, pa.Table], data: DataSpec) -> int:
        """Both texts of a pair, for ``encoding: separate``."""
        return 2 if self.separate else 1

    def strata(self, table: pa.Table) -> list[str] | None:
        """Which quarter of the scores each is in."""
        scores = table.column("label").to_numpy()
        edges = np.quantile(scores, np.arange(1, BINS) / BINS)
        return [str(number) for number in np.searchsorted(edges, scores, side="right")]

    def check(
        self, splits: Mapping[str, pa.Table], data: DataSpec, loc: Loc, *, cut: Collection[str] = ()
    ) -> tuple[str, ...]:
        """As `Task.check`; the one label says how the model's output becomes a score."""
        scores = splits["train"].column("label").to_numpy()
        if scores.min() == scores.max():
            raise StudyError(
                f"all {len(scores)} training rows have the score {scores[0]:g} (column {data.columns.label!r}): there "
                "is nothing to learn",
                (*loc, "columns", "label"),
            )
        return (f"score = {scores.mean():.6g} + {scores.std():.6g} * output",)

    def warnings(self, splits: Mapping[str, pa.Table], labels: Sequence[str]) -> list[str]:
        """Splits on which no correlation can be computed, or none that means much."""
        found = []
        for split, table in splits.items():
            scores = table.column("label").to_numpy()
            if split != "train" and scores.min() == scores.max():
                found.append(f"all scores of {split} are {scores[0]:g}: correlations on it are 0 by definition")
            elif split != "train" and len(scores) < 30:
                found.append(f"{split} has {len(scores)} pairs: correlations on so few vary a lot by chance")
        return found

    def tokenize(self, table: pa.Table, labels: Sequence[str], how: Tokenization) -> datasets.Dataset:
        """As `Task.tokenize`; ``first`` and ``second`` hold the tokens of each text by itself, for baselines."""
        import datasets

        inputs = text_columns(table)
        columns = tokenize_texts(inputs, how)
        mean, deviation = scale_of(labels)
        rows = table.num_rows
        columns["labels"] = table.column("label").combine_chunks()
        columns["mean"] = pa.array([mean] * rows, pa.float64())
        columns["deviation"] = pa.array([deviation] * rows, pa.float64())
        if len(inputs) == 2 and (how.architecture == "encoder" or self.separate):
            for name, texts in zip(("first", "second"), inputs, strict=True):
                columns[name] = tokenize_texts([texts], how)["input_ids"]
        if self.separate:
            if len(inputs) < 2:
                raise ValueError("encoding: separate is for pairs: map columns.text_pair")
            sizes = [[len(tokens) for tokens in columns[name].to_pylist()] for name in ("first", "second")]
            # Both are rows of one batch, as long as its longest.
            columns["length"] = pa.array([2 * max(pair) for pair in zip(*sizes, strict=True)], pa.int32())
        return datasets.Dataset(pa.table(columns))

    def config_kwargs(self, labels: Sequence[str]) -> dict[str, Any]:
        """``num_labels`` 1, its name, and ``problem_type``; nothing for embeddings."""
        if self.separate:
            return {}
        return {**super().config_kwargs(labels), "problem_type": "regression"}

    def collate(self, rows: Mapping[str, Sequence[Any]], pad_token_id: int, *, multiple_of: int = 8) -> dict[str, Any]:
        """As `Task.collate`; ``labels`` (scores), ``mean`` and ``deviation`` have shape (rows,) and type float32.

        For ``encoding: separate`` the first texts of all pairs are followed by the second ones: twice as many rows.
        """
        import torch

        if self.separate:
            texts = [*rows["first"], *rows["second"]]
            batch: dict[str, Any] = dict(text_batch({"input_ids": texts}, pad_token_id, multiple_of=multiple_of))
        else:
            unlabelled = {**rows, "labels": [0] * len(rows["labels"])}
            batch = super().collate(unlabelled, pad_token_id, multiple_of=multiple_of)
        for name in ("labels", "mean", "deviation"):
            batch[name] = torch.tensor(rows[name], dtype=torch.float32)
        return batch

    def losses(self, output: Any, batch: Mapping[str, Any], options: LossOptions | None = None) -> torch.Tensor:
        """Squared error of each standardised score; of the cosine, for ``encoding: separate``."""
        if self.separate:
            low, high = self.options.range
            difference: torch.Tensor = _cosines(output, batch) - (batch["labels"] - low) / (high - low)
            return difference**2
        targets = (batch["labels"] - batch["mean"]) / batch["deviation"]
        found: torch.Tensor = (output.logits.float().squeeze(-1) - targets) ** 2
        return found

    def predict(self, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction) -> list[Any]:
        """The score of each pair, within ``options.range``."""
        if self.separate:
            low, high = self.options.range
            return list((low + (high - low) * _cosines(output, batch).detach().clamp(0.0, 1.0)).tolist())
        scores = output.logits.detach().float().squeeze(-1) * batch["deviation"] + batch["mean"]
        if self.options.range is not None:
            scores = scores.clamp(*self.options.range)
        return list(scores.tolist())

    def references(self, rows: Mapping[str, Sequence[Any]]) -> list[Any]:
        """The true score of each pair."""
        return [float(score) for score in rows["labels"]]

    def score(self, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str]) -> dict[str, float]:
        """Pearson's and Spearman's correlation, and the (root) mean squared error.

        A correlation with a constant is undefined; it counts as 0.
        """
        from scipy.stats import pearsonr, spearmanr

        check_counts(predictions, references)
        ours, theirs = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        mse = float(((ours - theirs) ** 2).mean())
        # Not "all equal": the correlation with rounding noise around a constant is noise.
        constant = any(np.ptp(values) <= 1e-9 * max(1.0, float(np.abs(values).max())) for values in (ours, theirs))
        if constant or not np.isfinite(ours).all():
            pearson = spearman = 0.0
        else:
            pearson, spearman = float(pearsonr(ours, theirs)[0]), float(spearmanr(ours, theirs)[0])
        return {"pearson": pearson, "spearman": spearman, "mse": mse, "rmse": math.sqrt(mse)}

    def class_counts(self, rows: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> list[int] | None:
        """There are no classes."""
        return None

    def guesses(
        self, train: Mapping[str, Sequence[Any]], split: Mapping[str, Sequence[Any]], labels: Sequence[str]
    ) -> dict[str, Guess]:
        """The mean of train."""
        mean = float(np.mean(train["labels"]))
        detail = f"always {mean:.4g}: its correlation is 0 by definition"
        return {"mean": Guess("mean score", detail, [mean] * len(split["labels"]))}

    def probes(self) -> list[tuple[str, Any]]:
        """Ridge regressions."""
        from sklearn.linear_model import Ridge

        return [(f"alpha = {alpha:g}", Ridge(alpha=alpha)) for alpha in (0.01, 0.1, 1.0, 10.0)]


def _cosines(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Cosine of the mean-pooled embeddings of each pair's texts, shape (pairs,)."""
    from torch.nn import functional

    mask = batch["attention_mask"].unsqueeze(-1).float()
    # Soft tokens stand in front of the text.
    hidden = output.last_hidden_state[:, -mask.shape[1] :].float()
    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
    first, second = pooled.chunk(2)
    return functional.cosine_similarity(first, second)


def scale_of(labels: Sequence[str]) -> tuple[float, float]:
    """Mean and deviation by which a model's output becomes a score, from the one label of such a domain."""
    match = _SCALE.fullmatch(labels[0])
    assert match is not None
    return float(match[1]), float(match[2])


def _scores(column: pa.ChunkedArray, name: str, where: str, loc: Loc) -> list[float]:
    kind = column.type
    values: list[Any] = column.to_pylist()
    if is_text(kind):
        # Tables of text (CSV, TSV) hold numbers as text.
        found: list[Any] = []
        for row, value in enumerate(values, 1):
            try:
                found.append(None if value is None or not value.strip() else float(value))
            except ValueError:
                raise StudyError(
                    f"column {name!r} of {where} holds {value!r} in row {row}, which is not a number: similarity needs "
                    "a score in each row",
                    loc,
                ) from None
        values = found
    elif not (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)
    ):
        raise StudyError(
            f"column {name!r} of {where} holds {kind_of(kind)}: similarity needs a number in each row", loc
        )
    bad = [value is None or not math.isfinite(value) for value in values]
    refuse(bad, f"column {name!r} of {where} holds no finite number", loc)
    return [float(value) for value in values]
