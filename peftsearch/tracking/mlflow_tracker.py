"""MLflow as a projection of the ledger: one experiment per study, one run per domain, one child run per trial, and
below a confirmed trial one run per re-training.

What is on the server is compared with what should be there, and only the difference is written. So writing twice
changes nothing, a gap is filled by writing again, and a run that somebody deleted comes back under its old id. Trials
are found by their tags (``peftsearch.study``, ``peftsearch.domain``, ``peftsearch.number``), re-trainings by
``peftsearch.confirms`` (the trial's number) and ``seed``.

MLflow is imported in the tracker's thread only: that takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from peftsearch.spec import Reading, StudyError, StudyFacts, TrialRecord, TrialState
from peftsearch.tracking.names import confirmation_name, mlflow_names, run_name, shorten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

# MLflow's limits (mlflow.utils.validation).
_BATCH = 100
# Metrics alone, and everything together.
_METRICS = 1000
# A request may have 1 MB, and one character takes up to 12 bytes of JSON.
_CHARACTERS = 20_000
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
NOTE_LENGTH = _TAG_LENGTH
"""Characters that a run's note may have: it is a tag."""

_STUDY = "peftsearch.study"
_DOMAIN = "peftsearch.domain"
_NUMBER = "peftsearch.number"
_CONFIRMS = "peftsearch.confirms"
_REPORT = "peftsearch.report"
_PARENT = "mlflow.parentRunId"
_NOTE = "mlflow.note.content"
_KIND = "mlflow.experimentKind"
_STATUS = {
    TrialState.RUNNING: "RUNNING",
    TrialState.COMPLETE: "FINISHED",
    # As MLflow's own Optuna integration has it.
    TrialState.PRUNED: "KILLED",
    TrialState.FAILED: "FAILED",
}

_Item = TypeVar("_Item", bound=tuple[Any, ...])

_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
_HOPELESS = 30.0


@dataclass(frozen=True)
class DomainReport:
    """A domain's run in MLflow, already rendered (`peftsearch.frontier.domain_report`).

    Attributes:
        note: Markdown, at most `NOTE_LENGTH` characters.
        files: Artifacts by file name.
        metrics: Numbers about the domain: hypervolume, counts by state, baselines.
        on_front: Numbers of the trials on the front.
        step: The x of the metrics' curves: trials that have ended.
    """

    note: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    on_front: AbstractSet[int] = frozenset()
    step: int = 0


def default_tracking_uri(storage: Path) -> str:
    """The MLflow store of a storage folder: one SQLite file for all its studies."""
    return f"sqlite:///{storage.expanduser().resolve() / 'mlflow.db'}"


def default_artifacts(storage: Path) -> str:
    """Where the default store keeps its artifacts."""
    return str(storage.expanduser().resolve() / "mlflow-artifacts")


def sync(
    tracking_uri: str,
    records: Iterable[TrialRecord],
    facts: StudyFacts,
    reports: Mapping[str, DomainReport] | None = None,
    artifact_location: str | None = None,
) -> dict[int, str]:
    """Bring MLflow up to date, whatever is there already.

    Args:
        tracking_uri: The server or store.
        records: All trials of the study.
        facts: The study.
        reports: Rendered domains.
        artifact_location: Where a new experiment keeps its artifacts; the server's choice where None.

    Returns:
        The id of each trial's run.

    Raises:
        StudyError: The server cannot be reached, or refuses what it is given.
    """
    prepare_environment()
    records = list(records)
    try:
        mirror = _Mirror(tracking_uri, artifact_location, facts)
        mirror.connect()
        for record in records:
            mirror.write(record)
        for domain, report in (reports or {}).items():
            mirror.write_report(domain, report)
        mirror.settle(facts.domains, {record.domain for record in records if record.state is TrialState.RUNNING})
    except Exception as error:  # MLflow, requests and SQLAlchemy have no common base
        raise StudyError(
            f"MLflow at {_public(tracking_uri)} could not be brought up to date: {_brief(error)}"
        ) from error
    return {record.number: mirror.run_id(record.number) for record in records}


