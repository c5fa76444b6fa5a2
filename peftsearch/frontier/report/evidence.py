"""What a doubtful reader asks for: budgets, estimates, readings of the test split, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from peftsearch.frontier.report import words
from peftsearch.frontier.report.document import Document, Heading, Points, Table, Text
from peftsearch.frontier.report.material import FOLD, LESS, Material
from peftsearch.spec import TrialState


def budgets(document: Document, study: Material) -> None:
    """What each cell got, and which got less."""
    joint = study.spec.search.allocation == "joint"
    document.add(Heading(2, "Budgets" if joint else "Equal budgets"))
    budgets = study.budgets
    odd = [budget for budget in budgets if budget.less]
    trials = study.facts.trials_per_cell
    plan = f"Every cell (a method on a model in a domain) was to get {trials} trials"
    if joint:
        shared = trials * len(study.spec.methods)
        document.add(
            Text(
                f"The methods shared {shared} trials in every domain, and the sampler chose each trial's method "
                "(search.allocation: joint): those that did well early got more of them. So methods are not compared "
                "on equal budgets here; the best configuration is what this study looked for."
            )
        )
    elif odd:
        document.add(
            Text(
                f"{plan}. {len(odd)} of {len(budgets)} cells got less than that or something else; they are "
                f"marked {LESS}, and what they show is to be read with that in mind."
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
            budget.method + (LESS if budget.less else ""),
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
            folded=len(rows) > FOLD,
            source="budgets.csv",
        )
    )


def estimates(document: Document, study: Material) -> None:
    """Expected memory and time against what was measured."""
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


def readings(document: Document, study: Material) -> None:
    """When the test split was read, and by what."""
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
    confirmed = len(rows)
    rows += _baseline_readings(document, study)
    if not rows:
        document.add(Text("The test split has not been read: no configuration is confirmed."))
        return
    twice = [f"trial {trial} with seed {seed}" for (trial, seed), count in seen.items() if count > 1]
    document.add(
        Text(
            f"{len(rows)} readings"
            + (f", {len(rows) - confirmed} of them by baselines. " if len(rows) > confirmed else ". ")
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
            folded=len(rows) > FOLD,
            source="readings.csv",
        )
    )


def _baseline_readings(document: Document, study: Material) -> list[list[str]]:
    """The readings of baselines, which have neither trial nor seed."""
    rows = []
    for name, domain in study.facts.domains.items():
        for model, named in domain.baselines.items():
            for key, baseline in named.items():
                if baseline.test_value is None:
                    continue
                document.record(
                    "readings.csv",
                    read_at=baseline.test_read_at,
                    domain=name,
                    model=model,
                    method=f"baseline {key}",
                    metric=domain.metric,
                    test=baseline.test_value,
                    test_examples=baseline.test_examples,
                    validation=baseline.value,
                )
                rows.append(
                    [
                        name,
                        f"{baseline.title}, {model}" if study.several_models else baseline.title,
                        words.ABSENT,
                        words.ABSENT,
                        words.number(baseline.test_value),
                        words.ABSENT if baseline.test_examples is None else words.count(baseline.test_examples),
                        baseline.test_read_at or words.ABSENT,
                    ]
                )
    return rows


def provenance(document: Document, study: Material) -> None:
    """What the results rest on: data, models, software, hardware."""
    facts, spec = study.facts, study.spec
    document.add(Heading(2, "How it was made"))
    document.add(
        Text(
            f"Search: {spec.search.sampler} sampler, {spec.search.scheduler} scheduler, seed {spec.search.seed}, "
            f"{facts.trials_per_cell} trials per cell. Training: {spec.training.epochs:g} epochs, batches of "
            f"{spec.training.batch}. Confirmation: {spec.confirm.seeds or 'no'} seeds."
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
                    examples=baseline.examples,
                    test=baseline.test_value,
                    test_examples=baseline.test_examples,
                    test_read_at=baseline.test_read_at,
                    trainable_parameters=baseline.trainable_parameters,
                    detail=baseline.detail,
                )


def _ratios(values: Sequence[float]) -> str:
    if not values:
        return words.ABSENT
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
