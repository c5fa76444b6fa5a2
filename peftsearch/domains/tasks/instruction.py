"""Instruction following: the response to an instruction, with or without an input that it is about."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

import pyarrow as pa
from pydantic import Field, model_validator

from peftsearch.domains.metrics.rouge import rouge
from peftsearch.domains.tasks.base import Guess, Metric, Tokenization, check_counts
from peftsearch.domains.tasks.columns import refuse
from peftsearch.domains.tasks.generation import Generating, GeneratingOptions
from peftsearch.spec import DataSpec
from peftsearch.spec.yaml_file import Loc

LABEL_ACCURACY = Metric("label_accuracy", "maximize")


class InstructionOptions(GeneratingOptions):
    """Settings of instruction following."""

    labels: tuple[str, ...] | None = Field(
        default=None, description="The possible responses, where there are only some: adds the metric label_accuracy"
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        known = [plain(label) for label in self.labels or ()]
        if self.labels is not None and (len(known) < 2 or len(set(known)) < len(known) or not all(known)):
            raise ValueError("list at least two labels that differ in more than case, white space and punctuation")
        return self


class Instruction(Generating):
    """The response to an instruction (``text``) about an input (``text_pair``), where there is one."""

    name: ClassVar[str] = "instruction"
    metrics: Mapping[str, Metric] = {  # type: ignore[misc]  # an instance with labels has one more
        "rougeL": Metric("rougeL", "maximize"),
        "rouge1": Metric("rouge1", "maximize"),
        "rouge2": Metric("rouge2", "maximize"),
        "exact_match": Metric("exact_match", "maximize"),
    }
    optional_metrics: ClassVar[Mapping[str, str]] = {LABEL_ACCURACY.name: "labels"}
    Options = InstructionOptions
    options: InstructionOptions

    def __init__(self, options: InstructionOptions | None = None) -> None:
        super().__init__(options)
        if self.options.labels is not None:
            self.metrics = {**type(self).metrics, LABEL_ACCURACY.name: LABEL_ACCURACY}

    def template(self, how: Tokenization, pair: bool) -> str:
        """Alpaca's headings (Taori et al. 2023), or the bare message in a chat."""
        if self.options.template is not None:
            return self.options.template
        if self.options.chat:
            return "{text}\n\n{text_pair}" if pair else "{text}"
        middle = "### Input:\n{text_pair}\n\n" if pair else ""
        return "### Instruction:\n{text}\n\n" + middle + "### Response:\n"

    def check(
        self, splits: Mapping[str, pa.Table], data: DataSpec, loc: Loc, *, cut: Collection[str] = ()
    ) -> tuple[str, ...]:
        """As `Generating.check`; with ``labels``, every target is one of them."""
        super().check(splits, data, loc, cut=cut)
        for split, table in splits.items():
            if self.options.labels is not None:
                refuse(
                    [self.label(target) is None for target in table.column("target").to_pylist()],
                    f"column {data.columns.target!r} of {split} holds a response that options.labels does not list",
                    (*loc[:-1], "options", "labels"),
                    "list it",
                )
        return ()

    def label(self, text: str) -> str | None:
        """The label that a response gives: the one it is, or the longest one it begins with; None for neither."""
        words = plain(text)
        known = {plain(label): label for label in self.options.labels or ()}
        if words in known:
            return known[words]
        begun = [label for label in known if words.startswith(f"{label} ")]
        return known[max(begun, key=len)] if begun else None

    def score(self, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str]) -> dict[str, float]:
        """ROUGE (see `rouge`), the share of responses that equal the reference (see `plain`), and with the option
        ``labels`` the share whose label is the reference's."""
        check_counts(predictions, references)
        found = rouge(predictions, references)
        scores = {name: found[name] for name in ("rougeL", "rouge1", "rouge2")}
        pairs = list(zip(predictions, references, strict=True))
        scores["exact_match"] = sum(plain(given) == plain(wanted) for given, wanted in pairs) / len(pairs)
        if self.options.labels is not None:
            scores["label_accuracy"] = sum(self.label(given) == self.label(wanted) for given, wanted in pairs) / len(
                pairs
            )
        return scores

    def guesses(
        self, train: Mapping[str, Sequence[Any]], split: Mapping[str, Sequence[Any]], labels: Sequence[str]
    ) -> dict[str, Guess]:
        """The most frequent response, where any occurs twice."""
        response, count = Counter(train["reference"]).most_common(1)[0]
        if count < 2:
            return {}
        shown = response if len(response) <= 60 else f"{response[:57]}..."
        detail = f"always {shown!r}, {count} of {len(train['reference'])} responses of train"
        return {"majority": Guess("most frequent response", detail, [response] * len(split["reference"]))}


def plain(text: str) -> str:
    """A response without differences in case, white space, and punctuation around words."""
    words = (word.strip(string.punctuation) for word in text.lower().split())
    return " ".join(word for word in words if word)
