"""The ledger: every trial of a study in one Optuna storage. It is the truth; everything else can be rebuilt from it.

One Optuna study per cell, named ``STUDY/DOMAIN/METHOD/MODEL``, with two objectives: the domain's metric, and trainable
parameters. What Optuna has no field for is a user attribute of the trial; what becomes known after a trial's end
(Optuna freezes finished trials) is a user attribute of the cell's study: the MLflow run, and each confirmation.

A configuration outside the study's limits is a PRUNED Optuna trial with a violated constraint, which samplers and
Optuna's front know as infeasible. It is no trial of the study.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from peftsearch.spec import Confirmed, Direction, Reading, Rung, StudyError, TrialRecord, TrialState, hide_secrets

if TYPE_CHECKING:
    import optuna

CLAIMS = "ledger-claims.json"
"""The file in a study's folder that tells the folder from copies of it, where the ledger is elsewhere."""

_CELL = "peftsearch_cell"
_OWNER = "peftsearch_study"
_TRIAL = "trial"
_RUNGS = "rungs"
_ENDED = "ended"
_RUN_ID = "mlflow_run_id"
_INFEASIBLE = "infeasible"
_READING = "reading"
_UNCONFIRMED = "confirmation_failed"
_TAKEN = "taken_from"
_CONFIRMING = "confirming"


@dataclass(frozen=True)
class LedgerCell:
    """What the ledger keeps of a cell."""

    key: str
    model: str
    domain: str
    method: str
    metric: str
    direction: Direction


@dataclass(frozen=True)
class Owner:
    """The study that a ledger's trials belong to; another study of the same name is another study.

    Attributes:
        id: Made when the study was begun.
        where: The storage that holds the study's other files, for people.
        claim: A word that this run makes up and leaves in the storage and in the ledger, whoever else may have a copy
            of the storage; None where storage and ledger cannot part, or nothing is to be written.
        earlier: The words of the storage, one of which the ledger must hold; None where any other will do, too.
    """

    id: str
    where: str
    claim: str | None = None
    earlier: tuple[str, ...] | None = None

    @property
    def signature(self) -> dict[str, str]:
        """What the ledger keeps of it."""
        return {"id": self.id, "where": self.where} | ({"claim": self.claim} if self.claim else {})


