"""What Optuna is asked for: samplers seeded per trial, search spaces as suggestions, published defaults first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftsearch.methods import MethodSpace
from peftsearch.spec import Range, Scalar, SearchSpec

if TYPE_CHECKING:
    import optuna


def make_sampler(search: SearchSpec, number: int) -> optuna.samplers.BaseSampler:
    """A sampler for one trial, seeded from the study's seed and the trial's number.

    A sampler that lived through the study would depend on how often it had been restarted; this one does not, so an
    interrupted study continues with the very trials that it would have had.
    """
    import optuna

    digest = hashlib.sha256(f"{search.seed}:{number}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = search.startup_trials or min(10, max(4, search.trials // 4))
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)


def suggest(trial: optuna.Trial, space: MethodSpace) -> dict[str, Scalar]:
    """Draw every hyperparameter of a method; those with a fixed value are not Optuna's business."""
    values: dict[str, Scalar] = {}
    for name, dimension in space.space.items():
        kind = space.method.hyperparameters[name].kind
        if isinstance(dimension, Range):
            if kind == "int":
                values[name] = trial.suggest_int(
                    name,
                    int(dimension.low),
                    int(dimension.high),
                    step=int(dimension.step or 1),
                    log=dimension.log,
                )
            else:
                values[name] = trial.suggest_float(
                    name, dimension.low, dimension.high, step=dimension.step, log=dimension.log
                )
        elif isinstance(dimension, tuple):
            chosen = trial.suggest_categorical(name, list(dimension))
            assert chosen is not None
            values[name] = chosen
        else:
            values[name] = dimension
    return values


def fitting_priors(space: MethodSpace) -> list[dict[str, Scalar]]:
    """The method's published defaults, each reduced to what the study's space contains."""
    priors = []
    for prior in space.method.priors:
        fitting = {name: value for name, value in prior.items() if _contains(space.space, name, value)}
        if fitting:
            priors.append(fitting)
    return priors


def _contains(space: Mapping[str, Any], name: str, value: Scalar) -> bool:
    dimension = space[name]
    if isinstance(dimension, tuple):
        return value in dimension
    if not isinstance(dimension, Range) or isinstance(value, str):
        return False
    if not dimension.low <= value <= dimension.high:
        return False
    if dimension.step is None:
        return True
    steps = (value - dimension.low) / dimension.step
    return abs(steps - round(steps)) < 1e-9
