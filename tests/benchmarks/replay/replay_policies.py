"""Compares search policies on recorded learning curves: the project's own searcher and scheduler, without training.

    python tests/benchmarks/replay/replay_policies.py [--table FILE.csv] [--seeds 20] [--budget 1.0] [--slots 1]
                                                      [--policies random tpe tpe-asha tpe-pareto] [--to FOLDER]

Every policy searches each domain of the table from several seeds, until it has spent as many epochs as the whole grid
took (times ``--budget``). A proposal is answered by the grid's configuration next to it. Writes ``replay.json``,
``replay.md`` and ``replay.png``: hypervolume of the finished trials' front against epochs spent (those of pruned trials
too), the mean over the seeds with its 95% confidence band; and the epochs that each took to reach 99% of the
hypervolume of the full grid.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from curve_table import Curve, DomainTable, read_table
from replay_ledger import ReplayLedger

HERE = Path(__file__).parent
POLICIES = {
    "random": {"sampler": "random", "scheduler": "none"},
    "tpe": {"sampler": "tpe", "scheduler": "none"},
    "random-pareto": {"sampler": "random", "scheduler": "pareto_asha"},
    "tpe-asha": {"sampler": "tpe", "scheduler": "asha"},
    "tpe-pareto": {"sampler": "tpe", "scheduler": "pareto_asha"},
}
"""What a study file would say under ``search``."""
TITLES = {
    "random": "random, no pruning",
    "tpe": "TPE, no pruning",
    "random-pareto": "random, front-aware ASHA",
    "tpe-asha": "TPE, accuracy-only ASHA",
    "tpe-pareto": "TPE, front-aware ASHA",
}
COMPARED = ("random", "tpe", "tpe-asha", "tpe-pareto")
PLACES = 200
"""Points of a curve."""
TARGET = 0.99
"""Share of the full grid's hypervolume that is to be reached."""
QUARTERS = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Shares of the full grid's epochs at which the table compares."""


@dataclass(frozen=True)
class Search:
    """One search: the front's hypervolume from so many epochs on.

    Attributes:
        epochs: Ascending.
        hypervolume: At each.
        trials: Begun.
        complete: Of those that reached the full budget.
    """

    epochs: tuple[float, ...]
    hypervolume: tuple[float, ...]
    trials: int
    complete: int

    def at(self, epochs: float) -> float:
        """Hypervolume after so many epochs."""
        place = bisect_right(self.epochs, epochs)
        return self.hypervolume[place - 1] if place else 0.0

    def reached(self, hypervolume: float) -> float:
        """Epochs after which the front had so much; infinite where it never had."""
        return next(
            (spent for spent, area in zip(self.epochs, self.hypervolume, strict=True) if area >= hypervolume), math.inf
        )


def grid_hypervolume(table: DomainTable) -> float:
    """Of the front of all configurations."""
    from peftsearch.frontier import hypervolume
    from peftsearch.spec import TrialRecord, TrialState

    records = [
        TrialRecord(
            number=number,
            model="grid",
            domain=table.domain,
            method=curve.method,
            state=curve.state,
            seed=0,
            value=curve.evaluations[-1].value,
            trainable_parameters=curve.parameters,
            hyperparameters={},
        )
        for number, curve in enumerate(table.curves)
        if curve.state is TrialState.COMPLETE
    ]
    return hypervolume(records, table.direction, table.total_parameters)


