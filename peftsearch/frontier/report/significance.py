"""Is the best method better than the others, or only luckier? Paired bootstrap over the test examples."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from peftsearch.files import Place, read_bytes
from peftsearch.frontier.report.additive import Numbers, Score, additive, resampled

Key = TypeVar("Key", int, str)

RESAMPLES = 1000
FEWEST = 50
_SEED = 20040725
_AT_ONCE = 100


@dataclass(frozen=True)
class Predicted:
    """What one re-trained model answered on the test split: predictions and references, in the split's order."""

    predictions: list[Any]
    references: list[Any]


@dataclass(frozen=True)
class Comparison:
    """The best configuration against another one.

    Attributes:
        difference: Of the metric over all test examples, mean over seeds: best minus other.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end.
        p: Two-sided p value.
        resamples: How many resamples it rests on.
        adjusted: ``p`` after Holm's correction, set by `holm`.
    """

    difference: float
    low: float
    high: float
    p: float
    resamples: int
    adjusted: float | None = None


def read_predictions(path: Place) -> Predicted:
    """One JSON object per line, ``{"prediction": ..., "reference": ...}``.

    Raises:
        ValueError: There is no such file, or it is broken; one sentence.
    """
    try:
        text = read_bytes(path).decode()
        # Not splitlines: a generated text may hold other line separators of Unicode.
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        return Predicted([row["prediction"] for row in rows], [row["reference"] for row in rows])
    except FileNotFoundError:
        raise ValueError(f"the predictions {path.name} of {path.parent.name} are gone") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the predictions {path.parent.name}/{path.name} cannot be read: {error}") from None


def compare(
    best: str,
    runs: Mapping[str, Sequence[Predicted]],
    score: Score,
    *,
    labels: Sequence[str] = (),
    whole: Mapping[str, Sequence[float]] | None = None,
    resamples: int = RESAMPLES,
    budget: float = 10.0,
) -> dict[str, Comparison]:
    """Paired bootstrap (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation", W04-3250).

    Test examples are drawn with replacement, the same ones for every configuration; a configuration's score on a
    resample is the mean over its seeds. With d the differences, B their number: the interval runs from the 2.5th to
    the 97.5th percentile of d, and ``p = min(1, 2 (1 + min(#{d <= 0}, #{d >= 0})) / (B + 1))``. Resamples on which
    the metric is undefined are left out.

    Args:
        best: The configuration to compare with all others.
        runs: By configuration, one entry for each seed. All of them answered the same examples in the same order.
        score: The metric.
        labels: The domain's labels.
        whole: The metric of each run on all examples, where that is known already.
        resamples: How many; more of them where many configurations are compared.
        budget: Seconds that this should take; slow metrics get fewer resamples, but as many as significance can
            need, up to three times the budget.

    Raises:
        ValueError: The configurations answered different examples, or scoring takes too long; one sentence.
    """
    # With fewer, no p value could stay below 0.05 after the correction over all pairs, however clear the difference.
    enough = 40 * len(runs) * (len(runs) - 1)
    resamples = max(resamples, enough)
    references = runs[best][0].references
    for name, seeds in runs.items():
        if any(seed.references != references for seed in seeds):
            raise ValueError(f"{name} was tested on other examples than {best}")
    size = len(references)
    if size < 2:
        raise ValueError("one test example tells nothing apart")

    def safe(predictions: Sequence[Any], truth: Sequence[Any]) -> float:
        return _safe(score, predictions, truth)

    if whole is None:
        whole = {name: [safe(seed.predictions, references) for seed in seeds] for name, seeds in runs.items()}
    full = {name: _mean(whole[name]) for name in runs}
    generator = np.random.default_rng(_SEED)
    shortcut = additive(
        [seed for seeds in runs.values() for seed in seeds],
        [value for name in runs for value in whole[name]],
        safe,
        labels,
        np.random.default_rng(0),
    )
    if shortcut is not None:
        found_statistics, combine = shortcut
        of_runs = iter(found_statistics)
        statistics = {name: [next(of_runs) for _ in seeds] for name, seeds in runs.items()}
        drawn = _fast(statistics, combine, size, resamples, generator)
    else:
        drawn = _slow(runs, references, safe, resamples, max(FEWEST, enough), budget, generator)
    ours = drawn[best]
    found = {}
    for name in runs:
        if name == best:
            continue
        differences = ours - drawn[name]
        differences = differences[np.isfinite(differences)]
        count = len(differences)
        if count < FEWEST or not math.isfinite(full[best] - full[name]):
            raise ValueError("the metric is undefined on most resamples of so few test examples")
        fewer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
        low, high = np.percentile(differences, [2.5, 97.5])
        found[name] = Comparison(
            full[best] - full[name], float(low), float(high), min(1.0, 2 * (1 + fewer) / (count + 1)), count
        )
    return found


def _fast(
    statistics: Mapping[str, Sequence[Numbers]],
    combine: Callable[[Numbers, int], Numbers],
    size: int,
    resamples: int,
    generator: np.random.Generator,
) -> dict[str, Numbers]:
    parts: list[dict[str, Numbers]] = []
    # A thousand rows of weights over a large test split would fill the memory.
    for start in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - start)
        weights = np.stack([np.bincount(generator.integers(0, size, size), minlength=size) for _ in range(count)])
        parts.append(resampled(statistics, combine, weights.astype(np.float64)))
    return {name: np.concatenate([part[name] for part in parts]) for name in statistics}


def _slow(
    runs: Mapping[str, Sequence[Predicted]],
    references: Sequence[Any],
    score: Score,
    resamples: int,
    enough: int,
    budget: float,
    generator: np.random.Generator,
) -> dict[str, Numbers]:
    drawn: dict[str, list[float]] = {name: [] for name in runs}
    began = time.monotonic()
    for done in range(resamples):
        spent = time.monotonic() - began
        if (done >= enough and spent > budget) or spent > 3 * budget:
            break
        chosen = generator.integers(0, len(references), len(references))
        truth = [references[index] for index in chosen]
        for name, seeds in runs.items():
            drawn[name].append(_mean([score([seed.predictions[index] for index in chosen], truth) for seed in seeds]))
    if len(drawn[next(iter(runs))]) < FEWEST:
        raise ValueError("scoring is too slow for a bootstrap")
    return {name: np.array(values) for name, values in drawn.items()}


def holm(p: Mapping[Key, float], family: int | None = None) -> dict[Key, float]:
    """Holm's step-down correction (Holm 1979): the p values, so adjusted that each may be held against 0.05.

    Args:
        p: By comparison.
        family: How many comparisons these are the smallest ones of, at worst: of k methods k (k - 1) / 2 where the one
            that the others are held against was chosen by the same scores. Those in ``p`` where absent.
    """
    adjusted: dict[Key, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, p[name] * ((family or len(p)) - rank)))
        adjusted[name] = highest
    return adjusted


def _safe(score: Score, predictions: Sequence[Any], references: Sequence[Any]) -> float:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # A resample may lack a label, or be constant; that it is undefined is all there is to know.
        warnings.simplefilter("ignore")
        try:
            return float(score(predictions, references))
        except (ValueError, KeyError, ZeroDivisionError, OverflowError):
            return math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
