"""Relation classification: how two marked things in a text relate, with a class for pairs that do not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from peftsearch.domains.tasks.base import LabelOptions, Metric, Tokenization
from peftsearch.domains.tasks.classification import Classification, apart, text_columns
from peftsearch.spec import DataSpec, StudyError, suggest
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets


class RelationOptions(LabelOptions):
    """Settings of relation classification."""

    negative: str | None = Field(
        default=None, min_length=1, description="The label that says 'no relation'; F1 scores do not count it"
    )
    markers: tuple[str, ...] = Field(
        default=(),
        description="What marks the two things in the text, for example ['@DRUG1$', '@DRUG2$']: a warning says how "
        "many texts are cut off before one",
    )


class Relation(Classification):
    """One relation for the two things that are marked in a text.

    The marks are text like any other: no token is added to the model.
    """

    name: ClassVar[str] = "relation"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "micro_f1": Metric("micro_f1", "maximize"),
        **{name: metric for name, metric in Classification.metrics.items() if name != "micro_f1"},
    }
    Options = RelationOptions

    def check(
        self, splits: Mapping[str, pa.Table], data: DataSpec, loc: Loc, *, cut: Collection[str] = ()
    ) -> tuple[str, ...]:
        """As `Classification.check`; the negative class and the markers must occur."""
        labels = super().check(splits, data, loc, cut=cut)
        negative = self.options.negative
        if negative is not None and negative not in labels:
            raise StudyError(
                f"the negative class {negative!r} is no label of the data{suggest(negative, labels)}",
                (*loc[:-1], "options", "negative"),
            )
        texts = splits["train"].column("text").to_pylist()
        for marker in self.options.markers:
            if not any(marker in text for text in texts):
                raise StudyError(
                    f"no text of train holds the marker {marker!r}: write it as the data does",
                    (*loc[:-1], "options", "markers"),
                )
        return labels

    def tokenize(self, table: pa.Table, labels: Sequence[str], how: Tokenization) -> datasets.Dataset:
        """As `Classification.tokenize`; warns of texts that are cut off before a marker."""
        found = super().tokenize(table, labels, how)
        if self.options.markers:
            lengths = [len(ids) for ids in found.data.column("input_ids").to_pylist()]
            rows = [row for row, length in enumerate(lengths) if length >= how.max_length]
            lost = _without_markers(apart(text_columns(table), how.architecture), rows, self.options.markers, how)
            if lost:
                marks = " or ".join(map(repr, self.options.markers))
                how.warnings.append(
                    f"{lost} of {table.num_rows} texts are cut off before they show {marks}: "
                    f"raise max_length ({how.max_length} tokens)"
                )
        return found

    def score(self, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str]) -> dict[str, float]:
        """As `Classification.score`, but the averages of F1 do not count the negative class.

        Micro F1 over the positive classes is the score of SemEval-2013 task 9.2 (DDI) and BioCreative VI (ChemProt),
        and BLURB's. Macro F1 is the mean over the positive classes that occur among references or predictions.
        """
        return super().score(predictions, references, labels)

    def _counts(self, label: str) -> bool:
        return bool(label != self.options.negative)


def _without_markers(
    texts: Sequence[Sequence[str]], rows: Sequence[int], markers: Sequence[str], how: Tokenization
) -> int:
    """How many of the rows lose a marker of their first text to truncation."""
    if not rows:
        return 0
    chosen = [[column[row] for row in rows] for column in texts]
    lost = 0
    if how.tokenizer.is_fast:
        encoded = how.tokenizer(*chosen, truncation=True, max_length=how.max_length, return_offsets_mapping=True)
        for number, text in enumerate(chosen[0]):
            kept = np.zeros(len(text), dtype=bool)
            for sequence, (start, end) in zip(
                encoded.sequence_ids(number), encoded["offset_mapping"][number], strict=True
            ):
                if sequence == 0:
                    kept[start:end] = True
            lost += any(not kept[place] for marker in markers for place in _places(text, marker))
        return lost
    # Without offsets: a text keeps a marker if all up to it fits.
    for text in chosen[0]:
        ends = [place + 1 for marker in markers for place in _places(text, marker)]
        lost += bool(ends) and len(how.tokenizer(text[: max(ends)])["input_ids"]) > how.max_length
    return lost


def _places(text: str, marker: str) -> list[int]:
    """The last character of a marker where it stands first in a text; nowhere if it does not."""
    start = text.find(marker)
    # A marker's own blanks belong to no token.
    return [start + len(marker.rstrip()) - 1] if start >= 0 else []
