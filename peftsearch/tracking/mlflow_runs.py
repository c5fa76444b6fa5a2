"""What a study's runs in MLflow hold, worked out from its records: names, params, tags, curves; and MLflow's limits.

Nothing here talks to a server, or needs MLflow.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import quote

from peftsearch.spec import DomainFacts, Reading, TrialRecord, TrialState
from peftsearch.tracking.names import mlflow_names, shorten

# MLflow's limits (mlflow.utils.validation).
BATCH = 100
# Metrics alone, and everything together.
METRICS = 1000
# A request may have 1 MB, and one character takes up to 12 bytes of JSON.
_CHARACTERS = 20_000
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
NOTE_LENGTH = TAG_LENGTH
"""Characters that a run's note may have: it is a tag."""

STUDY = "peftsearch.study"
STUDY_ID = "peftsearch.study_id"
DOMAIN = "peftsearch.domain"
NUMBER = "peftsearch.number"
CONFIRMS = "peftsearch.confirms"
REPORT = "peftsearch.report"
PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"
KIND = "mlflow.experimentKind"
SYSTEM = "system/"
"""Metrics that begin so are shown among the system metrics of a run."""
DATA_CONTEXT = "mlflow.data.context"
THIS_RUN = "0" * 32
"""Stands in a note for the id of the run that it belongs to."""
STATUS = {
    TrialState.RUNNING: "RUNNING",
    TrialState.COMPLETE: "FINISHED",
    # As MLflow's own Optuna integration has it.
    TrialState.PRUNED: "KILLED",
    TrialState.FAILED: "FAILED",
}

_Item = TypeVar("_Item", bound=tuple[Any, ...])


@dataclass(frozen=True)
class DomainReport:
    """A domain's run in MLflow, already rendered (`peftsearch.frontier.domain_report`).

    Attributes:
        note: Markdown, at most `NOTE_LENGTH` characters; `THIS_RUN` stands for the run's id.
        files: Artifacts by file name.
        metrics: Numbers about the domain: hypervolume, counts by state, baselines.
        on_front: Numbers of the trials on the front.
        picks: By number, for what a trial would be picked: ``best``, ``knee`` and ``smallest``, apart by spaces.
        method_best: Numbers of the trials that are their method's best, for each model.
        step: The x of the metrics' curves: trials that have ended.
    """

    note: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    on_front: AbstractSet[int] = frozenset()
    picks: Mapping[int, str] = field(default_factory=dict)
    method_best: AbstractSet[int] = frozenset()
    step: int = 0


def trial_note(record: TrialRecord, study: str) -> str:
    """Links of a trial's run, as its note. It is the same whatever becomes of the trial: readers may write their own
    one over it, which stays.
    """
    page = f"{page_path(study)}#{quote(record.domain, safe='')}/{record.number}"
    return f"[Trial {record.number} on the Pareto page]({page}), where `peftsearch ui` serves MLflow."


def page_path(study: str) -> str:
    """Where a study's live page is on the server that ``peftsearch ui`` starts (`peftsearch.live`)."""
    return f"/peftsearch/studies/{quote(study, safe='')}"


def data_profile(facts: DomainFacts) -> str:
    """What MLflow shows of a data set."""
    return json.dumps({**{f"rows_{split}": rows for split, rows in facts.rows.items()}, "labels": len(facts.labels)})


def trial_params(record: TrialRecord) -> dict[str, Any]:
    """Params of a trial's run."""
    names = mlflow_names(record.hyperparameters)
    params = {names[name]: value for name, value in record.hyperparameters.items()}
    return {**params, "model": record.model, "seed": record.seed, "total_steps": record.total_steps}


def curve_points(record: TrialRecord, written: set[int]) -> list[tuple[str, float, int, int]]:
    """Name, value, milliseconds since the epoch, and step, of every evaluation that is not written yet."""
    metrics: list[tuple[str, float, int, int]] = []
    for rung, moment in zip(record.rungs, moments_of(record), strict=False):
        if rung.step in written:
            continue
        scores = {name: value for name, value in rung.scores.items() if "/" not in name}
        names = mlflow_names(scores)
        values = {names[name]: value for name, value in scores.items()}
        values |= {f"{SYSTEM}{name}": value for name, value in rung.usage.items()}
        # The loss comes last: a step is known to be written by its loss, if a batch was cut in the middle.
        values |= {"train_loss": rung.train_loss}
        values.pop("loss", None)
        values |= {"loss": rung.loss}
        metrics += [(name, value, moment, rung.step) for name, value in values.items()]
    return metrics


