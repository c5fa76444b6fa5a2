"""What is on MLflow's server, and how to make it what it should be.

What is there is compared with what should be there, and only the difference is written. So writing twice changes
nothing, a gap is filled by writing again, and a run that somebody deleted comes back under its old id. Trials are found
by their tags (``peftsearch.study``, ``peftsearch.domain``, ``peftsearch.number``), re-trainings by
``peftsearch.confirms`` (the trial's number) and ``seed``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsearch.spec import Reading, StudyFacts, TrialRecord, TrialState
from peftsearch.tracking.mlflow_runs import (
    BATCH,
    CONFIRMS,
    DATA_CONTEXT,
    DOMAIN,
    KIND,
    METRICS,
    NOTE,
    NOTE_LENGTH,
    NUMBER,
    PARAM_LENGTH,
    PARENT,
    REPORT,
    STATUS,
    STUDY,
    STUDY_ID,
    TAG_LENGTH,
    THIS_RUN,
    DomainReport,
    confirmed_at,
    confirmed_numbers,
    curve_points,
    data_profile,
    differing,
    end_of,
    fingerprint_of,
    first_numbers,
    flag,
    last_numbers,
    moments_of,
    reading_numbers,
    start_of,
    take,
    texts,
    to_milliseconds,
    trial_note,
    trial_params,
)
from peftsearch.tracking.mlflow_store import prepare_sqlite, public_uri, relocate_artifacts
from peftsearch.tracking.mlflow_views import saved_views, unless_a_readers, view_links
from peftsearch.tracking.names import confirmation_name, description_note, mlflow_names, run_name, shorten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Experiment, Run


# MLflow's limits (mlflow.utils.validation).
_DATA_NAME = 500
_DATA_DIGEST = 36

_ID_SHOWN = 8
"""How much of a study's id tells its experiment from that of another study of the same name."""

log = logging.getLogger(__name__)


