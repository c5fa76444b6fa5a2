"""A ledger in memory, for searches that are over in a second: what `StudyRun` asks of the real one, and no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna

from peftsearch.search.cells import Cell
from peftsearch.spec import Rung, TrialRecord, TrialState

_OPTUNA = {
    TrialState.COMPLETE: optuna.trial.TrialState.COMPLETE,
    TrialState.PRUNED: optuna.trial.TrialState.PRUNED,
    TrialState.FAILED: optuna.trial.TrialState.FAIL,
}


class ReplayLedger:
    """See `peftsearch.search.run.TrialLedger`; Optuna is told the same as by `peftsearch.tracking.Ledger`.

    Args:
        cells: Of one domain.
        direction: Of its metric.
    """

    def __init__(self, cells: Sequence[Cell], direction: str) -> None:
        self._studies = {cell.key: optuna.create_study(directions=[direction, "minimize"]) for cell in cells}
        self._cells = {cell.key: cell for cell in cells}
        self._trials: list[tuple[str, int, TrialRecord]] = []
        self._started = dict.fromkeys(self._studies, 0)

    @property
    def records(self) -> list[TrialRecord]:
        """By number."""
        return [record for _, _, record in self._trials]

    def record(self, number: int) -> TrialRecord:
        """One trial."""
        return self._trials[number][2]

    def started(self, cell: str) -> int:
        """Trials of a cell."""
        return self._started[cell]

    def next_number(self) -> int:
        """Of the next trial."""
        return len(self._trials)

    def is_new(self, cell: str) -> bool:
        """Every replay begins anew."""
        return True

    def infeasible(self, cell: str, number: int | None = None) -> int:
        """There are no limits."""
        return 0

    def enqueue(self, cell: str, configurations: Sequence[Mapping[str, Any]]) -> None:
        """Have configurations proposed first."""
        for configuration in configurations:
            self._studies[cell].enqueue_trial(dict(configuration))

    def ask(
        self,
        cell: str,
        sampler: optuna.samplers.BaseSampler,
        suggest: Callable[[optuna.Trial], dict[str, Any]],
        describe: Callable[[int, dict[str, Any]], dict[str, Any]],
    ) -> TrialRecord:
        """Have Optuna propose a trial."""
        study, number = self._studies[cell], len(self._trials)
        study.sampler = sampler
        trial = study.ask()
        values = suggest(trial)
        fields = describe(number, values)
        fields.pop("constraints", None)
        item = self._cells[cell]
        record = TrialRecord(
            number=number,
            model=item.model,
            domain=item.domain,
            method=item.method,
            hyperparameters=values,
            state=TrialState.RUNNING,
            **fields,
        )
        self._trials.append((cell, trial._trial_id, record))
        self._started[cell] += 1
        return record

    def add_rung(self, number: int, rung: Rung, **updates: Any) -> TrialRecord:
        """Record an evaluation."""
        rungs = [*self.record(number).rungs, rung]
        return self._update(number, rungs=rungs, value=rung.value, **updates)

    def complete(self, number: int, **updates: Any) -> TrialRecord:
        """The full budget was reached."""
        record = self.record(number)
        assert record.value is not None
        return self._end(number, TrialState.COMPLETE, [record.value, float(record.trainable_parameters)], updates)

    def prune(self, number: int, **updates: Any) -> TrialRecord:
        """The scheduler stopped it."""
        return self._end(number, TrialState.PRUNED, None, updates)

    def fail(self, number: int, error: str, **updates: Any) -> TrialRecord:
        """It could not go on."""
        return self._end(number, TrialState.FAILED, None, {"error": error, **updates})

    def _end(
        self, number: int, state: TrialState, values: list[float] | None, updates: Mapping[str, Any]
    ) -> TrialRecord:
        cell, trial_id, _ = self._trials[number]
        self._studies[cell]._storage.set_trial_state_values(trial_id, _OPTUNA[state], values)
        return self._update(number, state=state, **updates)

    def _update(self, number: int, **updates: Any) -> TrialRecord:
        cell, trial_id, record = self._trials[number]
        record = record.model_copy(update=updates)
        self._trials[number] = (cell, trial_id, record)
        return record
