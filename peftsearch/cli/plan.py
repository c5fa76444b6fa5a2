"""What ``peftsearch validate`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftsearch.cli.fitting import Fitted
from peftsearch.cli.words import duration, size
from peftsearch.spec import Range, Space, hide_secrets

if TYPE_CHECKING:
    from peftsearch.search.estimate import Estimate
    from peftsearch.search.plan import CellPlan, StudyPlan
    from peftsearch.study import Study


_WANTED = {
    "front": "the trials of each domain's front",
    "methods": "each method's best trials",
    "both": "each method's best trials and those of each domain's front",
    "all": "all trials of the full budget",
}


def print_plan(console: Console, study: Study, plan: StudyPlan) -> None:
    """Print a checked study: its domains, models and cells, how much it will train, and what that roughly takes."""
    from peftsearch.search.estimate import estimate

    spec = plan.spec
    far = ", as far as it can be checked here" if plan.unchecked else ""
    console.print(f"{study.name} is a valid study{far}.", markup=False, style="bold")
    adding = study.extending()
    if adding is not None:
        what = f"extends the study {study.name} of this storage with {'; '.join(adding)}" if adding else ""
        what = what or f"continues the study {study.name} of this storage"
        console.print(f"Running it {what}.", markup=False)
    if spec.description:
        console.print(hide_secrets(spec.description.strip()), markup=False)
    console.print()
    console.print(Fitted(_domains(plan)))
    for warning in plan.warnings:
        console.print(f"Warning: {warning}.", markup=False, style="yellow")
    for name, domain in plan.domains.items():
        for warning in domain.warnings:
            console.print(f"Note on {name}: {warning}.", markup=False, style="yellow")
    for table in (_models(plan), _cells(plan)) if plan.cells else ():
        console.print()
        console.print(Fitted(table))
    console.print()
    for line in totals(plan, estimate(plan)):
        console.print(line, markup=False)
    if plan.unchecked:
        console.print()
        console.print("Not checked here:", style="yellow")
        for sentence in plan.unchecked:
            console.print(f"- {sentence}", markup=False)


def totals(plan: StudyPlan, estimated: Estimate | None) -> list[str]:
    """Trials, steps, memory and time, in sentences."""
    spec = plan.spec
    trials = sum(plan.trials(item.cell) for item in plan.cells)
    steps = sum(
        plan.trials(item.cell) * plan.budgets[item.cell.domain, item.cell.method].total_steps for item in plan.cells
    )
    where = "of GPU memory" if spec.resources.gpus_per_worker else "of memory"
    lines = [
        f"{trials:,} trials in {len(plan.cells)} cells, {steps:,} optimiser steps if none is pruned "
        f"(scheduler: {spec.search.scheduler}).",
    ]
    if estimated is not None:
        needed = f"about {size(estimated.worker_bytes)} {where} per worker ({estimated.largest} needs most)"
        lines.append(f"Rough estimate: {needed}.")
        if estimated.memory_here is not None and estimated.worker_bytes > estimated.memory_here:
            lines.append(
                f"This machine has {size(estimated.memory_here)}: such trials would probably fail here. A smaller "
                "model or batch_size needs less; search.max_memory leaves out what needs more than it says."
            )
    small = sorted({item.cell.method for item in plan.cells if plan.trials(item.cell) < spec.search.trials})
    if small:
        grids = "grid of {} has" if len(small) == 1 else "grids of {} have"
        lines.append(
            f"The {grids.format(', '.join(small))} fewer combinations than search.trials ({spec.search.trials}): "
            "those cells are done when their grid is."
        )
    if spec.search.sampler == "grid":
        from peftsearch.search.proposals import Grid

        sizes = {item.cell.method: Grid(item.cell.space).size for item in plan.cells}
        large = [f"{method} {count:,}" for method, count in sizes.items() if count > spec.search.trials]
        if large:
            lines.append(
                f"Of these grids only the first {spec.search.trials:,} combinations are run (search.trials): "
                f"{', '.join(large)}."
            )
    if spec.search.allocation == "joint":
        shared = spec.search.trials * len(spec.methods)
        lines.append(
            f"The methods share {shared:,} trials in every domain{' on every model' if len(spec.models) > 1 else ''}, "
            "and the sampler chooses each trial's method (search.allocation: joint): they get no equal budgets."
        )
    limits = {"parameters": spec.search.max_parameters, "GiB of memory per worker": spec.search.max_memory}
    lines += [f"Configurations with more than {limit:,} {what} are not run." for what, limit in limits.items() if limit]
    if spec.confirm.seeds:
        unread = [name for name, domain in plan.domains.items() if "test" not in domain.rows]
        apart = f", {', '.join(unread)} apart, which {'has' if len(unread) == 1 else 'have'} none" if unread else ""
        most = f" (at most {spec.confirm.max_finalists} per domain)" if spec.confirm.max_finalists else ""
        lines.append(
            f"Then {_WANTED[spec.confirm.finalists]}{most} are trained again with {spec.confirm.seeds} further "
            f"seed{'s' if spec.confirm.seeds > 1 else ''}, and scored once on the test split{apart}."
        )
    if estimated is None:
        return lines
    what = "without pruning"
    if spec.confirm.seeds and spec.confirm.finalists != "front":
        included = "all trials" if spec.confirm.finalists == "all" else "each method's best"
        what += f", the confirmation of {included} included,"
    if estimated.assumed:
        lines.append(
            f"Rough estimate: about {_hours(estimated.seconds)} GPU hours {what} on an "
            f"{estimated.device}, the baselines apart; this machine has no GPU to measure."
        )
    else:
        lines.append(
            f"Rough estimate: about {duration(estimated.seconds, rough=True)} {what} on this machine "
            f"({estimated.device}); the start of the workers and the baselines come on top."
        )
    return lines


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, header_style="dim", justify="right" if column in right else "left", overflow="fold")
    return table


def _domains(plan: StudyPlan) -> Table:
    numbers = ("train", "validation", "test", "labels", "length", "steps", "evaluations")
    table = _table("Domains", "domain", "task", "metric", *numbers, "source", right=numbers)
    for name, domain in plan.domains.items():
        budgets = [plan.budgets[name, method] for method in plan.spec.methods]
        steps = sorted({budget.total_steps for budget in budgets})
        evaluations = sorted({len(budget.evaluation_steps) for budget in budgets})
        rows = [f"{domain.rows[split]:,}" if split in domain.rows else "-" for split in ("train", "validation", "test")]
        words = [name, domain.task_name, domain.metric, *rows, str(len(domain.labels)), str(domain.max_length)]
        words += [_span(f"{steps[0]:,}", f"{steps[-1]:,}"), _span(str(evaluations[0]), str(evaluations[-1]))]
        words += [domain.source]
        table.add_row(*map(Text, words))
    return table


def _models(plan: StudyPlan) -> Table:
    table = _table("Models", "model", "architecture", "parameters", right=("parameters",))
    for path, facts in plan.model_facts.items():
        table.add_row(*map(Text, (path, facts.architecture, f"{facts.total_parameters:,}")))
    return table


def _cells(plan: StudyPlan) -> Table:
    several = len(plan.models) > 1
    numbers = ("trials", "trainable parameters", "% of model")
    table = _table("Cells", "domain", *(["model"] if several else []), "method", *numbers, "searched", right=numbers)
    for item in plan.cells:
        cell = item.cell
        total = plan.model_facts[cell.model].total_parameters
        trials = "shared" if plan.spec.search.allocation == "joint" else str(plan.trials(cell))
        words = [cell.domain, *([cell.model] if several else []), cell.method, trials]
        words += [
            _span(f"{item.smallest.trainable:,}", f"{item.largest.trainable:,}"),
            _span(_percent(item.smallest.trainable / total), _percent(item.largest.trainable / total)),
            _searched(item),
        ]
        table.add_row(*map(Text, words))
    return table


def _searched(item: CellPlan) -> str:
    space = item.cell.space
    return ", ".join(f"{name} {_space(space.space[name])}" for name in space.searched) or "nothing"


def _space(space: Space) -> str:
    if isinstance(space, Range):
        log = " (log)" if space.log else ""
        return f"{space.low:g}..{space.high:g}{log}"
    return "{" + ", ".join(map(str, space)) + "}" if isinstance(space, tuple) else str(space)


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} .. {high}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"
