"""The front of a domain: which trials nobody beats, how good that front is as a whole, and which trial to take home.

Two objectives: the domain's metric on the validation split, and trainable parameters (the task head included), fewer
being better. Only trials that reached the full budget count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from peftsearch.search.pareto import non_dominated
from peftsearch.spec import (
    ConfirmSpec,
    Direction,
    DomainFacts,
    StudyError,
    StudyFacts,
    TrialRecord,
    TrialState,
    suggest,
)

Pick = Literal["frontier", "best", "knee", "smallest"]

PICKS: tuple[Pick, ...] = ("best", "knee", "smallest")
"""Those of one trial."""


@dataclass(frozen=True)
class DomainFront:
    """One domain's answer.

    Attributes:
        domain: Name of the domain.
        facts: The domain as it was prepared.
        front: The front over all models, by trainable parameters.
        by_model: The front of each model's trials.
        hypervolume: Of ``front``, see `hypervolume`.
        records: All trials of the domain, whatever their state, by number.
        study: The study that the domain is one of.
        storage: What ``--storage`` commands on it need; None where they find it without.
    """

    domain: str
    facts: DomainFacts
    front: list[TrialRecord]
    by_model: dict[str, list[TrialRecord]]
    hypervolume: float
    records: list[TrialRecord]
    study: StudyFacts = field(repr=False)
    storage: str | None = field(default=None, repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """Trials by state: complete, pruned, failed, running."""
        order = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED, TrialState.RUNNING)
        return {state.value.lower(): sum(record.state is state for record in self.records) for state in order}

    @property
    def best(self) -> TrialRecord | None:
        """The trial with the best metric; of several, the one with fewest parameters."""
        return _best(self.front, self.facts.direction) if self.front else None

    def picks(self) -> dict[Pick, Choice]:
        """The trial that each of `PICKS` gives where nothing else is asked for; {} for an empty front."""
        direction = self.facts.direction
        return {how: choose(self.front, how, direction)[0] for how in PICKS} if self.front else {}

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from peftsearch.frontier.notebook import display

        return display(self.records, self.study, [self.domain], storage=self.storage)


def complete(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The trials that may stand on a front: COMPLETE, with a finite metric."""
    return [
        record
        for record in records
        if record.state is TrialState.COMPLETE and record.value is not None and math.isfinite(record.value)
    ]


def front(records: Iterable[TrialRecord], direction: Direction) -> list[TrialRecord]:
    """The Pareto-optimal trials: no other has a metric at least as good and parameters at most as many, one of them
    better. Trials that are equal in both are all kept.

    Args:
        records: Trials of one domain, of one model or of several; those that are not COMPLETE are ignored.
        direction: Of the domain's metric.

    Returns:
        By trainable parameters, then number.
    """
    candidates = complete(records)
    if not candidates:
        return []
    points = np.array([(-goodness(record, direction), record.trainable_parameters) for record in candidates])
    chosen = [candidates[index] for index in np.flatnonzero(non_dominated(points))]
    return sorted(chosen, key=lambda record: (record.trainable_parameters, record.number))


def goodness(record: TrialRecord, direction: Direction) -> float:
    """A finished trial's metric, with the sign that makes more better."""
    assert record.value is not None
    return record.value if direction == "maximize" else -record.value


def hypervolume(records: Iterable[TrialRecord], direction: Direction, total_parameters: int) -> float:
    """The share of the unit square that the front dominates: one number for "accurate with few parameters".

    A trial is the point ``(x, y)``, more of both being better; it dominates the rectangle from (0, 0) to (x, y), and
    the hypervolume is the area of the rectangles' union (Zitzler and Thiele 1998)::

        x = 1 - log10(max(p, 1)) / log10(N)      clipped to [0, 1]
        y = v        where the metric is maximised, 1 - v where it is minimised; clipped to [0, 1]

    with ``p`` trainable parameters, ``N`` parameters of the base model, and ``v`` the metric, which is supposed to lie
    in [0, 1]. So x is 0 for a trial that trains as many parameters as the model has (full fine-tuning adds no area),
    1/2 for one that trains its square root, and 1 for one that trains nothing. The best is 1. Metrics outside [0, 1],
    such as perplexity, say nothing here.

    Args:
        records: Trials of one domain; those that are not COMPLETE are ignored.
        direction: Of the domain's metric.
        total_parameters: N; with several models the largest one's.
    """
    width = math.log10(max(total_parameters, 2))
    area, reached = 0.0, 0.0
    for record in front(records, direction):
        assert record.value is not None
        x = 1 - math.log10(max(record.trainable_parameters, 1)) / width
        y = record.value if direction == "maximize" else 1 - record.value
        x, y = min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)
        # By rising parameters x falls and y rises: each trial adds the strip above those before it.
        area += x * max(0.0, y - reached)
        reached = max(reached, y)
    return area


