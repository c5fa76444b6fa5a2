"""A limit on the tokens of a batch, from the study file to the trained trial."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import SAMPLES, tiny_encoder

from peftsearch.search.estimate import MemoryCosts, model_shapes
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyError, StudyFile
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import Segment, SegmentResult, TrialPlan
from peftsearch.training.worker import Worker

TRAINING = {"epochs": 2, "evaluations": 2, "batch_size": 64, "tokens_per_batch": 160, "max_length": 16}
Make = Callable[..., Path]


def planned(write_study: Make, tmp_path: Path, training: dict[str, Any], **sections: Any) -> StudyPlan:
    sections = {"methods": {"lora": {}, "full": {}}, "training": training} | sections
    return plan_study(StudyFile.load(write_study(**sections)), tmp_path / "cache")


def test_a_trial_trains_on_batches_within_the_limit(write_study: Make, tmp_path: Path) -> None:
    plan = planned(write_study, tmp_path, TRAINING)
    budget = plan.budgets["topics", "lora"]
    rows = plan.domains["topics"].rows["train"]
    # Texts of 11 tokens count as 16.
    assert budget.steps_per_epoch == -(-rows // 10)
    assert plan.budgets["topics", "full"] == budget
    worker = Worker(plan.for_workers(tmp_path, threads=1), WorkerGroup())
    trial = TrialPlan(0, next(iter(plan.models)), "topics", "lora", SAMPLES["lora"], seed=0)
    for step in budget.evaluation_steps:
        result = worker.do(Segment(trial, step))
        assert isinstance(result, SegmentResult), result
    assert result.step == budget.total_steps == 2 * budget.steps_per_epoch
    found = worker._sessions[trial.key].order.batch(3)
    assert len(found) <= 10


def test_trials_of_all_models_have_equally_many_steps(write_study: Make, tiny_base: Path, tmp_path: Path) -> None:
    """The other model spells words in pieces: its texts are longer, and make more batches."""
    other = tiny_encoder(tmp_path / "other")
    training = TRAINING | {"max_length": 32}
    alone = planned(write_study, tmp_path, training).budgets["topics", "lora"]
    path = write_study(methods={"lora": {}}, training=training)
    path.write_text(path.read_text().replace(f"model: {tiny_base}", f"models: [{tiny_base}, {other}]"))
    plan = plan_study(StudyFile.load(path), tmp_path / "cache")
    budget = plan.budgets["topics", "lora"]
    assert budget.steps_per_epoch > alone.steps_per_epoch
    worker = Worker(plan.for_workers(tmp_path, threads=1), WorkerGroup())
    for number, model in enumerate(plan.models):
        trial = TrialPlan(number, model, "topics", "lora", SAMPLES["lora"], seed=0)
        assert isinstance(worker.do(Segment(trial, 1)), SegmentResult)
        order = worker._sessions[trial.key].order
        rows = [row for step in range(budget.steps_per_epoch) for row in order.batch(step)]
        assert sorted(rows) == list(range(plan.domains["topics"].rows["train"]))


def test_a_limit_without_room_for_a_text_is_refused(write_study: Make, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no room for one text of domain 'topics'") as raised:
        planned(write_study, tmp_path, TRAINING | {"tokens_per_batch": 15})
    assert raised.value.loc == ("training", "tokens_per_batch")
    own = {"lora": {}, "full": {"training": {"tokens_per_batch": 8}}}
    with pytest.raises(StudyError, match="raise tokens_per_batch") as raised:
        planned(write_study, tmp_path, TRAINING, methods=own)
    assert raised.value.loc == ("methods", "full", "training", "tokens_per_batch")


def test_the_estimate_of_memory_knows_the_limit(write_study: Make, tmp_path: Path) -> None:
    def memory(**training: Any) -> int:
        plan = planned(write_study, tmp_path, TRAINING | training)
        shapes = model_shapes(plan.models, plan.model_facts, plan.counter)
        scored = dict.fromkeys(plan.prepared)
        lengths = dict.fromkeys(plan.prepared, 16)
        costs = MemoryCosts(plan.spec, [item.cell for item in plan.cells], shapes, lengths, scored)
        return costs(plan.cells[0].cell, plan.cells[0].largest)

    assert memory() < memory(tokens_per_batch=1024) == memory(tokens_per_batch=None)
