"""Learning curves of a full grid in one table, and a black box that answers from it (as in Syne Tune).

The table is a CSV file with one row per evaluation; its first line, behind a ``#``, is JSON with what concerns a whole
domain: metric, direction, and the base model's parameters.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peftsearch.spec import Direction, StudyFacts, TrialRecord, TrialState

COLUMNS = ("domain", "method", "hyperparameters", "parameters", "state", "step", "epoch", "value", "loss", "seconds")


@dataclass(frozen=True)
class Evaluation:
    """A point of a curve; ``seconds`` is the time since the one before, evaluation included."""

    step: int
    epoch: float
    value: float
    loss: float
    seconds: float


@dataclass(frozen=True)
class Curve:
    """What one configuration went through; one that failed ends before its budget."""

    method: str
    hyperparameters: Mapping[str, Any]
    parameters: int
    state: TrialState
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True)
class DomainTable:
    """All curves of a domain."""

    domain: str
    metric: str
    direction: Direction
    total_parameters: int
    curves: tuple[Curve, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """In the table's order."""
        return tuple(dict.fromkeys(curve.method for curve in self.curves))

    @property
    def epochs(self) -> float:
        """Passes over the training split that the whole grid took."""
        return sum(curve.evaluations[-1].epoch for curve in self.curves if curve.evaluations)

    def of(self, method: str) -> list[Curve]:
        """A method's curves."""
        return [curve for curve in self.curves if curve.method == method]

    def space(self, method: str) -> dict[str, Any]:
        """The method's search space as a study file writes it: numbers between the grid's ends, the rest as listed."""
        return {name: _dimension(values) for name, values in self._values[method].items()}

    def nearest(self, method: str, hyperparameters: Mapping[str, Any]) -> Curve:
        """The curve of the grid's configuration next to a proposal.

        Numbers are compared on the scale of their range, from 0 to 1; choices must be the same.
        """

        def distance(curve: Curve) -> float:
            return sum(
                _gap(values, hyperparameters[name], curve.hyperparameters[name])
                for name, values in self._values[method].items()
            )

        return min(self.of(method), key=distance)

    @cached_property
    def _values(self) -> dict[str, dict[str, list[Any]]]:
        found: dict[str, dict[str, list[Any]]] = {}
        for curve in self.curves:
            mine = found.setdefault(curve.method, {})
            for name, value in curve.hyperparameters.items():
                values = mine.setdefault(name, [])
                if value not in values:
                    values.append(value)
        return found


def _numbers(values: Sequence[Any]) -> bool:
    return len(values) > 1 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _logarithmic(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= 8


def _dimension(values: Sequence[Any]) -> Any:
    if len(values) == 1:
        return values[0]
    if not _numbers(values):
        return list(values)
    return {"low": min(values), "high": max(values), "log": _logarithmic(values)}


def _gap(values: Sequence[Any], one: Any, other: Any) -> float:
    if not _numbers(values):
        return 0.0 if one == other else 1e6
    scale = math.log if _logarithmic(values) else float
    low, high = scale(min(values)), scale(max(values))
    return ((scale(one) - scale(other)) / (high - low)) ** 2


def write_table(path: Path, records: Iterable[TrialRecord], facts: StudyFacts) -> int:
    """Write the curves of a study's trials that have ended; returns how many."""
    total = max(model.total_parameters for model in facts.models.values())
    head = {
        name: {"metric": domain.metric, "direction": domain.direction, "total_parameters": total}
        for name, domain in facts.domains.items()
    }
    ended = [record for record in records if record.state in (TrialState.COMPLETE, TrialState.FAILED)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {json.dumps(head)}\n")
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for record in ended:
            what = (
                record.domain,
                record.method,
                json.dumps(record.hyperparameters, sort_keys=True),
                record.trainable_parameters,
                record.state.value,
            )
            for rung in record.rungs:
                seconds = round(rung.train_seconds + rung.evaluation_seconds, 3)
                rows.writerow([*what, rung.step, rung.epoch, round(rung.value, 6), round(rung.loss, 5), seconds])
    return len(ended)


def read_table(path: Path) -> dict[str, DomainTable]:
    """The curves by domain.

    Raises:
        ValueError: The file is no such table.
    """
    found: dict[str, dict[tuple[str, str], list[dict[str, str]]]] = {}
    with path.open(newline="") as file:
        head = file.readline()
        rows = csv.DictReader(file)
        if not head.startswith("# {") or tuple(rows.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} is no table of learning curves: write one with record_curves.py")
        for row in rows:
            curves = found.setdefault(row["domain"], {})
            curves.setdefault((row["method"], row["hyperparameters"]), []).append(row)
    facts = json.loads(head[1:])
    return {
        domain: DomainTable(
            domain,
            curves=tuple(_curve(method, text, rows) for (method, text), rows in curves.items()),
            **facts[domain],
        )
        for domain, curves in found.items()
    }


def _curve(method: str, hyperparameters: str, rows: Sequence[Mapping[str, str]]) -> Curve:
    evaluations = tuple(
        Evaluation(
            int(row["step"]), float(row["epoch"]), float(row["value"]), float(row["loss"]), float(row["seconds"])
        )
        for row in rows
    )
    state = TrialState(rows[0]["state"])
    return Curve(method, json.loads(hyperparameters), int(rows[0]["parameters"]), state, evaluations)
