"""Trials and fronts as JSON, Arrow, pandas, CSV, Parquet, on the terminal and as Markdown."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftsearch.frontier.front import DomainFront, domain_fronts
from peftsearch.frontier.marginal_cost import costs_between_picks
from peftsearch.spec import DomainFacts, StudyError, StudyFacts, TrialRecord, TrialState, suggest
from peftsearch.tracking.names import configuration_text

if TYPE_CHECKING:
    import pandas
    import pyarrow
    from rich.console import RenderableType
    from rich.table import Table

MAJORITY = "majority"
LINEAR_PROBE = "linear_probe"

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", *"\uff1d\uff0b\uff0d\uff20")


# --- JSON: the shapes that other people's scripts read ---


def frontier_json(records: Iterable[TrialRecord], facts: StudyFacts) -> dict[str, Any]:
    """What ``peftsearch frontier --json`` prints; numbers that JSON cannot write (NaN, infinity) are null."""
    return {
        "study": facts.study,
        "domains": {domain: domain_json(front) for domain, front in domain_fronts(records, facts).items()},
    }


def domain_json(front: DomainFront) -> dict[str, Any]:
    """One domain of `frontier_json`."""
    found: dict[str, Any] = _finite(
        {
            "metric": front.facts.metric,
            "direction": front.facts.direction,
            "counts": front.counts,
            "hypervolume": front.hypervolume,
            "baselines": {
                model: {name: baseline.model_dump(mode="json") for name, baseline in list(named.items())}
                for model, named in list(front.facts.baselines.items())
            },
            "failed_baselines": {
                model: {name: failed.model_dump(mode="json") for name, failed in list(named.items())}
                for model, named in list(front.facts.failed_baselines.items())
            },
            "front": [record.model_dump(mode="json") for record in front.front],
            "front_by_model": {model: [record.number for record in own] for model, own in front.by_model.items()},
            "picks": picks_json(front),
        }
    )
    return found


def picks_json(front: DomainFront) -> dict[str, Any]:
    """The trial of each pick that gives one, and why another stood back, where one did; {} for an empty front."""
    return {
        how: {
            "number": choice.record.number,
            "instead_of": choice.instead_of.number if choice.instead_of is not None else None,
            "reason": choice.reason,
        }
        for how, choice in front.picks().items()
    }


def picks_sentence(front: DomainFront) -> str:
    """Which trial each pick gives, and where error bars decided; empty for an empty front."""
    found = picks_json(front)
    named = [f"{how}: trial {pick['number']}" for how, pick in found.items()]
    reasons = dict.fromkeys(pick["reason"] for pick in found.values() if pick["reason"])
    return ". ".join(["Picks: " + ", ".join(named), *reasons]) + "." if named else ""


def trials_json(records: Iterable[TrialRecord], study: str) -> dict[str, Any]:
    """What ``peftsearch trials --json`` prints."""
    found: dict[str, Any] = _finite({"study": study, "trials": [r.model_dump(mode="json") for r in records]})
    return found


# --- tables for programs ---


def trials_arrow(records: Iterable[TrialRecord]) -> pyarrow.Table:
    """One row per trial: the record's fields, hyperparameters as ``hyperparameters.NAME``, the scores of the last
    evaluation as ``scores.NAME`` (per-class ones left out), confirmations as ``confirmed.NAME``, and the evaluations as
    a list in ``rungs``.
    """
    import pyarrow

    records = list(records)
    number, text = pyarrow.float64(), pyarrow.string()
    integer = pyarrow.int64()
    columns: dict[str, tuple[Any, list[Any]]] = {
        "number": (integer, [record.number for record in records]),
        "model": (text, [record.model for record in records]),
        "domain": (text, [record.domain for record in records]),
        "method": (text, [record.method for record in records]),
        "state": (text, [record.state.value for record in records]),
        "seed": (integer, [record.seed for record in records]),
        "value": (number, [record.value for record in records]),
        "trainable_parameters": (integer, [record.trainable_parameters for record in records]),
        "exported_parameters": (integer, [record.exported_parameters for record in records]),
    }
    for name in _names(record.hyperparameters for record in records):
        values = [record.hyperparameters.get(name) for record in records]
        columns[f"hyperparameters.{name}"] = _hyperparameter_column(values)
    columns |= {
        "train_seconds": (number, [record.train_seconds for record in records]),
        "evaluation_seconds": (number, [record.evaluation_seconds for record in records]),
        "peak_memory_bytes": (integer, [record.peak_memory_bytes for record in records]),
        "total_steps": (integer, [record.total_steps for record in records]),
        "evaluations": (integer, [len(record.rungs) for record in records]),
        "retries": (integer, [record.retries for record in records]),
    }
    for name in _names(record.scores for record in records):
        if "/" not in name:
            columns[f"scores.{name}"] = (number, [record.scores.get(name) for record in records])
    if any(record.confirmed for record in records):
        for name in ("seeds", "mean", "std", "test_mean", "test_std"):
            columns[f"confirmed.{name}"] = (
                integer if name == "seeds" else number,
                [getattr(record.confirmed, name) if record.confirmed else None for record in records],
            )
    columns |= {
        "started": (text, [record.started for record in records]),
        "finished": (text, [record.finished for record in records]),
        "checkpoint": (text, [record.checkpoint for record in records]),
        "mlflow_run_id": (text, [record.mlflow_run_id for record in records]),
        "error": (text, [record.error for record in records]),
        "rungs": (_rungs_type(), [[_rung(rung) for rung in record.rungs] for record in records]),
    }
    return pyarrow.table({name: pyarrow.array(values, kind) for name, (kind, values) in columns.items()})


def trials_frame(records: Iterable[TrialRecord]) -> pandas.DataFrame:
    """`trials_arrow` as a pandas table; whole numbers stay whole where some are missing."""
    import pandas
    import pyarrow

    whole = {pyarrow.int64(): pandas.Int64Dtype(), pyarrow.bool_(): pandas.BooleanDtype()}
    return trials_arrow(records).to_pandas(types_mapper=whole.get)


def trials_csv(records: Iterable[TrialRecord]) -> bytes:
    """`trials_arrow` as CSV (UTF-8, with a header); ``rungs`` is JSON."""
    import csv

    table = trials_arrow(records)
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(table.column_names)
    for row in table.to_pylist():
        row["rungs"] = json.dumps(_finite(row["rungs"]))
        writer.writerow([csv_cell(value) for value in row.values()])
    return out.getvalue().encode("utf-8", "replace")


def csv_cell(value: Any) -> Any:
    """A value as a CSV file holds it: nothing for what is missing or no number, and no text that a spreadsheet takes
    for a formula (https://owasp.org/www-community/attacks/CSV_Injection)."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value


def trials_parquet(records: Iterable[TrialRecord]) -> bytes:
    """`trials_arrow` as a Parquet file."""
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(trials_arrow(records), out)
    return out.getvalue()


# --- did tuning pay? ---


@dataclass(frozen=True)
class Verdict:
    """Whether tuning paid in a domain.

    Attributes:
        paid: The best trial beats every baseline by more than noise explains; None where that cannot be said (no
            finished trial, no baseline, or a difference within the noise).
        sentence: For people.
    """

    paid: bool | None
    sentence: str


def verdict(front: DomainFront) -> Verdict:
    """The best trial against the majority class and the linear probe on the same model's frozen embeddings.

    A difference below two standard errors (`sampling_noise`, on the validation split's rows) is called noise; that is a
    cautious test, as both are scored on the same texts. Where less than that is known, the sentence says so.
    """
    best = front.best
    metric = front.facts.metric
    if best is None:
        return Verdict(None, "No trial has reached the full budget yet, so there is nothing to compare.")
    assert best.value is not None
    named = f"trial {best.number} ({best.method})"
    baselines = front.facts.baselines.get(best.model, {})
    probe, majority = baselines.get(LINEAR_PROBE), baselines.get(MAJORITY)
    hardest = max(
        list(baselines.values()),
        key=lambda baseline: _oriented(front, baseline.value, 0.0),
        default=None,
    )
    if hardest is None:
        return Verdict(None, f"The best trial, {named}, has {metric} {best.value:.3f}; there is no baseline.")
    against = [f"{baseline.title} {baseline.value:.3f}" for baseline in (majority, probe) if baseline is not None]
    comparison = (
        f"the best trial, {named}, has {metric} {best.value:.3f}; {', '.join(against)}" if against else f"best {named}"
    )
    gain = _oriented(front, best.value, hardest.value)
    rows = hardest.examples or front.facts.rows.get("validation", 0)
    texts = f"{rows:,} validation texts"
    noise = sampling_noise(front.facts, best.value, hardest.value, rows)
    if gain <= 0:
        lead = f"Tuning did not pay: nothing beats the {hardest.title} ({best.value - hardest.value:+.3f})"
        return Verdict(False, f"{lead}; {comparison}.")
    if gain < noise:
        lead = f"It is open whether tuning paid: {best.value - hardest.value:+.3f} is within the noise of {texts}"
        return Verdict(None, f"{lead}; {comparison}.")
    lead = f"Tuning paid: {best.value - hardest.value:+.3f} over the {hardest.title}"
    if noise == 0.0:
        lead += f" (how much of that is chance is not known of {metric})"
    elif by_label(metric):
        lead += f" (chance: ±{noise:.3f} with {texts}, and more where labels are rare)"
    return Verdict(True, f"{lead}; {comparison}.")


def delta(front: DomainFront, record: TrialRecord) -> float | None:
    """A trial's metric minus the linear probe's on the same model; None where one is missing."""
    probe = front.facts.baselines.get(record.model, {}).get(LINEAR_PROBE)
    return None if probe is None or record.value is None else record.value - probe.value


def key_hyperparameters(records: Iterable[TrialRecord]) -> dict[str, tuple[str, ...]]:
    """By method, the hyperparameters that differ among its trials (all of them where none does)."""
    seen: dict[str, dict[str, set[str]]] = {}
    for record in records:
        for name, value in record.hyperparameters.items():
            seen.setdefault(record.method, {}).setdefault(name, set()).add(repr(value))
    return {
        method: tuple(name for name, found in values.items() if len(found) > 1) or tuple(values)
        for method, values in seen.items()
    }


# --- tables for people ---


@dataclass(frozen=True)
class FrontRow:
    """One line of a front's table, as texts."""

    number: str
    method: str
    model: str
    configuration: str
    value: str
    delta: str
    parameters: str
    share: str
    seconds: str
    exported: str
    confirmed: str
    test: str
    gain: float | None
    """Of the metric over the linear probe's, positive where better."""


def front_rows(front: DomainFront, facts: StudyFacts) -> list[FrontRow]:
    """The front's table, line by line."""
    keys = key_hyperparameters(front.records)
    rows = []
    for record in front.front:
        assert record.value is not None
        over = delta(front, record)
        total = facts.models[record.model].total_parameters if record.model in facts.models else 0
        confirmed = record.confirmed
        rows.append(
            FrontRow(
                number=str(record.number),
                method=record.method,
                model=record.model,
                configuration=configuration_text(record.hyperparameters, keys.get(record.method)),
                value=f"{record.value:.3f}",
                delta="" if over is None else f"{over:+.3f}",
                parameters=f"{record.trainable_parameters:,}",
                share=_percent(record.trainable_parameters, total),
                seconds=f"{record.train_seconds:.1f}",
                exported="" if record.exported_parameters is None else f"{record.exported_parameters:,}",
                confirmed=f"{confirmed.mean:.3f} ± {confirmed.std:.3f} ({confirmed.seeds})" if confirmed else "",
                test=f"{confirmed.test_mean:.3f} ± {confirmed.test_std or 0.0:.3f}"
                if confirmed and confirmed.test_mean is not None
                else "",
                gain=None if over is None else _oriented(front, over, 0.0),
            )
        )
    return rows


def front_columns(front: DomainFront, rows: Sequence[FrontRow]) -> dict[str, str]:
    """Which fields of the rows to show, and their titles; columns that say nothing here are left out."""
    columns = {
        "number": "trial",
        "method": "method",
        "configuration": "hyperparameters",
        "value": front.facts.metric,
        "delta": "Δ linear probe",
        "parameters": "trainable parameters",
        "share": "% of base",
        "seconds": "train s",
        "exported": "exported parameters",
    }
    if len({row.model for row in rows}) > 1:
        columns = {"number": "trial", "model": "model"} | columns
    if any(row.confirmed for row in rows):
        columns |= {"confirmed": "confirmed (seeds)", "test": "test"}
    return columns


def front_table(front: DomainFront, facts: StudyFacts) -> Table:
    """The front for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    counts = ", ".join(f"{count} {state}" for state, count in front.counts.items() if count)
    rows = front_rows(front, facts)
    table = Table(
        title=Text(f"{front.domain}: {front.facts.metric} against trainable parameters ({counts or 'no trials'})"),
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    columns = front_columns(front, rows)
    for field, title in columns.items():
        if field in ("method", "model", "configuration"):
            table.add_column(Text(title), overflow="fold")
        else:
            table.add_column(Text(title), justify="right", overflow="fold", min_width=6)
    for row in rows:
        cells = []
        for field in columns:
            style = ""
            if field == "delta" and row.gain is not None:
                style = "green" if row.gain > 0 else "red"
            cells.append(Text(_one_line(getattr(row, field)), style=style))
        table.add_row(*cells)
    return table


def front_renderables(
    records: Iterable[TrialRecord], facts: StudyFacts, domains: Iterable[str] | None = None
) -> list[RenderableType]:
    """What ``peftsearch frontier`` shows: for each domain the front's table, whether tuning paid, which trial to
    pick, and what a further point of the metric costs.

    Raises:
        StudyError: The study has no such domain.
    """
    from rich.text import Text

    fronts = domain_fronts(records, facts)
    shown: list[RenderableType] = []
    for domain in facts.domains if domains is None else domains:
        if domain not in fronts:
            raise StudyError(f"the study {facts.study!r} has no domain {domain!r}{suggest(domain, fronts)}")
        found = verdict(fronts[domain])
        style = {True: "green", False: "yellow", None: ""}[found.paid]
        shown += [front_table(fronts[domain], facts), Text(_one_line(found.sentence), style=style)]
        shown += [Text(line) for line in (picks_sentence(fronts[domain]),) if line]
        metric = fronts[domain].facts.metric
        shown += [Text(_one_line(cost.sentence(metric))) for cost in costs_between_picks(fronts[domain])]
        shown.append(Text(""))
    return shown


def trials_table(records: Iterable[TrialRecord]) -> Table:
    """Every trial for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    records = list(records)
    keys = key_hyperparameters(records)
    several_models = len({record.model for record in records}) > 1
    table = Table(box=SIMPLE_HEAD)
    for title in ("trial", "domain", *(["model"] if several_models else []), "method", "hyperparameters"):
        table.add_column(title, overflow="fold", justify="right" if title == "trial" else "left")
    for title in ("state", "metric", "evaluations", "parameters", "train s"):
        table.add_column(title, justify="left" if title == "state" else "right")
    styles = {TrialState.COMPLETE: "green", TrialState.PRUNED: "dim", TrialState.FAILED: "red", TrialState.RUNNING: ""}
    for record in records:
        words = [str(record.number), record.domain, *([record.model] if several_models else []), record.method]
        words += [
            configuration_text(record.hyperparameters, keys.get(record.method)),
            record.state.value if record.error is None else f"{record.state.value}: {record.error}",
            "" if record.value is None else f"{record.value:.3f}",
            str(len(record.rungs)),
            f"{record.trainable_parameters:,}",
            f"{record.train_seconds:.1f}",
        ]
        table.add_row(*(Text(_one_line(word)) for word in words), style=styles[record.state])
    return table


def front_markdown(front: DomainFront, facts: StudyFacts, limit: int | None = None) -> str:
    """The front as a Markdown table, for MLflow's note and for model cards.

    Args:
        front: The front.
        facts: The study.
        limit: At most so many rows, the best ones; a line below the table says how many were left out.
    """
    rows = front_rows(front, facts)
    if not rows:
        return "No trial has reached the full budget yet."
    columns = front_columns(front, rows)
    shown = rows if limit is None else rows[-limit:]
    left = {"method", "model", "configuration"}
    lines = [
        "| " + " | ".join(escape_markdown(title) for title in columns.values()) + " |",
        "|" + "|".join(":---" if field in left else "---:" for field in columns) + "|",
    ]
    lines += ["| " + " | ".join(escape_markdown(getattr(row, field)) for field in columns) + " |" for row in shown]
    if len(shown) < len(rows):
        lines += ["", f"{len(rows) - len(shown)} smaller trials of the front are left out here."]
    return "\n".join(lines)


def escape_markdown(text: str) -> str:
    """Text that Markdown (and the HTML inside it) shows as it is, on one line."""
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", text)
    # At the beginning of a line these make lists and rules.
    return re.sub(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=[-+]\s)|(?=[-=]{2,}$))", r"\1\\", text)


