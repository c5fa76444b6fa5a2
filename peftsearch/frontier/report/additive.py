"""Metrics that follow from sums over examples, so that a thousand resamples cost one pass and not a thousand.

Scoring a resample through the task takes milliseconds (F1 of labels) to seconds (entities, ROUGE). Accuracy, F1 and
ROUGE are functions of sums over examples, and the sums of all resamples are one product of matrices. Nothing here is
believed: a formula is used only where it agrees with the task's own score, to nine digits, on the whole test split and
on three resamples of every run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Score = Callable[[Sequence[Any], Sequence[Any]], float]
"""From predictions and references to the domain's metric."""

_MOST_LABELS = 200


class Answers(Protocol):
    """One run's predictions and references."""

    @property
    def predictions(self) -> list[Any]:
        """What was answered."""

    @property
    def references(self) -> list[Any]:
        """What should have been answered."""


@dataclass(frozen=True)
class Formula:
    """A metric as a function of sums.

    Attributes:
        statistics: Of one run: shape (examples, sums). Raises ValueError or TypeError where it does not apply.
        combine: From sums of shape (resamples, sums) and the number of examples to scores of shape (resamples,).
    """

    statistics: Callable[[Sequence[Any], Sequence[Any]], Numbers]
    combine: Callable[[Numbers, int], Numbers]


def additive(
    runs: Sequence[Answers], score: Score, labels: Sequence[str], generator: np.random.Generator
) -> tuple[list[Numbers], Callable[[Numbers, int], Numbers]] | None:
    """The formula that the metric agrees with, and each run's statistics; None where there is none.

    Args:
        runs: On the same examples.
        score: The metric.
        labels: The domain's labels (tags come as their indices or as words).
        generator: Draws the resamples that the formula is tried on.
    """
    size = len(runs[0].references)
    tries = [np.arange(size), *(generator.integers(0, size, size) for _ in range(3))]
    wanted: dict[int, list[float]] = {}
    for formula in _formulas(score, labels):
        found = []
        for number, run in enumerate(runs):
            try:
                statistics = formula.statistics(run.predictions, run.references)
            except (ValueError, TypeError, KeyError, IndexError):
                break
            if number not in wanted:
                wanted[number] = [_scored(score, run, chosen) for chosen in tries]
            sums = np.stack([statistics[chosen].sum(axis=0) for chosen in tries])
            with np.errstate(all="ignore"):
                ours = formula.combine(sums, size)
            if not np.allclose(ours, wanted[number], rtol=1e-9, atol=1e-9):
                break
            found.append(statistics)
        if len(found) == len(runs):
            return found, formula.combine
    return None


def _scored(score: Score, run: Answers, chosen: npt.NDArray[np.int64]) -> float:
    return score([run.predictions[i] for i in chosen], [run.references[i] for i in chosen])


def _formulas(score: Score, labels: Sequence[str]) -> Iterator[Formula]:
    """The cheap ones first."""
    count = len(labels)
    for read in (_single, _several, _hot) if 0 < count <= _MOST_LABELS else ():
        of_labels = _labels_of(read, count)
        for combine in (_correct, _micro_f1, _macro_f1(occurring=True), _macro_f1(occurring=False)):
            yield Formula(of_labels, combine)
        for label in range(count):
            yield Formula(of_labels, _label_f1(label))
    yield Formula(_entities(labels), _micro_f1)
    known: dict[str, float] = {}
    yield Formula(_single_scores(score, known), lambda sums, size: sums[:, 0] / size)
    # Perplexity: the exponential of a mean.
    yield Formula(
        lambda p, r: np.log(_positive(_single_scores(score, known)(p, r))),
        lambda sums, size: np.exp(sums[:, 0] / size),
    )


# --- labels: sums are true positives, predicted and actual ones, for each label ---


def _labels_of(read: Callable[[Any], set[int]], count: int) -> Callable[[Sequence[Any], Sequence[Any]], Numbers]:
    def statistics(predictions: Sequence[Any], references: Sequence[Any]) -> Numbers:
        predicted, actual = [read(item) for item in predictions], [read(item) for item in references]
        found = np.zeros((len(predicted), 3, count))
        for row, (ours, theirs) in enumerate(zip(predicted, actual, strict=True)):
            found[row, 0, list(ours & theirs)] = 1
            found[row, 1, list(ours)] = 1
            found[row, 2, list(theirs)] = 1
        return found.reshape(len(predicted), -1)

    return statistics


def _single(item: Any) -> set[int]:
    if isinstance(item, bool) or not isinstance(item, int) or item < 0:
        raise TypeError("not a label")
    return {item}


