"""What Optuna is asked for: samplers seeded per trial, search spaces as suggestions, published defaults first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftsearch.methods import MethodSpace
from peftsearch.spec import Range, Scalar, SearchSpec, StudyError

if TYPE_CHECKING:
    import optuna

    from peftsearch.search.history import Memory


_GUIDED_PROPOSALS = 20
"""TPE proposes so many configurations for one trial; where all are outside the limits, chance finds others."""


def make_sampler(
    search: SearchSpec, number: int, attempt: int = 0, grid: Grid | None = None, memory: Memory | None = None
) -> optuna.samplers.BaseSampler:
    """A sampler for one proposal, seeded from the study's seed, the trial's number and how many were refused before.

    A sampler that lived through the study would depend on how often it had been restarted; this one does not, so an
    interrupted study continues with the very trials that it would have had.

    Args:
        search: The study file's section.
        number: The trial's number.
        attempt: Proposals for this trial that were outside the study's limits.
        grid: The cell's grid, where the sampler is ``grid``.
        memory: What chooses, of a long history of the cell, the trials that TPE looks at.
    """
    import optuna

    if grid is not None:
        return _grid_sampler(grid)
    seed = seed_of(search.seed, number, *([attempt] if attempt else []))
    if search.sampler == "random" or attempt >= _GUIDED_PROPOSALS:
        return optuna.samplers.RandomSampler(seed=seed)
    from peftsearch.search.history import Memory, RememberingTPE

    return RememberingTPE(memory or Memory(), seed=seed, n_startup_trials=startup_trials(search))


def startup_trials(search: SearchSpec) -> int:
    """Random trials of a cell before TPE takes over."""
    return search.startup_trials or min(10, max(4, search.trials // 4))


def seed_of(seed: int, *what: object) -> int:
    """A seed of its own for one draw, below 2**32.

    Args:
        seed: The study's.
        what: Names the draw.
    """
    digest = hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()
    return int.from_bytes(digest[:4], "big")


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


def first_guesses(space: MethodSpace, trials: int, found: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Scalar]]:
    """What is tried before anything is sampled, each configuration reduced to what the study's space contains.

    Args:
        space: The cell's space.
        trials: Trials of the cell.
        found: What another study found, best first; at most half of the trials go to these (one at least).

    Returns:
        Those, then the method's published defaults; no configuration twice, and no more than there are trials.
    """
    taken = _fitting(space, found)[: max(1, trials // 2)]
    return _fitting(space, [*taken, *space.method.priors])[:trials]


def _fitting(space: MethodSpace, configurations: Sequence[Mapping[str, Any]]) -> list[dict[str, Scalar]]:
    chosen: list[dict[str, Scalar]] = []
    for configuration in configurations:
        fitting = {name: value for name, value in configuration.items() if _contains(space.space, name, value)}
        if fitting and fitting not in chosen:
            chosen.append(fitting)
    return chosen


@dataclass(frozen=True)
class Grid:
    """All combinations of a space's values, in order: the last hyperparameter changes fastest."""

    space: MethodSpace

    @property
    def values(self) -> dict[str, tuple[Scalar, ...]]:
        """The values of each searched hyperparameter, in the order of the method's file.

        Raises:
            StudyError: A range without a step has no last value to come to.
        """
        return {name: self._values(name) for name in self.space.searched}

    def check(self) -> None:
        """See that the grid has an end.

        Raises:
            StudyError: A hyperparameter is searched in a range without a step.
        """
        _ = self.values

    @property
    def size(self) -> int:
        """Number of combinations."""
        return math.prod(len(values) for values in self.values.values())

    def combination(self, index: int) -> dict[str, Scalar]:
        """The combination at a place, from 0."""
        chosen: dict[str, Scalar] = {}
        for name, values in reversed(self.values.items()):
            index, place = divmod(index, len(values))
            chosen[name] = values[place]
        return chosen

    def _values(self, name: str) -> tuple[Scalar, ...]:
        dimension = self.space.space[name]
        if isinstance(dimension, tuple):
            return dimension
        assert isinstance(dimension, Range)
        values = dimension.values
        if values is None:
            raise StudyError(
                f"search.sampler: grid needs a list of values for {name}, or a range with a step, not "
                f"{dimension.low:g} .. {dimension.high:g}: write for example {name}: [{dimension.low:g}, "
                f"{dimension.high:g}]",
                ("methods", self.space.method.name, name),
            )
        whole = self.space.method.hyperparameters[name].kind == "int"
        return tuple(int(value) if whole else value for value in values)


def _grid_sampler(grid: Grid) -> optuna.samplers.BaseSampler:
    import optuna

    class GridInOrder(optuna.samplers.BaseSampler):
        """Stateless, unlike Optuna's own grid sampler, which draws the next combination at random: the place in the
        grid is the trial's number within its cell."""

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return grid.combination(trial.number)[param_name]

    return GridInOrder()


def _contains(space: Mapping[str, Any], name: str, value: Scalar) -> bool:
    dimension = space.get(name)
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
