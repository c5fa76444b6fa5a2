"""What TPE is shown of a long history: enough to learn from, and no more than it can look through for every trial.

Optuna's TPE sorts all finished trials of a cell, for every hyperparameter of every proposal: the best tenth of them by
fronts and hypervolume, whose selection takes time that grows with the square. After ten thousand trials a proposal
would take seconds.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from peftsearch.search.pareto import crowding_distance, non_dominated_rank

WHOLE = 400
"""As long as a cell has no more trials than this, TPE sees all of them."""
RECENT = 200
"""Of a longer history it sees at least the latest ones, ..."""
BEST = 100
"""... of those before them the best ..."""
OTHERS = 100
"""... and some of the rest, evenly spread: TPE also learns what is not worth trying."""
EVERY = 100
"""What is shown of the earlier trials is chosen anew after so many."""

_OF_USE = (TrialState.COMPLETE, TrialState.PRUNED)


class Memory:
    """The choice among a cell's trials, kept from one proposal to the next.

    With one trial at a time it follows from the trials alone, so that a study that was interrupted continues with the
    proposals that it would have had.
    """

    def __init__(self) -> None:
        self._until = -1
        self._earlier: list[FrozenTrial] = []

    def choose(
        self, trials: Sequence[FrozenTrial], directions: Sequence[optuna.study.StudyDirection]
    ) -> list[FrozenTrial]:
        """The trials to show, by number.

        Args:
            trials: All of the cell, by number, whatever their state.
            directions: Of the objectives.
        """
        if len(trials) <= WHOLE:
            return list(trials)
        until = (len(trials) - RECENT) // EVERY * EVERY
        if until != self._until:
            earlier = [trial for trial in trials[:until] if trial.state in _OF_USE]
            self._until, self._earlier = until, _summary(earlier, directions)
        return [*self._earlier, *trials[until:]]


def _summary(trials: list[FrozenTrial], directions: Sequence[optuna.study.StudyDirection]) -> list[FrozenTrial]:
    signs = [-1.0 if direction == optuna.study.StudyDirection.MAXIMIZE else 1.0 for direction in directions]
    scored = [
        index
        for index, trial in enumerate(trials)
        if trial.state is TrialState.COMPLETE and all(excess <= 0 for excess in trial.constraints.values())
    ]
    chosen: set[int] = set()
    if scored:
        points = np.array([trials[index].values for index in scored]) * signs
        ranks = non_dominated_rank(points)
        room = np.zeros(len(points))
        for rank in range(int(ranks.max()) + 1):
            front = ranks == rank
            room[front] = crowding_distance(points[front])
            if (ranks <= rank).sum() >= BEST:
                break
        # By front, within it those with more room, of equals the earlier.
        chosen = {scored[place] for place in np.lexsort((-room, ranks))[:BEST].tolist()}
    rest = [index for index in range(len(trials)) if index not in chosen]
    if rest:
        chosen |= {rest[place] for place in np.linspace(0, len(rest) - 1, min(OTHERS, len(rest))).astype(int).tolist()}
    return [trials[index] for index in sorted(chosen)]


class _View:
    """An Optuna study of which TPE sees a part."""

    def __init__(self, study: optuna.Study, memory: Memory) -> None:
        self._study = study
        # Read once per proposal, as Optuna does.
        self._trials = memory.choose(study._get_trials(deepcopy=False, use_cache=True), study.directions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [trial for trial in self._trials if states is None or trial.state in states]


class RememberingTPE(optuna.samplers.TPESampler):
    """TPE for one proposal, shown what a memory chooses.

    Args:
        memory: Of the cell.
        options: As `optuna.samplers.TPESampler`.
    """

    def __init__(self, memory: Memory, **options: Any) -> None:
        super().__init__(**options)
        self._memory = memory
        self._view: _View | None = None

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """With two objectives, TPE draws every hyperparameter by itself."""
        if self._view is None:
            self._view = _View(study, self._memory)
        view = cast("optuna.Study", self._view)
        return super().sample_independent(view, trial, param_name, param_distribution)
