"""Summarisation: a short text that says what matters in a long one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import pyarrow as pa
from pydantic import Field, model_validator

from peftsearch.domains.metrics.rouge import rouge, sentences
from peftsearch.domains.tasks.base import Guess, Metric, Tokenization
from peftsearch.domains.tasks.generation import Generating, GeneratingOptions


class SummarizationOptions(GeneratingOptions):
    """Settings of summarisation."""

    prefix: str | None = Field(
        default=None,
        description="Before the text, for encoder-decoders; 'summarize: ' where neither it nor a template is given",
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if self.prefix is not None and self.chat:
            raise ValueError("prefix is for plain prompts: with chat, write a template")
        return self


class Summarization(Generating):
    """A summary of a text.

    BERTScore is not among the metrics: it needs a further pretrained model from the Hub.
    """

    name: ClassVar[str] = "summarization"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "rouge1": Metric("rouge1", "maximize"),
        "rouge2": Metric("rouge2", "maximize"),
        "rougeL": Metric("rougeL", "maximize"),
        "rougeLsum": Metric("rougeLsum", "maximize"),
    }
    Options = SummarizationOptions
    options: SummarizationOptions

    def template(self, how: Tokenization, pair: bool) -> str:
        """``prefix`` or ``summarize:`` before the text for encoder-decoders, markers around it for decoders."""
        both = "{text}\n{text_pair}" if pair else "{text}"
        plain = how.architecture == "encoder-decoder" and not self.options.chat
        if plain and self.options.prefix is not None:
            return self.options.prefix + both
        if self.options.template is not None:
            return self.options.template
        if plain:
            return f"summarize: {both}"
        return f"Summarize the following text.\n\n{both}" if self.options.chat else f"Text: {both}\nSummary:"

    def extra_columns(self, table: pa.Table) -> dict[str, pa.Array]:
        """``lead``: the first sentences of each text, as many as a summary can need."""
        lead = [_lead(text, self.options.target_length) for text in table.column("text").to_pylist()]
        return {"lead": pa.array(lead, pa.large_string())}

    def score(self, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str]) -> dict[str, float]:
        """See `rouge`."""
        return rouge(predictions, references)

    def guesses(
        self, train: Mapping[str, Sequence[Any]], split: Mapping[str, Sequence[Any]], labels: Sequence[str]
    ) -> dict[str, Guess]:
        """The first sentences of the text, until they are as long as the summaries of train are on average."""
        words = sum(len(text.split()) for text in train["reference"]) / len(train["reference"])
        detail = f"the first sentences of the text, until they have the {words:.0f} words of train's mean target"
        return {"lead": Guess("lead", detail, [_lead(text, words) for text in split["lead"]])}


def _lead(text: str, words: float) -> str:
    """The first sentences, until they have so many words."""
    chosen: list[str] = []
    count = 0
    for sentence in sentences(text):
        chosen.append(sentence)
        count += len(sentence.split())
        if count >= words:
            break
    return "\n".join(chosen)