def domain_fronts(
    records: Iterable[TrialRecord], facts: StudyFacts, storage: str | None = None
) -> dict[str, DomainFront]:
    """Every domain's front, in the order of the study file; ``storage`` as in `DomainFront`."""
    by_domain: dict[str, list[TrialRecord]] = {domain: [] for domain in facts.domains}
    for record in sorted(records, key=lambda record: record.number):
        by_domain.setdefault(record.domain, []).append(record)
    total = max((model.total_parameters for model in facts.models.values()), default=1)
    fronts = {}
    for domain, domain_facts in facts.domains.items():
        mine, direction = by_domain[domain], domain_facts.direction
        models = list(dict.fromkeys([*facts.models, *(record.model for record in mine)]))
        fronts[domain] = DomainFront(
            domain,
            domain_facts,
            front(mine, direction),
            {model: front((record for record in mine if record.model == model), direction) for model in models},
            hypervolume(mine, direction, total),
            mine,
            facts,
            storage,
        )
    return fronts


def finalists(records: Iterable[TrialRecord], facts: StudyFacts, confirm: ConfirmSpec) -> list[TrialRecord]:
    """The trials to train again with further seeds: each method's best for each model, and the domain's front.

    Args:
        records: All trials of the study.
        facts: The study's facts.
        confirm: Which of the two, or all trials of the full budget, and how many per domain.

    Returns:
        Domain by domain; within a domain the methods' best (the best of them first), then the front from its most
        accurate trial on, then the others. None twice; what is beyond ``max_finalists`` is left out.
    """
    records = list(records)
    chosen: list[TrialRecord] = []
    for domain, domain_facts in facts.domains.items():
        direction = domain_facts.direction
        mine = [record for record in records if record.domain == domain]
        methods = _by_goodness(method_bests(mine, direction), direction)
        over_all = _by_goodness(front(mine, direction), direction)
        wanted = {
            "front": over_all,
            "methods": methods,
            "both": methods + over_all,
            "all": methods + over_all + _by_goodness(complete(mine), direction),
        }[confirm.finalists]
        distinct = {record.number: record for record in wanted}
        chosen += list(distinct.values())[: confirm.max_finalists]
    return chosen


def method_bests(records: Iterable[TrialRecord], direction: Direction) -> list[TrialRecord]:
    """Each method's best trial for each model; of equals, the one with fewest parameters.

    Args:
        records: Trials of one domain; those that are not COMPLETE are ignored.
        direction: Of the domain's metric.
    """
    cells: dict[tuple[str, str], list[TrialRecord]] = {}
    for record in complete(records):
        cells.setdefault((record.model, record.method), []).append(record)
    return [_best(mine, direction) for mine in cells.values()]


def exportable(records: Iterable[TrialRecord], direction: Direction) -> list[TrialRecord]:
    """The trials whose weights are kept: the front of each method's trials for each model, and whatever was confirmed.

    The front over all methods is among them, and each method's best. With ``finalists: all``, trials are confirmed
    whose weights went when others took their place on a front.

    Args:
        records: Trials of one domain.
        direction: Of the domain's metric.
    """
    records = list(records)
    cells: dict[tuple[str, str], list[TrialRecord]] = {}
    for record in records:
        cells.setdefault((record.model, record.method), []).append(record)
    kept = {record.number for mine in cells.values() for record in front(mine, direction)}
    return [record for record in records if record.number in kept or record.confirmed]


def _by_goodness(records: Iterable[TrialRecord], direction: Direction) -> list[TrialRecord]:
    return sorted(
        records, key=lambda record: (-goodness(record, direction), record.trainable_parameters, record.number)
    )


@dataclass(frozen=True)
class Choice:
    """A trial that was picked.

    Attributes:
        record: The trial.
        instead_of: What would have been picked if the error bars did not touch; None where nothing stood back.
    """

    record: TrialRecord
    instead_of: TrialRecord | None = None

    @property
    def reason(self) -> str | None:
        """Why another trial stood back, in one sentence."""
        other = self.instead_of
        if other is None:
            return None
        assert self.record.confirmed is not None
        assert other.confirmed is not None
        ours, theirs = self.record.confirmed, other.confirmed
        noise = seed_noise((ours.mean, ours.std, ours.seeds), (theirs.mean, theirs.std, theirs.seeds))
        # Validation chose the other one; with further seeds the cheaper one can even be the better one.
        verdict = "a tie within" if abs(ours.mean - theirs.mean) <= noise else "better, beyond"
        return (
            f"trial {self.record.number} ({self.record.method}) is picked rather than trial {other.number} "
            f"({other.method}): {ours.mean:.4f} ± {ours.std:.4f} and {theirs.mean:.4f} ± {theirs.std:.4f} over "
            f"{ours.seeds} and {theirs.seeds} seeds is {verdict} the error bars, and it trains "
            f"{self.record.trainable_parameters:,} parameters rather than {other.trainable_parameters:,}"
        )


