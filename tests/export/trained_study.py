"""A study as a driver leaves it, trained in this process: real weights, a real ledger, no Ray."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from peftsearch.preparing import plan_facts, save_facts, write_files
from peftsearch.search.cells import Cell
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.search.run import StudyRun
from peftsearch.spec import StudyFile
from peftsearch.storage import study_folder
from peftsearch.study import Study
from peftsearch.study_ledger import driver_ledger
from peftsearch.tracking.ledger import Ledger
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import Segment, SegmentResult
from peftsearch.training.worker import Worker

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "lora": {
        "rank": 4,
        "alpha": 16.0,
        "dropout": 0.1,
        "variant": "lora",
        "targets": "attention",
        "learning_rate": 2e-2,
    },
    "adapter": {
        "bottleneck": 8,
        "activation": "gelu",
        "placement": "houlsby",
        "scale": 4.0,
        "quantization": "none",
        "dropout": 0.0,
        "learning_rate": 5e-3,
    },
    "prompt": {"tokens": 4, "init": "text", "init_text": "", "learning_rate": 5e-2},
    "full": {"learning_rate": 5e-3},
}


def lively_base(base: Path, folder: Path) -> Path:
    """A copy of a base whose answers depend on the text: a freshly initialised BERT sees no difference between texts,
    and with larger weights even a prompt can do something."""
    shutil.copytree(base, folder)
    file = folder / "model.safetensors"
    tensors = {name: 8 * tensor if tensor.ndim == 2 else tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def document(name: str, model: str, data: Path, methods: Mapping[str, str]) -> dict[str, Any]:
    """A study file; ``methods`` says by domain which method is trained there."""
    source = {"source": data.name, "split": {"group": "document", "validation": 0.25, "test": 0.2}}
    return {
        "name": name,
        "description": "Topics, for the tests",
        "model": model,
        "domains": {domain: {"data": source, "metric": "macro_f1"} for domain in methods},
        "methods": {method: {} for method in dict.fromkeys(methods.values())},
        "search": {"trials": 1, "scheduler": "none", "seed": 3},
        "training": {"epochs": 10, "evaluations": 2, "batch_size": 16, "max_length": 16},
        "tracking": {"mlflow": "off"},
    }


def train_study(
    data: dict[str, Any], folder: Path, storage: Path, trials: Mapping[str, tuple[str, dict[str, Any]]]
) -> Study:
    """Train one trial in each domain.

    Args:
        data: The study file.
        folder: Where the study file would be.
        storage: The storage folder.
        trials: Method and hyperparameters by domain.
    """
    file = StudyFile(data, folder=folder)
    study = Study(file.spec, study_folder(file.spec.name, storage), file)
    plan = plan_study(file, study.folder.cache)
    study.folder.create()
    write_files(study)
    save_facts(study, plan_facts(study, plan))
    with closing(driver_ledger(study, plan)) as ledger:
        run = StudyRun(
            file.spec.search, [item.cell for item in plan.cells], plan.searches(), lambda *_: _count(), ledger
        )
        worker = Worker(plan.for_workers(study.folder.path, threads=1), WorkerGroup())
        cells = {(item.cell.domain, item.cell.method): item.cell for item in plan.cells}
        for domain, (method, hyperparameters) in trials.items():
            _train(plan, run, ledger, worker, cells[domain, method], hyperparameters)
    return study


def _count() -> Any:
    raise AssertionError("nothing is proposed")


def _train(
    plan: StudyPlan, run: StudyRun, ledger: Ledger, worker: Worker, cell: Cell, hyperparameters: dict[str, Any]
) -> None:
    import optuna

    count = plan.count(cell, hyperparameters)
    steps = plan.budgets[cell.domain, cell.method].evaluation_steps
    fields = {
        "seed": 3,
        "total_steps": steps[-1],
        "trainable_parameters": count.trainable,
        "exported_parameters": count.exported,
    }
    record = ledger.ask(
        cell.key, optuna.samplers.RandomSampler(seed=0), lambda _: dict(hyperparameters), lambda *_: fields
    )
    for step in steps:
        outcome = worker.do(Segment(run.plan(record), step, final=step == steps[-1]))
        assert isinstance(outcome, SegmentResult), outcome
        run.evaluated(record.number, outcome, 0, final=step == steps[-1])
