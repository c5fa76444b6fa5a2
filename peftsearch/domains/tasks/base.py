"""What every task provides: how labelled text is checked and tokenised, and how a model's output is scored.

Adding a task is one file with one `Task` in it, and its entry in the registry. Nothing here imports torch at the top:
processes that only steer must start fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from peftsearch.domains.models import Architecture
from peftsearch.spec import DataSpec, Direction
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets
    import torch
    from torch import nn

GROUP = "group"
"""The column of `Task.read` that keeps rows together when splits are cut."""
EXAMPLE = "example"
"""The column of a tokenised split that says which example a row belongs to, where an example makes several rows."""
PART = "part"
"""The column that says which data set of a joined domain a row comes from; blocks of text hold one data set's."""

HEAVIEST = 100.0
"""How many times as much as others an example of a rare class weighs at most where classes are balanced: beyond that, a
few examples would be most of the loss."""


@dataclass(frozen=True)
class Metric:
    """One number that says how good a model is.

    Attributes:
        name: The word in the study file, and the key of its value in `Task.score`.
        direction: Whether more is better.
    """

    name: str
    direction: Direction


@dataclass(frozen=True)
class Head:
    """How a kind of model does a task.

    Attributes:
        auto_model: The class of `transformers` that loads a model with the task's head.
        peft_task_type: PEFT's name of the task; None where it has none.
    """

    auto_model: str
    peft_task_type: str | None

    @property
    def bare(self) -> bool:
        """Whether there is none: the task reads the base's own output."""
        return self.peft_task_type == "FEATURE_EXTRACTION"


