"""Metrics that follow from sums over examples, so that a thousand resamples cost one pass and not a thousand.

Scoring a resample through the task takes milliseconds (F1 of labels) to seconds (entities, ROUGE). Accuracy, F1 and
ROUGE are functions of sums over examples, and the sums of all resamples are one product of matrices. Nothing here is
believed: a formula is used only where it agrees with the task's own score, to nine digits, on the whole test split for
every run and on three resamples of the first one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Score = Callable[[Sequence[Any], Sequence[Any]], float]
"""From predictions and references to the domain's metric."""
Statistics = Callable[[Sequence[Any], Sequence[Any]], Numbers]
"""Of one run: shape (examples, sums). Raises ValueError, TypeError or the like where it does not apply."""
Combine = Callable[[Numbers, int], Numbers]
"""From sums of shape (resamples, sums) and the number of examples to scores of shape (resamples,)."""

_MOST_LABELS = 200


class Answers(Protocol):
    """One run's predictions and references."""

    @property
    def predictions(self) -> list[Any]:
        """What was answered."""

    @property
    def references(self) -> list[Any]:
        """What should have been answered."""


def additive(
    runs: Sequence[Answers],
    whole: Sequence[float],
    score: Score,
    labels: Sequence[str],
    generator: np.random.Generator,
) -> tuple[list[Numbers], Combine] | None:
    """Each run's statistics, and the formula that gives the metric from their sums; None where no formula does.

    Args:
        runs: On the same examples.
        whole: The metric of each run on all of them.
        score: The metric.
        labels: The domain's labels (predictions hold their numbers).
        generator: Draws the resamples that a formula is tried on.
    """
    first, size = runs[0], len(runs[0].references)
    tries = [np.arange(size), *(generator.integers(0, size, size) for _ in range(3))]
    wanted = [whole[0]]
    for chosen in tries[1:]:
        wanted.append(score([first.predictions[i] for i in chosen], [first.references[i] for i in chosen]))
    for read, formulas in _candidates(score, labels):
        own = _read(read, first)
        if own is None:
            continue
        sums = np.stack([own[chosen].sum(axis=0) for chosen in tries])
        agreeing = [formula for formula in formulas if _agrees(formula, sums, size, wanted)]
        if not agreeing:
            continue
        others = [_read(read, run) for run in runs[1:]]
        found = [own, *(other for other in others if other is not None)]
        if len(found) < len(runs):
            continue
        totals = np.stack([statistics.sum(axis=0) for statistics in found])
        for formula in agreeing:
            if _agrees(formula, totals, size, whole):
                return found, formula
    return None


def resampled(statistics: Mapping[str, Sequence[Numbers]], combine: Combine, weights: Numbers) -> dict[str, Numbers]:
    """Scores on resamples, mean over each configuration's runs.

    Args:
        statistics: By configuration, those of each run: shape (examples, sums).
        combine: The formula.
        weights: How often each resample holds each example: shape (resamples, examples).
    """
    size = weights.shape[1]
    with np.errstate(all="ignore"):
        return {
            name: np.mean([combine(weights @ own, size) for own in runs], axis=0) for name, runs in statistics.items()
        }


def _read(read: Statistics, run: Answers) -> Numbers | None:
    try:
        return read(run.predictions, run.references)
    except (ValueError, TypeError, KeyError, IndexError):
        return None


def _agrees(formula: Combine, sums: Numbers, size: int, wanted: Sequence[float]) -> bool:
    with np.errstate(all="ignore"):
        return bool(np.allclose(formula(sums, size), wanted, rtol=1e-9, atol=1e-9))


def _candidates(score: Score, labels: Sequence[str]) -> Iterator[tuple[Statistics, list[Combine]]]:
    """Ways to read the answers, and what may follow from each; the cheap ones first."""
    count = len(labels)
    if 0 < count <= _MOST_LABELS:
        of_labels = _label_formulas(count)
        for each in (_single, _several, _hot):
            yield _label_counts(each, count), of_labels
        kinds = sorted({label[2:] for label in labels if label[:2] in ("B-", "I-")})
        if kinds:
            of_kinds = _label_formulas(len(kinds))
            for strict in (False, True):
                yield _entity_counts(labels, kinds, strict), of_kinds
            yield _word_counts([kinds.index(label[2:]) if label != "O" else None for label in labels]), of_kinds
            yield _word_counts(list(range(count))), of_labels
    yield _rows, [_ratio(0, 1, np.exp), _ratio(0, 2, lambda value: value / math.log(2))]
    yield _moments, [_pearson]
    known: dict[str, float] = {}
    yield (
        _single_scores(score, known),
        [
            lambda sums, size: sums[:, 0] / size,
            # A root mean square of errors.
            lambda sums, size: np.sqrt(sums[:, 1] / size),
        ],
    )


