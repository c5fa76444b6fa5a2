"""ROUGE (Lin 2004) as the summarisation literature computes it: Google's ``rouge-score`` with the Porter stemmer."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
"""Shared single words, shared word pairs, longest common subsequence of the whole text, and the union of the
subsequences of each sentence."""

# A sentence ends at ., ! or ? (and closing quotes or brackets), before a space and something that begins one.
_END = re.compile(r"""(?<=[.!?])(["')\]]*)\s+(?=["'(\[]?[A-Z0-9])""")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measure of each of `ROUGE`, as a share in [0, 1]: times 100 it is what papers print.

    Words are runs of a-z and 0-9 after lower-casing, as ``rouge-score`` has them, stemmed where longer than three
    letters. For ``rougeLsum`` a text that has no line breaks is cut into sentences first (`sentences`); texts in other
    scripts have no words and score 0.

    Raises:
        ValueError: No texts, or not as many predictions as references.
    """
    if len(references) == 0 or len(predictions) != len(references):
        raise ValueError(f"cannot score {len(predictions)} predictions against {len(references)} references")
    scorer = _scorer()
    totals: dict[str, list[float]] = {name: [] for name in ROUGE}
    for prediction, reference in zip(predictions, references, strict=True):
        found = scorer.score("\n".join(sentences(reference)), "\n".join(sentences(prediction)))
        for name, values in totals.items():
            values.append(float(found[name].fmeasure))
    return {name: float(np.mean(values)) for name, values in totals.items()}


def sentences(text: str) -> list[str]:
    """The sentences of a text: its lines where it has several, else cut behind ``.``, ``!`` and ``?``."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        return lines
    return [part.strip() for part in _END.sub(r"\1\n", text.strip()).split("\n") if part.strip()]


@functools.lru_cache(maxsize=1)
def _scorer() -> Any:
    from nltk.stem.porter import PorterStemmer
    from rouge_score import rouge_scorer, tokenize, tokenizers

    class CachedStems(tokenizers.Tokenizer):  # type: ignore[misc]
        """The library's own tokenizer, except that it stems each word once: stemming takes most of its time."""

        def __init__(self) -> None:
            # Named as in nltk's stemmer, whose place this object takes.
            self.stem = functools.lru_cache(maxsize=100_000)(PorterStemmer().stem)

        def tokenize(self, text: str) -> list[str]:
            return list(tokenize.tokenize(text, self))

    return rouge_scorer.RougeScorer(list(ROUGE), tokenizer=CachedStems())
