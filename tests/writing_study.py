"""A study whose answer is a text, on a tiny model: data, plan and training for the tests of such tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_models import tiny_decoder, tiny_encoder_decoder
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from peftsearch.domains import PreparedDomain, prepare_domain
from peftsearch.methods import METHODS
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import Segment, SegmentResult, TrialPlan
from peftsearch.training.worker import Worker

MODELS = {"encoder-decoder": tiny_encoder_decoder, "decoder": tiny_decoder}
AUTO = {"encoder-decoder": AutoModelForSeq2SeqLM, "decoder": AutoModelForCausalLM}
SUBJECTS = {
    "dog": "the dog can run",
    "cat": "a cat is not big",
    "bird": "one bird in the tree",
    "river": "see the river",
}
"""What each text is about, and its summary."""
OTHERS = ["the", "a", "of", "and", "with", "red", "green", "blue", "white", "black", "two", "three", "four"]


def topic_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts around one subject each, and what is always said of it."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        subject = sorted(SUBJECTS)[number % len(SUBJECTS)]
        words = [draw.choice(OTHERS) for _ in range(draw.randint(3, 7))]
        words.insert(draw.randrange(len(words)), subject)
        words.insert(draw.randrange(len(words)), subject)
        rows.append({"text": " ".join(words), "target": SUBJECTS[subject]})
    return rows


def study(
    folder: Path, model: Path, domain: Mapping[str, Any], rows: Mapping[str, list[Any]], **more: Any
) -> StudyFile:
    """A study with the one domain ``d`` on files of its own, one per split."""
    folder.mkdir(parents=True, exist_ok=True)
    data = dict(domain.get("data", {}))
    for split, records in rows.items():
        data[split] = f"{split}.jsonl"
        (folder / data[split]).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    if "test" not in rows:
        data["split"] = {"test": 0}
    document = {
        "name": "writing",
        "model": str(model),
        "domains": {"d": {**domain, "data": data}},
        "methods": {"lora": {}, "prompt": {}, "full": {}},
        "tracking": {"mlflow": "off"},
        "resources": {"cpus_per_worker": 1, "slots": 1},
        **more,
    }
    document["training"] = {
        "epochs": 1,
        "evaluations": 1,
        "max_length": 32,
        "precision": "fp32",
        **more.get("training", {}),
    }
    return StudyFile.parse(json.dumps(document), "study.yaml", folder=folder)


def prepare(file: StudyFile, cache: Path) -> PreparedDomain:
    """The domain, tokenised."""
    place = file.spec.models[0].path
    return prepare_domain("d", file.spec, folder=file.folder, model_location=place, revision=None, cache=cache)


def plan_and_worker(file: StudyFile, folder: Path) -> tuple[StudyPlan, Worker]:
    """A worker that can train the study's trials."""
    plan = plan_study(file, folder / "cache")
    return plan, Worker(plan.for_workers(folder, threads=1), WorkerGroup())


def train(plan: StudyPlan, worker: Worker, method: str, number: int = 0, **changes: Any) -> list[SegmentResult]:
    """A trial from its start to its end."""
    defaults = {name: item.space for name, item in METHODS[method].hyperparameters.items()}
    trial = TrialPlan(number, next(iter(plan.models)), "d", method, defaults | changes, seed=0)
    steps = plan.budgets["d", method].evaluation_steps
    results = []
    for step in steps:
        outcome = worker.do(Segment(trial, step, final=step == steps[-1]))
        assert isinstance(outcome, SegmentResult), outcome
        results.append(outcome)
    return results
