"""What a further point of the metric costs: from one trial of a front to a dearer one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftsearch.frontier.front import DomainFront, seed_noise
from peftsearch.spec import Direction, TrialRecord


@dataclass(frozen=True)
class MarginalCost:
    """What one pays for a better metric.

    Attributes:
        cheaper: The trial that one has.
        dearer: The trial that one could have: a better metric, for more trainable parameters.
        direction: Of the metric.
    """

    cheaper: TrialRecord
    dearer: TrialRecord
    direction: Direction

    @property
    def gain(self) -> float:
        """How much better the metric is on the validation split; positive, whichever way the metric goes."""
        assert self.cheaper.value is not None
        assert self.dearer.value is not None
        return _better(self.cheaper.value, self.dearer.value, self.direction)

    @property
    def point(self) -> float:
        """What counts as a point of the metric: 0.01 of one between -1 and 1, 1 of any other (a perplexity, say)."""
        values = (self.cheaper.value, self.dearer.value)
        return 0.01 if all(value is not None and -1 <= value <= 1 for value in values) else 1.0

    @property
    def parameters(self) -> int:
        """Trainable parameters that come on top."""
        return self.dearer.trainable_parameters - self.cheaper.trainable_parameters

    @property
    def parameters_per_point(self) -> float:
        """Further trainable parameters for each point."""
        return self.parameters * self.point / self.gain

    @property
    def seeds(self) -> tuple[float, float] | None:
        """The gain between the means over the confirmation's seeds (negative: a loss), and the error bars of that
        (`seed_noise`); None unless both trials were confirmed with two seeds or more."""
        a, b = self.cheaper.confirmed, self.dearer.confirmed
        if a is None or b is None or a.seeds < 2 or b.seeds < 2:
            return None
        return _better(a.mean, b.mean, self.direction), seed_noise((a.mean, a.std, a.seeds), (b.mean, b.std, b.seeds))

    def sentence(self, metric: str) -> str:
        """For people.

        Args:
            metric: The metric's name.
        """
        cheaper, dearer = self.cheaper, self.dearer
        change = (dearer.value or 0.0) - (cheaper.value or 0.0)
        text = (
            f"From trial {cheaper.number} ({cheaper.method}) to trial {dearer.number} ({dearer.method}): "
            f"{metric} {change:+.3f} for {self.parameters:,} more parameters "
            f"({times(dearer.trainable_parameters, cheaper.trainable_parameters)}), "
            f"{self.parameters_per_point:,.0f} for each {self.point:g}"
        )
        # A share of a pack's time is no measure for who trains alone.
        if cheaper.train_seconds and dearer.train_seconds and cheaper.packed == dearer.packed:
            longer = times(dearer.train_seconds, cheaper.train_seconds)
            text += "; training takes as long" if longer == "1 times" else f"; training takes {longer} the time"
        if self.seeds is not None:
            gain, noise = self.seeds
            shown = gain if self.direction == "maximize" else -gain
            said = "beyond the error bars" if gain > noise else "within the error bars, so perhaps nothing"
            text += f"; over seeds {shown:+.3f} ± {noise:.3f}, {said}"
        return f"{text}."


def marginal_costs(trials: Sequence[TrialRecord], direction: Direction) -> list[MarginalCost]:
    """From each trial to the next one.

    Args:
        trials: Of one front, by trainable parameters. Of equals (in both), the first counts.
        direction: Of the domain's metric.
    """
    found: list[MarginalCost] = []
    last: TrialRecord | None = None
    for record in trials:
        if last is not None:
            cost = MarginalCost(last, record, direction)
            if cost.gain <= 0 or cost.parameters <= 0:
                continue
            found.append(cost)
        last = record
    return found


def costs_between_picks(front: DomainFront) -> list[MarginalCost]:
    """From the smallest to the knee to the best, as far as these are different trials."""
    picked = {choice.record.number: choice.record for choice in front.picks().values()}
    return marginal_costs(
        sorted(picked.values(), key=lambda record: record.trainable_parameters), front.facts.direction
    )


def times(larger: float, smaller: float) -> str:
    """A ratio in words, with two digits."""
    ratio = larger / max(smaller, 1e-9)
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.2g} times"


def _better(value: float, other: float, direction: Direction) -> float:
    return other - value if direction == "maximize" else value - other
