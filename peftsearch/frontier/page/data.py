"""What the Pareto page shows, as one JSON object: the ledger's trials column by column, and what follows from them.

Everything that needs a definition (fronts, picks, hypervolume, verdicts, commands) is computed here, in Python, by the
functions that the rest of the package uses; the page's script draws, filters and sorts.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from statistics import fmean
from typing import Any

from peftsearch.frontier.front import DomainFront, domain_fronts, pick
from peftsearch.frontier.history import hypervolume_history, seconds_spent
from peftsearch.frontier.marginal_cost import costs_between_picks, marginal_costs
from peftsearch.frontier.plots import baseline_lines, is_log, method_colour, method_symbol, methods_in_order
from peftsearch.frontier.tables import key_hyperparameters, verdict
from peftsearch.spec import StudyError, StudyFacts, TrialRecord, TrialState, suggest

# Lighter twins of `method_colour`, which were chosen for white paper.
_DARK_COLOURS = ("#4FA8E0", "#F0803C", "#2FBF92", "#DB93BC", "#EDB13B", "#8CCFF5", "#ABABAB")
_STATES = tuple(state.value for state in TrialState)


def page_data(
    records: Iterable[TrialRecord],
    facts: StudyFacts,
    domain: str | None = None,
    *,
    state: str | None = None,
    planned: int | None = None,
    storage: str | None = None,
) -> dict[str, Any]:
    """Everything that the page shows; numbers that JSON cannot write are null.

    Args:
        records: Trials of the study.
        facts: The study.
        domain: Only this domain.
        state: Of the study: running, interrupted or finished; not shown where absent.
        planned: Trials that the whole study will have; not shown where absent.
        storage: What ``--storage`` the commands on the page need; the default storage where absent.

    Raises:
        StudyError: The study has no such domain.
    """
    fronts = domain_fronts(records, facts)
    if domain is not None:
        if domain not in fronts:
            raise StudyError(f"the study {facts.study!r} has no domain {domain!r}{suggest(domain, fronts)}")
        fronts = {domain: fronts[domain]}
    methods = methods_in_order(fronts.values(), facts)
    total = max((model.total_parameters for model in facts.models.values()), default=1)
    models = list(dict.fromkeys([*facts.models, *(r.model for front in fronts.values() for r in front.records)]))
    return {
        "study": facts.study,
        "description": facts.description,
        "state": state,
        "planned": planned,
        "models": [
            {"name": name, "parameters": facts.models[name].total_parameters if name in facts.models else None}
            for name in models
        ],
        "methods": [
            {
                "name": method,
                "colour": method_colour(index),
                "dark": _DARK_COLOURS[index % len(_DARK_COLOURS)],
                "symbol": method_symbol(index),
            }
            for index, method in enumerate(methods)
        ],
        "domains": [_domain(front, facts, total, storage) for front in fronts.values()],
        "trials": _trials(list(fronts.values()), methods, models),
    }


def export_command(front: DomainFront, record: TrialRecord, study: str, storage: str | None = None) -> str:
    """The command that exports one trial of a front (and those that are its equals in both objectives)."""
    command = ["peftsearch", "export", study, "--to", "adapters", "--domain", front.domain]
    command += _selection(front, record)
    if storage is not None:
        command += ["--storage", storage]
    return shlex.join(command)


def _selection(front: DomainFront, record: TrialRecord) -> list[str]:
    direction = front.facts.direction
    for how, choice in front.picks().items():
        if choice.record.number == record.number:
            return ["--pick", how]
    # On a front the metric rises with the parameters, so that both limits together leave one point.
    assert record.value is not None
    rounding = ROUND_FLOOR if direction == "maximize" else ROUND_CEILING
    text = repr(record.value)
    # Of a diverged trial's perplexity no digits are left to cut, and Decimal has 28.
    for digits in range(3, 17) if abs(record.value) < 1e9 else ():
        limit = str(Decimal(record.value).quantize(Decimal(1).scaleb(-digits), rounding))
        left = pick(
            front.front,
            "frontier",
            direction,
            max_parameters=record.trainable_parameters,
            min_metric=float(limit),
        )
        if all(item.value == record.value for item in left):
            text = limit
            break
    return ["--max-parameters", str(record.trainable_parameters), "--min-metric", text]


def batch_milliseconds(record: TrialRecord) -> float | None:
    """Milliseconds per example, in batches, from the readings of the test split; None where none was made.

    Of one example by itself, which ``export --max-latency`` asks for, the ledger knows nothing.
    """
    speeds = [reading.examples_per_second for reading in record.confirmed.readings] if record.confirmed else []
    known = [1000 / speed for speed in speeds if speed]
    return fmean(known) if known else None


def _domain(front: DomainFront, facts: StudyFacts, total: int, storage: str | None) -> dict[str, Any]:
    found, said = front.facts, verdict(front)
    history = hypervolume_history(front.records, found.direction, total)
    choices = front.picks()
    return {
        "name": front.domain,
        "task": found.task,
        "metric": found.metric,
        "direction": found.direction,
        "log": is_log(front),
        "labels": len(found.labels),
        "rows": found.rows,
        "source": found.source,
        "warnings": found.warnings,
        "counts": front.counts,
        "hypervolume": front.hypervolume,
        # Ended trials, the hypervolume then, and the seconds that these trials took.
        "history": [
            [count, reached, _rounded(seconds)]
            for (count, reached), seconds in zip(
                history, seconds_spent(front.records, [count for count, _ in history]), strict=True
            )
        ],
        "baselines": [{"title": title, "value": value} for title, value in baseline_lines(front)],
        "verdict": {"paid": said.paid, "sentence": said.sentence},
        "picks": {how: choice.record.number for how, choice in choices.items()},
        "ties": {how: choice.reason for how, choice in choices.items() if choice.reason},
        "front": [record.number for record in front.front],
        "costs": [cost.sentence(found.metric.replace("_", " ")) for cost in costs_between_picks(front)],
        # From each trial of the front to the next one, so that the script needs no definition of its own.
        "steps": [
            {
                "from": cost.cheaper.number,
                "to": cost.dearer.number,
                "point": cost.point,
                "each": round(cost.parameters_per_point),
                "seeds": None if cost.seeds is None else [_rounded(number) for number in cost.seeds],
            }
            for cost in marginal_costs(front.front, found.direction)
        ],
        "commands": {str(record.number): export_command(front, record, facts.study, storage) for record in front.front},
    }


def _trials(fronts: Sequence[DomainFront], methods: Sequence[str], models: Sequence[str]) -> dict[str, Any]:
    """The trials column by column: with ten thousand of them, names would be most of the file.

    ``names`` holds each method's hyperparameters in order, ``keys`` those that differ among its trials, and
    ``hyperparameters`` each trial's values in the order of ``names``;
    ``ladders`` holds the steps and epochs of evaluations, which most trials share, and ``rungs`` each trial's
    ``[ladder, values, losses, training losses]``.
    """
    pairs = [(index, record) for index, front in enumerate(fronts) for record in front.records]
    records = [record for _, record in pairs]
    keys = key_hyperparameters(records)
    method, model = ({name: index for index, name in enumerate(names)} for names in (methods, models))
    names: list[dict[str, None]] = [{} for _ in methods]
    for record in records:
        names[method[record.method]].update(dict.fromkeys(record.hyperparameters))
    ladders: dict[tuple[tuple[int, ...], tuple[float, ...]], int] = {}
    rungs = []
    for record in records:
        steps = tuple(rung.step for rung in record.rungs)
        ladder = (steps, tuple(_rounded(rung.epoch) or 0.0 for rung in record.rungs))
        rungs.append(
            [
                ladders.setdefault(ladder, len(ladders)),
                [_rounded(rung.value) for rung in record.rungs],
                [_rounded(rung.loss) for rung in record.rungs],
                [_rounded(rung.train_loss) for rung in record.rungs],
            ]
        )
    return {
        "number": [record.number for record in records],
        "domain": [index for index, _ in pairs],
        "model": [model[record.model] for record in records],
        "method": [method[record.method] for record in records],
        "state": [_STATES.index(record.state.value) for record in records],
        "states": _STATES,
        "value": [_finite(record.value) for record in records],
        "trainable_parameters": [record.trainable_parameters for record in records],
        "exported_parameters": [record.exported_parameters for record in records],
        "train_seconds": [_rounded(record.train_seconds) for record in records],
        "peak_memory_bytes": [record.peak_memory_bytes for record in records],
        "batch_milliseconds": [_rounded(batch_milliseconds(record)) for record in records],
        "steps": [record.total_steps for record in records],
        "seed": [record.seed for record in records],
        "names": [list(found) for found in names],
        "keys": [list(keys.get(name, ())) for name in methods],
        "hyperparameters": [
            [_value(record.hyperparameters.get(name)) for name in names[method[record.method]]] for record in records
        ],
        "ladders": [list(ladder) for ladder in ladders],
        "rungs": rungs,
        "confirmed": [_confirmed(record) for record in records],
        "error": [record.error for record in records],
        "run": [record.mlflow_run_id for record in records],
    }


def _confirmed(record: TrialRecord) -> list[Any] | None:
    found = record.confirmed
    if found is None:
        return None
    return [found.seeds, *(_finite(item) for item in (found.mean, found.std, found.test_mean, found.test_std))]


def _value(value: Any) -> Any:
    """A hyperparameter as the page gets it: numbers, texts and truth values as they are, all else as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping | list | tuple):
        return str(value)
    return repr(value)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _rounded(value: float | None) -> float | None:
    """Six digits: more than a curve shows, and a third of the file's size."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