def pick(
    front: Sequence[TrialRecord],
    how: Pick | str,
    direction: Direction = "maximize",
    *,
    max_parameters: int | None = None,
    min_metric: float | None = None,
) -> list[TrialRecord]:
    """The trials of `choose`."""
    chosen = choose(front, how, direction, max_parameters=max_parameters, min_metric=min_metric)
    return [choice.record for choice in chosen]


def choose(
    front: Sequence[TrialRecord],
    how: Pick | str,
    direction: Direction = "maximize",
    *,
    max_parameters: int | None = None,
    min_metric: float | None = None,
    max_latency: float | None = None,
    latencies: Mapping[int, float] | None = None,
) -> list[Choice]:
    """Choose trials from a front.

    - ``frontier``: all of them.
    - ``best``: the best metric.
    - ``knee``: where further parameters stop paying. On the front, put log10 of the trainable parameters and the
      metric each on a scale from 0 (the cheapest trial) to 1 (the best trial); the knee is the trial furthest above the
      straight line between those two, as in Kneedle (Satopää et al. 2011, "Finding a 'Kneedle' in a Haystack") and
      Das 1999 ("On characterizing the knee of the Pareto curve"); Branke et al. 2004 ("Finding Knees in Multi-objective
      Optimization") compare this with other definitions. Of equals, the cheapest. A front that nowhere rises above the
      line, such as one of two trials, has no knee: then the best trial is picked.
    - ``smallest``: the fewest trainable parameters; above all with ``min_metric``.

    Where trials were confirmed, ``best`` and ``knee`` give way to the cheapest trial that is tied with them: whose mean
    over the confirmation's seeds, on the validation split, is worse by no more than the error bars (`seed_noise`), and
    of whose seeds at least one reaches one of the other's (`fall_apart`).

    Args:
        front: A domain's front, as `front` returns it.
        how: One of the above.
        direction: Of the domain's metric.
        max_parameters: Only trials with at most so many trainable parameters.
        min_metric: Only trials whose metric is at least this good (where the metric is minimised: at most this).
        max_latency: Only trials that take at most so many milliseconds for an example.
        latencies: How many each takes, by its number; needed for ``max_latency``.

    Returns:
        By trainable parameters; one trial unless ``how`` is ``frontier``.

    Raises:
        StudyError: Unknown ``how``, an empty front, or nothing left under the limits; says what comes nearest.
    """
    if how not in get_args(Pick):
        raise StudyError(f"unknown pick {how!r}{suggest(how, get_args(Pick))}")
    if not front:
        raise StudyError("there is nothing to pick from: no trial has reached the full budget yet")
    left = [
        record
        for record in front
        if (max_parameters is None or record.trainable_parameters <= max_parameters)
        and (min_metric is None or _at_least(record, min_metric, direction))
    ]
    if not left:
        raise StudyError(_nothing_left(front, direction, max_parameters, min_metric))
    if max_latency is not None:
        known = latencies or {}
        fastest = min(left, key=lambda record: known.get(record.number, math.inf))
        left = [record for record in left if known.get(record.number, math.inf) <= max_latency]
        if not left:
            took = known.get(fastest.number, math.inf)
            limited = max_parameters is not None or min_metric is not None
            raise StudyError(
                f"no trial{' that is left' if limited else ' on the front'} takes at most "
                f"{max_latency:g} ms for an example: the fastest, trial {fastest.number} ({fastest.method}), "
                f"takes {took:.3g} ms"
            )
    if how == "frontier":
        return [Choice(record) for record in left]
    if how == "smallest":
        return [Choice(min(left, key=lambda r: (r.trainable_parameters, -goodness(r, direction), r.number)))]
    picked = _best(left, direction) if how == "best" else _knee(left, direction)
    tied = [record for record in left if record.trainable_parameters < picked.trainable_parameters]
    tied = [record for record in tied if _tied(record, picked, direction)]
    if not tied:
        return [Choice(picked)]
    return [Choice(min(tied, key=lambda record: (record.trainable_parameters, record.number)), picked)]


