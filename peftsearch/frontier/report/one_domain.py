"""One domain: costs, significance, front and learning curves of its methods."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from peftsearch.frontier.front import complete
from peftsearch.frontier.report import figures, words
from peftsearch.frontier.report.comparisons import LEVEL
from peftsearch.frontier.report.document import Document, Figure, Heading, Table, Text
from peftsearch.frontier.report.hyperparameters import hyperparameters
from peftsearch.frontier.report.material import LESS, VALIDATION, Material, metric_words
from peftsearch.frontier.report.significance import RESAMPLES
from peftsearch.frontier.tables import front_columns, front_rows, key_hyperparameters
from peftsearch.spec import TrialState, deviation
from peftsearch.tracking.names import configuration_text


def domain(document: Document, study: Material, name: str) -> None:
    """All about one domain."""
    facts = study.facts.domains[name]
    rows = ", ".join(f"{count:,} {split}" for split, count in facts.rows.items())
    document.add(Heading(2, name))
    goal = "more is better" if facts.direction == "maximize" else "less is better"
    document.add(Text(f"{facts.task.replace('_', ' ')}, {metric_words(facts)} ({goal}); examples: {rows}."))
    if not complete(study.fronts[name].records):
        document.add(Text("No trial has reached the full budget yet."))
    _costs(document, study, name)
    _parts(document, study, name)
    _significance(document, study, name)
    _front(document, study, name)
    _curves(document, study, name)
    hyperparameters(document, study, name)


def _costs(document: Document, study: Material, name: str) -> None:
    found = study.results[name]
    forgetting = any(result.forgetting is not None for result in found)
    keys = key_hyperparameters(study.fronts[name].records)
    rows = []
    for result in found:
        chosen = result.chosen
        less = study.less(result.model, name, result.method)
        state = {s: sum(record.state is s for record in result.records) for s in TrialState}
        trials = f"{state[TrialState.COMPLETE]}/{state[TrialState.PRUNED]}/{state[TrialState.FAILED]}"
        row = [*([result.model] if study.several_models else []), result.method + (LESS if less else "")]
        if chosen is None:
            rows.append([*row, "", *[words.ABSENT] * (9 if forgetting else 8), trials])
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
                words.memory(result.peak_memory_bytes),
                words.seconds(result.train_seconds),
                words.rate(result.examples_per_second),
                *([words.signed(result.forgetting)] if forgetting else []),
                trials,
            ]
        )
    head = [
        *(["model"] if study.several_models else []),
        *("method", "configuration", "test", "validation", "trainable", "of the model", "exported"),
        *("peak memory", "training", "inference", *(["forgetting"] if forgetting else []), "trials"),
    ]
    notes = [
        "Peak memory is the worker's: of the GPU, or resident in main memory. Training is the time of one training at "
        "the full budget, inference is examples per second on the test split, both beside whatever else the machine "
        "did; where confirmed, means over the seeds. Trials: complete/pruned/failed."
    ]
    if packed := [study.called(r.model, r.method) for r in found if r.chosen and r.chosen.packed]:
        notes.append(
            f"Trained in packs: {', '.join(packed)}. Their time is their share of a pack's; that of the others is a "
            "worker's whole time, and not to be compared with it."
        )
    if forgetting:
        notes.append("Forgetting: the rise of the loss on general text, of the configuration's trial.")
    left = 3 if study.several_models else 2
    document.add(Table("What each method reaches and costs", head, rows, left, notes=notes, source="results.csv"))


def _parts(document: Document, study: Material, name: str) -> None:
    """A domain that joins data sets: one adapter for all, each data set scored by itself."""
    parts = study.spec.domains[name].data.join if name in study.spec.domains else None
    if not parts:
        return
    metric = study.facts.domains[name].metric
    rows = []
    for result in study.results[name]:
        cells = []
        for part in parts:
            key = f"{part}/{metric}"
            on_test = [reading.test_scores[key] for reading in result.readings if key in reading.test_scores]
            last = result.chosen.scores.get(key) if result.chosen else None
            values = on_test or ([last] if last is not None else [])
            mean = fmean(values) if values else None
            spread = deviation(values) if len(values) > 1 else None
            if on_test:
                cells.append(words.spread(mean, spread, len(values)))
            else:
                cells.append(words.number(mean) + (VALIDATION if values else ""))
            document.record(
                "parts.csv",
                domain=name,
                part=part,
                model=result.model,
                method=result.method,
                metric=metric,
                split="test" if on_test else "validation",
                mean=mean,
                std=spread,
                seeds=len(on_test),
            )
        rows.append([study.called(result.model, result.method), *cells])
    document.add(
        Table(
            f"Each joined data set by itself, {metric_words(study.facts.domains[name])} on the test split",
            ["method", *parts],
            rows,
            notes=[f"{VALIDATION} On the validation split."] if any(VALIDATION in c for r in rows for c in r) else [],
            source="parts.csv",
        )
    )


def _significance(document: Document, study: Material, name: str) -> None:
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
        + ": two-sided p values, Holm's correction over all pairs of this domain's methods, since the best one was "
        "found by these scores. Within the noise: a corrected p of 0.05 or more, or a difference within its 95 % "
        "confidence interval over the seeds (Welch)."
    ]
    tested = 1 + sum(other.result.test is not None for other in comparison.others)
    if resamples and 2 / (min(resamples) + 1) * tested * (tested - 1) / 2 >= LEVEL:
        notes.append(
            f"Scoring is slow here, so there are only {min(resamples)} resamples: corrected for all pairs of {tested} "
            "methods, no difference can be seen to be more than noise."
        )
    elif resamples and min(resamples) < RESAMPLES:
        notes.append(
            f"Scoring is slow here, so there are fewer than {RESAMPLES} resamples: no p value below "
            f"{2 / (min(resamples) + 1):.2g} can be seen."
        )
    document.add(
        Table(
            f"{called} against each other method, {metric_words(study.facts.domains[name])} on the test split",
            ["method", "verdict", "difference", "95 % interval", "p", "p (Holm)"],
            rows,
            2,
            notes=notes,
            source="significance.csv",
        )
    )


def _front(document: Document, study: Material, name: str) -> None:
    front = study.fronts[name]
    if not any(record.value is not None for record in front.records):
        return
    document.add(Heading(3, f"{name}: {metric_words(front.facts)} against parameters"))
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
    title = f"{name}: {metric_words(front.facts)} against trainable parameters"
    document.add(Figure(study.file("front", name), title, png, svg, table))


def _curves(document: Document, study: Material, name: str) -> None:
    front, metric = study.fronts[name], metric_words(study.facts.domains[name])
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
    png, svg = figures.curves_picture(records, chosen, metric, front.facts.direction, study.methods)
    title = f"{name}: {metric} on the validation split while training; bold, the trial that stands for its method"
    document.add(Figure(study.file("curves", name), title, png, svg, table))


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
