"""What every task provides: how labelled text is checked and tokenised, and how a model's output is scored.

Adding a task is one file with one `Task` in it, and its entry in the registry. Nothing here imports torch at the top:
processes that only steer must start fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from peftsearch.spec import DataSpec, Direction
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets
    import torch

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Metric:
    """One number that says how good a model is.

    Attributes:
        name: The word in the study file, and the key of its value in `Task.score`.
        direction: Whether more is better.
        title: The name in tables and plots.
    """

    name: str
    direction: Direction
    title: str


class Task(ABC):
    """What a model must do with a text."""

    name: ClassVar[str]
    """The word in the study file."""
    metrics: ClassVar[Mapping[str, Metric]]
    """What it can be scored by; the first is the default objective."""
    label_metrics: ClassVar[Mapping[str, Metric]] = {}
    """Scores of one label: the study file names them as ``f1/LABEL``."""
    peft_task_type: ClassVar[str]
    """PEFT's name of the task."""
    auto_model: ClassVar[str]
    """The class of `transformers` that loads a model with the task's head."""

    @abstractmethod
    def read(self, table: pa.Table, data: DataSpec, where: str, loc: Loc) -> pa.Table:
        """Check the rows of one source and bring them into the task's form.

        Args:
            table: The rows as their source holds them.
            data: The domain's ``data`` section.
            where: What to call the rows in errors, for example ``train.csv``.
            loc: Where the ``data`` section stands in the study file.

        Returns:
            The columns that the task needs (and the group column where there is one), under their own names. Reading
            a table twice changes nothing.

        Raises:
            StudyError: A missing column, a missing or unusable value (with its row), or no rows at all.
        """

    @abstractmethod
    def keys(self, table: pa.Table, data: DataSpec) -> list[str]:
        """What makes each row the example it is, without its label: equal keys mean identical inputs."""

    @abstractmethod
    def content(self, table: pa.Table, data: DataSpec) -> list[tuple[str, ...]]:
        """Everything of each row that training can see, label included, for fingerprints."""

    def strata(self, table: pa.Table, data: DataSpec) -> list[str] | None:
        """What each split should hold in the same proportion: the label of each row, for tasks that have one."""
        return None

    @abstractmethod
    def check(
        self, splits: Mapping[str, pa.Table], data: DataSpec, loc: Loc, *, cut: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Check the splits against each other.

        Args:
            splits: The rows of each split.
            data: The domain's ``data`` section.
            loc: Where the ``data`` section stands in the study file.
            cut: Splits that were cut from train rather than brought by the data. What only an unlucky cut can cause is
                a warning (`warnings`), not an error.

        Returns:
            The label names, in a fixed order; () for tasks without labels.

        Raises:
            StudyError: As `read`; too few labels; a label that train never shows.
        """

    def warnings(self, splits: Mapping[str, pa.Table], data: DataSpec, labels: Sequence[str]) -> list[str]:
        """What a careful reader should know about the splits; one sentence each."""
        return []

    @abstractmethod
    def tokenize(
        self, table: pa.Table, data: DataSpec, labels: Sequence[str], tokenizer: Any, max_length: int
    ) -> datasets.Dataset:
        """Turn rows into token ids, truncated to `max_length` and not padded.

        Returns:
            Columns ``input_ids`` (list of int), ``token_type_ids`` where the model needs them, and ``labels``.

        Raises:
            ValueError: A row has no tokens.
        """

    @abstractmethod
    def config_kwargs(self, labels: Sequence[str]) -> dict[str, Any]:
        """What ``from_pretrained`` needs to know to build the task's head."""

    @abstractmethod
    def collate(
        self, rows: Mapping[str, Sequence[Any]], pad_token_id: int, *, multiple_of: int = 8
    ) -> dict[str, torch.Tensor]:
        """One batch of tensors from some rows of a tokenised split.

        Args:
            rows: Columns, as slicing a tokenised split gives them.
            pad_token_id: Fills texts up on the right; the attention mask is 0 there.
            multiple_of: The padded length is a multiple of it (or the longest text's length for 1).

        Returns:
            ``input_ids``, ``attention_mask`` and, where present, ``token_type_ids``, each of shape (rows, length) and
            type int64; ``labels``.
        """

    @abstractmethod
    def losses(self, output: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of each example: float32, shape (rows,)."""

    @abstractmethod
    def predictions(self, output: Any, batch: Mapping[str, torch.Tensor]) -> Ids:
        """What the model answers for each example."""

    @abstractmethod
    def references(self, rows: Mapping[str, Sequence[Any]]) -> Ids:
        """What the model should answer for each example."""

    @abstractmethod
    def score(self, predictions: Ids, references: Ids, labels: Sequence[str]) -> dict[str, float]:
        """All scores: one for each of `metrics`, and those of single labels.

        Raises:
            ValueError: No examples, or not as many predictions as references.
        """
