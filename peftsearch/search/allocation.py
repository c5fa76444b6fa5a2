"""Which method a trial goes to, where methods share their trials: ``search.allocation: joint``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftsearch.search.proposals import seed_of
from peftsearch.spec import Direction, SearchSpec, TrialRecord, TrialState

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

EACH = 2
"""Trials that every method has, in turn, before the sampler chooses among them."""

_METHOD = "method"


class Joint:
    """The trials of one model and domain, which its methods share.

    Once every method has had `EACH`, Optuna's TPE proposes the next trial's method from what the trials so far gave,
    by the two objectives of the search; its hyperparameters are then proposed as in any study, from the trials of that
    method. A proposal follows from the study's seed, the trial's number and the trials before it: a study that was
    interrupted continues with the methods that it would have had. What was pruned or failed counts as worse than what
    reached the full budget; what is running, as likely to be no better (Optuna's "constant liar").

    Args:
        search: The study file's section.
        methods: In the order of the study file.
        direction: Of the metric.
    """

    def __init__(self, search: SearchSpec, methods: Sequence[str], direction: Direction) -> None:
        from peftsearch.search.history import Memory

        self._search = search
        self._methods = list(methods)
        self._direction = direction
        self._memory = Memory()
        self._had = dict.fromkeys(methods, 0)
        self._trials: dict[int, FrozenTrial] = {}
        self._running: set[int] = set()

    def learn(self, record: TrialRecord) -> None:
        """A trial of this model and domain was started, or has changed; to be told of each, first by number."""
        running = record.state is TrialState.RUNNING
        new = record.number not in self._trials
        if record.method not in self._had or not (new or record.number in self._running):
            return
        if new:
            self._had[record.method] += 1
        if new or not running:
            self._trials[record.number] = self._trial(record)
        if running:
            self._running.add(record.number)
        else:
            self._running.discard(record.number)

    def method(self, number: int) -> str:
        """The method of a new trial, from those that were told of.

        Args:
            number: The trial's number.
        """
        import optuna

        if (fewest := min(self._had.values())) < EACH:
            return next(method for method in self._methods if self._had[method] == fewest)
        study = optuna.create_study(
            directions=[self._direction, "minimize"],
            sampler=optuna.samplers.TPESampler(
                seed=seed_of(self._search.seed, number, _METHOD), n_startup_trials=0, constant_liar=True
            ),
        )
        study.add_trials(self._memory.choose(list(self._trials.values()), study.directions))
        chosen: str = study.ask().suggest_categorical(_METHOD, self._methods)
        return chosen

    def _trial(self, record: TrialRecord) -> FrozenTrial:
        """A record as Optuna sees it."""
        import optuna

        state = {
            TrialState.COMPLETE: optuna.trial.TrialState.COMPLETE,
            TrialState.RUNNING: optuna.trial.TrialState.RUNNING,
        }.get(record.state, optuna.trial.TrialState.PRUNED)
        known = record.state is TrialState.COMPLETE and record.value is not None
        return optuna.trial.create_trial(
            state=state,
            params={_METHOD: record.method},
            distributions={_METHOD: optuna.distributions.CategoricalDistribution(self._methods)},
            values=[record.value or 0.0, record.trainable_parameters] if known else None,
        )
