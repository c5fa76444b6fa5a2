"""How much of the front a search has found by when: hypervolume against wall time and against epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from segment_records import Record

GRID = 200
"""Points of a median curve."""


@dataclass(frozen=True)
class Point:
    """What a search had found at a moment.

    Attributes:
        seconds: Since the start of its process.
        epochs: Passes over the training rows that it had spent, on finished, pruned and running trials.
        hypervolume: Of the front of its finished trials (`peftsearch.frontier.hypervolume`).
        finished: Number of trials that had reached the full budget.
    """

    seconds: float
    epochs: float
    hypervolume: float
    finished: int


def curve(records: Sequence[Record], began: float, limit: float, rows: int, total_parameters: int) -> list[Point]:
    """The points of one search, at each evaluation; what came after the limit does not count.

    Args:
        records: By the time at which they ended.
        began: When its process was started.
        limit: Seconds that it had.
        rows: Training rows.
        total_parameters: Of the base model.
    """
    from peftsearch.frontier import hypervolume
    from peftsearch.spec import TrialRecord, TrialState

    points = [Point(0.0, 0.0, 0.0, 0)]
    examples: dict[int, int] = {}
    finished: list[TrialRecord] = []
    area = 0.0
    for record in records:
        if record.ended - began > limit:
            break
        examples[record.trial] = record.examples
        if record.final:
            finished.append(
                TrialRecord(
                    number=record.trial,
                    model="base",
                    domain="domain",
                    method="lora",
                    state=TrialState.COMPLETE,
                    seed=0,
                    value=record.accuracy,
                    trainable_parameters=record.parameters,
                    hyperparameters={},
                )
            )
            area = hypervolume(finished, "maximize", total_parameters)
        points.append(Point(record.ended - began, sum(examples.values()) / rows, area, len(finished)))
    return points


def at(points: Sequence[Point], place: float, axis: str) -> float:
    """Hypervolume where ``axis`` (``seconds`` or ``epochs``) had come to a place."""
    return max((point.hypervolume for point in points if getattr(point, axis) <= place), default=0.0)


def middle(curves: Sequence[Sequence[Point]], end: float, axis: str) -> dict[str, list[float]]:
    """Median, lowest and highest hypervolume of several repeats at evenly spread places from 0 to ``end``."""
    places = [end * index / GRID for index in range(GRID + 1)]
    values = [[at(points, place, axis) for points in curves] for place in places]
    return {
        axis: places,
        "median": [median(several) for several in values],
        "lowest": [min(several) for several in values],
        "highest": [max(several) for several in values],
    }


def summary(curves: Mapping[str, Sequence[Sequence[Point]]], limit: float) -> str:
    """A Markdown table of medians: hypervolume after quarters of the time, trials that were finished, epochs spent."""
    lines = [
        "| search | 25% of the time | 50% | 75% | 100% | trials finished | epochs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, repeats in curves.items():
        areas = [median(at(points, limit * share, "seconds") for points in repeats) for share in (0.25, 0.5, 0.75, 1.0)]
        finished = median(points[-1].finished for points in repeats)
        epochs = median(points[-1].epochs for points in repeats)
        lines.append(f"| {name} | {' | '.join(f'{area:.4f}' for area in areas)} | {finished:g} | {epochs:.1f} |")
    return "\n".join(lines)


def draw(curves: Mapping[str, Sequence[Sequence[Point]]], limit: float, path: Path) -> None:
    """Median curves with the range of the repeats, against wall time and against epochs, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # To where every search has come, so that none is drawn beyond its end.
    epochs = min(min(points[-1].epochs for points in repeats) for repeats in curves.values())
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, name, end in zip(axes, ("seconds", "epochs"), (limit, epochs), strict=True):
        for search, repeats in curves.items():
            found = middle(repeats, end, name)
            (line,) = axis.step(found[name], found["median"], where="post", label=search)
            axis.fill_between(
                found[name], found["lowest"], found["highest"], step="post", alpha=0.15, color=line.get_color()
            )
        axis.set_xlabel({"seconds": "wall time in seconds", "epochs": "epochs spent"}[name])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("hypervolume of the front")
    axes[0].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