class TaskOptions(BaseModel):
    """The settings that a task takes from a domain's ``options``; by default none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LabelOptions(TaskOptions):
    """Settings of tasks with labels."""

    names: dict[str, str] = Field(
        default={},
        description="What prompts call the labels (types of entities) where the data's own names say little: "
        "{'0': no relation}. Of baselines by prompting; a trained model never reads a label's name",
    )

    def said(self, label: str) -> str:
        """What prompts call a label."""
        return self.names.get(label, label)


@dataclass
class Tokenization:
    """What a split is tokenised for.

    Attributes:
        tokenizer: The model's.
        max_length: Tokens that the model sees at most.
        architecture: Of the model.
        training: Whether the split is trained on.
        decoder_start_token_id: What an encoder-decoder's decoder begins with; None where its configuration names none.
        warnings: Sentences about what was lost; `Task.tokenize` adds to it.
    """

    tokenizer: Any
    max_length: int
    architecture: Architecture
    training: bool = False
    decoder_start_token_id: int | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LossOptions:
    """What the training loss does otherwise than the validation loss.

    Attributes:
        label_smoothing: Share of the target that is spread over all classes.
        class_weights: Weight of each class, as a tensor of shape (classes,), or None.
    """

    label_smoothing: float = 0.0
    class_weights: torch.Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """What `Task.predict` may need besides model and batch.

    Attributes:
        tokenizer: The model's; only for tasks with `Task.decodes`.
        architecture: Of the model.
        final: Whether this is the evaluation at the full budget, or a quick one on the way (where a generating task
            may decode greedily).
    """

    architecture: Architecture
    final: bool = True
    tokenizer: Any = None


@dataclass(frozen=True)
class Guess:
    """A baseline that looks at the data alone.

    Attributes:
        title: For people, for example ``majority class``.
        detail: How it was made.
        predictions: One for each example of the scored split, as `Task.score` takes them.
    """

    title: str
    detail: str
    predictions: list[Any]


class Task(ABC):
    """What a model must do with a text.

    A task works on canonical columns: `read` gives each role of the study file's ``columns`` its own name (``text``,
    ``label``, ...), and everything after it knows no other.

    Args:
        options: The domain's ``options``, checked; the defaults where absent.
    """

    name: ClassVar[str]
    """The word in the study file."""
    metrics: ClassVar[Mapping[str, Metric]]
    """What it can be scored by; the first is the default objective."""
    label_metrics: ClassVar[Mapping[str, Metric]] = {}
    # Metrics that only an option brings, and that option, to name where it is missing.
    optional_metrics: ClassVar[Mapping[str, str]] = {}
    """Scores of one label: the study file names them as ``f1/LABEL``."""
    Options: ClassVar[type[TaskOptions]] = TaskOptions
    heads: ClassVar[Mapping[Architecture, Head]]
    """How each kind of model does it; a kind that is missing cannot."""
    hidden: ClassVar[frozenset[str]] = frozenset({"labels"})
    """Entries of a batch that the model does not see."""
    decodes: ClassVar[bool] = False
    """Whether `predict` needs the tokenizer."""
    loss_options: ClassVar[frozenset[str]] = frozenset()
    """Which of ``training.label_smoothing`` and ``training.class_weights`` `losses` heeds (`LossOptions`)."""
    probe: ClassVar[Literal["text", "token", "pair", "choice", "span"] | None] = None
    """Whether linear models on frozen features are a baseline: of whole texts, of each word, of both texts of a pair,
    each by itself, of each choice with its question, or of each token as an answer's first and last."""
    formats: ClassVar[Mapping[str, str]] = {}
    """What files of some suffix are taken for where the study file names no format, for example ``.txt`` for iob."""

    def __init__(self, options: TaskOptions | None = None) -> None:
        self.options: Any = self.Options() if options is None else options

    @abstractmethod
    def columns(self, data: DataSpec) -> tuple[str, ...]:
        """Names, in the source, of the columns that `read` needs."""

    @abstractmethod
    def read(self, table: pa.Table, data: DataSpec, where: str, loc: Loc) -> pa.Table:
        """Check the rows of one source and bring them into the task's form.

        Args:
            table: The rows as their source holds them.
            data: The domain's ``data`` section.
            where: What to call the rows in errors, for example ``train.csv``.
            loc: Where the ``data`` section stands in the study file.

        Returns:
            The canonical columns that the task needs. (The group column is added by the caller.)

        Raises:
            StudyError: A missing column, a missing or unusable value (with its row), or no rows at all.
        """

    @abstractmethod
    def keys(self, table: pa.Table) -> list[str]:
        """What makes each row the example it is, without its label: equal keys mean identical inputs."""

    @abstractmethod
    def content(self, table: pa.Table) -> list[tuple[str, ...]]:
        """Everything of each row that training can see, label included, for fingerprints."""

    def texts_at_once(self, splits: Mapping[str, pa.Table], data: DataSpec) -> int:
        """How many texts the model reads for one example, at most: so many rows of a batch, each of its own length.

        Args:
            splits: The rows of each split, as `read` returns them; none where the data is not at hand.
            data: The domain's ``data`` section.
        """
        return 1

    def strata(self, table: pa.Table) -> list[str] | None:
        """What each split should hold in the same proportion: the label of each row, for tasks that have one."""
        return None

    def check(
        self, splits: Mapping[str, pa.Table], data: DataSpec, loc: Loc, *, cut: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Check the splits against each other.

        Args:
            splits: The rows of each split, as `read` returns them.
            data: The domain's ``data`` section, for the names of columns in errors.
            loc: Where it stands in the study file.
            cut: Splits that were cut from train rather than brought by the data. What only an unlucky cut can cause is
                a warning (`warnings`), not an error.

        Returns:
            The label names, in a fixed order; () for tasks without labels.

        Raises:
            StudyError: Too few labels; a label that train never shows.
        """
        return ()

    def lacks(self, metric: Metric, table: pa.Table) -> str | None:
        """What the rows of a split lack for a metric to be defined on them, in words; None where they lack nothing."""
        return None

    def warnings(self, splits: Mapping[str, pa.Table], labels: Sequence[str]) -> list[str]:
        """What a careful reader should know about the splits; one sentence each."""
        return []

    def check_length(self, max_length: int, architecture: Architecture, reads: int | None, writes: int | None) -> None:
        """Refuse texts for which the model has no positions: on a GPU, an index out of range would end the process.

        Args:
            max_length: Tokens per text at most.
            architecture: Of the model.
            reads: Tokens that the model, or its encoder, takes at most; None where there is no limit.
            writes: The same of an encoder-decoder's decoder.

        Raises:
            ValueError: They are too long; one sentence.
        """
        # Without an answer to write, a decoder reads the text once more.
        most = min((limit for limit in (reads, writes) if limit is not None), default=max_length)
        if max_length > most:
            raise ValueError(f"{max_length} tokens are more than the {most} that the model takes: lower it")

    @abstractmethod
    def tokenize(self, table: pa.Table, labels: Sequence[str], how: Tokenization) -> datasets.Dataset:
        """Turn rows into token ids, truncated to ``how.max_length`` and not padded.

        Returns:
            Columns ``input_ids`` (lists of int), ``token_type_ids`` where the model needs them, and what `collate`,
            `references` and `predict` want. Where an example makes several rows (windows), the column `EXAMPLE` holds
            the number of the example. A column ``length`` replaces the length of ``input_ids`` for batching.

        Raises:
            ValueError: A row has no tokens.
        """

    def config_kwargs(self, labels: Sequence[str]) -> dict[str, Any]:
        """What ``from_pretrained`` needs to know to build the task's head."""
        return {}

    @abstractmethod
    def collate(self, rows: Mapping[str, Sequence[Any]], pad_token_id: int, *, multiple_of: int = 8) -> dict[str, Any]:
        """One batch from some rows of a tokenised split.

        Args:
            rows: Columns, as slicing a tokenised split gives them.
            pad_token_id: Fills texts up on the right; the attention mask is 0 there.
            multiple_of: The padded length is a multiple of it (or the longest text's length for 1).

        Returns:
            ``input_ids``, ``attention_mask`` and, where present, ``token_type_ids``, each of shape (rows, length) and
            type int64, and whatever else the model takes; and the `hidden` entries, ``labels`` among them.
        """

    @abstractmethod
    def losses(self, output: Any, batch: Mapping[str, Any], options: LossOptions | None = None) -> torch.Tensor:
        """The loss of each row: float32, shape (rows,).

        Token-level outputs may be longer than the text, by soft tokens in front of it: the last positions are the
        text's.
        """

    @abstractmethod
    def predict(self, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction) -> list[Any]:
        """What the model answers for each row; values that JSON can write."""

    @abstractmethod
    def references(self, rows: Mapping[str, Sequence[Any]]) -> list[Any]:
        """What the model should answer for each row; values that JSON can write."""

    def merge(self, predictions: list[Any]) -> Any:
        """The prediction for an example from those for its rows (windows)."""
        return predictions[0]

    @abstractmethod
    def score(self, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str]) -> dict[str, float]:
        """All scores: one for each of `metrics`, and those of single labels.

        One that is undefined on these examples is absent (see `lacks`).

        Raises:
            ValueError: No examples, or not as many predictions as references.
        """

    def metric_labels(self, labels: Sequence[str]) -> Sequence[str]:
        """What `label_metrics` may be about; the labels, unless a task says otherwise."""
        return labels

    def balanced_weights(self, rows: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> list[float] | None:
        """The weight of each class where the study file wants them balanced; None for tasks without classes.

        scikit-learn's "balanced", n / (classes x count), and at most `HEAVIEST` times the lightest class's, unless a
        task says otherwise; classes that are absent have no row to weigh.
        """
        counts = self.class_counts(rows, labels)
        if counts is None:
            return None
        weights = [sum(counts) / (len(counts) * count) if count else 0.0 for count in counts]
        lightest = min((weight for weight in weights if weight), default=0.0)
        return [min(weight, HEAVIEST * lightest) for weight in weights]

    def class_counts(self, rows: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> list[int] | None:
        """How often each class occurs, for balanced class weights; None for tasks without classes."""
        return None

    def guesses(
        self, train: Mapping[str, Sequence[Any]], split: Mapping[str, Sequence[Any]], labels: Sequence[str]
    ) -> dict[str, Guess]:
        """Baselines that look at the data alone, by name.

        Args:
            train: The columns of the tokenised training split.
            split: Those of the split to predict.
            labels: The domain's labels.
        """
        return {}

    def probes(self) -> list[tuple[str, Any]]:
        """Linear models (of scikit-learn) on frozen features, with the setting that tells them apart; the best on
        validation is the baseline."""
        return []


def pad(rows: Sequence[Sequence[int]], fill: int, *, multiple_of: int = 8, left: bool = False) -> np.ndarray:
    """Lists of different lengths as one int64 array, filled up on the right (or left)."""
    longest = max((len(row) for row in rows), default=1)
    width = -(-max(longest, 1) // multiple_of) * multiple_of
    padded = np.full((len(rows), width), fill, dtype=np.int64)
    for number, row in enumerate(rows):
        if len(row):
            if left:
                padded[number, width - len(row) :] = row
            else:
                padded[number, : len(row)] = row
    return padded


def text_batch(
    rows: Mapping[str, Sequence[Any]], pad_token_id: int, *, multiple_of: int = 8
) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` and, where present, ``token_type_ids`` of some rows, padded on the right."""
    import torch

    filled = {"input_ids": pad_token_id} | ({"token_type_ids": 0} if "token_type_ids" in rows else {})
    batch = {name: torch.from_numpy(pad(rows[name], fill, multiple_of=multiple_of)) for name, fill in filled.items()}
    lengths = np.array([len(tokens) for tokens in rows["input_ids"]])
    mask = np.arange(batch["input_ids"].shape[1]) < lengths[:, None]
    batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
    return batch


def first_rows(rows: Mapping[str, Sequence[Any]]) -> list[int]:
    """The first row of each example, in the order of the examples, where an example makes several rows; else all."""
    if EXAMPLE not in rows:
        return list(range(len(next(iter(rows.values()), ()))))
    first: dict[int, int] = {}
    for row, example in enumerate(rows[EXAMPLE]):
        first.setdefault(example, row)
    return list(first.values())


def predicted_at(labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """Rows and columns at which something is predicted, row by row, of shape (2, positions).

    Found where a batch is made: a GPU that is asked makes the host wait for all that was launched before.
    """
    import torch

    return torch.from_numpy(np.stack(np.nonzero(labels.cpu().numpy() != ignored))).to(labels.device)


def check_counts(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Refuse to score nothing, or lists of different lengths.

    Raises:
        ValueError: See above.
    """
    if len(references) == 0 or len(predictions) != len(references):
        raise ValueError(f"cannot score {len(predictions)} predictions against {len(references)} references")
