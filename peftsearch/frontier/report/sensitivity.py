"""How a method's score depends on each hyperparameter: points, medians with quartiles, and importance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peftsearch.frontier.front import complete
from peftsearch.methods import METHODS
from peftsearch.spec import Direction, Range, Space, StudySpec, TrialRecord, TrialState

FEWEST_FOR_IMPORTANCE = 8
_BINS = 5
_FEWEST_PER_BIN = 3


@dataclass(frozen=True)
class Bin:
    """Trials whose hyperparameter lies close together.

    Attributes:
        low: Smallest value among them.
        high: Largest value among them.
        centre: Where the bin is drawn.
        trials: How many.
        quartiles: 25 %, 50 % and 75 % of their scores.
    """

    low: float
    high: float
    centre: float
    trials: int
    quartiles: tuple[float, float, float]


@dataclass(frozen=True)
class Sensitivity:
    """Score against one numeric hyperparameter of a method in a domain.

    Attributes:
        name: Of the hyperparameter.
        log: Whether it is searched (and so drawn) on a logarithmic scale.
        points: Value and score of each COMPLETE trial.
        pruned: Value and last score of each pruned trial.
        bins: In rising order.
    """

    name: str
    log: bool
    points: list[tuple[float, float]]
    pruned: list[tuple[float, float]]
    bins: list[Bin]


def sensitivities(records: Sequence[TrialRecord], method: str, spec: StudySpec) -> list[Sensitivity]:
    """Every numeric hyperparameter that took at least two values among the method's finished trials."""
    finished = complete(records)
    pruned = [r for r in records if r.state is TrialState.PRUNED and r.value is not None and math.isfinite(r.value)]
    found = []
    for name in dict.fromkeys(name for record in finished for name in record.hyperparameters):
        points = _points(finished, name)
        if len({value for value, _ in points}) < 2:
            continue
        given_up = _points(pruned, name)
        log = is_log(space_of(spec, method, name), [value for value, _ in (*points, *given_up)])
        found.append(Sensitivity(name, log, points, given_up, bins(points, log)))
    return found


def bins(points: Sequence[tuple[float, float]], log: bool) -> list[Bin]:
    """A bin for each value where there are few different ones, else bins of (nearly) equally many trials.

    Trials of equal value are never torn apart.
    """
    ordered = sorted(points)
    values = sorted({value for value, _ in ordered})
    if len(values) <= _BINS:
        groups = [[point for point in ordered if point[0] == value] for value in values]
    else:
        wanted = max(1, min(_BINS, len(ordered) // _FEWEST_PER_BIN))
        size = len(ordered) / wanted
        groups = [[]]
        for index, point in enumerate(ordered):
            full = index >= round(size * len(groups))
            if full and groups[-1] and groups[-1][-1][0] != point[0]:
                groups.append([])
            groups[-1].append(point)
    found = []
    for group in groups:
        places = np.array([value for value, _ in group], dtype=float)
        centre = float(np.exp(np.log(places).mean())) if log else float(places.mean())
        low, middle, high = (float(q) for q in np.percentile([score for _, score in group], [25, 50, 75]))
        found.append(Bin(float(places.min()), float(places.max()), centre, len(group), (low, middle, high)))
    return found


def space_of(spec: StudySpec, method: str, name: str) -> Space | None:
    """What the study searched: as the study file says, or the method's default."""
    if method in spec.methods and name in spec.methods[method].space:
        return spec.methods[method].space[name]
    known = METHODS.get(method)
    return known.hyperparameters[name].space if known and name in known.hyperparameters else None


def is_log(space: Space | None, values: Sequence[float]) -> bool:
    """Whether a hyperparameter is drawn on a logarithmic scale: as its range says, and lists that span a decade."""
    if min(values) <= 0:
        return False
    return space.log if isinstance(space, Range) else max(values) / min(values) >= 10


@dataclass(frozen=True)
class Importance:
    """What decides whether a method's trial is among the best.

    Attributes:
        shares: By hyperparameter, adding up to 1, largest first; empty where it cannot be said.
        trials: COMPLETE trials that it rests on.
        why_not: Why it cannot be said; None where it can.
    """

    shares: dict[str, float]
    trials: int
    why_not: str | None = None


def importance(records: Sequence[TrialRecord], method: str, spec: StudySpec, direction: Direction) -> Importance:
    """PED-ANOVA (Watanabe, Bansal and Hutter 2023, arXiv:2304.10255), as Optuna computes it.

    It compares the distribution of each hyperparameter among the best trials with that among all trials. The best are
    a tenth of them, or five where a tenth is less (at most half).
    """
    finished = complete(records)
    count = len(finished)
    if count < FEWEST_FOR_IMPORTANCE:
        return Importance({}, count, f"too few trials ({count} of at least {FEWEST_FOR_IMPORTANCE})")
    names = [
        name
        for name in finished[0].hyperparameters
        if all(name in record.hyperparameters for record in finished)
        and len({repr(record.hyperparameters[name]) for record in finished}) > 1
    ]
    if not names:
        return Importance({}, count, "nothing was varied")
    scores = [float(record.value or 0.0) for record in finished]
    if max(scores) == min(scores):
        return Importance({}, count, "all trials scored the same")
    if len(names) == 1:
        return Importance({names[0]: 1.0}, count, "only this one was varied")
    return Importance(_ped_anova(finished, names, scores, method, spec, direction), count)


def _ped_anova(
    records: Sequence[TrialRecord],
    names: Sequence[str],
    scores: Sequence[float],
    method: str,
    spec: StudySpec,
    direction: Direction,
) -> dict[str, float]:
    import warnings

    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    distributions: dict[str, BaseDistribution] = {}
    categorical = set()
    for name in names:
        values = [record.hyperparameters[name] for record in records]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        space = space_of(spec, method, name)
        if not numeric or isinstance(space, tuple):
            # Lists of values are compared value by value, as the search drew them.
            categorical.add(name)
            distributions[name] = CategoricalDistribution(sorted({str(value) for value in values}))
        elif all(isinstance(value, int) for value in values):
            distributions[name] = IntDistribution(min(values), max(values), log=is_log(space, values))
        else:
            distributions[name] = FloatDistribution(min(values), max(values), log=is_log(space, values))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=0))
    for record, score in zip(records, scores, strict=True):
        study.add_trial(
            optuna.trial.create_trial(
                params={
                    name: str(record.hyperparameters[name]) if name in categorical else record.hyperparameters[name]
                    for name in names
                },
                distributions=distributions,
                value=score,
            )
        )
    quantile = max(0.1, min(0.5, 5 / len(records)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
        )
    return {name: float(share) for name, share in found.items()}


def _points(records: Sequence[TrialRecord], name: str) -> list[tuple[float, float]]:
    found = []
    for record in records:
        value = record.hyperparameters.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or record.value is None:
            continue
        if math.isfinite(value):
            found.append((float(value), record.value))
    return found