# --- labels: sums are true positives, predicted and actual ones, for each label ---


def _label_counts(read: Callable[[Any], set[int]], count: int) -> Statistics:
    def statistics(predictions: Sequence[Any], references: Sequence[Any]) -> Numbers:
        found = np.zeros((len(references), 3, count))
        for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            ours, theirs = read(prediction), read(reference)
            found[row, 0, list(ours & theirs)] = 1
            found[row, 1, list(ours)] = 1
            found[row, 2, list(theirs)] = 1
        return found.reshape(len(references), -1)

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


def _entity_counts(labels: Sequence[str], kinds: Sequence[str], strict: bool) -> Statistics:
    """Entities by type: with conlleval's reading of tags, or with that of seqeval's strict IOB2."""

    def statistics(predictions: Sequence[Any], references: Sequence[Any]) -> Numbers:
        from seqeval.metrics.sequence_labeling import get_entities
        from seqeval.scheme import IOB2, Entities

        def spans(item: Any) -> set[tuple[str, int, int]]:
            tags = [labels[number] for number in item]
            if strict:
                (own,) = Entities([tags], IOB2, False).entities
                return {(entity.tag, entity.start, entity.end) for entity in own}
            return set(get_entities(tags))

        return _type_counts([spans(p) for p in predictions], [spans(r) for r in references], kinds)

    return statistics


def _type_counts(
    predicted: Sequence[Collection[tuple[str, int, int]]],
    actual: Sequence[Collection[tuple[str, int, int]]],
    kinds: Sequence[str],
) -> Numbers:
    place = {kind: number for number, kind in enumerate(kinds)}
    found = np.zeros((len(actual), 3, len(kinds)))
    for row, (ours, theirs) in enumerate(zip(predicted, actual, strict=True)):
        for part, own in enumerate((set(ours) & set(theirs), ours, theirs)):
            for kind, _, _ in own:
                found[row, part, place[kind]] += 1
    return found.reshape(len(actual), -1)


def _word_counts(kind_of: Sequence[int | None]) -> Statistics:
    """Words by what their tag stands for; None where it stands for nothing."""
    width = max((kind for kind in kind_of if kind is not None), default=0) + 1

    def statistics(predictions: Sequence[Any], references: Sequence[Any]) -> Numbers:
        found = np.zeros((len(references), 3, width))
        for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            for one, other in zip(prediction, reference, strict=True):
                ours, theirs = kind_of[one], kind_of[other]
                if ours is not None:
                    found[row, 1, ours] += 1
                    found[row, 0, ours] += ours == theirs
                if theirs is not None:
                    found[row, 2, theirs] += 1
        return found.reshape(len(references), -1)

    return statistics


def _label_formulas(count: int) -> list[Combine]:
    """Accuracy, micro, macro and weighted F1 of all labels, and without one that does not count; and of one label."""
    formulas: list[Combine] = [_correct, _balanced_accuracy, _matthews]
    for left_out in (None, *range(count)):
        kept = [label for label in range(count) if label != left_out]
        if not kept:
            continue
        formulas += [_micro(kept, measure) for measure in (_f1, _precision, _recall)]
        formulas += [_macro(kept, occurring=True), _macro(kept, occurring=False), _weighted(kept)]
    for label in range(count):
        formulas += [_micro([label], measure) for measure in (_f1, _precision, _recall)]
    return formulas


def _counts(sums: Numbers, kept: Sequence[int] | None = None) -> tuple[Numbers, Numbers, Numbers]:
    thirds = sums.reshape(len(sums), 3, -1)
    if kept is not None:
        thirds = thirds[:, :, list(kept)]
    return thirds[:, 0], thirds[:, 1], thirds[:, 2]


def _share(part: Numbers, of: Numbers) -> Numbers:
    return np.divide(part, of, out=np.zeros_like(part, dtype=np.float64), where=of > 0)


def _f1(hits: Numbers, predicted: Numbers, actual: Numbers) -> Numbers:
    return _share(2 * hits, predicted + actual)


def _precision(hits: Numbers, predicted: Numbers, actual: Numbers) -> Numbers:
    return _share(hits, predicted)