CONSTANT = 0
"""In the place of a number of seeds: a value in which there is no chance."""


def seed_noise(one: tuple[float, float, int], other: tuple[float, float, int]) -> float:
    """The error bars of the difference of two means over seeds: half of its 95 % confidence interval.

    That is ``t * sqrt(s1**2 / n1 + s2**2 / n2)``, with the 97.5 % quantile t of Student's distribution at Welch's
    degrees of freedom (Welch 1947, Biometrika 34; with three seeds each and equal deviations t is 2.78, and 4.30 with
    two). Of a single seed the deviation is not known: it is taken to be the other one's.

    Args:
        one: Mean, sample standard deviation, and number of seeds or `CONSTANT`.
        other: Likewise.

    Returns:
        0 where neither has two seeds.
    """
    from scipy.special import stdtrit

    known = [(std**2 / count, count - 1) for _, std, count in (one, other) if count > 1]
    single = sum(count == 1 for _, _, count in (one, other))
    if single and known:
        (variance, degrees) = known[0]
        return float(stdtrit(degrees, 0.975)) * math.sqrt(variance + single * variance * (degrees + 1))
    total = sum(variance for variance, _ in known)
    if total == 0:
        return 0.0
    welch = total**2 / sum(variance**2 / degrees for variance, degrees in known)
    return float(stdtrit(welch, 0.975)) * math.sqrt(total)


def _tied(cheaper: TrialRecord, picked: TrialRecord, direction: Direction) -> bool:
    """Whether both were confirmed with several seeds, and the cheaper is worse by no more than the error bars."""
    a, b = cheaper.confirmed, picked.confirmed
    if a is None or b is None or a.seeds < 2 or b.seeds < 2:
        return False
    worse = b.mean - a.mean if direction == "maximize" else a.mean - b.mean
    if worse > seed_noise((a.mean, a.std, a.seeds), (b.mean, b.std, b.seeds)):
        return False
    return not fall_apart([r.value for r in a.readings], [r.value for r in b.readings], direction)


def fall_apart(worse: Sequence[float], better: Sequence[float], direction: Direction) -> bool:
    """Whether every seed of the one is worse than every seed of the other, of three seeds or more each.

    A configuration that diverges with some seeds has error bars in which everything is a tie; it is none that anybody
    would want in place of another.
    """
    if min(len(worse), len(better)) < 3:
        return False
    return max(worse) < min(better) if direction == "maximize" else min(worse) > max(better)


def _best(front: Sequence[TrialRecord], direction: Direction) -> TrialRecord:
    return min(front, key=lambda record: (-goodness(record, direction), record.trainable_parameters, record.number))


def _knee(front: Sequence[TrialRecord], direction: Direction) -> TrialRecord:
    best = _best(front, direction)
    x = np.log10([max(record.trainable_parameters, 1) for record in front])
    y = np.array([goodness(record, direction) for record in front])
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return best
    # The distance to the diagonal is (y - x) / sqrt(2).
    above = (y - y.min()) / np.ptp(y) - (x - x.min()) / np.ptp(x)
    index = int(np.argmax(above))
    return front[index] if above[index] > 1e-9 else best


def _at_least(record: TrialRecord, limit: float, direction: Direction) -> bool:
    return goodness(record, direction) >= (limit if direction == "maximize" else -limit)


def _nothing_left(
    front: Sequence[TrialRecord], direction: Direction, max_parameters: int | None, min_metric: float | None
) -> str:
    def named(record: TrialRecord) -> str:
        return f"trial {record.number} ({record.method})"

    cheapest = min(front, key=lambda record: (record.trainable_parameters, record.number))
    reach = "reaches" if direction == "maximize" else "gets down to"
    if max_parameters is not None and cheapest.trainable_parameters > max_parameters:
        return (
            f"no trial on the front trains at most {max_parameters:,} parameters: "
            f"the smallest, {named(cheapest)}, trains {cheapest.trainable_parameters:,}"
        )
    assert min_metric is not None
    affordable = [record for record in front if max_parameters is None or record.trainable_parameters <= max_parameters]
    best = _best(affordable, direction)
    if max_parameters is None:
        return f"no trial on the front {reach} {min_metric:g}: the best, {named(best)}, has {best.value:.4f}"
    message = (
        f"no trial on the front with at most {max_parameters:,} parameters {reach} {min_metric:g}: "
        f"the best of them, {named(best)}, has {best.value:.4f}"
    )
    good = [record for record in front if _at_least(record, min_metric, direction)]
    if good:
        message += f"; {named(good[0])} {reach} it with {good[0].trainable_parameters:,} parameters"
    return message