class Ledger:
    """All trials of a study, by number; the study's driver is its only writer.

    Args:
        url: SQLAlchemy URL of the Optuna storage.
        study: Name of the study.
        cells: The cells to create where they do not exist; empty to read what is there.
        owner: The study that the trials must belong to; not checked where absent.
        patience: Seconds that each call waits for a database that is restarted, or locked by another process.
        guard: Called before every write; raises where this process may not write any more.

    Raises:
        StudyError: The storage cannot be opened, or holds another study of this name.
        RuntimeError: From every method: the database stayed away for longer than the patience.
    """

    def __init__(
        self,
        url: str,
        study: str,
        cells: Iterable[LedgerCell] = (),
        *,
        owner: Owner | None = None,
        patience: float = 15.0,
        guard: Callable[[], None] | None = None,
    ) -> None:
        import optuna

        from peftsearch.tracking.database import open_database

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.url = url
        self.study = study
        self._database = open_database(url, patience, guard)
        self._storage = optuna.storages.get_storage(self._database)
        self._studies: dict[str, optuna.Study] = {}
        # What never changes in a cell's study: its own attributes grow with every trial (`set_run_id`).
        self._cells: dict[str, Mapping[str, Any]] = {}
        # By number, ascending.
        self._trials: dict[int, _Entry] = {}
        self._started: Counter[str] = Counter()
        self._unstarted: dict[str, list[optuna.trial.FrozenTrial]] = {}
        self._infeasible: dict[str, Counter[int]] = {}
        self._readings: dict[int, dict[int, Reading]] = {}
        self._unconfirmed: dict[int, dict[int, str]] = {}
        self._confirming: dict[tuple[int, int], Mapping[str, Any]] = {}
        try:
            self._load(cells, owner)
        except (StudyError, OSError, ImportError):
            raise
        except Exception as error:
            if type(error) is RuntimeError:
                # The database stayed away, or the study is no longer ours to write.
                raise
            # All else comes from what the database holds: errors of SQLite, broken JSON, fields that are missing.
            why = " ".join(str(getattr(error, "orig", None) or error.__cause__ or error).split())[:120]
            raise StudyError(
                f"the ledger {hide_password(url)} is damaged ({type(error).__name__}: {why}): restore it from a copy, "
                "or start the study anew under another --name",
                ("tracking", "ledger"),
            ) from None

    def _load(self, cells: Iterable[LedgerCell], owner: Owner | None) -> None:
        """Find the study's cells, create those that do not exist, and read all trials."""
        import optuna

        url, study = self.url, self.study
        existing = set(optuna.get_all_study_names(self._storage))
        loaded = {
            name: optuna.load_study(study_name=name, storage=self._storage)
            for name in sorted(existing)
            if name.startswith(f"{study}/")
        }
        if owner is not None:
            for item in loaded.values():
                _check_owner(item.user_attrs.get(_OWNER), owner, url, study)
        for cell in cells:
            name = f"{study}/{cell.key}"
            created = optuna.create_study(
                storage=self._storage,
                study_name=name,
                directions=[cell.direction, "minimize"],
                load_if_exists=True,
            )
            if _CELL not in created.user_attrs:
                # Last, so that a driver that dies here finds the cell unfinished and not half made.
                created.set_metric_names([cell.metric, "trainable_parameters"])
                created.set_user_attr(_CELL, cell.__dict__)
            if owner is not None and created.user_attrs.get(_OWNER) != owner.signature:
                created.set_user_attr(_OWNER, owner.signature)
            loaded[name] = created
        for _, item in sorted(loaded.items()):
            if (info := item.user_attrs.get(_CELL)) is not None:
                self._studies[info["key"]], self._cells[info["key"]] = item, info
        self._read()

    @property
    def failure(self) -> Exception | None:
        """Why this ledger is not written any more: what a write raised, whoever asked for it."""
        return self._database.failure

    @property
    def records(self) -> list[TrialRecord]:
        """Every started trial, by number."""
        return [entry.record for entry in self._trials.values()]

    def record(self, number: int) -> TrialRecord:
        """One trial."""
        return self._trials[number].record

    def next_number(self) -> int:
        """The number of the next new trial."""
        return next(reversed(self._trials), -1) + 1

    def started(self, cell: str) -> int:
        """Trials of a cell, whatever their state."""
        return self._started[cell]

    def is_new(self, cell: str) -> bool:
        """Whether nothing has ever been asked for in a cell."""
        import optuna

        trials = self._studies[cell].get_trials(deepcopy=False)
        return all(trial.state is optuna.trial.TrialState.WAITING for trial in trials)

    def enqueue(self, cell: str, configurations: Sequence[Mapping[str, Any]]) -> None:
        """Have configurations (or parts of them) proposed before anything is sampled, in a cell that `is_new`.

        The same call, made again after a driver died in the middle of it, enqueues the rest.
        """
        study = self._studies[cell]
        for configuration in configurations[len(study.get_trials(deepcopy=False)) :]:
            study.enqueue_trial(dict(configuration))

    def infeasible(self, cell: str, number: int | None = None) -> int:
        """Proposals of a cell that were outside the study's limits: all of them, or those for one trial."""
        refused = self._infeasible.get(cell, Counter())
        return refused.total() if number is None else refused[number]

    def ask(
        self,
        cell: str,
        sampler: optuna.samplers.BaseSampler,
        suggest: Callable[[optuna.Trial], dict[str, Any]],
        describe: Callable[[int, dict[str, Any]], dict[str, Any]],
    ) -> TrialRecord | None:
        """Have Optuna propose the next trial of a cell, and record it as RUNNING.

        Args:
            cell: Key of the cell.
            sampler: Proposes; seeded for this trial.
            suggest: Draws the hyperparameters from an Optuna trial.
            describe: Number and hyperparameters to further fields of the trial's record (``seed``,
                ``trainable_parameters``, ...). An ``error`` in them ends the trial as FAILED at once. ``constraints``
                in them are Optuna's, by name: where one is above 0, the proposal is recorded as infeasible and is no
                trial.

        Returns:
            The trial; None where the proposal is infeasible.
        """
        import optuna

        study = self._studies[cell]
        study.sampler = sampler
        left = self._unstarted.get(cell)
        # A driver that died between asking and recording leaves a trial without a number: it is taken up again, so
        # that the queue of priors and the sampler see what they would have seen without the crash.
        trial = optuna.Trial(study, left.pop(0)._trial_id) if left else study.ask()
        hyperparameters = suggest(trial)
        number = self.next_number()
        info = self._cells[cell]
        fields = {
            "number": number,
            "model": info["model"],
            "domain": info["domain"],
            "method": info["method"],
            "hyperparameters": hyperparameters,
            "started": _now(),
            **describe(number, hyperparameters),
        }
        error = fields.pop("error", None)
        constraints = fields.pop("constraints", {})
        for name, excess in constraints.items():
            # Of a trial that is taken up again they are known already.
            if name not in trial._cached_frozen_trial.constraints:
                trial.set_constraint(name, excess)
        if error is None and any(excess > 0 for excess in constraints.values()):
            trial.set_user_attr(_INFEASIBLE, fields)
            self._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.PRUNED, None)
            self._infeasible[cell][number] += 1
            return None
        record = TrialRecord(state=TrialState.RUNNING, **fields)
        # One attribute, one transaction: a trial has all of these or is not started.
        trial.set_user_attr(_TRIAL, fields)
        self._add(number, _Entry(cell, trial._trial_id, record))
        if error is not None:
            return self.fail(number, str(error))
        return record

    def add_rung(self, number: int, rung: Rung, **updates: Any) -> TrialRecord:
        """Record an evaluation. One that is recorded already (its segment was trained twice) is left as it is."""
        entry = self._trials[number]
        before = entry.record
        if any(known.step >= rung.step for known in before.rungs):
            return before
        # Per-class scores are kept for the last evaluation only: they are many.
        earlier = [
            known.model_copy(update={"scores": {k: v for k, v in known.scores.items() if "/" not in k}})
            for known in before.rungs
        ]
        rungs = [*earlier, rung]
        entry.record = before.model_copy(update=_derived(rungs) | updates)
        self._set(entry, _RUNGS, {"rungs": [item.model_dump() for item in rungs], **updates})
        return entry.record

    def complete(self, number: int, **updates: Any) -> TrialRecord:
        """The trial reached the full budget."""
        return self._end(number, TrialState.COMPLETE, updates)

    def prune(self, number: int, **updates: Any) -> TrialRecord:
        """The scheduler stopped the trial."""
        return self._end(number, TrialState.PRUNED, updates)

    def fail(self, number: int, error: str, **updates: Any) -> TrialRecord:
        """The trial could not go on."""
        return self._end(number, TrialState.FAILED, {"error": hide_secrets(error), **updates})

    def set_run_id(self, number: int, run_id: str) -> None:
        """Remember a trial's MLflow run."""
        entry = self._trials[number]
        if entry.record.mlflow_run_id != run_id:
            self._studies[entry.cell].set_user_attr(f"{_RUN_ID}:{number}", run_id)
            entry.record = entry.record.model_copy(update={"mlflow_run_id": run_id})

    # --- confirmations ---

    def add_reading(self, number: int, reading: Reading) -> TrialRecord:
        """Record a re-training of a finished trial and its reading of the test split.

        Written once: a reading that is recorded already (of the same seed) stays as it is.
        """
        known = self._readings.setdefault(number, {})
        entry = self._trials[number]
        if reading.seed not in known:
            self._note(number, _READING, reading.seed, reading.model_dump())
            known[reading.seed] = reading
            entry.record = entry.record.model_copy(update={"confirmed": _confirmed(known)})
        return entry.record

    def fail_confirmation(self, number: int, seed: int, error: str) -> None:
        """Record that a re-training could not go on."""
        known = self._unconfirmed.setdefault(number, {})
        if seed not in known:
            error = hide_secrets(error)
            self._note(number, _UNCONFIRMED, seed, error)
            known[seed] = error
            entry = self._trials[number]
            entry.record = entry.record.model_copy(update={"failed_confirmations": dict(sorted(known.items()))})

    def failed_confirmations(self, number: int) -> Mapping[int, str]:
        """The errors of a trial's re-trainings that could not go on, by seed."""
        return self._unconfirmed.get(number, {})

    def set_confirming(self, number: int, seed: int, progress: Mapping[str, Any]) -> None:
        """Remember how far a re-training has come, so that another driver asks for what comes next."""
        self._note(number, _CONFIRMING, seed, dict(progress))
        self._confirming[number, seed] = dict(progress)

    def confirming(self, number: int, seed: int) -> Mapping[str, Any]:
        """What `set_confirming` was told of a re-training last; empty at first."""
        return self._confirming.get((number, seed), {})

    def _note(self, number: int, kind: str, seed: int, value: Any) -> None:
        self._studies[self._trials[number].cell].set_user_attr(f"{kind}:{number}:{seed}", value)

    # --- trials of another study ---

    def finished(self, cell: str) -> list[int]:
        """Numbers of a cell's finished trials, in order."""
        return sorted(
            number
            for number, entry in self._trials.items()
            if entry.cell == cell and entry.record.state is not TrialState.RUNNING
        )

    def take_over(self, cell: str, source: Ledger, numbers: Sequence[int], seeds: Sequence[int]) -> None:
        """Copy a cell's trials from another study's ledger; those that were copied before are left as they are.

        With them go what was proposed outside the limits (samplers learn from it) and what was enqueued. Of unfinished
        trials the hyperparameters are enqueued.

        Args:
            cell: Key of the cell, in both.
            source: The other ledger.
            numbers: Finished trials to copy.
            seeds: Confirmations to copy.
        """
        import copy

        import optuna

        ours, theirs = self._studies[cell], source._studies[cell]
        known = {trial.user_attrs.get(_TAKEN) for trial in ours.get_trials(deepcopy=False)}
        for trial in theirs.get_trials():
            started = trial.user_attrs.get(_TRIAL)
            finished = trial.state.is_finished()
            if trial.number in known or (finished and started is not None and started["number"] not in numbers):
                continue
            if finished or trial.state is optuna.trial.TrialState.WAITING:
                taken = copy.deepcopy(trial)
                taken.user_attrs = {**trial.user_attrs, _TAKEN: trial.number}
            else:
                taken = optuna.trial.create_trial(
                    state=optuna.trial.TrialState.WAITING,
                    user_attrs={_TAKEN: trial.number},
                    system_attrs={"fixed_params": {**trial.system_attrs.get("fixed_params", {}), **trial.params}},
                )
            ours.add_trial(taken)
        self._read()
        for number in numbers:
            for seed, reading in sorted(source._readings.get(number, {}).items()):
                if seed in seeds:
                    self.add_reading(number, reading)

    def close(self) -> None:
        """Release the connections."""
        self._storage.remove_session()
        self._database.engine.dispose()

    def _end(self, number: int, state: TrialState, updates: dict[str, Any]) -> TrialRecord:
        import optuna

        entry = self._trials[number]
        if entry.record.state is not TrialState.RUNNING:
            return entry.record
        updates = {"finished": _now(), **updates}
        record = entry.record.model_copy(update={"state": state, **updates})
        self._set(entry, _ENDED, updates)
        values: list[float] | None = None
        if state is TrialState.COMPLETE:
            assert record.value is not None
            values = [record.value, float(record.trainable_parameters)]
        optuna_state = {
            TrialState.COMPLETE: optuna.trial.TrialState.COMPLETE,
            TrialState.PRUNED: optuna.trial.TrialState.PRUNED,
            TrialState.FAILED: optuna.trial.TrialState.FAIL,
        }[state]
        self._storage.set_trial_state_values(entry.trial_id, optuna_state, values)
        entry.record = record
        return record

    def _add(self, number: int, entry: _Entry) -> None:
        self._trials[number] = entry
        self._started[entry.cell] += 1

    def _set(self, entry: _Entry, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(entry.trial_id, key, value)

    def _read(self) -> None:
        import optuna

        states = {
            optuna.trial.TrialState.RUNNING: TrialState.RUNNING,
            optuna.trial.TrialState.COMPLETE: TrialState.COMPLETE,
            optuna.trial.TrialState.PRUNED: TrialState.PRUNED,
            optuna.trial.TrialState.FAIL: TrialState.FAILED,
        }
        entries: dict[int, _Entry] = {}
        self._readings.clear()
        self._unconfirmed.clear()
        self._confirming.clear()
        for cell, study in self._studies.items():
            late = study.user_attrs
            self._unstarted[cell], self._infeasible[cell] = [], Counter()
            for key, value in late.items():
                kind, *place = key.split(":")
                if kind == _READING:
                    self._readings.setdefault(int(place[0]), {})[int(place[1])] = Reading(**value)
                elif kind == _UNCONFIRMED:
                    self._unconfirmed.setdefault(int(place[0]), {})[int(place[1])] = value
                elif kind == _CONFIRMING:
                    self._confirming[int(place[0]), int(place[1])] = value
            for trial in study.get_trials(deepcopy=False):
                attributes = trial.user_attrs
                if trial.state not in states:
                    continue
                if _TRIAL not in attributes:
                    if trial.state is optuna.trial.TrialState.PRUNED:
                        self._infeasible[cell][attributes[_INFEASIBLE]["number"]] += 1
                    if trial.state is optuna.trial.TrialState.RUNNING:
                        self._unstarted[cell].append(trial)
                    continue
                fields = dict(attributes[_TRIAL])
                kept = dict(attributes.get(_RUNGS, {}))
                fields |= _derived([Rung(**rung) for rung in kept.pop("rungs", [])])
                fields |= kept
                # A driver that died between the two writes of an end leaves the state RUNNING: then it has not ended.
                if trial.state is not optuna.trial.TrialState.RUNNING:
                    fields |= attributes.get(_ENDED, {})
                fields["confirmed"] = _confirmed(self._readings.get(fields["number"], {}))
                fields["failed_confirmations"] = dict(sorted(self._unconfirmed.get(fields["number"], {}).items()))
                fields["mlflow_run_id"] = late.get(f"{_RUN_ID}:{fields['number']}")
                record = TrialRecord(**{**fields, "state": states[trial.state]})
                entries[record.number] = _Entry(cell, trial._trial_id, record)
        self._trials.clear()
        self._started.clear()
        for number in sorted(entries):
            self._add(number, entries[number])


@dataclass
class _Entry:
    cell: str
    trial_id: int
    record: TrialRecord


def _check_owner(found: Mapping[str, str] | None, owner: Owner, url: str, study: str) -> None:
    """Refuse the trials of another study; those that a driver died over before it signed them belong to anyone."""
    if found is not None and found["id"] != owner.id:
        raise StudyError(
            f"the ledger {hide_password(url)} holds another study of the name {study!r}, which lives in "
            f"{found['where']}: give this one another --name, or another tracking.ledger",
            ("tracking", "ledger"),
        )
    if found is not None and owner.earlier is not None and found.get("claim") not in (None, *owner.earlier):
        raise StudyError(
            f"the ledger {hide_password(url)} holds trials of {study!r} that a copy of this storage has run, which is "
            f"{found['where']}: continue the study there, or give this one another --name; if that copy is lost, "
            f"delete {CLAIMS} in the folder of this one",
            ("tracking", "ledger"),
        )


def _confirmed(readings: Mapping[int, Reading]) -> Confirmed | None:
    return Confirmed.of([readings[seed] for seed in sorted(readings)]) if readings else None


def _derived(rungs: list[Rung]) -> dict[str, Any]:
    return {
        "rungs": rungs,
        "value": rungs[-1].value if rungs else None,
        "train_seconds": sum(rung.train_seconds for rung in rungs),
        "evaluation_seconds": sum(rung.evaluation_seconds for rung in rungs),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def hide_password(url: str) -> str:
    """The URL fit for people's eyes."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        # The driver's own options may hold one too: ?password=...
        return hide_secrets(make_url(url).render_as_string(hide_password=True))
    except ArgumentError:
        return "(not a database URL)"


warnings.filterwarnings("ignore", message=".*set_metric_names is experimental.*")