def _recall(hits: Numbers, predicted: Numbers, actual: Numbers) -> Numbers:
    return _share(hits, actual)


def _micro(kept: Sequence[int], measure: Callable[[Numbers, Numbers, Numbers], Numbers]) -> Combine:
    def combine(sums: Numbers, size: int) -> Numbers:
        hits, predicted, actual = (part.sum(axis=1) for part in _counts(sums, kept))
        return measure(hits, predicted, actual)

    return combine


def _macro(kept: Sequence[int], *, occurring: bool) -> Combine:
    """Mean F1 over the labels that occur, or over all of them."""

    def combine(sums: Numbers, size: int) -> Numbers:
        hits, predicted, actual = _counts(sums, kept)
        there = (predicted + actual > 0).sum(axis=1) if occurring else np.full(len(sums), len(kept))
        return _share(_f1(hits, predicted, actual).sum(axis=1), there)

    return combine


def _weighted(kept: Sequence[int]) -> Combine:
    def combine(sums: Numbers, size: int) -> Numbers:
        hits, predicted, actual = _counts(sums, kept)
        return _share((_f1(hits, predicted, actual) * actual).sum(axis=1), actual.sum(axis=1))

    return combine


def _correct(sums: Numbers, size: int) -> Numbers:
    hits, _, _ = _counts(sums)
    found: Numbers = hits.sum(axis=1) / size
    return found


def _balanced_accuracy(sums: Numbers, size: int) -> Numbers:
    hits, predicted, actual = _counts(sums)
    return _share(_recall(hits, predicted, actual).sum(axis=1), (actual > 0).sum(axis=1))


def _matthews(sums: Numbers, size: int) -> Numbers:
    """Of several classes (Gorodkin 2004): it needs no more of the confusion matrix than its diagonal and margins."""
    hits, predicted, actual = _counts(sums)
    covariance = hits.sum(axis=1) * size - (predicted * actual).sum(axis=1)
    spread = (size**2 - (predicted**2).sum(axis=1)) * (size**2 - (actual**2).sum(axis=1))
    return _share(covariance, np.sqrt(spread))


# --- numbers ---


def _rows(predictions: Sequence[Any], references: Sequence[Any]) -> Numbers:
    """Predictions that are sums already: of a language model, nats, tokens and bytes."""
    found = np.array(predictions, dtype=np.float64)
    if found.ndim != 2 or found.shape[1] < 3:
        raise ValueError("not rows of numbers")
    return found


def _ratio(over: int, under: int, then: Callable[[Numbers], Numbers]) -> Combine:
    def combine(sums: Numbers, size: int) -> Numbers:
        return then(sums[:, over] / sums[:, under])

    return combine


def _moments(predictions: Sequence[Any], references: Sequence[Any]) -> Numbers:
    ours, theirs = np.array(predictions, dtype=np.float64), np.array(references, dtype=np.float64)
    if ours.ndim != 1 or theirs.ndim != 1:
        raise ValueError("not numbers")
    # Sums of squares far from the mean would lose digits.
    ours, theirs = ours - ours.mean(), theirs - theirs.mean()
    return np.stack([ours, theirs, ours**2, theirs**2, ours * theirs], axis=1)


def _pearson(sums: Numbers, size: int) -> Numbers:
    x, y, xx, yy, xy = (sums / size).T
    found: Numbers = (xy - x * y) / np.sqrt((xx - x**2) * (yy - y**2))
    return found


def _single_scores(score: Score, known: dict[str, float]) -> Statistics:
    """Each example's own score, and its square; equal answers to equal questions are scored once."""

    def single(prediction: Any, reference: Any) -> float:
        key = json.dumps([prediction, reference])
        if key not in known:
            known[key] = score([prediction], [reference])
        return known[key]

    def statistics(predictions: Sequence[Any], references: Sequence[Any]) -> Numbers:
        few = min(8, len(references))
        head = np.array([single(*pair) for pair in zip(predictions[:few], references[:few], strict=True)])
        whole = score(predictions[:few], references[:few])
        if not any(math.isclose(whole, mean, rel_tol=1e-9, abs_tol=1e-9) for mean in (head.mean(), _root(head))):
            # Not worth scoring all of them.
            raise ValueError("not a mean over examples")
        values = np.array([single(*pair) for pair in zip(predictions, references, strict=True)], dtype=np.float64)
        return np.stack([values, values**2], axis=1)

    return statistics


def _root(values: Numbers) -> float:
    return float(np.sqrt((values**2).mean()))