def search(table: DomainTable, settings: Mapping[str, Any], seed: int, budget: float, slots: int = 1) -> Search:
    """Search one domain until so many epochs are spent.

    Args:
        table: Of the domain.
        settings: Of the study file's ``search`` section.
        seed: Of the search.
        budget: Epochs.
        slots: Trials at a time; each takes as long as its epochs.
    """
    from peftsearch.frontier import hypervolume
    from peftsearch.frontier.front import front
    from peftsearch.methods import method_space
    from peftsearch.search.cells import Cell
    from peftsearch.search.counts import ParameterCount
    from peftsearch.search.proposals import startup_trials
    from peftsearch.search.run import DomainSearch, StudyRun
    from peftsearch.spec import Range, SearchSpec, TrialRecord, TrialState
    from peftsearch.training.budget import Budget
    from peftsearch.training.segment import SegmentResult

    def space(method: str) -> dict[str, Any]:
        written = table.space(method)
        return {
            name: Range(**value) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
            for name, value in written.items()
        }

    def count(cell: Cell, hyperparameters: Mapping[str, Any]) -> ParameterCount:
        parameters = table.nearest(cell.method, hyperparameters).parameters
        return ParameterCount(parameters, parameters)

    budgets = {}
    for method in table.methods:
        whole = max(table.of(method), key=lambda curve: len(curve.evaluations)).evaluations
        steps = tuple(evaluation.step for evaluation in whole)
        budgets[method] = Budget(max(1, round(whole[-1].step / whole[-1].epoch)), steps)
    cells = [Cell("grid", table.domain, method_space(method, space(method))) for method in table.methods]
    ledger = ReplayLedger(cells, table.direction)
    # More trials than the budget can pay for: it is what ends the search. TPE takes over as soon as in a study of the
    # usual number of trials, not as late as in one that is so long.
    size = {"trials": len(table.curves) * 20, "startup_trials": startup_trials(SearchSpec())}
    run = StudyRun(
        SearchSpec(**{**size, "seed": seed, **settings}),
        cells,
        {table.domain: DomainSearch(table.metric, table.direction, budgets)},
        count,
        ledger,
    )
    spent, area = 0.0, 0.0
    epochs, areas = [0.0], [0.0]
    best: list[TrialRecord] = []
    # Time (in epochs), a counter that keeps the order, trial, its curve, and its next evaluation.
    running: list[tuple[float, int, int, Curve, int]] = []
    now, asked = 0.0, 0

    def begin(number: int, curve: Curve, index: int) -> None:
        nonlocal asked
        before = curve.evaluations[index - 1].epoch if index else 0.0
        ends = curve.evaluations[index].epoch if index < len(curve.evaluations) else before
        asked += 1
        heapq.heappush(running, (now + ends - before, asked, number, curve, index))

    while True:
        while len(running) < slots and spent < budget and (record := run.next_trial()) is not None:
            begin(record.number, table.nearest(record.method, record.hyperparameters), 0)
        if not running or spent >= budget:
            break
        now, _, number, curve, index = heapq.heappop(running)
        if index == len(curve.evaluations):
            run.failed(number, "it failed when it was recorded")
            continue
        point = curve.evaluations[index]
        spent += point.epoch - (curve.evaluations[index - 1].epoch if index else 0.0)
        last = curve.state is TrialState.COMPLETE and index == len(curve.evaluations) - 1
        result = SegmentResult(point.step, point.loss, point.loss, {table.metric: point.value}, point.seconds, 0.0, 0)
        if run.evaluated(number, result, 0, final=last):
            begin(number, curve, index + 1)
        elif ledger.record(number).state is TrialState.COMPLETE:
            best = front([*best, ledger.record(number)], table.direction)
            area = hypervolume(best, table.direction, table.total_parameters)
        epochs.append(spent)
        areas.append(area)
    complete = sum(record.state is TrialState.COMPLETE for record in ledger.records)
    return Search(tuple(epochs), tuple(areas), len(ledger.records), complete)


@dataclass(frozen=True)
class Summary:
    """A policy on one domain, over all seeds; hypervolumes are shares of the full grid's.

    Attributes:
        mean: At `PLACES` evenly spread budgets, from 0.
        low: Lower end of the mean's 95% confidence interval.
        high: Upper end.
        lowest: Tenth of the seeds below it.
        highest: Tenth of the seeds above it.
        to_target: Epochs to `TARGET`, as a share of the full grid's: of the median seed, None where it was never there.
        reached: Share of the seeds that got there.
        trials: Median number of trials.
        complete: Median number of those that reached the full budget.
    """

    mean: list[float]
    low: list[float]
    high: list[float]
    lowest: list[float]
    highest: list[float]
    to_target: float | None
    reached: float
    trials: float
    complete: float


def places(table: DomainTable, budget: float) -> list[float]:
    """The budgets of a summary's curves, in epochs."""
    return [table.epochs * budget * index / PLACES for index in range(PLACES + 1)]


def summarise(searches: Sequence[Search], table: DomainTable, budget: float) -> Summary:
    """Over the seeds."""
    whole = grid_hypervolume(table)
    values = np.array([[one.at(place) / whole for place in places(table, budget)] for one in searches])
    mean = values.mean(axis=0)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
    half = _t95(len(values)) * spread / math.sqrt(len(values))
    needed = [one.reached(TARGET * whole) for one in searches]
    middle = median(needed)
    return Summary(
        mean.tolist(),
        (mean - half).tolist(),
        (mean + half).tolist(),
        np.quantile(values, 0.1, axis=0).tolist(),
        np.quantile(values, 0.9, axis=0).tolist(),
        None if math.isinf(middle) else middle / table.epochs,
        sum(not math.isinf(epochs) for epochs in needed) / len(needed),
        median(one.trials for one in searches),
        median(one.complete for one in searches),
    )