# --- inside ---


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _oriented(front: DomainFront, value: float, reference: float) -> float:
    return value - reference if front.facts.direction == "maximize" else reference - value


_CORRELATIONS = ("pearson", "spearman", "mcc")


def by_label(metric: str) -> bool:
    """Whether a metric averages over labels or is one label's, and so rests on fewer texts where labels are rare."""
    return "/" in metric or "macro" in metric or metric == "balanced_accuracy"


def sampling_noise(facts: DomainFacts, one: float, other: float, rows: int) -> float:
    """Two standard errors of the difference of two values that rest on so many texts; 0.0 where none is known.

    Of an accuracy, the binomial's; of any other mean of numbers from 0 to 1 that is the most it can be, and for a micro
    F1 the right size. Of what goes by label (`by_label`) it is the least that it can be: it is right where labels are
    equally frequent. Of a correlation, ``(1 - r²) / sqrt(rows)`` (Fisher, 1915). Of metrics without bounds (perplexity)
    none is known.

    Args:
        facts: The domain, for its metric.
        one: A value of the metric.
        other: Another one.
        rows: How many texts both rest on.
    """
    values = (one, other)
    if rows == 0:
        return 0.0
    if facts.metric in _CORRELATIONS:
        variances = [(1 - min(1.0, value * value)) ** 2 for value in values]
    elif facts.direction == "maximize" and all(0 <= value <= 1 for value in values):
        variances = [value * (1 - value) for value in values]
    else:
        return 0.0
    return 2 * math.sqrt(sum(variances) / rows)


def _percent(part: int, total: int) -> str:
    if total <= 0:
        return ""
    share = 100 * part / total
    return f"{share:.3f}" if share < 1 else f"{share:.1f}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _hyperparameter_column(values: list[Any]) -> tuple[Any, list[Any]]:
    import pyarrow

    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool}:
        return pyarrow.bool_(), values
    if kinds <= {int} and all(value is None or abs(value) < 2**63 for value in values):
        return pyarrow.int64(), values
    if kinds <= {int, float}:
        return pyarrow.float64(), [None if value is None else float(value) for value in values]
    return pyarrow.string(), [_text(value) for value in values]


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)


def _rungs_type() -> Any:
    import pyarrow

    number = pyarrow.float64()
    fields = [("step", pyarrow.int64()), ("epoch", number), ("value", number), ("loss", number), ("train_loss", number)]
    return pyarrow.list_(pyarrow.struct([*fields, ("train_seconds", number), ("evaluation_seconds", number)]))


def _rung(rung: Any) -> dict[str, Any]:
    return rung.model_dump(exclude={"scores"})  # type: ignore[no-any-return]