@dataclass
class Known:
    """A run as the server has it."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    steps: set[int] | None
    """Steps whose curves are written; None where the server has not been asked."""
    data: set[tuple[str, str]] = field(default_factory=set)
    """Names and digests of the data sets that it used."""
    deleted: bool = False
    brief: bool = False
    """Whether only what every report asks for is kept here, see `Mirror._recall`."""

    def shorten(self) -> None:
        """Drop what is not needed any more: of ten thousand trials it is a lot."""
        self.tags = {key: self.tags[key] for key in _KEPT if key in self.tags}
        self.params, self.metrics, self.steps, self.brief = {}, {}, None, True


_KEPT = (PARENT, DOMAIN, NUMBER, "domain", "on_front", "pick", "method_best")


class Mirror:
    """What is on the server, and how to make it what it should be. Used by one thread at a time.

    A write that fails leaves in doubt what the server holds of that trial and its domain: a request may have been
    carried out though its answer was lost. So the server is asked for these again, and for nothing else.
    """

    def __init__(self, tracking_uri: str, artifact_location: str | None, facts: StudyFacts) -> None:
        self.tracking_uri = tracking_uri
        self.artifact_location = artifact_location
        self.facts = facts
        self._client: MlflowClient | None = None
        self._experiment: str | None = None
        self.experiment_name: str | None = None
        """What MLflow calls the study, once it is connected: its name, where no other study there has it."""
        self._parents: dict[str, Known] = {}
        self._trials: dict[int, Known] = {}
        self._twins: dict[int, list[Known]] = {}
        self._readings: dict[tuple[str, str], Known] = {}
        self._reports: dict[str, DomainReport] = {}
        self._doubted_trials: set[int] = set()
        self._doubted_domains: set[str] = set()

    @property
    def connected(self) -> bool:
        """Whether the server's state is known."""
        return self._experiment is not None

    @property
    def experiment(self) -> str | None:
        """The experiment's id, once it is connected."""
        return self._experiment

    def run_id(self, number: int) -> str:
        """The run of a trial that has been written."""
        return self._trials[number].run_id

    @property
    def client(self) -> MlflowClient:
        """Made at the first use."""
        if self._client is None:
            prepare_sqlite(self.tracking_uri)
            from mlflow import MlflowClient

            # Schema migrations of a new database are announced at length, in the middle of a progress display.
            for name in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(name).setLevel(logging.WARNING)
            self._client = MlflowClient(tracking_uri=self.tracking_uri)
        return self._client

    def connect(self) -> None:
        """Find (or create) the experiment and the domains' runs, and read what is there; or see, after a write that
        failed, that they still are what they were."""
        if self.connected and (not self._doubted_domains or self._still_there()):
            self._doubted_domains.clear()
            return
        self._experiment = None
        client, facts = self.client, self.facts
        self._relocate()
        mine = {STUDY_ID: facts.id} if facts.id else {}
        found, name = self._find()
        if found is None:
            experiment = client.create_experiment(name, self.artifact_location, mine)
            if name != facts.study:
                log.warning(
                    "MLflow at %s shows another study named %r: this one's experiment is %r",
                    public_uri(self.tracking_uri),
                    facts.study,
                    name,
                )
        else:
            experiment = found.experiment_id
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(experiment)
        # MLflow shows the first line above the run table, and the rest when it is asked to.
        paragraphs = [description_note(facts.description)] if facts.description else []
        note = "\n\n".join([view_links(experiment, facts.study), *paragraphs])
        tags = {STUDY: facts.study, **mine}
        have = {} if found is None else found.tags
        if KIND not in have:
            # Else the UI guesses whether the experiment is about training or about chats.
            tags[KIND] = "custom_model_development"
        for key, value in {NOTE: note, **saved_views(facts)}.items():
            tags |= unless_a_readers(key, value, have)
        for key, value in tags.items():
            if have.get(key) != value:
                client.set_experiment_tag(experiment, key, value)
        self._read(experiment)
        for domain in facts.domains:
            self._ensure_parent(experiment, domain)
        for known in self._trials.values():
            # Trials whose domain's run is gone for good (mlflow gc) move below the new one.
            parent = self._parents.get(known.tags.get(DOMAIN, ""))
            if parent is not None and not known.deleted and known.tags.get(PARENT) != parent.run_id:
                self._log(known, [], {}, {PARENT: parent.run_id})
        self._experiment, self.experiment_name = experiment, name
        self._doubted_trials.clear()
        self._doubted_domains.clear()

    def write(self, record: TrialRecord) -> None:
        """Make a trial's run what it should be."""
        with self._doubted_where_it_fails(record.domain, record.number):
            self._read_again(record.number)
            self._write(record)

    def _write(self, record: TrialRecord) -> None:
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
            self._recall(known)
            self._restore(known)
        chosen = self._chosen_tags(record, known)
        tags = texts(self._trial_tags(record, domain.run_id) | chosen, TAG_LENGTH)
        if known is None or NOTE not in known.tags:
            tags[NOTE] = trial_note(record, self.facts.study)
        params = texts(trial_params(record), PARAM_LENGTH)
        if known is None:
            begin = dict(list(tags.items())[: BATCH // 2])
            run = client.create_run(
                self._experiment, start_time=start_of(record), tags=begin, run_name=begin["mlflow.runName"]
            )
            known = self._trials[record.number] = Known(run.info.run_id, "RUNNING", dict(begin), {}, {}, set())
        status = STATUS[record.state]
        if known.steps is None and (known.status == "RUNNING" or status == "RUNNING"):
            known.steps = {metric.step for metric in client.get_metric_history(known.run_id, "loss")}
        curves = [] if known.steps is None else curve_points(record, known.steps)
        moments = moments_of(record)
        began, ended = start_of(record) or moments[0], end_of(record) or moments[-1]
        step = record.rungs[-1].step if record.rungs else 0
        first = differing(first_numbers(record), known.metrics)
        last = differing(last_numbers(record), known.metrics)
        confirmed, then = differing(confirmed_numbers(record), known.metrics), confirmed_at(record, ended)
        self._log(
            known,
            [
                *curves,
                *((key, value, began, 0) for key, value in first.items()),
                *((key, value, ended, step) for key, value in last.items()),
                *((key, value, then, step) for key, value in confirmed.items()),
            ],
            {key: value for key, value in params.items() if key not in known.params},
            {key: value for key, value in tags.items() if known.tags.get(key) != value},
        )
        if known.steps is not None:
            known.steps |= {rung.step for rung in record.rungs}
        self._log_data(known, record.domain, "training")
        if known.status != status:
            if status == "RUNNING":
                client.update_run(known.run_id, status="RUNNING")
            else:
                client.set_terminated(known.run_id, status, end_time=end_of(record))
            known.status = status
        for reading in record.confirmed.readings if record.confirmed else ():
            self._write_reading(record, known.run_id, reading)
        if record.state is not TrialState.RUNNING:
            known.shorten()

    def _write_reading(self, record: TrialRecord, parent: str, reading: Reading) -> None:
        """Make the run of a re-training what it should be; its metrics stand at its last step."""
        assert self._experiment is not None
        tags = texts(self._reading_tags(record, parent, reading), TAG_LENGTH)
        params = texts({**trial_params(record), "seed": reading.seed}, PARAM_LENGTH)
        key = (tags[CONFIRMS], tags["seed"])
        known = self._readings.get(key)
        end = to_milliseconds(reading.read_at) or end_of(record) or 0
        if known is None:
            first = dict(list(tags.items())[: BATCH // 2])
            start = end - round(1000 * (reading.train_seconds + reading.evaluation_seconds))
            run = self.client.create_run(
                self._experiment, start_time=start, tags=first, run_name=first["mlflow.runName"]
            )
            known = self._readings[key] = Known(run.info.run_id, "RUNNING", dict(first), {}, {}, None)
        self._restore(known)
        metrics = differing(reading_numbers(reading), known.metrics)
        self._log(
            known,
            [(name, value, end, reading.steps) for name, value in metrics.items()],
            {name: value for name, value in params.items() if name not in known.params},
            {name: value for name, value in tags.items() if known.tags.get(name) != value},
        )
        self._log_data(known, record.domain, "testing")
        if known.status != "FINISHED":
            self.client.set_terminated(known.run_id, "FINISHED", end_time=end)
            known.status = "FINISHED"

    def write_report(self, domain: str, report: DomainReport) -> None:
        """Make a domain's run what it should be, and mark which trials are on the front."""
        with self._doubted_where_it_fails(domain):
            self._write_report(domain, report)
        for number in [number for number, trial in self._trials.items() if trial.tags.get("domain") == domain]:
            with self._doubted_where_it_fails(domain, number):
                self._read_again(number)
                self._choose(number, report)

    def _write_report(self, domain: str, report: DomainReport) -> None:
        assert self._experiment is not None
        # What is known of the study grows while it runs: provenance, for one.
        self._ensure_parent(self._experiment, domain)
        known = self._parents[domain]
        self._reports[domain] = report
        names = mlflow_names(report.metrics)
        metrics = differing({names[name]: value for name, value in report.metrics.items()}, known.metrics)
        now = int(time.time() * 1000)
        note = report.note.replace(THIS_RUN, known.run_id)
        tags = {NOTE: shorten(note, NOTE_LENGTH), REPORT: fingerprint_of(report)}
        if known.tags.get(REPORT) != tags[REPORT]:
            self._upload(known.run_id, report.files)
        self._log(
            known,
            [(key, value, now, report.step) for key, value in metrics.items()],
            {},
            {key: value for key, value in tags.items() if known.tags.get(key) != value},
        )

    def _choose(self, number: int, report: DomainReport) -> None:
        trial = self._trials.get(number)
        if trial is not None and not trial.deleted:
            chosen = _chosen(number, report)
            self._log(trial, [], {}, {key: value for key, value in chosen.items() if trial.tags.get(key) != value})

    def settle(self, domains: Iterable[str], running: AbstractSet[str]) -> None:
        """Mark domains as finished, or as running where trials of theirs are."""
        for domain in domains:
            known = self._parents[domain]
            status = "RUNNING" if domain in running else "FINISHED"
            if known.status != status:
                with self._doubted_where_it_fails(domain):
                    if status == "RUNNING":
                        self.client.update_run(known.run_id, status=status)
                    else:
                        self.client.set_terminated(known.run_id, status)
                known.status = status

    # --- reading ---

    def _find(self) -> tuple[Experiment | None, str]:
        """The study's experiment, None where there is none yet, and its name.

        The experiment that carries the study's id, whatever somebody has called it since; else the one of its name,
        unless that is of another study of the same name: a server is shared by groups who do not know each other.
        """
        from mlflow.entities import ViewType
        from mlflow.exceptions import MlflowException

        facts, client = self.facts, self.client
        if facts.id is None:
            return client.get_experiment_by_name(facts.study), facts.study
        found = client.search_experiments(ViewType.ALL, filter_string=f"tags.`{STUDY_ID}` = '{facts.id}'")
        if found:
            # Where somebody has copied the tag, the oldest.
            experiment = min(found, key=lambda item: (item.lifecycle_stage == "deleted", item.creation_time or 0))
            return experiment, experiment.name
        for name in (facts.study, f"{facts.study} {facts.id[:_ID_SHOWN]}"):
            try:
                named = client.get_experiment_by_name(name)
            except MlflowException as error:
                # A server with permissions does not show what belongs to others.
                if error.error_code != "PERMISSION_DENIED":
                    raise
                continue
            if named is None or named.tags.get(STUDY_ID, facts.id) == facts.id:
                return named, name
        return None, f"{facts.study} {facts.id}"

    @contextlib.contextmanager
    def _doubted_where_it_fails(self, domain: str, number: int | None = None) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._doubted_domains.add(domain)
            if number is not None:
                self._doubted_trials.add(number)
            raise

    def _still_there(self) -> bool:
        """Ask for the experiment and for the runs of the domains that are in doubt; returns whether they are there."""
        from mlflow.exceptions import MlflowException

        assert self._experiment is not None
        found, self.experiment_name = self._find()
        if found is None or found.experiment_id != self._experiment or found.lifecycle_stage == "deleted":
            return False
        for domain in self._doubted_domains & self._parents.keys():
            try:
                run = self.client.get_run(self._parents[domain].run_id)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return False
                raise
            self._parents[domain] = _known(run)
            self._ensure_parent(self._experiment, domain)
        return True

    def _read_again(self, number: int) -> None:
        """Ask for the runs of a trial that is in doubt."""
        if number not in self._doubted_trials:
            return
        assert self._experiment is not None
        runs = [
            run for tag in (NUMBER, CONFIRMS) for run in self._search(self._experiment, f"tags.`{tag}` = '{number}'")
        ]
        self._trials.pop(number, None)
        self._twins.pop(number, None)
        for key in [key for key in self._readings if key[0] == str(number)]:
            del self._readings[key]
        self._take(runs)
        self._doubted_trials.discard(number)

    def _read(self, experiment: str) -> None:
        self._parents.clear()
        self._trials.clear()
        self._twins.clear()
        self._readings.clear()
        self._take(self._search(experiment))

    def _search(self, experiment: str, filter_string: str = "") -> list[Run]:
        from mlflow.entities import ViewType

        runs: list[Run] = []
        token: str | None = None
        while True:
            # Deleted runs too: a trial whose run was deleted gets that run back, so there are never two.
            page = self.client.search_runs(
                [experiment],
                filter_string,
                run_view_type=ViewType.ALL,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _take(self, runs: Iterable[Run]) -> None:
        # Where there are two after all, the one that is not deleted counts, unless the ledger names the other.
        for run in sorted(runs, key=lambda run: run.info.lifecycle_stage == "deleted"):
            tags = run.data.tags
            if tags.get(STUDY) != self.facts.study:
                continue
            known = _known(run)
            if CONFIRMS in tags:
                self._readings.setdefault((tags[CONFIRMS], tags.get("seed", "")), known)
            elif NUMBER not in tags:
                self._parents.setdefault(tags.get(DOMAIN, ""), known)
            elif tags[NUMBER].isdecimal():
                number = int(tags[NUMBER])
                self._trials.setdefault(number, known)
                self._twins.setdefault(number, []).append(known)

    # --- writing ---

    def _ensure_parent(self, experiment: str, domain: str) -> None:
        facts = self.facts.domains[domain]
        tags: dict[str, Any] = {
            "mlflow.runName": domain,
            "mlflow.source.name": "peftsearch",
            STUDY: self.facts.study,
            DOMAIN: domain,
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
        tags = texts(tags, TAG_LENGTH)
        params = texts(params, PARAM_LENGTH)
        known = self._parents.get(domain)
        if known is None:
            first = dict(list(tags.items())[: BATCH // 2])
            run = self.client.create_run(experiment, tags=first, run_name=domain)
            known = self._parents[domain] = Known(run.info.run_id, "RUNNING", dict(first), {}, {}, None)
        self._restore(known)
        self._log(
            known,
            [],
            {key: value for key, value in params.items() if key not in known.params},
            {key: value for key, value in tags.items() if known.tags.get(key) != value},
        )
        self._log_data(known, domain, "training")

    def _log_data(self, known: Known, domain: str, context: str) -> None:
        """Have a run say which data it used, so that MLflow finds a data set's runs."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        facts = self.facts.domains[domain]
        name, digest = shorten(domain, _DATA_NAME), facts.fingerprint[:_DATA_DIGEST]
        if (name, digest) in known.data:
            return
        # MLflow's types of sources open what they name; only what the study file says of it is known here.
        source = json.dumps({"tags": {"source": shorten(facts.source, PARAM_LENGTH), "task": facts.task}})
        dataset = Dataset(name, digest, "code", source, profile=data_profile(facts))
        self.client.log_inputs(known.run_id, [DatasetInput(dataset, [InputTag(DATA_CONTEXT, context)])])
        known.data.add((name, digest))

    def _recall(self, known: Known) -> None:
        """Ask the server for the run of a trial that had ended: it was confirmed since, or comes a second time."""
        if known.brief:
            data = self.client.get_run(known.run_id).data
            known.tags, known.params, known.metrics = dict(data.tags), dict(data.params), dict(data.metrics)
            known.brief = False

    def _restore(self, known: Known) -> None:
        if known.deleted:
            self.client.restore_run(known.run_id)
            known.deleted = False

    def _trial_tags(self, record: TrialRecord, parent: str) -> dict[str, Any]:
        tags: dict[str, Any] = {
            "mlflow.runName": run_name(record),
            "mlflow.source.name": "peftsearch",
            PARENT: parent,
            STUDY: self.facts.study,
            DOMAIN: record.domain,
            NUMBER: str(record.number),
            "domain": record.domain,
            "model": record.model,
            "method": record.method,
            "state": record.state.value,
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
            PARENT: parent,
            STUDY: self.facts.study,
            DOMAIN: record.domain,
            CONFIRMS: str(record.number),
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

    def _chosen_tags(self, record: TrialRecord, known: Known | None) -> dict[str, str]:
        report = self._reports.get(record.domain)
        if report is not None:
            return _chosen(record.number, report)
        have = known.tags if known else {}
        return {key: have.get(key, value) for key, value in _chosen(record.number, DomainReport("")).items()}

    def _log(
        self,
        known: Known,
        metrics: Sequence[tuple[str, float, int, int]],
        params: dict[str, str],
        tags: dict[str, str],
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if not (metrics or params or tags):
            return
        metric_rest, param_rest, tag_rest = list(metrics), list(params.items()), list(tags.items())
        while metric_rest or param_rest or tag_rest:
            some_params, param_rest = take(param_rest, BATCH)
            some_tags, tag_rest = take(tag_rest, BATCH)
            some_metrics, metric_rest = take(metric_rest, METRICS - len(some_params) - len(some_tags))
            self.client.log_batch(
                known.run_id,
                [Metric(key, value, moment, step) for key, value, moment, step in some_metrics],
                [Param(key, value) for key, value in some_params],
                [RunTag(key, value) for key, value in some_tags],
            )
        known.params |= params
        known.tags |= tags
        known.metrics |= {key: value for key, value, _, _ in metrics}

    def _relocate(self) -> None:
        if self.artifact_location is not None:
            relocate_artifacts(self.tracking_uri, self.artifact_location)

    def _upload(self, run_id: str, files: Mapping[str, bytes]) -> None:
        # Whoever has opened the storage on another machine, where it is mounted elsewhere, has left its own path.
        self._relocate()
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            self.client.log_artifacts(run_id, folder)


def _chosen(number: int, report: DomainReport) -> dict[str, str]:
    """Tags that tell where a trial stands among the others."""
    return {
        "on_front": flag(number in report.on_front),
        "pick": report.picks.get(number, ""),
        "method_best": flag(number in report.method_best),
    }


def _known(run: Run) -> Known:
    return Known(
        run_id=run.info.run_id,
        status=run.info.status,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        steps=None,
        data={(item.dataset.name, item.dataset.digest) for item in _dataset_inputs(run)},
        deleted=run.info.lifecycle_stage == "deleted",
    )


def _dataset_inputs(run: Run) -> Sequence[DatasetInput]:
    return run.inputs.dataset_inputs if run.inputs is not None else ()
