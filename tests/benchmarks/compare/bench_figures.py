"""From records to figures: times, overhead, medians over repeats, ratios within one, and the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from measured_process import Measured
from segment_records import Record
from trial_list import Work

Figures = dict[str, float | None]

COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("wall_seconds", "wall s", 1),
    ("first_result_seconds", "first result s", 1),
    ("warm_up_seconds", "warm-up s", 1),
    ("training_seconds", "training s", 1),
    ("closing_seconds", "closing s", 1),
    ("overhead_per_trial_seconds", "overhead/trial s", 3),
    ("whole_overhead_per_trial_seconds", "whole overhead/trial s", 3),
    ("examples_per_second", "examples/s", 1),
    ("peak_rss_gib", "peak RSS GiB", 2),
    ("peak_pss_gib", "peak PSS GiB", 2),
)
"""Key, title and decimals of each figure."""


def busy_seconds(intervals: Iterable[tuple[float, float]], lanes: int) -> float:
    """Time for which the lanes trained, on average over them.

    With one lane, the length of the intervals' union. With several, each moment counts for the share of the lanes that
    have something to train; more intervals at once than lanes (a pack of trials in one lane) fill them all.
    """
    edges = sorted([(start, 1) for start, _ in intervals] + [(end, -1) for _, end in intervals])
    total, running, before = 0.0, 0, 0.0
    for moment, change in edges:
        total += min(running, lanes) / lanes * (moment - before)
        running, before = running + change, moment
    return total


def figures_of(records: Sequence[Record], run: Measured, lanes: int) -> Figures:
    """The figures of one run.

    - ``wall_seconds``: from the start of the process to its end.
    - ``first_result_seconds``: from the start of the process to the first evaluation of a trial.
    - ``warm_up_seconds``: from the start of the process to the first training step.
    - ``training_seconds``: time in which the lanes trained and evaluated, see `busy_seconds`.
    - ``closing_seconds``: from the last evaluation of a trial to the end of the process.
    - ``overhead_per_trial_seconds``: (wall - warm-up - training - closing) / trials: what grows with the trials.
    - ``whole_overhead_per_trial_seconds``: (wall - training) / trials.
    - ``examples_per_second``: trained examples over the wall time.

    Args:
        records: At least one.
        run: The process.
        lanes: Trials that are trained at once.
    """
    wall = run.ended - run.began
    trials = len({record.trial for record in records})
    intervals = [(record.ended - record.seconds, record.ended) for record in records]
    training = busy_seconds(intervals, lanes)
    warm_up = min(start for start, _ in intervals) - run.began
    closing = run.ended - max(end for _, end in intervals)
    last = {record.trial: record for record in sorted(records, key=lambda record: record.step)}
    return {
        "wall_seconds": wall,
        "first_result_seconds": min(record.ended for record in records) - run.began,
        "warm_up_seconds": warm_up,
        "training_seconds": training,
        "closing_seconds": closing,
        "overhead_per_trial_seconds": (wall - warm_up - training - closing) / trials,
        "whole_overhead_per_trial_seconds": (wall - training) / trials,
        "examples_per_second": sum(record.examples for record in last.values()) / wall,
        "peak_rss_gib": run.peak_rss / 2**30,
        "peak_pss_gib": None if run.peak_pss is None else run.peak_pss / 2**30,
        "trials": trials,
    }


def add_ratios(runs: Mapping[str, Figures], floors: Sequence[str]) -> dict[str, Figures]:
    """The runs of one repeat with their ratios to the floor, which is the faster one of ``floors``.

    ``to_floor`` is the ratio of the wall times; ``to_floor_without_warm_up`` leaves out both warm-ups. Where no floor
    was run, there are no ratios.
    """
    found = [runs[name] for name in floors if name in runs]
    floor = min(found, key=lambda figures: figures["wall_seconds"] or 0.0, default=None)

    def ratio(figures: Figures, *less: str) -> float | None:
        if floor is None:
            return None
        taken, least = ((one["wall_seconds"] or 0) - sum(one[key] or 0 for key in less) for one in (figures, floor))
        return taken / least

    return {
        name: {
            **figures,
            "to_floor": ratio(figures),
            "to_floor_without_warm_up": ratio(figures, "warm_up_seconds"),
        }
        for name, figures in runs.items()
    }


def medians(repeats: Sequence[Mapping[str, Figures]]) -> dict[str, Figures]:
    """For each contender the median of each figure over the repeats in which it came to an end."""
    names = list(dict.fromkeys(name for repeat in repeats for name in repeat))
    return {name: _median_of([repeat[name] for repeat in repeats if name in repeat]) for name in names}


def _median_of(runs: Sequence[Figures]) -> Figures:
    found: Figures = {}
    for key in dict.fromkeys(key for run in runs for key in run):
        values = [value for run in runs if (value := run.get(key)) is not None]
        found[key] = median(values) if values else None
    return {**found, "repeats": len(runs)}


def differences(runs: Mapping[str, Sequence[Record]], work: Work, exact: Iterable[str], tolerance: float) -> list[str]:
    """Where contenders did not do the same work, one sentence each; none where they did.

    Every contender must have trained every trial of the list to its end, with all steps and all examples. The training
    losses at the end must agree among those that train the same batches with the same random numbers in the same
    precision.

    Args:
        runs: The records of each contender.
        work: The list.
        exact: The contenders whose losses must agree with those of the first of them.
        tolerance: Relative, of the losses.
    """
    found = []
    wanted = {(trial.rank, trial.learning_rate) for trial in work.trials}
    ends = {name: {(one.rank, one.learning_rate): one for one in runs[name] if one.final} for name in runs}
    for name, done in ends.items():
        if done.keys() != wanted:
            found.append(f"{name} finished {len(done.keys() & wanted)} of {len(wanted)} trials")
        for key, end in done.items():
            if (end.step, end.examples) != (work.budget.steps, work.examples):
                found.append(
                    f"{name} trained rank {key[0]}, rate {key[1]:g} for {end.step} steps and {end.examples} examples "
                    f"instead of {work.budget.steps} and {work.examples}"
                )
    agreeing = [name for name in exact if name in ends]
    for name in agreeing[1:]:
        for key in ends[name].keys() & ends[agreeing[0]].keys():
            one, other = ends[agreeing[0]][key].train_loss, ends[name][key].train_loss
            if abs(one - other) > tolerance * abs(one):
                found.append(
                    f"rank {key[0]}, rate {key[1]:g}: the training loss ends at {one:.6g} in {agreeing[0]} and at "
                    f"{other:.6g} in {name}"
                )
    return found


def markdown(rows: Mapping[str, Figures]) -> str:
    """The medians as a Markdown table, a line for each contender."""
    ratios = (("to_floor", "x floor", 2), ("to_floor_without_warm_up", "x floor, no warm-up", 2))
    columns = (*COLUMNS, *ratios)
    lines = [["contender", *(title for _, title, _ in columns)]]
    lines += [[name, *(_number(row.get(key), digits) for key, _, digits in columns)] for name, row in rows.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def drawn(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *rest])} |"

    rule = [("-" * width if column == 0 else "-" * (width - 1) + ":") for column, width in enumerate(widths)]
    return "\n".join([drawn(lines[0]), drawn(rule), *map(drawn, lines[1:])])


def _number(value: Any, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
