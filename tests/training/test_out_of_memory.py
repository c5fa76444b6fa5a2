"""A configuration that does not fit into memory fails with a sentence; its worker goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from group_runs import GroupRun, run_group
from lone_worker import numbers
from tiny_models import SAMPLES

from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyError, StudyFile
from peftsearch.training.memory import describe, free_bytes, out_of_memory, within_memory
from peftsearch.training.segment import Failure, Segment, SegmentResult, TrialPlan

ROOM = 400 * 2**20
"""What the processes may still allocate once the base is loaded."""


@pytest.fixture
def plan(write_study: Callable[..., Path], tmp_path: Path) -> StudyPlan:
    training = {"epochs": 1, "evaluations": 1, "batch_size": 16, "max_length": 16, "precision": "fp32"}
    path = write_study(methods={"lora": {}, "adapter": {}}, training=training)
    return plan_study(StudyFile.load(path), tmp_path / "cache")


def segment(plan: StudyPlan, method: str, number: int, **changes: Any) -> Segment:
    trial = TrialPlan(number, next(iter(plan.models)), "topics", method, SAMPLES[method] | changes, seed=0)
    return Segment(trial, plan.budgets["topics", method].total_steps, final=True)


def too_large_to_build(plan: StudyPlan) -> Segment:
    return segment(plan, "adapter", 0, bottleneck=20_000_000)


def too_large_to_run(plan: StudyPlan) -> Segment:
    """Its weights take 150 MB, and the activations of its first layer for a batch 200 MB each."""
    return segment(plan, "adapter", 1, bottleneck=300_000)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_worker_stays_warm_and_the_next_trial_is_as_on_a_fresh_one(
    workers: int, plan: StudyPlan, tmp_path: Path
) -> None:
    work = [
        [segment(plan, "lora", 2)],
        [too_large_to_build(plan), too_large_to_run(plan), segment(plan, "lora", 3)],
    ]
    handed = GroupRun(plan.for_workers(tmp_path, threads=1), work, "ddp", workers, dict.fromkeys(range(workers), ROOM))
    for expected, first, second, found in run_group(handed).outcomes:
        for failure in (first, second):
            assert isinstance(failure, Failure), failure
            assert "out of memory" in failure.error
            assert "GiB more were wanted" in failure.error
            assert "training.batch_size" in failure.error
        assert numbers(found) == numbers(expected)


def test_one_worker_that_cannot_build_its_model_tells_the_others(plan: StudyPlan, tmp_path: Path) -> None:
    # Larger than the room of one worker, and not so large that the other one takes long to build it.
    work = [segment(plan, "adapter", 0, bottleneck=4_000_000), segment(plan, "lora", 2)]
    found = run_group(GroupRun(plan.for_workers(tmp_path / "one", threads=1), [work], "ddp", 2, {1: ROOM}))
    for failure, result in found.outcomes:
        assert isinstance(failure, Failure)
        assert "out of memory" in failure.error
        assert isinstance(result, SegmentResult)
    assert "worker 1: out of memory" in str(found.outcomes[0][0])


def test_what_torch_holds_in_reserve_of_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver counts it as taken."""
    for name, found in {"mem_get_info": (100, 1000), "memory_reserved": 800, "memory_allocated": 300}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert free_bytes(torch.device("cuda", 0)) == 600


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_was_given_back_on_a_gpu_is_free_again() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before = free_bytes(device)
    held = torch.empty(2**30, dtype=torch.uint8, device=device)
    assert free_bytes(device) < before - 2**29
    del held
    assert abs(free_bytes(device) - before) < 2**28


def test_what_counts_as_out_of_memory() -> None:
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of")
    assert out_of_memory(on_gpu)
    assert describe(on_gpu).startswith("out of GPU memory: 20.00 MiB more were wanted; raise training.gradient_acc")
    assert out_of_memory(MemoryError())
    assert describe(MemoryError()).startswith("out of memory; raise")
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_what_does_not_fit_is_one_sentence_with_its_advice() -> None:
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB"
    advice, wanted = "lower --batch-size", r"out of GPU memory: 2\.50 GiB more were wanted; lower --batch-size"
    with pytest.raises(StudyError, match=wanted), within_memory(advice):
        raise torch.OutOfMemoryError(text)
    with pytest.raises(StudyError, match=r"^out of memory; lower --batch-size"), within_memory(advice):
        raise MemoryError
    with pytest.raises(RuntimeError, match="mat1 and mat2"), within_memory(advice):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