class MlflowTracker:
    """Shows a study in MLflow while it runs, from a thread of its own.

    `update` and `report` only leave a note of what is new and return at once. The thread writes about once a second;
    what it cannot write, because the server is away or refuses it, it keeps and tries again, with pauses of up to half
    a minute. Nothing that happens there is raised into the study; ``last_error`` holds the latest trouble. What MLflow
    reads from the environment is set as `prepare_environment` says.

    Args:
        tracking_uri: MLflow's server, or a database URL.
        artifact_location: Where a new experiment keeps its artifacts; the server's choice where None.
        facts: The study. Baselines that are added to it later are seen.
        on_run_id: Told each trial's run id once. It is called in the thread of whoever calls `update`, `report`,
            `flush` or `close`, so it may write the ledger.
    """

    def __init__(
        self,
        tracking_uri: str,
        artifact_location: str | None,
        facts: StudyFacts,
        on_run_id: Callable[[int, str], None],
    ) -> None:
        prepare_environment()
        self.tracking_uri = tracking_uri
        self.last_error: str | None = None
        self._facts = facts
        self._on_run_id = on_run_id
        self._mirror = _Mirror(tracking_uri, artifact_location, facts)
        self._lock = threading.Lock()
        self._records: dict[int, TrialRecord] = {}
        self._reports: dict[str, DomainReport] = {}
        self._running: dict[int, str] = {}
        self._unsettled: set[str] = set()
        self._run_ids: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._told: dict[int, str] = {}
        self._wake = threading.Event()
        self._written = threading.Condition(self._lock)
        self._closing = False
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def backlog(self) -> int:
        """How many trials and domains wait to be written."""
        with self._lock:
            return len(self._records) + len(self._reports) + len(self._unsettled)

    def update(self, record: TrialRecord) -> None:
        """A trial has changed. Only its latest state is written."""
        with self._lock:
            if self._closing:
                raise RuntimeError("the tracker is closed")
            self._records[record.number] = record
            if record.state is TrialState.RUNNING:
                self._running[record.number] = record.domain
            else:
                self._running.pop(record.number, None)
        self._deliver()

    def report(self, domain: str, report: DomainReport) -> None:
        """A domain's page has changed. Only the latest one is written."""
        with self._lock:
            if self._closing:
                raise RuntimeError("the tracker is closed")
            self._reports[domain] = report
        self._wake.set()
        self._deliver()

    def flush(self, timeout: float) -> bool:
        """Wait until everything is written, at most so many seconds; returns whether it is.

        Gives up earlier when nothing could be written for half a minute.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            self._last_progress = time.monotonic()
            while self._records or self._reports or self._unsettled:
                self._wake.set()
                now = time.monotonic()
                hopeless = self.last_error is not None and now > self._last_progress + _HOPELESS
                if now >= deadline or hopeless or not self._thread.is_alive():
                    break
                self._written.wait(min(0.5, deadline - now))
            done = not (self._records or self._reports or self._unsettled)
        self._deliver()
        return done

    def close(self, timeout: float) -> bool:
        """Write what is left, mark domains without running trials as finished, and stop.

        Returns whether everything is written. Gives up earlier when nothing could be written for half a minute. What is
        missing then is written by the next tracker that is told of the same trials, or by `sync`.
        """
        with self._lock:
            if not self._closing:
                self._closing = True
                self._unsettled = set(self._facts.domains)
        deadline = time.monotonic() + timeout
        done = self.flush(timeout)
        with self._lock:
            if not done:
                waiting = len(self._records) + len(self._reports)
                log.warning("%d trials and pages did not reach MLflow: %s", waiting, self.last_error or "no time left")
                self._records.clear()
                self._reports.clear()
                self._unsettled.clear()
        self._wake.set()
        self._thread.join(max(0.0, min(2.0, deadline - time.monotonic())))
        self._deliver()
        return done

    # --- the caller's side ---

    def _deliver(self) -> None:
        while True:
            try:
                number, run_id = self._run_ids.get_nowait()
            except queue.Empty:
                return
            self._on_run_id(number, run_id)

    # --- the thread ---

    def _work(self) -> None:
        pause = _PAUSE
        while True:
            worked = self._write_all()
            with self._lock:
                if self._closing and not (self._records or self._reports or self._unsettled):
                    return
                hurry = self._closing
            pause = _PAUSE if worked else min(_LONGEST_PAUSE, pause * 2)
            # Somebody who waits for the end is not kept waiting by a long pause.
            self._wake.wait(min(pause, _PAUSE) if hurry else pause)
            self._wake.clear()

    def _write_all(self) -> bool:
        """Write what there is; returns whether all of it could be."""
        mirror = self._mirror
        if not self._connect():
            return False
        with self._lock:
            records = list(self._records.values())
            reports = list(self._reports.items())
        worked = True
        for record in records:
            if self._attempt(partial(mirror.write, record), self._records, record.number, record):
                run_id = mirror.run_id(record.number)
                if self._told.get(record.number) != run_id:
                    self._told[record.number] = run_id
                    self._run_ids.put((record.number, run_id))
            else:
                worked = False
                # One trial that MLflow refuses must not stand in the way of the others.
                if not self._connect():
                    return False
        for domain, report in reports:
            if not self._attempt(partial(mirror.write_report, domain, report), self._reports, domain, report):
                worked = False
                if not self._connect():
                    return False
        with self._lock:
            settle = set() if self._records or self._reports else set(self._unsettled)
            running = set(self._running.values())
        if settle:
            try:
                mirror.settle(settle, running)
            except Exception as error:
                self._failed(error)
                return False
            with self._lock:
                self._unsettled -= settle
                self._progressed()
        return worked

    def _connect(self) -> bool:
        try:
            self._mirror.connect()
        except Exception as error:
            self._failed(error)
            return False
        return True

    def _attempt(self, write: Callable[[], None], waiting: dict[Any, Any], key: Any, written: Any) -> bool:
        try:
            write()
        except Exception as error:
            self._failed(error)
            return False
        with self._lock:
            if waiting.get(key) is written:
                del waiting[key]
            self._progressed()
        return True

    def _progressed(self) -> None:
        self._last_progress = time.monotonic()
        self.last_error = None
        self._written.notify_all()

    def _failed(self, error: Exception) -> None:
        # What the server holds is no longer known: a request may have been carried out though its answer was lost.
        self._mirror.forget()
        message = _brief(error)
        if message != self.last_error:
            log.info("MLflow at %s: %s", _public(self.tracking_uri), message)
        self.last_error = message


@dataclass
class _Known:
    """A run as the server has it."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    steps: set[int] | None
    """Steps whose curves are written; None where the server has not been asked."""
    deleted: bool = False


