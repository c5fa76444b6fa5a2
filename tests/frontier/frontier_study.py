"""A made-up study of two domains, as the ledger and the facts would hold it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

from peftsearch.domains import get_task
from peftsearch.spec import (
    Baseline,
    Confirmed,
    DomainFacts,
    ModelFacts,
    Reading,
    Rung,
    StudyFacts,
    StudySpec,
    TrialRecord,
    TrialState,
)

TOTAL = 22_713_216


def make_record(number: int, value: float | None, parameters: int, **changes: object) -> TrialRecord:
    """A finished LoRA trial unless the changes say otherwise."""
    fields: dict[str, object] = {
        "number": number,
        "model": "package:tiny/model",
        "domain": "clinical",
        "method": "lora",
        "state": TrialState.COMPLETE,
        "seed": 0,
        "value": value,
        "trainable_parameters": parameters,
        "exported_parameters": parameters,
        "hyperparameters": {"rank": 8, "learning_rate": 3.1e-4},
        "total_steps": 90,
    }
    return TrialRecord.model_validate(fields | changes)


def make_facts(**changes: object) -> StudyFacts:
    """Facts of the study."""
    domains = {
        name: DomainFacts(
            task="classification",
            metric=metric,
            direction="maximize",
            labels=("a", "b", "c"),
            rows={"train": 3000, "validation": 600, "test": 600},
            max_length=64,
            fingerprint=f"{name}-fingerprint",
            source="recipe:example",
            baselines={
                "package:tiny/model": {
                    "majority": Baseline(title="majority class", value=majority),
                    "linear_probe": Baseline(
                        title="logistic regression on frozen embeddings", value=probe, trainable_parameters=1155
                    ),
                }
            },
        )
        for name, metric, majority, probe in (("clinical", "accuracy", 0.21, 0.69), ("legal", "macro_f1", 0.05, 0.86))
    }
    fields: dict[str, object] = {
        "study": "example",
        "description": "A made-up study",
        "trials_per_cell": 12,
        "methods": ("lora", "adapter", "prompt", "full"),
        "domains": domains,
        "models": {
            "package:tiny/model": ModelFacts(
                location="/models/tiny",
                architecture="BertModel",
                total_parameters=TOTAL,
                fingerprint="model-fingerprint",
            )
        },
        "provenance": {"python": "3.11.9", "version.torch": "2.13.0", "git_commit": "0123abcd"},
    }
    return StudyFacts.model_validate(fields | changes)


def make_study(trials_per_cell: int = 12, seed: int = 1) -> list[TrialRecord]:
    """Trials of every method on both domains, some of them pruned, failed or running."""
    generator = random.Random(seed)
    records: list[TrialRecord] = []
    for index in range(trials_per_cell):
        for domain, ceiling in (("clinical", 0.80), ("legal", 0.95)):
            for method in ("lora", "adapter", "prompt", "full"):
                size = round(2 ** generator.uniform(0, 6))
                rate = 10 ** generator.uniform(-4, -2)
                quality = 0.12 * abs(math.log10(rate) + 3) + 0.02 * generator.random()
                hyperparameters, parameters, loss = {
                    "lora": ({"rank": size, "alpha": 32.0, "learning_rate": rate}, 8500 + 9216 * size, 0.03),
                    "adapter": ({"bottleneck": 4 * size, "learning_rate": rate}, 8500 + 36_000 * size, 0.02),
                    "prompt": ({"tokens": size, "learning_rate": rate}, 8500 + 384 * size, 0.25),
                    "full": ({"learning_rate": rate}, TOTAL + 8500, 0.0),
                }[method]
                final = max(0.2, ceiling - loss - quality - 0.03 / size)
                steps = [10, 20, 30, 40, 50, 60, 70, 80, 90]
                state = TrialState.COMPLETE
                if index > 2 and quality > 0.08:
                    state, steps = TrialState.PRUNED, steps[: generator.choice([1, 3])]
                rungs = [
                    Rung(
                        step=step,
                        epoch=step / 30,
                        value=final * (1 - 0.8 ** (step / 6)),
                        loss=1.2 - final * step / 90,
                        train_loss=1.1 - final * step / 90,
                        train_seconds=0.8,
                        evaluation_seconds=0.1,
                        scores={
                            "accuracy": final,
                            "macro_f1": final - 0.05,
                            **{f"f1/{label}": final for label in "abc"},
                        },
                    )
                    for step in steps
                ]
                records.append(
                    make_record(
                        len(records),
                        rungs[-1].value,
                        parameters,
                        domain=domain,
                        method=method,
                        state=state,
                        hyperparameters=hyperparameters,
                        rungs=rungs,
                        train_seconds=0.8 * len(rungs),
                        evaluation_seconds=0.1 * len(rungs),
                        started=f"2026-01-01T10:{len(records) % 60:02d}:00.000+00:00",
                        finished=f"2026-01-01T10:{len(records) % 60:02d}:30.500+00:00",
                    )
                )
    number = len(records)
    records.append(make_record(number, None, 10_000, state=TrialState.FAILED, error="the loss became NaN"))
    records.append(make_record(number + 1, 0.4, 10_000, state=TrialState.RUNNING))
    return records


def make_spec(facts: StudyFacts, **changes: object) -> StudySpec:
    """The study file of a made-up study: its domains, models and methods."""
    fields: dict[str, object] = {
        "name": facts.study,
        "models": list(facts.models),
        "domains": {
            name: {"task": domain.task, "metric": domain.metric, "data": {"source": domain.source}}
            for name, domain in facts.domains.items()
        },
        "methods": {method: {} for method in facts.methods},
        "search": {"trials": facts.trials_per_cell},
        "confirm": {"seeds": 3},
    }
    return StudySpec.model_validate(fields | changes)


def confirm(
    record: TrialRecord, facts: StudyFacts, folder: Path, accuracy: float, seeds: int = 3, examples: int = 300
) -> TrialRecord:
    """The record with confirmations whose predictions, of about this accuracy, lie in the study's folder.

    All configurations of a domain answer the same examples, and the easy ones are easy for all of them.
    """
    domain = facts.domains[record.domain]
    task = get_task(domain.task)
    shared = random.Random(record.domain)
    references = [shared.randrange(len(domain.labels)) for _ in range(examples)]
    difficulty = [shared.random() for _ in range(examples)]
    readings = []
    for seed in range(1, seeds + 1):
        own = random.Random(f"{record.number} {seed}")
        predictions = [
            reference
            if 0.9 * hard + 0.1 * own.random() < accuracy
            else (reference + 1 + own.randrange(len(domain.labels) - 1)) % len(domain.labels)
            for reference, hard in zip(references, difficulty, strict=True)
        ]
        path = f"trials/{record.number:05d}-{seed}/test.jsonl"
        write_predictions(folder / path, predictions, references)
        scores = task.score(predictions, references, domain.labels)
        readings.append(
            Reading(
                seed=seed,
                value=scores[domain.metric] - 0.01,
                loss=0.7,
                test=scores[domain.metric],
                test_loss=0.7,
                test_scores=scores,
                test_examples=examples,
                read_at=f"2026-01-01T12:{seed:02d}:00+00:00",
                predictions=path,
                steps=90,
                train_seconds=7.0 + seed,
                evaluation_seconds=0.5,
                peak_memory_bytes=700 * 2**20,
                examples_per_second=410.0 + seed,
            )
        )
    return record.model_copy(update={"confirmed": Confirmed.of(readings)})


def write_predictions(path: Path, predictions: Sequence[object], references: Sequence[object]) -> None:
    """As a confirmation leaves them: one JSON object for each test example."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = zip(predictions, references, strict=True)
    path.write_text("".join(json.dumps({"prediction": p, "reference": r}) + "\n" for p, r in rows))


def confirm_best(records: Sequence[TrialRecord], facts: StudyFacts, folder: Path) -> list[TrialRecord]:
    """The records with each method's best trial of each domain confirmed: test accuracy about the validation value."""
    found = list(records)
    for domain in facts.domains:
        for model in facts.models:
            for method in facts.methods:
                mine = [
                    index
                    for index, record in enumerate(found)
                    if (record.domain, record.model, record.method) == (domain, model, method)
                    and record.state is TrialState.COMPLETE
                ]
                if mine:
                    best = max(mine, key=lambda index: found[index].value or 0.0)
                    found[best] = confirm(found[best], facts, folder, found[best].value or 0.0)
    return found
