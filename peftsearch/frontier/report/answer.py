"""The answer: in words, and as the table of methods and domains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from peftsearch.frontier.front import CONSTANT, complete, seed_noise
from peftsearch.frontier.report import words
from peftsearch.frontier.report.document import Document, Heading, Points, Table, Text
from peftsearch.frontier.report.material import LESS, VALIDATION, Material, metric_words
from peftsearch.frontier.report.results import (
    Result,
    better,
    macro_average,
    score_by_task,
    task_type,
    tested,
    validated,
)
from peftsearch.frontier.tables import sampling_noise, verdict
from peftsearch.spec import Baseline, DomainFacts, TrialRecord, TrialState
from peftsearch.tracking.names import configuration_text


def summary(document: Document, study: Material, state: str | None, planned: int | None) -> None:
    """How far the study is, and its answer for each domain in plain words."""
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
    read = sum(tested(record) is not None for record in records)
    if confirmed:
        scored = (
            "scored on the test split"
            if read == confirmed
            else "scored on the validation split: there is no test split"
            if not read
            else f"{read:,} of them scored on the test split"
        )
        lines.append(f"{confirmed:,} configurations were trained again with further seeds and {scored}.")
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


def _headline(study: Material, name: str) -> Iterator[str]:
    facts, comparison = study.facts.domains[name], study.comparisons[name]
    best = comparison.best
    if best is None or best.chosen is None:
        yield "No trial has reached the full budget yet."
        return
    metric = metric_words(facts)
    shown = best.test or best.validation
    where = "the test split" if best.test else "the validation split"
    assert shown is not None
    size = f"{words.count(best.chosen.trainable_parameters)} parameters"
    if share := _share(study, best.chosen):
        size += f" ({share} of the model)"
    seeds = f" over {shown[2]} seeds" if shown[2] > 1 else " (one seed)"
    value = f"{words.number(shown[0])} ± {words.number(shown[1])}" if shown[2] > 1 else words.number(shown[0])
    lead = "is best" if len(comparison.others) else "is the only method with a result,"
    yield f"{study.called(best.model, best.method)} {lead} with {metric} {value} on {where}{seeds}, training {size}."
    if lost := len(best.chosen.failed_confirmations):
        yield f"{lost} of its {lost + best.seeds} re-trainings failed, and are not in that."
    if not best.test and facts.rows.get("test"):
        yield "It is not confirmed on the test split."
    ties = [study.called(o.result.model, o.result.method) for o in comparison.others if o.within_noise]
    if ties:
        differences = "The difference to" if len(ties) == 1 else "The differences to"
        yield f"{differences} {', '.join(ties)} {'is' if len(ties) == 1 else 'are'} within the noise."
    cheap = comparison.cheapest
    if cheap is not None and cheap.record.trainable_parameters >= best.chosen.trainable_parameters:
        yield "No cheaper trial that was confirmed is within the noise of it."
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
    elif (comparison.others or best.seeds < 2) and all(o.within_noise is None for o in comparison.others):
        yield "What is within the noise cannot be said without confirmations of several methods with several seeds."
    own = facts.baselines.get(best.model, {})
    failed = facts.failed_baselines.get(best.model, {})
    tested_all = all(baseline.test_value is not None or key in failed for key, baseline in own.items())
    # Without the one that is hardest to beat, the others say nothing.
    hardest = max(own.values(), key=lambda baseline: better(baseline.value, 0.0, best.direction), default=None)
    if best.test and tested_all and hardest is not None and hardest.test_value is not None:
        yield _against_baselines(best, own.values(), facts)
        return
    yield verdict(study.fronts[name]).sentence
    if best.seeds > 1 and best.validation and own:
        mean, deviation, _ = best.validation
        yield (
            f"Over its seeds {study.called(best.model, best.method)} has {words.number(mean)} ± "
            f"{words.number(deviation)} on the validation split, where the baselines are scored."
        )
    rest = [f"{b.title} {words.number(b.value)}" for key, b in own.items() if key not in ("majority", "linear_probe")]
    if rest:
        yield f"Further baselines (validation): {', '.join(rest)}."


def _against_baselines(best: Result, baselines: Iterable[Baseline], facts: DomainFacts) -> str:
    """Whether tuning paid, on the test split: against the baseline that is hardest to beat there.

    There is chance in the seeds and in which texts are in the split; the two add up as independent errors do.
    """
    assert best.test is not None
    mean, _, seeds = best.test
    known, rows = {}, {}
    for baseline in baselines:
        if baseline.test_value is not None and math.isfinite(baseline.test_value):
            known[baseline.title] = baseline.test_value
            rows[baseline.title] = baseline.test_examples or facts.rows.get("test", 0)
    if not known:
        return "No baseline has a score on the test split."
    hardest = max(known, key=lambda title: better(known[title], 0.0, best.direction))
    gain = better(mean, known[hardest], best.direction)
    texts = sampling_noise(facts, mean, known[hardest], rows[hardest])
    listed = ", ".join(f"{title} {words.number(value)}" for title, value in known.items())
    if gain <= 0:
        lead = f"Tuning did not pay: nothing beats the {hardest} on the test split"
    elif seeds < 2:
        lead = f"It is open whether tuning paid: one seed alone is {words.number(gain)} better than the {hardest}"
    elif gain < math.hypot(texts, seed_noise(best.test, (known[hardest], 0.0, CONSTANT))):
        lead = (
            f"It is open whether tuning paid: the gain of {words.number(gain)} over the {hardest} is within the noise "
            f"of {seeds} seeds and {rows[hardest]:,} test examples"
        )
    else:
        lead = f"Tuning paid: {words.number(gain)} better than the {hardest} on the test split"
    return f"{lead} ({listed})."


def methods_by_domains(document: Document, study: Material) -> None:
    """The table of methods and domains, baselines below."""
    facts = study.facts
    domains = list(facts.domains)
    tasks = [task_type(facts.domains[name].task, facts.domains[name].metric) for name in domains]
    document.add(Heading(2, "Methods and domains"))
    keys = list(dict.fromkeys((r.model, r.method) for own in study.results.values() for r in own))
    by_key = {(r.model, r.method, r.domain): r for own in study.results.values() for r in own}
    averaged = _averages(study)
    extra = (["macro average"] if averaged else []) + (["by task type"] if averaged and _task_types(tasks) else [])
    head = [
        *(["model"] if study.several_models else []),
        "method",
        *(f"{name}: {metric_words(facts.domains[name])}" for name in domains),
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
                text, marks = text + VALIDATION, marks | {VALIDATION}
            less = study.less(model, name, method)
            if less:
                text, marks = text + LESS, marks | {LESS}
            cells.append(text)
            tests.append(result.test[0] if result.test else None)
            validations.append(result.validation[0] if result.validation else None)
            if best.get(name) == (model, method):
                bold.add((line, left + column))
            document.record("results.csv", **_result_row(study, result))
        if averaged:
            values = tests if macro_average(tests) is not None else validations
            mark = "" if values is tests or macro_average(values) is None else VALIDATION
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
    for baseline, model, found in _baseline_rows(study):
        cells = [
            words.number(value) + ("" if value is None or on_test else VALIDATION) + sample
            for value, on_test, sample in found
        ]
        if averaged:
            values = [value for value, _, _ in found]
            mean, by_type = macro_average(values), score_by_task(values, tasks)
            mark = "" if all(on_test for _, on_test, _ in found) else VALIDATION
            cells.append(words.number(mean) + ("" if mean is None else mark))
            if len(extra) > 1:
                cells.append(words.number(by_type) + ("" if by_type is None else mark))
        if any(VALIDATION in cell for cell in cells):
            marks.add(VALIDATION)
        rows.append([*([model] if study.several_models else []), baseline, *cells])
    notes = [
        "Mean ± sample standard deviation over the confirmation seeds (their number), on the test split. The "
        "configuration that stands for a method was chosen on the validation split. Bold: the best of a domain."
    ]
    if VALIDATION in marks:
        notes.append(
            f"{VALIDATION} On the validation split: a baseline, or a method that is not confirmed; not to be compared "
            "with values on the test split."
        )
    if LESS in marks:
        notes.append(f"{LESS} This cell got less than the others or something else: see the budgets below.")
    if averaged:
        notes.append(
            "Macro average: the mean over the domains, where every domain has a value"
            + (
                "; by task type: the mean over task types of the mean over each type's domains."
                if len(extra) > 1
                else "."
            )
        )
    notes += list(_failed_confirmations(study))
    notes += list(_failed_baselines(document, study))
    caption = "Every method in every domain, baselines below"
    document.add(Table(caption, head, rows, left, frozenset(bold), notes, source="results.csv"))


def _averages(study: Material) -> bool:
    """Whether an average over domains means anything: several of them, and no perplexities among them."""
    domains = study.facts.domains.values()
    return len(domains) > 1 and all(domain.direction == "maximize" for domain in domains)


def _task_types(tasks: Sequence[str]) -> bool:
    return 1 < len(set(tasks)) < len(tasks)


def _failed_confirmations(study: Material) -> Iterator[str]:
    """A sentence for each method that stands here by the seeds that survived."""
    for name, own in study.results.items():
        for result in own:
            failed = result.chosen.failed_confirmations if result.chosen else {}
            if failed:
                why = "; ".join(f"seed {seed}: {error}" for seed, error in failed.items())
                yield (
                    f"Of {study.called(result.model, result.method)} in {name}, {len(failed)} of "
                    f"{len(failed) + result.seeds} re-trainings failed, and are not in its mean ({why})."
                )


def _failed_baselines(document: Document, study: Material) -> Iterator[str]:
    """A sentence for each baseline that could not be computed."""
    for name, domain in study.facts.domains.items():
        for model, named in domain.failed_baselines.items():
            where = f"{name}, {model}" if study.several_models else name
            for key, failed in named.items():
                yield f"Not computed on the {failed.split} split: {failed.title} ({where}). {failed.error}"
                document.record(
                    "failed_baselines.csv",
                    domain=name,
                    model=model,
                    baseline=key,
                    title=failed.title,
                    split=failed.split,
                    error=failed.error,
                )


def _baseline_rows(study: Material) -> Iterator[tuple[str, str, list[tuple[float | None, bool, str]]]]:
    """Of each baseline its title, its model, and by domain its value, whether that is on the test split, and of how
    many of the split's examples it is where that is a sample."""
    for model in study.spec.models:
        titles: dict[str, str] = {}
        for domain in study.facts.domains.values():
            for key, baseline in domain.baselines.get(model.path, {}).items():
                titles.setdefault(key, baseline.title)
        for key, title in titles.items():
            values: list[tuple[float | None, bool, str]] = []
            for domain in study.facts.domains.values():
                found = domain.baselines.get(model.path, {}).get(key)
                on_test = found is not None and found.test_value is not None
                value = (found.test_value if on_test else found.value) if found else None
                sample = _sample(domain, found, on_test) if found else ""
                values.append((value if value is not None and math.isfinite(value) else None, on_test, sample))
            yield title, model.path, values


