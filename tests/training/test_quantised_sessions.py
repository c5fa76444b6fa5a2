"""Trials over a quantised base depend on their plan alone, as all do: not on the worker, nor on interruptions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lone_worker import new_worker, numbers
from tiny_models import SAMPLES

from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training.checkpoint import WEIGHTS, read_checkpoint, trial_folder
from peftsearch.training.segment import Segment, TrialPlan
from peftsearch.training.worker import Worker

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "qlora": {**SAMPLES["qlora"], "quantization": "nf4"},
    "adapter": {**SAMPLES["adapter"], "quantization": "nf4", "placement": "houlsby"},
    "hybrid": {**SAMPLES["hybrid"], "quantization": "int8", "placement": "parallel", "dropout": 0.1},
}


@pytest.fixture
def plan(write_study: Callable[..., Path], tmp_path: Path) -> StudyPlan:
    methods = {"lora": {}, "qlora": {}, "adapter": {"quantization": ["none", "nf4"]}, "hybrid": {}}
    return plan_study(StudyFile.load(write_study(methods=methods)), tmp_path / "cache")


def train(plan: StudyPlan, method: str, number: int, worker: Callable[[], Worker]) -> list[tuple[Any, ...]]:
    model = next(iter(plan.models))
    what = TrialPlan(number, model, "topics", method, CONFIGURATIONS.get(method, SAMPLES[method]), seed=0)
    steps = plan.budgets["topics", method].evaluation_steps
    results = []
    for index, step in enumerate(steps):
        results.append(numbers(worker().do(Segment(what, step, final=index == len(steps) - 1))))
    return results


def weights(folder: Path, number: int) -> dict[str, bytes]:
    tensors, _ = read_checkpoint(trial_folder(folder, f"{number:05d}") / WEIGHTS)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("method", CONFIGURATIONS)
def test_warm_fresh_and_interrupted_workers_give_the_same(method: str, plan: StudyPlan, tmp_path: Path) -> None:
    def new(name: str) -> Worker:
        return new_worker(plan, tmp_path / name)

    warm = new("warm")
    for number, other in enumerate((*CONFIGURATIONS, "lora"), start=10):
        train(plan, other, number, lambda: warm)
    fresh = new("fresh")
    expected = train(plan, method, 0, lambda: fresh)
    assert train(plan, method, 0, lambda: warm) == expected
    # A new worker for every segment: each begins from the checkpoint of the one before.
    assert train(plan, method, 0, lambda: new("interrupted")) == expected
    assert weights(tmp_path / "warm", 0) == weights(tmp_path / "fresh", 0) == weights(tmp_path / "interrupted", 0)