def _several(item: Any) -> set[int]:
    if not isinstance(item, list):
        raise TypeError("not a list of labels")
    return {label for one in item for label in _single(one)}


def _hot(item: Any) -> set[int]:
    if not isinstance(item, list) or any(value not in (0, 1) for value in item):
        raise TypeError("not a row of zeros and ones")
    return {index for index, value in enumerate(item) if value}


def _counts(sums: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    thirds = sums.reshape(len(sums), 3, -1)
    return thirds[:, 0], thirds[:, 1], thirds[:, 2]


def _f1(hits: Numbers, predicted: Numbers, actual: Numbers) -> Numbers:
    return np.divide(2 * hits, predicted + actual, out=np.zeros_like(hits), where=predicted + actual > 0)


def _micro_f1(sums: Numbers, size: int) -> Numbers:
    hits, predicted, actual = (part.sum(axis=1) for part in _counts(sums))
    return _f1(hits, predicted, actual)


def _macro_f1(occurring: bool) -> Callable[[Numbers, int], Numbers]:
    """Mean over the labels that occur, or over all of them."""

    def combine(sums: Numbers, size: int) -> Numbers:
        hits, predicted, actual = _counts(sums)
        there = predicted + actual > 0
        count = there.sum(axis=1) if occurring else there.shape[1]
        found: Numbers = _f1(hits, predicted, actual).sum(axis=1) / count
        return found

    return combine


def _label_f1(label: int) -> Callable[[Numbers, int], Numbers]:
    def combine(sums: Numbers, size: int) -> Numbers:
        hits, predicted, actual = _counts(sums)
        return _f1(hits[:, label], predicted[:, label], actual[:, label])

    return combine


def _correct(sums: Numbers, size: int) -> Numbers:
    hits, _, _ = _counts(sums)
    found: Numbers = hits.sum(axis=1) / size
    return found


# --- entities ---


def _entities(labels: Sequence[str]) -> Callable[[Sequence[Any], Sequence[Any]], Numbers]:
    def statistics(predictions: Sequence[Any], references: Sequence[Any]) -> Numbers:
        from seqeval.metrics.sequence_labeling import get_entities

        def spans(item: Any) -> set[Any]:
            if not isinstance(item, list):
                raise TypeError("not a list of tags")
            tags = [labels[tag] if isinstance(tag, int) else str(tag) for tag in item]
            if any(tag != "O" and tag[:2] not in ("B-", "I-") for tag in tags):
                raise ValueError("not IOB tags")
            return set(get_entities(tags))

        found = []
        for prediction, reference in zip(predictions, references, strict=True):
            ours, theirs = spans(prediction), spans(reference)
            found.append((len(ours & theirs), len(ours), len(theirs)))
        return np.array(found, dtype=np.float64)

    return statistics


# --- means ---


def _single_scores(score: Score, known: dict[str, float]) -> Callable[[Sequence[Any], Sequence[Any]], Numbers]:
    """Each example's own score; equal answers to equal questions are scored once."""

    def single(prediction: Any, reference: Any) -> float:
        key = json.dumps([prediction, reference])
        if key not in known:
            known[key] = score([prediction], [reference])
        return known[key]

    def statistics(predictions: Sequence[Any], references: Sequence[Any]) -> Numbers:
        few = min(8, len(references))
        head = [single(*pair) for pair in zip(predictions[:few], references[:few], strict=True)]
        whole = score(predictions[:few], references[:few])
        logs = math.exp(sum(math.log(value) for value in head) / few) if all(value > 0 for value in head) else math.nan
        if not any(math.isclose(whole, mean, rel_tol=1e-9, abs_tol=1e-9) for mean in (sum(head) / few, logs)):
            # Not worth scoring all of them.
            raise ValueError("not a mean over examples")
        return np.array([[single(*pair)] for pair in zip(predictions, references, strict=True)], dtype=np.float64)

    return statistics


def _positive(values: Numbers) -> Numbers:
    if not (values > 0).all():
        raise ValueError("no logarithm")
    return values


def resampled(
    statistics: Mapping[str, Sequence[Numbers]],
    combine: Callable[[Numbers, int], Numbers],
    weights: Numbers,
) -> dict[str, Numbers]:
    """Scores on resamples, mean over each configuration's runs.

    Args:
        statistics: By configuration, those of each run: shape (examples, sums).
        combine: The formula.
        weights: How often each resample holds each example: shape (resamples, examples).
    """
    size = weights.shape[1]
    found = {}
    for name, runs in statistics.items():
        with np.errstate(all="ignore"):
            found[name] = np.mean([combine(weights @ own, size) for own in runs], axis=0)
    return found