def _sample(domain: DomainFacts, baseline: Baseline, on_test: bool) -> str:
    examples, rows = (
        (baseline.test_examples, domain.rows.get("test", 0))
        if on_test
        else (baseline.examples, domain.rows.get("validation", 0))
    )
    return f" (on {examples:,} of {rows:,})" if examples is not None and examples < rows else ""


def _value(result: Result) -> tuple[str, bool]:
    """The result in words, and whether it is on the test split."""
    if result.test:
        return words.spread(*result.test), True
    if result.validation is None:
        return words.ABSENT, False
    return (words.spread(*result.validation) if result.seeds else words.number(result.validation[0])), False


def _result_row(study: Material, result: Result) -> dict[str, Any]:
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
        "failed_confirmations": len(chosen.failed_confirmations) if chosen else 0,
        "trainable_parameters": chosen.trainable_parameters if chosen else None,
        "exported_parameters": chosen.exported_parameters if chosen else None,
        "model_parameters": total,
        "trainable_share": chosen.trainable_parameters / total if chosen and total else None,
        "peak_memory_bytes": result.peak_memory_bytes,
        "train_seconds": result.train_seconds,
        "examples_per_second": result.examples_per_second,
        "forgetting": result.forgetting,
        "trials": len(result.records),
        "budget_differs": study.less(result.model, result.domain, result.method),
        "configuration": configuration_text(chosen.hyperparameters) if chosen else None,
    }


def _share(study: Material, record: TrialRecord) -> str:
    total = study.total(record.model)
    return words.percent(record.trainable_parameters, total) if total else ""