class _Mirror:
    """What is on the server, and how to make it what it should be. Used by one thread at a time."""

    def __init__(self, tracking_uri: str, artifact_location: str | None, facts: StudyFacts) -> None:
        self.tracking_uri = tracking_uri
        self.artifact_location = artifact_location
        self.facts = facts
        self._client: MlflowClient | None = None
        self._experiment: str | None = None
        self._parents: dict[str, _Known] = {}
        self._trials: dict[int, _Known] = {}
        self._twins: dict[int, list[_Known]] = {}
        self._readings: dict[tuple[str, str], _Known] = {}
        self._on_front: dict[str, AbstractSet[int]] = {}

    @property
    def connected(self) -> bool:
        """Whether the server's state is known."""
        return self._experiment is not None

    def run_id(self, number: int) -> str:
        """The run of a trial that has been written."""
        return self._trials[number].run_id

    def forget(self) -> None:
        """Ask the server again before the next write."""
        self._experiment = None

    @property
    def client(self) -> MlflowClient:
        """Made at the first use."""
        if self._client is None:
            _prepare_sqlite(self.tracking_uri)
            from mlflow import MlflowClient

            # Schema migrations of a new database are announced at length, in the middle of a progress display.
            for name in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(name).setLevel(logging.WARNING)
            self._client = MlflowClient(tracking_uri=self.tracking_uri)
        return self._client

    def connect(self) -> None:
        """Find (or create) the experiment and the domains' runs, and read what is there."""
        if self.connected:
            return
        client, facts = self.client, self.facts
        found = client.get_experiment_by_name(facts.study)
        if found is None:
            experiment = client.create_experiment(facts.study, self.artifact_location)
        else:
            experiment = found.experiment_id
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(experiment)
        tags = {_STUDY: facts.study} | ({_NOTE: facts.description} if facts.description else {})
        have = {} if found is None else found.tags
        if _KIND not in have:
            # Else the UI guesses whether the experiment is about training or about chats.
            tags[_KIND] = "custom_model_development"
        for key, value in tags.items():
            if have.get(key) != value:
                client.set_experiment_tag(experiment, key, value)
        self._read(experiment)
        for domain in facts.domains:
            self._ensure_parent(experiment, domain)
        for known in self._trials.values():
            # Trials whose domain's run is gone for good (mlflow gc) move below the new one.
            parent = self._parents.get(known.tags.get(_DOMAIN, ""))
            if parent is not None and not known.deleted and known.tags.get(_PARENT) != parent.run_id:
                self._log(known, [], {}, {_PARENT: parent.run_id})
        self._experiment = experiment

    def write(self, record: TrialRecord) -> None:
        """Make a trial's run what it should be."""
        assert self._experiment is not None
        client = self.client
        domain = self._parents[record.domain]
        if record.state is TrialState.RUNNING:
            self.settle([record.domain], {record.domain})
        for twin in self._twins.get(record.number, []):
            if twin.run_id == record.mlflow_run_id:
                self._trials[record.number] = twin
        known = self._trials.get(record.number)
        if known is not None:
            self._restore(known)
        on_front = self._front_tag(record, known)
        tags = _texts(self._trial_tags(record, domain.run_id, on_front), _TAG_LENGTH)
        params = _texts(_trial_params(record), _PARAM_LENGTH)
        if known is None:
            first = dict(list(tags.items())[: _BATCH // 2])
            run = client.create_run(
                self._experiment, start_time=_start(record), tags=first, run_name=first["mlflow.runName"]
            )
            known = self._trials[record.number] = _Known(run.info.run_id, "RUNNING", dict(first), {}, {}, set())
        status = _STATUS[record.state]
        if known.steps is None and (known.status == "RUNNING" or status == "RUNNING"):
            known.steps = {metric.step for metric in client.get_metric_history(known.run_id, "loss")}
        curves = [] if known.steps is None else _curves(record, known.steps)
        scalars = _changed(_scalars(record), known.metrics)
        moment = _end(record) or _moments(record)[-1]
        step = record.rungs[-1].step if record.rungs else 0
        self._log(
            known,
            [*curves, *((key, value, moment, step) for key, value in scalars.items())],
            {key: value for key, value in params.items() if key not in known.params},
            {key: value for key, value in tags.items() if known.tags.get(key) != value},
        )
        if known.steps is not None:
            known.steps |= {rung.step for rung in record.rungs}
        if known.status != status:
            if status == "RUNNING":
                client.update_run(known.run_id, status="RUNNING")
            else:
                client.set_terminated(known.run_id, status, end_time=_end(record))
            known.status = status
        for reading in record.confirmed.readings if record.confirmed else ():
            self._write_reading(record, known.run_id, reading)

    def _write_reading(self, record: TrialRecord, parent: str, reading: Reading) -> None:
        """Make the run of a re-training what it should be; its metrics stand at its last step."""
        assert self._experiment is not None
        tags = _texts(self._reading_tags(record, parent, reading), _TAG_LENGTH)
        params = _texts({**_trial_params(record), "seed": reading.seed}, _PARAM_LENGTH)
        key = (tags[_CONFIRMS], tags["seed"])
        known = self._readings.get(key)
        end = _milliseconds(reading.read_at) or _end(record) or 0
        if known is None:
            first = dict(list(tags.items())[: _BATCH // 2])
            start = end - round(1000 * (reading.train_seconds + reading.evaluation_seconds))
            run = self.client.create_run(
                self._experiment, start_time=start, tags=first, run_name=first["mlflow.runName"]
            )
            known = self._readings[key] = _Known(run.info.run_id, "RUNNING", dict(first), {}, {}, None)
        self._restore(known)
        metrics = _changed(_reading_scalars(reading), known.metrics)
        self._log(
            known,
            [(name, value, end, reading.steps) for name, value in metrics.items()],
            {name: value for name, value in params.items() if name not in known.params},
            {name: value for name, value in tags.items() if known.tags.get(name) != value},
        )
        if known.status != "FINISHED":
            self.client.set_terminated(known.run_id, "FINISHED", end_time=end)
            known.status = "FINISHED"

    def write_report(self, domain: str, report: DomainReport) -> None:
        """Make a domain's run what it should be, and mark which trials are on the front."""
        known = self._parents[domain]
        self._on_front[domain] = report.on_front
        names = mlflow_names(report.metrics)
        metrics = _changed({names[name]: value for name, value in report.metrics.items()}, known.metrics)
        now = int(time.time() * 1000)
        tags = {_NOTE: shorten(report.note, NOTE_LENGTH), _REPORT: _fingerprint(report)}
        if known.tags.get(_REPORT) != tags[_REPORT]:
            self._upload(known.run_id, report.files)
        self._log(
            known,
            [(key, value, now, report.step) for key, value in metrics.items()],
            {},
            {key: value for key, value in tags.items() if known.tags.get(key) != value},
        )
        for number, trial in self._trials.items():
            if trial.tags.get("domain") == domain:
                tag = _flag(number in report.on_front)
                if trial.tags.get("on_front") != tag and not trial.deleted:
                    self._log(trial, [], {}, {"on_front": tag})

    def settle(self, domains: Iterable[str], running: AbstractSet[str]) -> None:
        """Mark domains as finished, or as running where trials of theirs are."""
        for domain in domains:
            known = self._parents[domain]
            status = "RUNNING" if domain in running else "FINISHED"
            if known.status != status:
                if status == "RUNNING":
                    self.client.update_run(known.run_id, status=status)
                else:
                    self.client.set_terminated(known.run_id, status)
                known.status = status

    # --- reading ---

    def _read(self, experiment: str) -> None:
        from mlflow.entities import ViewType

        self._parents.clear()
        self._trials.clear()
        self._twins.clear()
        self._readings.clear()
        runs: list[Run] = []
        token: str | None = None
        while True:
            # Deleted runs too: a trial whose run was deleted gets that run back, so there are never two.
            page = self.client.search_runs(
                [experiment],
                run_view_type=ViewType.ALL,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                break
        # Where there are two after all, the one that is not deleted counts, unless the ledger names the other.
        for run in sorted(runs, key=lambda run: run.info.lifecycle_stage == "deleted"):
            tags = run.data.tags
            if tags.get(_STUDY) != self.facts.study:
                continue
            known = _Known(
                run_id=run.info.run_id,
                status=run.info.status,
                tags=dict(tags),
                params=dict(run.data.params),
                metrics=dict(run.data.metrics),
                steps=None,
                deleted=run.info.lifecycle_stage == "deleted",
            )
            if _CONFIRMS in tags:
                self._readings.setdefault((tags[_CONFIRMS], tags.get("seed", "")), known)
            elif _NUMBER not in tags:
                self._parents.setdefault(tags.get(_DOMAIN, ""), known)
            elif tags[_NUMBER].isdecimal():
                number = int(tags[_NUMBER])
                self._trials.setdefault(number, known)
                self._twins.setdefault(number, []).append(known)

    # --- writing ---

    def _ensure_parent(self, experiment: str, domain: str) -> None:
        facts = self.facts.domains[domain]
        tags: dict[str, Any] = {
            "mlflow.runName": domain,
            "mlflow.source.name": "peftsearch",
            _STUDY: self.facts.study,
            _DOMAIN: domain,
            "domain": domain,
            "task": facts.task,
        }
        tags |= self._provenance(domain)
        params: dict[str, Any] = {
            "metric": facts.metric,
            "direction": facts.direction,
            **{f"rows_{split}": rows for split, rows in facts.rows.items()},
            "labels": len(facts.labels),
            "max_length": facts.max_length,
            "source": facts.source,
            "fingerprint": facts.fingerprint,
        }
        tags = _texts(tags, _TAG_LENGTH)
        params = _texts(params, _PARAM_LENGTH)
        known = self._parents.get(domain)
        if known is None:
            first = dict(list(tags.items())[: _BATCH // 2])
            run = self.client.create_run(experiment, tags=first, run_name=domain)
            known = self._parents[domain] = _Known(run.info.run_id, "RUNNING", dict(first), {}, {}, None)
        self._restore(known)
        self._log(
            known,
            [],
            {key: value for key, value in params.items() if key not in known.params},
            {key: value for key, value in tags.items() if known.tags.get(key) != value},
        )

    def _restore(self, known: _Known) -> None:
        if known.deleted:
            self.client.restore_run(known.run_id)
            known.deleted = False

    def _trial_tags(self, record: TrialRecord, parent: str, on_front: str) -> dict[str, Any]:
        tags: dict[str, Any] = {
            "mlflow.runName": run_name(record),
            "mlflow.source.name": "peftsearch",
            _PARENT: parent,
            _STUDY: self.facts.study,
            _DOMAIN: record.domain,
            _NUMBER: str(record.number),
            "domain": record.domain,
            "model": record.model,
            "method": record.method,
            "state": record.state.value,
            "on_front": on_front,
        }
        if record.error is not None:
            tags["error"] = record.error
        if record.checkpoint is not None:
            tags["checkpoint"] = record.checkpoint
        return tags | self._provenance(record.domain, record.model)

    def _reading_tags(self, record: TrialRecord, parent: str, reading: Reading) -> dict[str, Any]:
        tags: dict[str, Any] = {
            "mlflow.runName": confirmation_name(record, reading.seed),
            "mlflow.source.name": "peftsearch",
            _PARENT: parent,
            _STUDY: self.facts.study,
            _DOMAIN: record.domain,
            _CONFIRMS: str(record.number),
            "seed": str(reading.seed),
            "domain": record.domain,
            "model": record.model,
            "method": record.method,
        }
        if reading.read_at is not None:
            tags["test_read_at"] = reading.read_at
        if reading.predictions is not None:
            tags["predictions"] = reading.predictions
        return tags | self._provenance(record.domain, record.model)

    def _provenance(self, domain: str, model: str | None = None) -> dict[str, str]:
        tags = {f"provenance.{key}": value for key, value in self.facts.provenance.items()}
        commit = self.facts.provenance.get("git_commit")
        if commit:
            tags["mlflow.source.git.commit"] = commit.split()[0]
        tags["provenance.data_fingerprint"] = self.facts.domains[domain].fingerprint
        models = self.facts.models
        for name in models if model is None else [model]:
            if name in models:
                key = "provenance.model_fingerprint" if len(models) == 1 else f"provenance.model_fingerprint.{name}"
                tags[key if model is None else "provenance.model_fingerprint"] = models[name].fingerprint
        return tags

    def _front_tag(self, record: TrialRecord, known: _Known | None) -> str:
        chosen = self._on_front.get(record.domain)
        if chosen is not None:
            return _flag(record.number in chosen)
        return known.tags.get("on_front", "false") if known else "false"

    def _log(
        self,
        known: _Known,
        metrics: Sequence[tuple[str, float, int, int]],
        params: dict[str, str],
        tags: dict[str, str],
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if not (metrics or params or tags):
            return
        metric_rest, param_rest, tag_rest = list(metrics), list(params.items()), list(tags.items())
        while metric_rest or param_rest or tag_rest:
            some_params, param_rest = _take(param_rest, _BATCH)
            some_tags, tag_rest = _take(tag_rest, _BATCH)
            some_metrics, metric_rest = _take(metric_rest, _METRICS - len(some_params) - len(some_tags))
            self.client.log_batch(
                known.run_id,
                [Metric(key, value, moment, step) for key, value, moment, step in some_metrics],
                [Param(key, value) for key, value in some_params],
                [RunTag(key, value) for key, value in some_tags],
            )
        known.params |= params
        known.tags |= tags
        known.metrics |= {key: value for key, value, _, _ in metrics}

    def _upload(self, run_id: str, files: Mapping[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            self.client.log_artifacts(run_id, folder)


# --- what a trial's run holds ---


def _trial_params(record: TrialRecord) -> dict[str, Any]:
    names = mlflow_names(record.hyperparameters)
    params = {names[name]: value for name, value in record.hyperparameters.items()}
    return {**params, "model": record.model, "seed": record.seed, "total_steps": record.total_steps}


def _curves(record: TrialRecord, written: set[int]) -> list[tuple[str, float, int, int]]:
    """Name, value, milliseconds since the epoch, and step, of every evaluation that is not written yet."""
    metrics: list[tuple[str, float, int, int]] = []
    for rung, moment in zip(record.rungs, _moments(record), strict=False):
        if rung.step in written:
            continue
        scores = {name: value for name, value in rung.scores.items() if "/" not in name}
        names = mlflow_names(scores)
        values = {names[name]: value for name, value in scores.items()}
        # The loss comes last: a step is known to be written by its loss, if a batch was cut in the middle.
        values |= {"train_loss": rung.train_loss}
        values.pop("loss", None)
        values |= {"loss": rung.loss}
        metrics += [(name, value, moment, rung.step) for name, value in values.items()]
    return metrics


def _scalars(record: TrialRecord) -> dict[str, float]:
    """What is one number per trial; most of it is known only at the end."""
    values: dict[str, float | None] = {
        "trainable_parameters": record.trainable_parameters,
        "exported_parameters": record.exported_parameters,
        "estimated_memory_bytes": record.estimated_memory_bytes,
        "estimated_seconds": record.estimated_seconds,
    }
    if record.state is not TrialState.RUNNING:
        values |= {
            "value": record.value,
            "train_seconds": record.train_seconds,
            "evaluation_seconds": record.evaluation_seconds,
            "peak_memory_bytes": record.peak_memory_bytes,
        }
        values |= {name: value for name, value in record.scores.items() if "/" in name}
    if record.confirmed is not None:
        summary = record.confirmed.model_dump(include={"seeds", "mean", "std", "test_mean", "test_std"})
        values |= {f"confirmed_{key}": value for key, value in summary.items()}
    return _named(values)


def _reading_scalars(reading: Reading) -> dict[str, float]:
    values: dict[str, float | None] = {
        "value": reading.value,
        "loss": reading.loss,
        "train_seconds": reading.train_seconds,
        "evaluation_seconds": reading.evaluation_seconds,
        "peak_memory_bytes": reading.peak_memory_bytes,
        "test": reading.test,
        "test_loss": reading.test_loss,
        "examples_per_second": reading.examples_per_second,
    }
    return _named(values | {f"test_{name}": value for name, value in reading.test_scores.items() if name != "loss"})


def _named(values: Mapping[str, float | None]) -> dict[str, float]:
    names = mlflow_names(values)
    return {names[name]: float(value) for name, value in values.items() if value is not None}


def _changed(wanted: Mapping[str, float], known: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in wanted.items() if key not in known or not _same(known[key], value)}


def _same(stored: float, value: float) -> bool:
    if math.isnan(value):
        # Stores keep NaN as 0 with a mark, and some answers lose the mark.
        return math.isnan(stored) or stored == 0
    if math.isinf(value):
        return math.isinf(stored) or abs(stored) > 1e308
    return math.isclose(stored, value, rel_tol=1e-9, abs_tol=1e-12)


def _texts(values: Mapping[str, Any], length: int) -> dict[str, str]:
    names = mlflow_names(values)
    return {names[key]: shorten(str(value), length) for key, value in values.items()}


def _take(items: list[_Item], count: int) -> tuple[list[_Item], list[_Item]]:
    """As many of the first items as fit into one request (at least one), and the rest."""
    size, taken = 0, 0
    for item in items[:count]:
        size += sum(len(part) for part in item if isinstance(part, str))
        if taken and size > _CHARACTERS:
            break
        taken += 1
    return items[:taken], items[taken:]


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _milliseconds(moment: str | None) -> int | None:
    if moment is None:
        return None
    try:
        return int(datetime.fromisoformat(moment).timestamp() * 1000)
    except ValueError:
        return None


def _start(record: TrialRecord) -> int | None:
    return _milliseconds(record.started)


def _end(record: TrialRecord) -> int | None:
    return None if record.state is TrialState.RUNNING else _milliseconds(record.finished)


def _moments(record: TrialRecord) -> list[int]:
    """When each evaluation ended, as far as the record tells; the same whenever it is asked, so that a metric that is
    written twice is one metric. The start, where there was no evaluation.
    """
    moment = float(_start(record) or 0)
    moments = [int(moment)] if not record.rungs else []
    for rung in record.rungs:
        moment += 1000 * (rung.train_seconds + rung.evaluation_seconds)
        moments.append(int(moment))
    return moments


def _fingerprint(report: DomainReport) -> str:
    digest = hashlib.sha256(json.dumps(report.note).encode())
    for name in sorted(report.files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(report.files[name]).digest())
    return digest.hexdigest()[:16]


# --- the store ---


def prepare_environment() -> None:
    """Settings that MLflow reads from the environment, where the user has not set them.

    - ``MLFLOW_HTTP_REQUEST_TIMEOUT`` = 10 (seconds; MLflow's 120 would hold up the end of a study),
    - ``MLFLOW_HTTP_REQUEST_MAX_RETRIES`` = 0 (we try again ourselves, after looking at what is there: a request that is
      blindly sent twice may create a run twice),
    - ``MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT`` and ``MLFLOW_DISABLE_TELEMETRY`` = true.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def _prepare_sqlite(tracking_uri: str) -> None:
    """Create a SQLite store's folder, and have the file use a write-ahead log.

    It is remembered in the file. Writing a trial then takes a third of the time, and whoever looks at the UI neither
    waits for the study nor stops it. https://www.sqlite.org/wal.html
    """
    prefix = "sqlite:///"
    if not tracking_uri.startswith(prefix):
        return
    import sqlite3

    path = Path(tracking_uri.removeprefix(prefix).partition("?")[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=10)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def _public(tracking_uri: str) -> str:
    from peftsearch.tracking.ledger import hide_password

    return hide_password(tracking_uri) if "://" in tracking_uri and "@" in tracking_uri else tracking_uri


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return shorten(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, 300)
