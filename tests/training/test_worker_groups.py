"""Two workers give what one gives, under DDP and FSDP2, for every method; and leave the base as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from group_runs import GroupRun, run_group
from tiny_models import SAMPLES, tiny_decoder, tiny_encoder

from peftsearch.methods import METHODS
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training.checkpoint import WEIGHTS, read_checkpoint, saved_steps, trial_folder
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import (
    Failure,
    HandedBack,
    Outcome,
    Probe,
    ProbeResult,
    Segment,
    SegmentResult,
    TrialPlan,
)
from peftsearch.training.worker import Worker

USUAL = ("lora", "adapter", "prompt", "full")
METHODS_OF = {
    "encoder": list(METHODS),
    # Llama has no biases for bitfit.
    "decoder": [method for method in METHODS if method != "bitfit"],
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory, topics_csv: Path) -> dict[str, StudyPlan]:
    """By architecture: a study of every method on a tiny model without dropout, whose masks differ between workers."""
    found = {}
    for architecture, build in (("encoder", tiny_encoder), ("decoder", tiny_decoder)):
        folder = tmp_path_factory.mktemp(architecture)
        model = build(folder / "model")
        config = json.loads((model / "config.json").read_text())
        config |= {name: 0.0 for name in config if name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
        (model / "config.json").write_text(json.dumps(config))
        split = {"group": "document", "validation": 0.25, "test": 0.2}
        document = {
            "name": "tiny",
            "model": str(model),
            "domains": {"topics": {"data": {"source": str(topics_csv), "split": split}}},
            "methods": {method: {} for method in METHODS_OF[architecture]},
            # Neither steps of 15 examples nor the batches of an evaluation divide by two workers.
            "training": {
                "epochs": 1,
                "evaluations": 2,
                "batch_size": 15,
                "evaluation_batch_size": 16,
                "max_length": 16,
                "precision": "fp32",
            },
        }
        path = folder / "study.yaml"
        path.write_text(yaml.safe_dump(document))
        found[architecture] = plan_study(StudyFile.load(path), folder / "cache")
    return found


def trial(plan: StudyPlan, method: str, number: int = 0, **changes: Any) -> TrialPlan:
    space = {name: item.space for name, item in METHODS[method].hyperparameters.items()}
    return TrialPlan(number, next(iter(plan.models)), "topics", method, space | SAMPLES[method] | changes, seed=0)


def segments(plan: StudyPlan, method: str, number: int = 0, **changes: Any) -> list[Segment]:
    steps = plan.budgets["topics", method].evaluation_steps
    what = trial(plan, method, number, **changes)
    return [Segment(what, step, final=step == steps[-1]) for step in steps]


def alone(plan: StudyPlan, folder: Path, pieces: list[Segment]) -> list[Outcome]:
    threads = torch.get_num_threads()
    worker = Worker(plan.for_workers(folder, threads=1), WorkerGroup())
    try:
        return [worker.do(piece) for piece in pieces]
    finally:
        torch.set_num_threads(threads)


def assert_same(found: list[Outcome], expected: list[Outcome], tolerance: float = TOLERANCE) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, SegmentResult), one
        assert isinstance(other, SegmentResult), other
        assert (one.step, one.loss, one.train_loss) == pytest.approx(
            (other.step, other.loss, other.train_loss), abs=tolerance
        )
        assert one.scores == pytest.approx(other.scores, abs=tolerance)


def assert_same_weights(folder: Path, other: Path, number: int, theirs: int, tolerance: float = 1e-3) -> None:
    (found, _), (expected, _) = (
        read_checkpoint(trial_folder(place, f"{key:05d}") / WEIGHTS)
        for place, key in ((folder, number), (other, theirs))
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=1e-2, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_where_one_worker_must_leave_both_do_at_the_same_step(
    strategy: str, plans: dict[str, StudyPlan], tmp_path: Path
) -> None:
    plan, two = plans["encoder"], tmp_path / "two"
    (first, _) = segments(plan, "lora")
    handed = plan.for_workers(two, threads=1)
    # They ask before the first step, sooner or later once more, and before the evaluation.
    assert run_group(GroupRun(handed, [[first]], strategy, leave=1)).outcomes == [[HandedBack()], [HandedBack()]]
    (step,) = saved_steps(trial_folder(two, "00000"))
    assert 0 < step <= first.to_step
    continued = run_group(GroupRun(handed, [[first]], strategy)).outcomes
    assert_same(continued[0], alone(plan, tmp_path / "one", [first]))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_give_what_one_gives_also_when_interrupted(
    strategy: str, plans: dict[str, StudyPlan], tmp_path: Path
) -> None:
    plan, two = plans["encoder"], tmp_path / "two"

    def numbered(first: int) -> list[list[Segment]]:
        return [segments(plan, method, first + place) for place, method in enumerate(USUAL)]

    whole, interrupted, shrunk, grown = (numbered(first) for first in (0, 10, 20, 30))
    diverging = segments(plan, "full", 40, learning_rate=1e30)[0]
    expected = [alone(plan, tmp_path / "one", pieces) for pieces in whole]
    before = [alone(plan, two, pieces[:1]) for pieces in grown]
    work = [
        [diverging, *(piece for pieces in whole for piece in pieces)],
        # A new worker for what is left: all that it has of these trials are their checkpoints.
        [pieces[0] for pieces in (*interrupted, *shrunk)],
        [pieces[1] for pieces in (*interrupted, *grown)],
    ]
    found = run_group(GroupRun(plan.for_workers(two, threads=1), work, strategy))
    for outcomes in found.outcomes:
        failure, *others = outcomes
        assert isinstance(failure, Failure)
        assert "1e+30" in failure.error
        ends = others[16:]
        for place in range(len(USUAL)):
            assert_same(others[2 * place : 2 * place + 2], expected[place])
            assert_same([others[8 + place], ends[place]], expected[place])
            assert_same([before[place][0], ends[4 + place]], expected[place])
    for place, pieces in enumerate(shrunk):
        assert_same([found.outcomes[0][13 + place], *alone(plan, two, pieces[1:])], expected[place])
        for first in (0, 10, 20, 30):
            assert_same_weights(two, tmp_path / "one", first + place, place)
    for before_and_after in found.fingerprints:
        assert all(fingerprint == before_and_after[0] for fingerprint in before_and_after)


def test_what_each_worker_of_a_group_used_is_told(plans: dict[str, StudyPlan], tmp_path: Path) -> None:
    plan = plans["encoder"]
    work = [segments(plan, "lora")[:1]]
    found = run_group(GroupRun(plan.for_workers(tmp_path, threads=1), work, "ddp", ballast={1: 200}))
    ((first,), (second,)) = found.outcomes
    assert isinstance(first, SegmentResult), first
    assert isinstance(second, SegmentResult), second
    assert first.usage == second.usage
    others = {name for name in first.usage if "/" in name}
    assert {f"worker_1/{name}" for name in first.usage.keys() - others} == others
    memory = "process_memory_usage_megabytes"
    assert first.usage[f"worker_1/{memory}"] > first.usage[memory] + 100 > 100


@pytest.mark.slow
@pytest.mark.parametrize("architecture", METHODS_OF)
def test_every_method_gives_the_same_on_parts_of_the_base(
    architecture: str, plans: dict[str, StudyPlan], tmp_path: Path
) -> None:
    plan = plans[architecture]
    work = [piece for number, method in enumerate(METHODS_OF[architecture]) for piece in segments(plan, method, number)]
    found = run_group(GroupRun(plan.for_workers(tmp_path / "two", threads=1), [work], "fsdp"))
    expected = alone(plan, tmp_path / "one", work)
    for number, method in enumerate(METHODS_OF[architecture]):
        pieces = slice(2 * number, 2 * number + 2)
        # Over this base in nf4, one worker's own losses move by 3e-4 when it adds a batch's gradients up in another
        # order (gradient_accumulation of 3 against 1, measured), and all others' by 4e-8.
        times = 10 if method == "qlora" else 1
        assert_same(found.outcomes[0][pieces], expected[pieces], times * TOLERANCE)
        assert_same_weights(tmp_path / "two", tmp_path / "one", number, number, times * 1e-3)
    for before, after in found.fingerprints:
        # The forms of the base that quantised trials take have come in addition.
        assert before.items() <= after.items()
    # A worker holds a part only.
    assert found.fingerprints[0][0] != found.fingerprints[1][0]


def test_a_baseline_that_one_worker_cannot_load_is_noted_by_both_and_they_go_on(
    plans: dict[str, StudyPlan], tmp_path: Path
) -> None:
    plan = plans["encoder"]
    (model,) = plan.models
    work = [Probe(model, "topics"), segments(plan, "lora")[0]]
    found = run_group(GroupRun(plan.for_workers(tmp_path, 1), [work], "fsdp", unloadable=0))
    for probed, trained in found.outcomes:
        assert isinstance(probed, ProbeResult)
        assert "majority" in probed.scores
        assert set(probed.failures) == {"linear_probe"}
        assert "a damaged file" in probed.failures["linear_probe"]
        assert isinstance(trained, SegmentResult)
