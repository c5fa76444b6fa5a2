"""How a front grew while the study ran."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from peftsearch.frontier.front import front, hypervolume
from peftsearch.spec import Direction, TrialRecord, TrialState

_POINTS = 200


def hypervolume_history(
    records: Iterable[TrialRecord], direction: Direction, total_parameters: int, points: int = _POINTS
) -> list[tuple[int, float]]:
    """The front's hypervolume after so many trials had ended.

    Args:
        records: Trials of one domain. Those that have ended count in the order of their ends, or by number where
            these were not recorded.
        direction: Of the domain's metric.
        total_parameters: See `hypervolume`.
        points: At most about so many moments, evenly spaced over the trials.

    Returns:
        Pairs (ended trials, hypervolume): (0, 0.0), each moment at which the front had grown, and the last trial.
    """
    ended = _ended(records)
    found = [(0, 0.0)]
    best: list[TrialRecord] = []
    stride = max(1, -(-len(ended) // points))
    for begin in range(0, len(ended), stride):
        moment = min(begin + stride, len(ended))
        # A trial that was dominated once stays so, which keeps this fast with ten thousand of them.
        best = front([*best, *ended[begin:moment]], direction)
        reached = hypervolume(best, direction, total_parameters)
        if reached != found[-1][1] or moment == len(ended):
            found.append((moment, reached))
    return found


def seconds_spent(records: Iterable[TrialRecord], counts: Sequence[int]) -> list[float]:
    """Seconds of training and evaluation that the first so many ended trials took, one after another.

    Unlike a clock's time this does not grow while a study stands still, nor shrink with more slots.

    Args:
        records: As for `hypervolume_history`.
        counts: How many trials, as in its pairs.
    """
    each = (record.train_seconds + record.evaluation_seconds for record in _ended(records))
    until = [0.0, *accumulate(each)]
    return [until[count] for count in counts]


def _ended(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    return sorted(
        (record for record in records if record.state is not TrialState.RUNNING),
        key=lambda record: (record.finished or "", record.number),
    )