def _t95(count: int) -> float:
    """Student's t for a 95% interval of the mean of so many values."""
    from scipy.stats import t

    return float(t.ppf(0.975, count - 1)) if count > 1 else 0.0


def markdown(found: Mapping[str, Mapping[str, Summary]], budget: float) -> str:
    """A table per domain: share of the full grid's hypervolume (mean and half its 95% interval) by share of epochs."""
    shares = [share for share in QUARTERS if share <= budget]
    lines: list[str] = []
    for domain, policies in found.items():
        lines += [
            f"### {domain}",
            "",
            "| policy | "
            + " | ".join(f"{share:.0%} of the epochs" for share in shares)
            + f" | epochs to {TARGET:.0%} | seeds that got there | trials (complete) |",
            "|---|" + "---:|" * (len(shares) + 3),
        ]
        for policy, summary in policies.items():
            at = [round(PLACES * share / budget) for share in shares]
            values = [f"{summary.mean[i]:.3f} ± {summary.high[i] - summary.mean[i]:.3f}" for i in at]
            needed = "not reached" if summary.to_target is None else f"{summary.to_target:.1%}"
            lines.append(
                f"| {TITLES[policy]} | {' | '.join(values)} | {needed} | {summary.reached:.0%} | "
                f"{summary.trials:g} ({summary.complete:g}) |"
            )
        lines.append("")
    return "\n".join(lines)


def draw(found: Mapping[str, Mapping[str, Summary]], budget: float, path: Path) -> None:
    """Mean curves with their confidence bands, a panel per domain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(found), figsize=(5.5 * len(found), 4.2), sharey=True, layout="constrained", squeeze=False
    )
    across = [budget * index / PLACES for index in range(PLACES + 1)]
    for axis, (domain, policies) in zip(axes[0], found.items(), strict=True):
        for policy, summary in policies.items():
            (line,) = axis.plot(across, summary.mean, label=TITLES[policy])
            axis.fill_between(across, summary.low, summary.high, alpha=0.2, color=line.get_color())
        axis.axhline(TARGET, color="grey", linewidth=0.8, linestyle=":")
        axis.axvline(0.25, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=domain, xlabel="epochs spent, of the full grid's")
        axis.set_ylim(0.6, 1.01)
    axes[0][0].set_ylabel("hypervolume, of the full grid's")
    axes[0][0].legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _search(job: tuple[DomainTable, Mapping[str, Any], int, float, int]) -> Search:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return search(*job)


def main() -> None:
    """Run the comparison."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, default=HERE / "data" / "curves.csv")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=1.0, help="epochs to spend, as a share of the full grid's")
    parser.add_argument("--slots", type=int, default=1, help="trials at a time")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="searches at a time")
    parser.add_argument("--policies", nargs="+", default=COMPARED, choices=tuple(POLICIES))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of search: eta=2, grace=1")
    parser.add_argument("--to", type=Path, default=Path(), help="folder of the results")
    options = parser.parse_args()
    changed = {key: json.loads(value) for key, value in (item.split("=", 1) for item in options.set)}
    tables = read_table(options.table)
    jobs = [
        (table, {**changed, **POLICIES[policy]}, seed, table.epochs * options.budget, options.slots)
        for table in tables.values()
        for policy in options.policies
        for seed in range(options.seeds)
    ]
    with ProcessPoolExecutor(options.processes) as processes:
        searches = iter(processes.map(_search, jobs))
    found = {
        domain: {
            policy: summarise([next(searches) for _ in range(options.seeds)], table, options.budget)
            for policy in options.policies
        }
        for domain, table in tables.items()
    }
    text = markdown(found, options.budget)
    print(text)
    options.to.mkdir(parents=True, exist_ok=True)
    (options.to / "replay.md").write_text(text)
    figures = {
        domain: {
            "metric": tables[domain].metric,
            "configurations": len(tables[domain].curves),
            "grid_epochs": tables[domain].epochs,
            "grid_hypervolume": grid_hypervolume(tables[domain]),
            "epochs": places(tables[domain], options.budget),
            "policies": {policy: asdict(summary) for policy, summary in policies.items()},
        }
        for domain, policies in found.items()
    }
    settings = {"seeds": options.seeds, "slots": options.slots, "search": changed}
    (options.to / "replay.json").write_text(json.dumps({"settings": settings, "domains": figures}, indent=1) + "\n")
    draw(found, options.budget, options.to / "replay.png")


if __name__ == "__main__":
    main()
