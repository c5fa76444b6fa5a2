"""What a report says, section by section, from the ledger's records and the facts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from peftsearch.frontier.budget import CellBudget, cell_budgets
from peftsearch.frontier.front import DomainFront, complete, domain_fronts
from peftsearch.frontier.report import figures, words
from peftsearch.frontier.report.comparisons import DomainComparison, compare_domain
from peftsearch.frontier.report.document import Document, Figure, Heading, Points, Table, Text
from peftsearch.frontier.report.results import (
    Result,
    macro_average,
    results,
    score_by_task,
    tested,
    validated,
)
from peftsearch.frontier.report.sensitivity import (
    Importance,
    Sensitivity,
    importance,
    sensitivities,
)
from peftsearch.frontier.tables import front_columns, front_rows, key_hyperparameters, trials_csv, verdict
from peftsearch.spec import DomainFacts, StudyFacts, StudySpec, TrialRecord, TrialState
from peftsearch.tracking.names import configuration_text

_FOLD = 40
_VALIDATION, _LESS = "†", "‡"


@dataclass
class _Study:
    """Everything that the sections read, computed once."""

    records: list[TrialRecord]
    facts: StudyFacts
    spec: StudySpec
    results: dict[str, list[Result]]
    fronts: dict[str, DomainFront]
    budgets: list[CellBudget]
    comparisons: dict[str, DomainComparison]
    methods: list[str]
    names: set[str] = field(default_factory=set)

    @property
    def several_models(self) -> bool:
        return len(self.spec.models) > 1

    def called(self, model: str, method: str) -> str:
        return f"{method} on {model}" if self.several_models else method

    def total(self, model: str) -> int | None:
        return self.facts.models[model].total_parameters if model in self.facts.models else None

    def less(self, model: str, domain: str, method: str) -> str | None:
        return next(
            (b.less for b in self.budgets if (b.model, b.domain, b.method) == (model, domain, method)),
            None,
        )

    def file(self, *parts: str) -> str:
        """A file name of its own, without what a file system or a URL would mind."""
        wanted = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part) for part in parts).strip("._-")[:100]
        name, count = wanted, 2
        while name.lower() in self.names:
            name, count = f"{wanted}-{count}", count + 1
        self.names.add(name.lower())
        return name


def build(
    records: Sequence[TrialRecord],
    facts: StudyFacts,
    spec: StudySpec,
    folder: Path,
    state: str | None = None,
    planned: int | None = None,
) -> Document:
    """The report of a study, whatever its state.

    Args:
        records: All trials.
        facts: What is known beside them.
        spec: The study file.
        folder: The study's folder, where predictions are.
        state: ``running``, ``interrupted`` or ``finished``, where known.
        planned: How many trials the study is to have; trials per cell times cells where absent.
    """
    records = sorted(records, key=lambda record: record.number)
    found = results(records, facts, spec)
    study = _Study(
        records,
        facts,
        spec,
        found,
        domain_fronts(records, facts),
        cell_budgets(records, facts, spec),
        {name: compare_domain(found[name], facts.domains[name], folder) for name in facts.domains},
        list(dict.fromkeys([*facts.methods, *(record.method for record in records)])),
    )
    document = Document(f"{facts.study}: report")
    _summary(document, study, state, planned)
    _methods_by_domains(document, study)
    _budgets(document, study)
    for name in facts.domains:
        _domain(document, study, name)
    _few_shot(document, study)
    _estimates(document, study)
    _readings(document, study)
    _provenance(document, study)
    document.files["trials.csv"] = trials_csv(records)
    return document


# --- the answer ---


def _summary(document: Document, study: _Study, state: str | None, planned: int | None) -> None:
    facts, records = study.facts, study.records
    if facts.description:
        document.add(Text(facts.description))
    if planned is None:
        planned = facts.trials_per_cell * len(study.budgets)
    ended = sum(record.state is not TrialState.RUNNING for record in records)
    finished = len(complete(records))
    confirmed = sum(record.confirmed is not None for record in records)
    lines = [f"{ended:,} of {planned:,} planned trials have ended, {finished:,} of them at the full budget."]
    if state in ("running", "interrupted"):
        lines.insert(0, f"The study is {state}: this is what the ledger holds so far.")
    if confirmed:
        lines.append(
            f"{confirmed:,} configurations were trained again with further seeds and scored on the test split."
        )
    elif study.spec.confirm.seeds:
        lines.append("No configuration is confirmed with further seeds yet, so nothing here is on the test split.")
    else:
        lines.append(
            "The study file asks for no confirmation (confirm.seeds), so nothing here is on the test split, "
            "and single values on the validation split are what the search picked: they flatter."
        )
    document.add(Text(" ".join(lines)))
    document.add(Heading(2, "In short"))
    document.add(Points([(name, " ".join(_headline(study, name))) for name in facts.domains]))


def _headline(study: _Study, name: str) -> Iterator[str]:
    facts, comparison = study.facts.domains[name], study.comparisons[name]
    best = comparison.best
    if best is None or best.chosen is None:
        yield "No trial has reached the full budget yet."
        return
    metric = _metric(facts)
    shown = best.test or best.validation
    where = "the test split" if best.test else "the validation split"
    assert shown is not None
    size = f"{words.count(best.chosen.trainable_parameters)} trainable parameters"
    if share := _share(study, best.chosen):
        size += f" ({share} of the model)"
    seeds = f" over {shown[2]} seeds" if shown[2] > 1 else " (one seed)"
    value = f"{words.number(shown[0])} ± {words.number(shown[1])}" if shown[2] > 1 else words.number(shown[0])
    lead = "is best" if len(comparison.others) else "is the only method with a result,"
    yield f"{study.called(best.model, best.method)} {lead} with {metric} {value} on {where}{seeds}, training {size}."
    if not best.test:
        yield "It is not confirmed on the test split."
    ties = [study.called(o.result.model, o.result.method) for o in comparison.others if o.within_noise]
    if ties:
        yield f"The difference to {', '.join(ties)} is within the noise."
    cheap = comparison.cheapest
    if cheap is not None and cheap.record.number == best.chosen.number:
        yield "Nothing cheaper is within the noise of it."
    elif cheap is not None:
        value_of = tested(cheap.record) or validated(cheap.record)
        assert value_of is not None
        fraction = cheap.record.trainable_parameters / max(best.chosen.trainable_parameters, 1)
        yield (
            f"The cheapest within the noise is {study.called(cheap.record.model, cheap.record.method)} "
            f"(trial {cheap.record.number}) with {words.count(cheap.record.trainable_parameters)} trainable "
            f"parameters, {100 * fraction:.3g} % of the best one's, and {metric} "
            f"{words.number(value_of[0])} ± {words.number(value_of[1])}."
        )
    elif comparison.others or best.seeds < 2:
        yield "What is within the noise cannot be said without confirmations with at least two seeds."
    yield verdict(study.fronts[name]).sentence
    if best.seeds > 1 and best.validation and facts.baselines.get(best.model):
        mean, deviation, _ = best.validation
        yield (
            f"Over its seeds {study.called(best.model, best.method)} has {words.number(mean)} ± "
            f"{words.number(deviation)} on the validation split, where the baselines are scored."
        )
    own = facts.baselines.get(best.model, {})
    rest = [f"{b.title} {words.number(b.value)}" for key, b in own.items() if key not in ("majority", "linear_probe")]
    if rest:
        yield f"Further baselines (validation): {', '.join(rest)}."


def _methods_by_domains(document: Document, study: _Study) -> None:
    facts = study.facts
    domains = list(facts.domains)
    tasks = [facts.domains[name].task for name in domains]
    document.add(Heading(2, "Methods and domains"))
    keys = list(dict.fromkeys((r.model, r.method) for own in study.results.values() for r in own))
    by_key = {(r.model, r.method, r.domain): r for own in study.results.values() for r in own}
    averaged = _averages(study)
    extra = (["macro average"] if averaged else []) + (["by task type"] if averaged and _task_types(tasks) else [])
    head = [
        *(["model"] if study.several_models else []),
        "method",
        *(f"{name}: {_metric(facts.domains[name])}" for name in domains),
        *extra,
    ]
    left = 2 if study.several_models else 1
    best = {name: (c.best.model, c.best.method) for name, c in study.comparisons.items() if c.best}
    rows, bold = [], set()
    marks: set[str] = set()
    for line, (model, method) in enumerate(keys):
        cells, tests, validations = [], [], []
        for column, name in enumerate(domains):
            result = by_key[model, method, name]
            text, on_test = _value(result)
            if text != words.ABSENT and not on_test:
                text, marks = text + _VALIDATION, marks | {_VALIDATION}
            less = study.less(model, name, method)
            if less:
                text, marks = text + _LESS, marks | {_LESS}
            cells.append(text)
            tests.append(result.test[0] if result.test else None)
            validations.append(result.validation[0] if result.validation else None)
            if best.get(name) == (model, method):
                bold.add((line, left + column))
            document.record("results.csv", **_result_row(study, result))
        if averaged:
            values = tests if macro_average(tests) is not None else validations
            mark = "" if values is tests or macro_average(values) is None else _VALIDATION
            marks |= {mark} - {""}
            cells.append(words.number(macro_average(values)) + mark)
            if len(extra) > 1:
                cells.append(words.number(score_by_task(values, tasks)) + mark)
            document.record(
                "averages.csv",
                model=model,
                method=method,
                split="test" if values is tests else "validation",
                macro_average=macro_average(values),
                by_task_type=score_by_task(values, tasks),
                domains=len(domains),
            )
        rows.append([*([model] if study.several_models else []), method, *cells])
    for baseline, model, values in _baseline_rows(study):
        marks.add(_VALIDATION)
        cells = [words.number(value) + ("" if value is None else _VALIDATION) for value in values]
        if averaged:
            mean, by_type = macro_average(values), score_by_task(values, tasks)
            cells.append(words.number(mean) + ("" if mean is None else _VALIDATION))
            if len(extra) > 1:
                cells.append(words.number(by_type) + ("" if by_type is None else _VALIDATION))
        rows.append([*([model] if study.several_models else []), baseline, *cells])
    notes = [
        "Mean ± sample standard deviation over the confirmation seeds (their number), on the test split. The "
        "configuration that stands for a method was chosen on the validation split. Bold: the best of a domain."
    ]
    if _VALIDATION in marks:
        notes.append(
            f"{_VALIDATION} On the validation split: a baseline, or a method that is not confirmed; not to be compared "
            "with values on the test split."
        )
    if _LESS in marks:
        notes.append(f"{_LESS} This cell got less than the others or something else: see the budgets below.")
    if averaged:
        notes.append(
            "Macro average: the mean over the domains, where every domain has a value"
            + (
                "; by task type: the mean over task types of the mean over each type's domains."
                if len(extra) > 1
                else "."
            )
        )
    caption = "Every method in every domain, baselines below"
    document.add(Table(caption, head, rows, left, frozenset(bold), notes, source="results.csv"))


def _averages(study: _Study) -> bool:
    """Whether an average over domains means anything: several of them, and no perplexities among them."""
    domains = study.facts.domains.values()
    return len(domains) > 1 and all(domain.direction == "maximize" for domain in domains)


def _task_types(tasks: Sequence[str]) -> bool:
    return 1 < len(set(tasks)) < len(tasks)


def _baseline_rows(study: _Study) -> Iterator[tuple[str, str, list[float | None]]]:
    for model in study.spec.models:
        titles: dict[str, str] = {}
        for domain in study.facts.domains.values():
            for key, baseline in domain.baselines.get(model.path, {}).items():
                titles.setdefault(key, baseline.title)
        for key, title in titles.items():
            values: list[float | None] = []
            for domain in study.facts.domains.values():
                found = domain.baselines.get(model.path, {}).get(key)
                values.append(found.value if found and math.isfinite(found.value) else None)
            yield title, model.path, values


def _value(result: Result) -> tuple[str, bool]:
    """The result in words, and whether it is on the test split."""
    if result.test:
        return words.spread(*result.test), True
    if result.validation is None:
        return words.ABSENT, False
    return (words.spread(*result.validation) if result.seeds else words.number(result.validation[0])), False


def _result_row(study: _Study, result: Result) -> dict[str, Any]:
    chosen, facts = result.chosen, study.facts.domains[result.domain]
    test, validation = result.test, result.validation
    total = study.total(result.model)
    return {
        "domain": result.domain,
        "model": result.model,
        "method": result.method,
        "metric": facts.metric,
        "direction": facts.direction,
        "trial": chosen.number if chosen else None,
        "test_mean": test[0] if test else None,
        "test_std": test[1] if test and test[2] > 1 else None,
        "test_seeds": test[2] if test else 0,
        "validation_mean": validation[0] if validation else None,
        "validation_std": validation[1] if validation and validation[2] > 1 else None,
        "confirmation_seeds": result.seeds,
        "trainable_parameters": chosen.trainable_parameters if chosen else None,
        "exported_parameters": chosen.exported_parameters if chosen else None,
        "model_parameters": total,
        "trainable_share": chosen.trainable_parameters / total if chosen and total else None,
        "peak_memory_bytes": _peak_memory(result),
        "train_seconds": _train_seconds(result),
        "examples_per_second": _speed(result),
        "trials": len(result.records),
        "budget_differs": study.less(result.model, result.domain, result.method),
        "configuration": configuration_text(chosen.hyperparameters) if chosen else None,
    }


# --- budgets ---


def _budgets(document: Document, study: _Study) -> None:
    document.add(Heading(2, "Equal budgets"))
    budgets = study.budgets
    odd = [budget for budget in budgets if budget.less]
    trials = study.facts.trials_per_cell
    plan = f"Every cell (a method on a model in a domain) was to get {trials} trials"
    if odd:
        document.add(
            Text(
                f"{plan}. {len(odd)} of {len(budgets)} cells got less than that or something else; they are "
                f"marked {_LESS}, and what they show is to be read with that in mind."
            )
        )
    else:
        document.add(Text(f"{plan}, and every cell got them, with the same training settings."))
    for method, own in study.spec.methods.items():
        settings = own.training.model_dump(exclude_none=True)
        if settings:
            said = ", ".join(f"{key} {value}" for key, value in settings.items())
            document.add(
                Text(f"{method} had training settings of its own: {said}. Its budget is not that of the others.")
            )
    rows = [
        [
            *([budget.model] if study.several_models else []),
            budget.domain,
            budget.method + (_LESS if budget.less else ""),
            budget.less or "",
            words.count(budget.trials),
            words.count(budget.complete),
            words.count(budget.pruned),
            words.count(budget.failed),
            words.count(budget.steps),
            words.seconds(budget.train_seconds),
        ]
        for budget in budgets
    ]
    for budget in budgets:
        document.record("budgets.csv", **budget.__dict__)
    document.add(
        Table(
            "What each cell got in the search; the scheduler prunes every cell by the same rule",
            [
                *(["model"] if study.several_models else []),
                *("domain", "method", "differs", "trials", "complete", "pruned", "failed", "steps", "training"),
            ],
            rows,
            4 if study.several_models else 3,
            folded=len(rows) > _FOLD,
            source="budgets.csv",
        )
    )


# --- one domain ---


def _domain(document: Document, study: _Study, name: str) -> None:
    facts = study.facts.domains[name]
    rows = ", ".join(f"{count:,} {split}" for split, count in facts.rows.items())
    document.add(Heading(2, name))
    goal = "more is better" if facts.direction == "maximize" else "less is better"
    document.add(Text(f"{facts.task.replace('_', ' ')}, {_metric(facts)} ({goal}); examples: {rows}."))
    if not complete(study.fronts[name].records):
        document.add(Text("No trial has reached the full budget yet."))
    _costs(document, study, name)
    _significance(document, study, name)
    _front(document, study, name)
    _curves(document, study, name)
    _sensitivity(document, study, name)


def _costs(document: Document, study: _Study, name: str) -> None:
    found = study.results[name]
    keys = key_hyperparameters(study.fronts[name].records)
    rows = []
    for result in found:
        chosen = result.chosen
        less = study.less(result.model, name, result.method)
        state = {s: sum(record.state is s for record in result.records) for s in TrialState}
        trials = f"{state[TrialState.COMPLETE]}/{state[TrialState.PRUNED]}/{state[TrialState.FAILED]}"
        row = [*([result.model] if study.several_models else []), result.method + (_LESS if less else "")]
        if chosen is None:
            rows.append([*row, "", *[words.ABSENT] * 8, trials])
            continue
        rows.append(
            [
                *row,
                f"trial {chosen.number}: " + configuration_text(chosen.hyperparameters, keys.get(result.method)),
                words.spread(*result.test) if result.test else "not confirmed",
                (words.spread(*result.validation) if result.seeds else words.number(result.validation[0]))
                if result.validation
                else words.ABSENT,
                words.count(chosen.trainable_parameters),
                words.percent(chosen.trainable_parameters, study.total(result.model)),
                words.count(chosen.exported_parameters),
                words.memory(_peak_memory(result)),
                words.seconds(_train_seconds(result)),
                words.rate(_speed(result)),
                trials,
            ]
        )
    head = [
        *(["model"] if study.several_models else []),
        *("method", "configuration", "test", "validation", "trainable", "of the model", "exported"),
        *("peak memory", "training", "inference", "trials"),
    ]
    notes = [
        "Peak memory is the worker's: of the GPU, or resident on a CPU. Training is the time of one training at the "
        "full budget, inference is examples per second on the test split; where confirmed, means over the seeds. "
        "Trials: complete/pruned/failed."
    ]
    left = 3 if study.several_models else 2
    document.add(Table("What each method reaches and costs", head, rows, left, notes=notes, source="results.csv"))


def _significance(document: Document, study: _Study, name: str) -> None:
    comparison = study.comparisons[name]
    best = comparison.best
    document.add(Heading(3, f"{name}: is the best method better?"))
    if best is None or best.chosen is None:
        document.add(Text("There is nothing to compare yet."))
        return
    called = study.called(best.model, best.method)
    if not comparison.others:
        document.add(Text(f"Only {called} has a result, so there is nothing to compare it with."))
        return
    if not best.test:
        document.add(Text(f"{called} leads on the validation split, but no method is confirmed on the test split."))
    rows = []
    resamples = [other.comparison.resamples for other in comparison.others if other.comparison]
    for other in comparison.others:
        found = other.comparison
        document.record(
            "significance.csv",
            domain=name,
            best_model=best.model,
            best_method=best.method,
            model=other.result.model,
            method=other.result.method,
            difference=found.difference if found else None,
            low=found.low if found else None,
            high=found.high if found else None,
            p=found.p if found else None,
            p_holm=found.adjusted if found else None,
            resamples=found.resamples if found else 0,
            within_noise=other.within_noise,
            note=other.why_not,
        )
        say = {True: "within the noise", False: "the best one is better", None: "cannot be said"}[other.within_noise]
        rows.append(
            [
                study.called(other.result.model, other.result.method),
                say + (f" ({other.why_not})" if other.why_not else ""),
                words.signed(found.difference if found else None),
                f"{words.signed(found.low)} to {words.signed(found.high)}" if found else words.ABSENT,
                words.probability(found.p) if found else words.ABSENT,
                words.probability(found.adjusted) if found else words.ABSENT,
            ]
        )
    notes = [
        "Paired bootstrap over the test examples (Koehn 2004, W04-3250), scores averaged over the seeds"
        + (f", {_range(resamples)} resamples" if resamples else "")
        + ": two-sided p values, Holm's correction over the methods of this domain. Within the noise: a corrected p of "
        "0.05 or more, or a difference below twice its standard error over the seeds."
    ]
    if resamples and min(resamples) < 1000:
        notes.append(
            f"Scoring is slow here, so there are fewer than 1000 resamples: no p value below "
            f"{2 / (min(resamples) + 1):.2g} can be seen."
        )
    document.add(
        Table(
            f"{called} against each other method, {_metric(study.facts.domains[name])} on the test split",
            ["method", "verdict", "difference", "95 % interval", "p", "p (Holm)"],
            rows,
            2,
            notes=notes,
            source="significance.csv",
        )
    )


def _front(document: Document, study: _Study, name: str) -> None:
    front = study.fronts[name]
    if not any(record.value is not None for record in front.records):
        return
    document.add(Heading(3, f"{name}: {_metric(front.facts)} against parameters"))
    rows = front_rows(front, study.facts)
    columns = front_columns(front, rows)
    table = Table(
        "The front: no other trial has a better metric with fewer trainable parameters"
        if rows
        else "No trial has reached the full budget yet, so there is no front.",
        list(columns.values()),
        [[getattr(row, column) for column in columns] for row in rows],
        1 + list(columns).index("configuration"),
        notes=[f"Hypervolume {front.hypervolume:.4f}."] if rows and front.facts.direction == "maximize" else [],
    )
    png, svg = figures.front_picture(front, study.facts, study.methods)
    title = f"{name}: {_metric(front.facts)} against trainable parameters"
    document.add(Figure(study.file("front", name), title, png, svg, table))


def _curves(document: Document, study: _Study, name: str) -> None:
    front, metric = study.fronts[name], _metric(study.facts.domains[name])
    records = [record for record in front.records if record.rungs]
    if not records:
        return
    for record in records:
        for rung in record.rungs:
            document.record(
                "learning_curves.csv",
                domain=name,
                model=record.model,
                method=record.method,
                trial=record.number,
                state=record.state.value,
                step=rung.step,
                epoch=rung.epoch,
                value=rung.value,
                loss=rung.loss,
                train_loss=rung.train_loss,
            )
    chosen = [result.chosen for result in study.results[name] if result.chosen and result.chosen.rungs]
    rows = []
    for record in chosen:
        values = [rung.value for rung in record.rungs]
        last = record.rungs[-1]
        rows.append(
            [
                study.called(record.model, record.method),
                str(record.number),
                words.number(values[0]),
                words.number(values[len(values) // 2]),
                words.number(values[-1]),
                words.number(last.train_loss),
                words.number(last.loss),
                words.count(last.step),
            ]
        )
    table = Table(
        "The trial that stands for each method" if rows else "No trial has reached the full budget yet.",
        ["method", "trial", "first", "middle", "last", "train loss", "validation loss", "steps"],
        rows,
        source="learning_curves.csv",
    )
    document.add(Heading(3, f"{name}: learning curves"))
    png, svg = figures.curves_picture(records, chosen, metric, study.methods)
    title = f"{name}: {metric} on the validation split while training; bold, the trial that stands for its method"
    document.add(Figure(study.file("curves", name), title, png, svg, table))


def _sensitivity(document: Document, study: _Study, name: str) -> None:
    direction = study.facts.domains[name].direction
    metric = _metric(study.facts.domains[name])
    shown: list[tuple[Result, list[Sensitivity]]] = []
    weights: list[tuple[Result, Importance]] = []
    for result in study.results[name]:
        found = sensitivities(result.records, result.method, study.spec)
        if found:
            shown.append((result, found))
        if complete(result.records):
            weights.append((result, importance(result.records, result.method, study.spec, direction)))
    if weights:
        document.add(Heading(3, f"{name}: which hyperparameters matter"))
        _importance(document, study, name, weights)
    for result, found in shown:
        _sensitivity_figure(document, study, name, metric, result, found)


def _importance(document: Document, study: _Study, name: str, weights: list[tuple[Result, Importance]]) -> None:
    rows = []
    for result, found in weights:
        called = study.called(result.model, result.method)
        shares = ", ".join(f"{key} {100 * share:.0f} %" for key, share in found.shares.items())
        rows.append(
            [
                called,
                f"{shares} ({found.why_not})" if shares and found.why_not else shares or found.why_not or "",
                words.count(found.trials),
            ]
        )
        for key, share in found.shares.items() or [(None, None)]:
            document.record(
                "importance.csv",
                domain=name,
                model=result.model,
                method=result.method,
                hyperparameter=key,
                importance=share,
                trials=found.trials,
                note=found.why_not,
            )
    table = Table(
        "Importance of each hyperparameter",
        ["method", "shares", "trials"],
        rows,
        2,
        notes=[
            "PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255) over the trials that reached the full budget: how much "
            "each hyperparameter decides whether a trial is among the best. Below some 20 trials this is a hint."
        ],
        source="importance.csv",
    )
    drawn = {
        study.called(result.model, result.method): found.shares
        for result, found in weights
        if found.shares and found.why_not is None
    }
    if not drawn:
        document.add(table)
        return
    methods = {study.called(result.model, result.method): result.method for result, _ in weights}
    png, svg = figures.importance_picture(drawn, methods, study.methods)
    document.add(Figure(study.file("importance", name), f"{name}: importance of hyperparameters", png, svg, table))


def _sensitivity_figure(
    document: Document, study: _Study, name: str, metric: str, result: Result, found: list[Sensitivity]
) -> None:
    rows = []
    for item in found:
        for group in item.bins:
            span = (
                _setting(group.low) if group.low == group.high else f"{_setting(group.low)} to {_setting(group.high)}"
            )
            low, middle, high = group.quartiles
            rows.append(
                [
                    item.name,
                    span,
                    words.number(middle),
                    f"{words.number(low)} to {words.number(high)}",
                    str(group.trials),
                ]
            )
            document.record(
                "sensitivity.csv",
                domain=name,
                model=result.model,
                method=result.method,
                hyperparameter=item.name,
                low=group.low,
                high=group.high,
                trials=group.trials,
                quartile_1=low,
                median=middle,
                quartile_3=high,
            )
    called = study.called(result.model, result.method)
    table = Table(
        f"{called}: median and quartiles of trials that lie close together",
        ["hyperparameter", "values", "median", "quartiles", "trials"],
        rows,
        2,
        source="sensitivity.csv",
    )
    png, svg = figures.sensitivity_picture(
        found, metric, study.facts.domains[name].direction, study.methods.index(result.method)
    )
    pruned = "; pruned trials faint, at their last value" if any(item.pruned for item in found) else ""
    title = (
        f"{name}, {called}: {metric} (validation) against each hyperparameter; line and band: median, quartiles{pruned}"
    )
    parts = [result.model] if study.several_models else []
    document.add(Figure(study.file("sensitivity", name, result.method, *parts), title, png, svg, table))


# --- across domains ---


def _few_shot(document: Document, study: _Study) -> None:
    groups: dict[str, list[tuple[int, str]]] = {}
    for name, domain in study.spec.domains.items():
        size = domain.data.limit.train
        stem, dash, end = name.rpartition("-")
        if name in study.facts.domains and dash and isinstance(size, int) and end == str(size):
            groups.setdefault(stem, []).append((study.facts.domains[name].rows.get("train", size), name))
    groups = {stem: sorted(members) for stem, members in groups.items() if len(members) > 1}
    if not groups:
        return
    document.add(Heading(2, "Accuracy against training examples"))
    for stem, members in groups.items():
        metric = _metric(study.facts.domains[members[0][1]])
        on_test = any(result.test for _, name in members for result in study.results[name])
        curves: dict[str, list[tuple[int, float, float]]] = {}
        labels: dict[str, str] = {}
        rows = []
        for size, name in members:
            for result in study.results[name]:
                value = result.test if on_test else result.validation
                called = study.called(result.model, result.method)
                labels[called] = result.method
                if value is None:
                    continue
                curves.setdefault(called, []).append((size, value[0], value[1]))
                rows.append([called, words.count(size), words.spread(*value)])
                document.record(
                    "few_shot.csv",
                    domain=stem,
                    model=result.model,
                    method=result.method,
                    examples=size,
                    split="test" if on_test else "validation",
                    mean=value[0],
                    std=value[1] if value[2] > 1 else None,
                    seeds=value[2],
                )
        where = "test" if on_test else "validation (not confirmed)"
        order = {called: index for index, called in enumerate(labels)}
        rows.sort(key=lambda row: order[row[0]])
        document.add(Heading(3, stem))
        table = Table(f"{metric}, {where}", ["method", "training examples", metric], rows, source="few_shot.csv")
        if not curves:
            document.add(Text("No trial has reached the full budget yet."))
            continue
        png, svg = figures.few_shot_picture(curves, metric, list(labels))
        title = f"{stem}: {metric} against training examples, {where}"
        document.add(Figure(study.file("few_shot", stem), title, png, svg, table))


def _estimates(document: Document, study: _Study) -> None:
    document.add(Heading(2, "Estimates against measurement"))
    rows = []
    for method in study.methods:
        mine = [record for record in study.records if record.method == method and record.rungs]
        memory = [
            record.peak_memory_bytes / record.estimated_memory_bytes
            for record in mine
            if record.peak_memory_bytes and record.estimated_memory_bytes
        ]
        # A pruned trial's time is not that of the full budget, which was estimated.
        time = [
            (record.train_seconds + record.evaluation_seconds) / record.estimated_seconds
            for record in mine
            if record.state is TrialState.COMPLETE and record.estimated_seconds
        ]
        if memory or time:
            rows.append([method, _ratios(memory), str(len(memory)), _ratios(time), str(len(time))])
            document.record(
                "estimates.csv",
                method=method,
                **{
                    f"{what}_{name}": function(values) if values else None
                    for what, values in (("memory", memory), ("seconds", time))
                    for name, function in (
                        ("median_ratio", median),
                        ("min_ratio", min),
                        ("max_ratio", max),
                        ("trials", len),
                    )
                },
            )
    if not rows:
        document.add(Text("The ledger holds no estimate beside a measurement."))
        return
    document.add(
        Table(
            "Measured divided by estimated: median (smallest to largest); 1 is a perfect estimate",
            ["method", "peak memory", "trials", "time", "trials"],
            rows,
            source="estimates.csv",
        )
    )


def _readings(document: Document, study: _Study) -> None:
    document.add(Heading(2, "Readings of the test split"))
    rows = []
    seen: dict[tuple[int, int], int] = {}
    for record in study.records:
        metric = study.facts.domains[record.domain].metric if record.domain in study.facts.domains else ""
        for reading in record.confirmed.readings if record.confirmed else ():
            document.record(
                "readings.csv",
                read_at=reading.read_at,
                domain=record.domain,
                trial=record.number,
                model=record.model,
                method=record.method,
                seed=reading.seed,
                metric=metric,
                test=reading.test,
                test_loss=reading.test_loss,
                test_examples=reading.test_examples,
                validation=reading.value,
                steps=reading.steps,
                train_seconds=reading.train_seconds,
                peak_memory_bytes=reading.peak_memory_bytes,
                examples_per_second=reading.examples_per_second,
                predictions=reading.predictions,
            )
            if reading.test is None:
                continue
            seen[record.number, reading.seed] = seen.get((record.number, reading.seed), 0) + 1
            rows.append(
                [
                    record.domain,
                    study.called(record.model, record.method),
                    str(record.number),
                    str(reading.seed),
                    words.number(reading.test),
                    words.count(reading.test_examples),
                    reading.read_at or words.ABSENT,
                ]
            )
    if not rows:
        document.add(Text("The test split has not been read: no configuration is confirmed."))
        return
    twice = [f"trial {trial} with seed {seed}" for (trial, seed), count in seen.items() if count > 1]
    document.add(
        Text(
            f"{len(rows)} readings. "
            + (
                f"Read more than once: {', '.join(twice)}."
                if twice
                else "Each confirmed model (a configuration and a seed) has read it once, after its training."
            )
        )
    )
    rows.sort(key=lambda row: row[-1])
    document.add(
        Table(
            "When the test split was read, and by what",
            ["domain", "method", "trial", "seed", "test", "examples", "read at (UTC)"],
            rows,
            2,
            folded=len(rows) > _FOLD,
            source="readings.csv",
        )
    )


def _provenance(document: Document, study: _Study) -> None:
    facts, spec = study.facts, study.spec
    document.add(Heading(2, "How it was made"))
    document.add(
        Text(
            f"Search: {spec.search.sampler} sampler, {spec.search.scheduler} scheduler, seed {spec.search.seed}, "
            f"{facts.trials_per_cell} trials per cell. Training: {spec.training.epochs:g} epochs, batches of "
            f"{spec.training.batch_size}. Confirmation: {spec.confirm.seeds or 'no'} seeds."
        )
    )
    document.add(
        Table(
            "Data",
            ["domain", "task", "source", "examples", "fingerprint"],
            [
                [
                    name,
                    domain.task.replace("_", " "),
                    domain.source,
                    ", ".join(f"{count:,} {split}" for split, count in domain.rows.items()),
                    domain.fingerprint[:16],
                ]
                for name, domain in facts.domains.items()
            ],
            5,
        )
    )
    warned = [(name, warning) for name, domain in facts.domains.items() for warning in domain.warnings]
    if warned:
        document.add(Heading(3, "What a careful reader should know about the data"), Points(warned))
    document.add(
        Table(
            "Base models",
            ["model", "architecture", "revision", "fingerprint", "parameters"],
            [
                [
                    name,
                    model.architecture,
                    model.revision or "",
                    model.fingerprint[:16],
                    words.count(model.total_parameters),
                ]
                for name, model in facts.models.items()
            ],
            4,
        )
    )
    document.add(
        Table("Software and hardware", ["what", "which"], [[key, value] for key, value in facts.provenance.items()], 2)
    )
    for name, domain in facts.domains.items():
        for key, value in (("fingerprint", domain.fingerprint), ("source", domain.source)):
            document.record("provenance.csv", of=f"domain {name}", what=key, value=value)
        for warning in domain.warnings:
            document.record("provenance.csv", of=f"domain {name}", what="warning", value=warning)
    for name, model in facts.models.items():
        document.record("provenance.csv", of=f"model {name}", what="fingerprint", value=model.fingerprint)
    for key, value in facts.provenance.items():
        document.record("provenance.csv", of="study", what=key, value=value)
    for name, domain in facts.domains.items():
        for path, named in domain.baselines.items():
            for key, baseline in named.items():
                document.record(
                    "baselines.csv",
                    domain=name,
                    model=path,
                    baseline=key,
                    title=baseline.title,
                    metric=domain.metric,
                    validation=baseline.value,
                    trainable_parameters=baseline.trainable_parameters,
                    detail=baseline.detail,
                )


# --- inside ---


def _metric(facts: DomainFacts) -> str:
    return facts.metric.replace("_", " ")


def _share(study: _Study, record: TrialRecord) -> str:
    total = study.total(record.model)
    return words.percent(record.trainable_parameters, total) if total else ""


def _mean(result: Result, of: Callable[[Any], float | int | None]) -> float | None:
    known = [value for reading in result.readings if (value := of(reading)) is not None]
    return fmean(known) if known else None


def _train_seconds(result: Result) -> float | None:
    found = _mean(result, lambda reading: reading.train_seconds or None)
    return found if found is not None else (result.chosen.train_seconds if result.chosen else None)


def _peak_memory(result: Result) -> float | None:
    known = [reading.peak_memory_bytes for reading in result.readings if reading.peak_memory_bytes is not None]
    if known:
        return max(known)
    return result.chosen.peak_memory_bytes if result.chosen else None


def _speed(result: Result) -> float | None:
    return _mean(result, lambda reading: reading.examples_per_second)


def _ratios(values: Sequence[float]) -> str:
    if not values:
        return words.ABSENT
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"


def _setting(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.2e}"
