"""What peftsearch is to reach against the other contenders: ratios within one repeat, and whether their medians do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench_figures import Figures

FLOORS = ("floor, one process", "floor, process per core")
"""A bare loop over the same length-bucketed batches as peftsearch's: what is beside it is overhead."""
SHUFFLED = ("shuffled floor, one process", "shuffled floor, process per core")
"""A bare loop as one writes it, over shuffled batches: bucketing is one of the things that are switched on."""
RAYS = ("Ray's pattern, 1 at a time", "Ray's pattern, 2 at a time")
TRAINER = ("hyperparameter_search",)


@dataclass(frozen=True)
class Target:
    """One ratio.

    Attributes:
        what: In words.
        contender: Of peftsearch's.
        others: The fastest of these is what it is compared with.
        figure: The contender's over the other's; or with ``faster``, the other's over the contender's.
        less: Figures that are taken off both first.
        bound: At most this; with ``faster`` at least.
        faster: See ``figure``.
    """

    what: str
    contender: str
    others: tuple[str, ...]
    bound: float
    figure: str = "wall_seconds"
    less: tuple[str, ...] = ()
    faster: bool = False

    def ratio(self, runs: Mapping[str, Figures]) -> float | None:
        """In one repeat; None where a contender is missing."""
        found = [runs[name] for name in self.others if name in runs]
        if self.contender not in runs or not found:
            return None
        other = min(found, key=lambda figures: figures["wall_seconds"] or 0.0)
        mine, its = (
            (run[self.figure] or 0.0) - sum(run[key] or 0.0 for key in self.less)
            for run in (runs[self.contender], other)
        )
        over, under = (its, mine) if self.faster else (mine, its)
        # An overhead may be measured as nothing.
        return over / under if under > 0 else None

    def met(self, ratio: float) -> bool:
        """Whether a ratio is good enough."""
        return ratio >= self.bound if self.faster else ratio <= self.bound


def targets(seconds_per_trial: float) -> list[Target]:
    """All of them.

    Args:
        seconds_per_trial: Of training: the documented pattern loses more with shorter trials.
    """
    plain, everything, half = "peftsearch, plain", "peftsearch, on", "peftsearch, bf16"
    over_ray = 4.0 if seconds_per_trial < 15 else 3.0
    return [
        Target("nothing switched on, warm-up left out", plain, FLOORS, 1.05, less=("warm_up_seconds",)),
        Target("nothing switched on", plain, FLOORS, 1.15),
        Target("everything on, same precision", everything, SHUFFLED, 0.7),
        Target("everything on, bf16 against fp32", half, SHUFFLED, 0.4),
        Target("faster than Ray's documented pattern", everything, RAYS, over_ray, faster=True),
        Target(
            "less overhead per trial than Ray's pattern",
            everything,
            RAYS,
            30.0,
            figure="overhead_per_trial_seconds",
            faster=True,
        ),
        Target("faster than hyperparameter_search", everything, TRAINER, 2.0, faster=True),
    ]


def verdicts(repeats: Sequence[Mapping[str, Figures]]) -> list[dict[str, Any]]:
    """Each target with the median of its ratios, their range, and whether the median reaches the bound.

    Targets whose contenders were not run are left out.
    """
    alone = [
        (run["training_seconds"] or 0.0) / (run["trials"] or 1)
        for repeat in repeats
        if (run := repeat.get(FLOORS[0])) is not None
    ]
    found = []
    for target in targets(median(alone) if alone else 20.0):
        ratios = [ratio for repeat in repeats if (ratio := target.ratio(repeat)) is not None]
        if ratios:
            middle = median(ratios)
            found.append(
                {
                    "target": target.what,
                    "against": " or ".join(target.others),
                    "ratio": middle,
                    "least": min(ratios),
                    "most": max(ratios),
                    "bound": target.bound,
                    "at_least": target.faster,
                    "met": target.met(middle),
                }
            )
    return found


def verdict_table(found: Sequence[Mapping[str, Any]]) -> str:
    """The verdicts as a Markdown table."""
    lines = ["| target | against the faster of | median ratio (range) | wanted | |", "|---|---|---:|---:|---|"]
    for one in found:
        wanted = f"{'>=' if one['at_least'] else '<='} {one['bound']:g}"
        ratio = f"{one['ratio']:.2f} ({one['least']:.2f} to {one['most']:.2f})"
        lines.append(
            f"| {one['target']} | {one['against']} | {ratio} | {wanted} | {'met' if one['met'] else 'missed'} |"
        )
    return "\n".join(lines)