def first_numbers(record: TrialRecord) -> dict[str, float]:
    """What is one number per trial and known before it trains. It stands at step 0, whenever it is written."""
    return _named(
        {
            "trainable_parameters": record.trainable_parameters,
            "exported_parameters": record.exported_parameters,
            "estimated_memory_bytes": record.estimated_memory_bytes,
            "estimated_seconds": record.estimated_seconds,
        }
    )


def last_numbers(record: TrialRecord) -> dict[str, float]:
    """What is one number per trial and known at its end. It stands at the last step."""
    values: dict[str, float | None] = {}
    if record.state is not TrialState.RUNNING:
        values |= {
            "value": record.value,
            # More digits would fill the run table with noise.
            "train_seconds": round(record.train_seconds, 3),
            "evaluation_seconds": round(record.evaluation_seconds, 3),
            "peak_memory_bytes": record.peak_memory_bytes,
        }
        values |= {name: value for name, value in record.scores.items() if "/" in name}
    return _named(values)


def confirmed_numbers(record: TrialRecord) -> dict[str, float]:
    """What a trial's re-trainings say so far. It stands at the last step, at `confirmed_at`."""
    if record.confirmed is None:
        return {}
    summary = record.confirmed.model_dump(include={"seeds", "mean", "std", "test_mean", "test_std"})
    return _named({f"confirmed_{key}": value for key, value in summary.items()})


def confirmed_at(record: TrialRecord, ended: int) -> int:
    """When the re-trainings said so, in milliseconds since the epoch; later with each of them.

    Of values with the same step and moment MLflow shows the largest (seen with 3.17): a mean that falls with a further
    seed needs a later moment. Readings may arrive in another order than they were made in, so that their number counts,
    too.

    Args:
        record: A trial that was confirmed.
        ended: When the trial itself had ended.
    """
    readings = record.confirmed.readings if record.confirmed else ()
    return max([ended, *(to_milliseconds(reading.read_at) or 0 for reading in readings)]) + len(readings)


def reading_numbers(reading: Reading) -> dict[str, float]:
    """Metrics of a re-training's run."""
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


def differing(wanted: Mapping[str, float], known: Mapping[str, float]) -> dict[str, float]:
    """Those of the wanted numbers that are not known with that value."""
    return {key: value for key, value in wanted.items() if key not in known or not _same(known[key], value)}


def _same(stored: float, value: float) -> bool:
    if math.isnan(value):
        # Stores keep NaN as 0 with a mark, and some answers lose the mark.
        return math.isnan(stored) or stored == 0
    if math.isinf(value):
        return math.isinf(stored) or abs(stored) > 1e308
    return math.isclose(stored, value, rel_tol=1e-9, abs_tol=1e-12)


def texts(values: Mapping[str, Any], length: int) -> dict[str, str]:
    """Tags or params as MLflow takes them: names made valid, values as texts that are not too long."""
    names = mlflow_names(values)
    return {names[key]: shorten(str(value), length) for key, value in values.items()}


def take(items: list[_Item], count: int) -> tuple[list[_Item], list[_Item]]:
    """As many of the first items as fit into one request (at least one), and the rest."""
    size, taken = 0, 0
    for item in items[:count]:
        size += sum(len(part) for part in item if isinstance(part, str))
        if taken and size > _CHARACTERS:
            break
        taken += 1
    return items[:taken], items[taken:]


def flag(value: bool) -> str:
    """As a tag."""
    return "true" if value else "false"


def to_milliseconds(moment: str | None) -> int | None:
    """Since the epoch, of an ISO 8601 moment; None where it is none."""
    if moment is None:
        return None
    try:
        return int(datetime.fromisoformat(moment).timestamp() * 1000)
    except ValueError:
        return None


def start_of(record: TrialRecord) -> int | None:
    """When a trial began, in milliseconds since the epoch."""
    return to_milliseconds(record.started)


def end_of(record: TrialRecord) -> int | None:
    """When a trial ended, in milliseconds since the epoch; None while it runs."""
    return None if record.state is TrialState.RUNNING else to_milliseconds(record.finished)


def moments_of(record: TrialRecord) -> list[int]:
    """When each evaluation ended, as far as the record tells; the same whenever it is asked, so that a metric that is
    written twice is one metric. The start, where there was no evaluation.
    """
    moment = float(start_of(record) or 0)
    moments = [int(moment)] if not record.rungs else []
    for rung in record.rungs:
        moment += 1000 * (rung.train_seconds + rung.evaluation_seconds)
        moments.append(int(moment))
    return moments


def fingerprint_of(report: DomainReport) -> str:
    """A digest of a page, to tell whether it is there already."""
    digest = hashlib.sha256(json.dumps(report.note).encode())
    for name in sorted(report.files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(report.files[name]).digest())
    return digest.hexdigest()[:16]
