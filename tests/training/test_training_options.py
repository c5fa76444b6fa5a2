"""Early stopping, gradient accumulation, smoothing, class weights, and the one reading of the test split."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peftsearch.domains import get_task
from peftsearch.domains.tasks import LossOptions
from peftsearch.methods import METHODS, AttachContext
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile, TrainingSpec
from peftsearch.training.checkpoint import WEIGHTS, delete_states, read_checkpoint, state_name, trial_folder
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.evaluate import Evaluation, evaluate
from peftsearch.training.optimizer import make_optimizer, master_weights, step_optimizer
from peftsearch.training.segment import Segment, SegmentResult, TrialPlan
from peftsearch.training.worker import Worker

Make = Callable[..., Path]
TRAINING = {"epochs": 2, "evaluations": 4, "batch_size": 16, "max_length": 16, "precision": "fp32"}


def planned(write_study: Make, folder: Path, model: Path | None = None, **training: Any) -> StudyPlan:
    sections = {"model": str(model)} if model else {}
    return plan_study(StudyFile.load(write_study(training=TRAINING | training, **sections)), folder / "cache")


def worker(plan: StudyPlan, folder: Path) -> Worker:
    return Worker(plan.for_workers(folder, threads=1), WorkerGroup())


def trial(plan: StudyPlan, learning_rate: float = 5e-3) -> TrialPlan:
    defaults: dict[str, Any] = {name: item.space for name, item in METHODS["lora"].hyperparameters.items()}
    chosen = defaults | {"rank": 4, "learning_rate": learning_rate}
    return TrialPlan(0, next(iter(plan.models)), "topics", "lora", chosen, seed=0)


def train(worker: Worker, plan: StudyPlan, what: TrialPlan, **segment: Any) -> list[SegmentResult]:
    results: list[SegmentResult] = []
    steps = plan.budgets["topics", "lora"].evaluation_steps
    for step in steps:
        final = step == steps[-1]
        outcome = worker.do(Segment(what, step, final=final, **(segment if final else {})))
        assert isinstance(outcome, SegmentResult), outcome
        results.append(outcome)
        if outcome.stopped:
            break
    return results


def test_accumulated_gradients_are_those_of_the_whole_batch(write_study: Make, tiny_base: Path, tmp_path: Path) -> None:
    # Parts draw other dropout masks than the whole, so the base has none here.
    model = shutil.copytree(tiny_base, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    whole, parts = (planned(write_study, tmp_path, model, gradient_accumulation=count) for count in (1, 4))
    first = train(worker(whole, tmp_path / "a"), whole, trial(whole))
    second = train(worker(parts, tmp_path / "b"), parts, trial(parts))
    assert [item.train_loss for item in second] == pytest.approx([item.train_loss for item in first], rel=1e-4)
    assert [item.loss for item in second] == pytest.approx([item.loss for item in first], rel=1e-3)


def test_small_steps_add_up_in_half_precision() -> None:
    """Each of them is less than bf16 tells apart; together they are not."""
    layer = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    layer.weight.data.fill_(1.0)
    training = TrainingSpec(schedule="constant", warmup=0.0, weight_decay=0.0)
    parameters, masters = dict(layer.named_parameters()), master_weights(layer)
    optimizer = make_optimizer(layer, frozenset(), 1e-4, training, torch.device("cpu"), masters)
    for _ in range(500):
        layer.weight.grad = torch.ones_like(layer.weight)
        step_optimizer(optimizer, parameters, masters)
    assert layer.weight.grad is None
    assert layer.weight.float().mean().item() == pytest.approx(1.0 - 500 * 1e-4, abs=2**-8)
    assert not master_weights(torch.nn.Linear(4, 4))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_trial_over_a_base_in_half_precision(
    method: str, write_study: Make, tiny_base: Path, tmp_path: Path
) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny_base).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "half")
    plan = planned(write_study, tmp_path, tmp_path / "half", evaluations=2, epochs=1)
    check_continued(plan, method, tmp_path)


def test_an_interrupted_trial_with_eight_bit_moments(write_study: Make, tmp_path: Path) -> None:
    plan = planned(write_study, tmp_path, evaluations=2, epochs=1, optimizer="adamw_8bit")
    # Below 4,096 weights bitsandbytes keeps them in 32 bits, as it does those of the head.
    moments = check_continued(plan, "lora", tmp_path, rank=256)
    kinds = {tensor.dtype for name, tensor in moments.items() if name.partition("/")[0].endswith(("state1", "state2"))}
    assert kinds == {torch.uint8, torch.float32}


def check_continued(plan: StudyPlan, method: str, tmp_path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A trial whose worker changes comes to what it comes to without; returns what its last state but one holds."""
    defaults: dict[str, Any] = {name: item.space for name, item in METHODS[method].hyperparameters.items()}
    changes |= {"learning_rate": 1e-4}
    chosen = defaults | (trial(plan).hyperparameters if method == "lora" else {}) | changes
    what = replace(trial(plan), method=method, hyperparameters=chosen)
    steps = plan.budgets["topics", method].evaluation_steps
    segments = [Segment(what, step, final=step == steps[-1]) for step in steps]
    whole = worker(plan, tmp_path / "whole")
    expected = [whole.do(segment) for segment in segments]
    found = [worker(plan, tmp_path / "parts").do(segments[0])]
    state, _ = read_checkpoint(trial_folder(tmp_path / "parts", what.key) / state_name(steps[0]))
    found += [worker(plan, tmp_path / "parts").do(segment) for segment in segments[1:]]
    for one, other in zip(expected, found, strict=True):
        assert isinstance(one, SegmentResult), one
        assert isinstance(other, SegmentResult), other
        assert (one.loss, one.train_loss, one.scores) == (other.loss, other.train_loss, other.scores)
    return {name.partition("optimizer/")[2] or name: tensor for name, tensor in state.items()}


def test_factors_are_not_drawn_to_zero() -> None:
    """Weight decay leaves IA3's vectors alone, which multiply what the base computes."""
    base = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=50)
    ).requires_grad_(False)
    model = METHODS["ia3"].attach(base, {"learning_rate": 1e-2}, AttachContext("CAUSAL_LM", ""))
    optimizer = make_optimizer(model, frozenset(), 1e-2, TrainingSpec(weight_decay=0.1), torch.device("cpu"))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_a_trial_that_stops_improving_ends_with_its_best_weights(write_study: Make, tmp_path: Path) -> None:
    # A learning rate this small changes no prediction: every evaluation after the first is one without improvement.
    plan = planned(write_study, tmp_path, patience=2, evaluations=4)
    mine = worker(plan, tmp_path)
    what = trial(plan, learning_rate=1e-8)
    results = train(mine, plan, what)
    steps = plan.budgets["topics", "lora"].evaluation_steps
    assert [item.step for item in results] == list(steps[:3])
    assert [item.stopped for item in results] == [False, False, True]
    assert results[-1].scores["accuracy"] == results[0].scores["accuracy"]
    assert (trial_folder(tmp_path, what.key) / WEIGHTS).is_file()
    # Whoever asks again, as after a crash of the driver, is told the same.
    again = worker(plan, tmp_path).do(Segment(what, steps[2]))
    assert again == results[-1]


def test_early_stopping_does_not_depend_on_a_lost_checkpoint(write_study: Make, tmp_path: Path) -> None:
    plan = planned(write_study, tmp_path, patience=2, evaluations=4)
    what = trial(plan, learning_rate=1e-8)
    expected = train(worker(plan, tmp_path / "a"), plan, what)
    steps = plan.budgets["topics", "lora"].evaluation_steps
    for step in steps[:2]:
        worker(plan, tmp_path / "b").do(Segment(what, step))
    delete_states(trial_folder(tmp_path / "b", what.key))
    found = worker(plan, tmp_path / "b").do(Segment(what, steps[2]))
    assert isinstance(found, SegmentResult)
    assert (found.stopped, found.loss, found.scores) == (True, expected[-1].loss, expected[-1].scores)


def test_patience_keeps_the_best_weights_of_a_trial_that_gets_worse(write_study: Make, tmp_path: Path) -> None:
    plan = planned(write_study, tmp_path, patience=3, evaluations=8, epochs=4, schedule="constant", warmup=0.0)
    results = train(worker(plan, tmp_path), plan, trial(plan, learning_rate=0.3))
    best = max(item.scores["accuracy"] for item in results)
    assert results[-1].scores["accuracy"] == best
    # The case is only worth something if the last weights were worse than the best ones.
    assert results[-2].scores["accuracy"] < best or results[-1].stopped


@pytest.mark.parametrize(("precision", "times"), [("fp32", 1), ("bf16", 2)])
def test_best_weights_that_are_the_last_are_scored_again_only_where_precision_differs(
    precision: str, times: int, write_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def counted(*args: Any, **kwargs: Any) -> Evaluation:
        calls.append(kwargs["final"])
        return evaluate(*args, **kwargs)

    monkeypatch.setattr("peftsearch.training.session.evaluate", counted)

    def only_result(patience: int | None) -> SegmentResult:
        plan = planned(write_study, tmp_path, patience=patience, evaluations=1, epochs=1, precision=precision)
        (result,) = train(worker(plan, tmp_path / str(patience)), plan, trial(plan))
        return result

    # Without patience the only evaluation is the one at the full budget.
    expected = only_result(None)
    assert calls == [True]
    found = only_result(2)
    assert len(calls[1:]) == times
    assert (found.loss, found.scores, found.train_loss) == (expected.loss, expected.scores, expected.train_loss)


def test_the_test_split_is_read_once_and_its_predictions_are_kept(write_study: Make, tmp_path: Path) -> None:
    plan = planned(write_study, tmp_path)
    what = replace(trial(plan), seed=5, confirmation=True)
    results = train(worker(plan, tmp_path), plan, what, read_test=True)
    assert all(item.test is None for item in results[:-1])
    reading = results[-1].test
    assert reading is not None
    assert reading.predictions == "trials/00000-seed5/test.jsonl"
    lines = [json.loads(line) for line in (tmp_path / reading.predictions).read_text().splitlines()]
    assert len(lines) == reading.examples == plan.domains["topics"].rows["test"]
    task, labels = plan.domains["topics"].task, plan.domains["topics"].labels
    scores = task.score([line["prediction"] for line in lines], [line["reference"] for line in lines], labels)
    assert scores == reading.scores
    # A lost answer is given again from the checkpoint: the test split is not read a second time.
    (tmp_path / reading.predictions).unlink()
    step = plan.budgets["topics", "lora"].total_steps
    again = worker(plan, tmp_path).do(Segment(what, step, final=True, read_test=True))
    assert again == results[-1]
    assert not (tmp_path / reading.predictions).exists()


def test_a_worker_that_died_after_reading_the_test_split_does_not_read_it_again(
    write_study: Make, tmp_path: Path
) -> None:
    plan = planned(write_study, tmp_path)
    what = replace(trial(plan), seed=5, confirmation=True)
    first = train(worker(plan, tmp_path), plan, what, read_test=True)[-1].test
    # As it was just before its last checkpoint: the reading is there, the weights are not.
    (trial_folder(tmp_path, what.key) / WEIGHTS).unlink()
    second = train(worker(plan, tmp_path), plan, what, read_test=True)[-1].test
    assert first is not None
    assert second == first, "the same moment, the same numbers"


def test_searching_never_reads_the_test_split(write_study: Make, tmp_path: Path) -> None:
    plan = planned(write_study, tmp_path)
    assert all(item.test is None for item in train(worker(plan, tmp_path), plan, trial(plan)))


def test_smoothing_and_class_weights_act_on_the_training_loss_alone() -> None:
    task = get_task("classification")
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    batch = {"labels": torch.tensor([0, 1])}
    plain = task.losses(SimpleNamespace(logits=logits), batch)
    logs = torch.log_softmax(logits, 1)
    smooth = task.losses(SimpleNamespace(logits=logits), batch, LossOptions(label_smoothing=0.2))
    torch.testing.assert_close(smooth, 0.8 * plain + 0.2 * -logs.mean(1))
    weighted = task.losses(SimpleNamespace(logits=logits), batch, LossOptions(class_weights=torch.tensor([3.0, 0.5])))
    torch.testing.assert_close(weighted, plain * torch.tensor([3.0, 0.5]))
    assert task.class_counts({"labels": [0, 0, 1]}, ("a", "b", "c")) == [2, 1, 0]


def test_balanced_weights_change_training(write_study: Make, tmp_path: Path) -> None:
    plain = planned(write_study, tmp_path)
    balanced = planned(write_study, tmp_path, class_weights="balanced", label_smoothing=0.1)
    first = train(worker(plain, tmp_path / "a"), plain, trial(plain))
    second = train(worker(balanced, tmp_path / "b"), balanced, trial(balanced))
    assert first[0].train_loss != second[0].train_loss


def test_weights_of_a_finished_trial_are_its_best(write_study: Make, tmp_path: Path) -> None:
    plan = planned(write_study, tmp_path, patience=1)
    what = trial(plan, learning_rate=1e-8)
    results = train(worker(plan, tmp_path), plan, what)
    tensors, meta = read_checkpoint(trial_folder(tmp_path, what.key) / WEIGHTS)
    assert tensors
    assert meta["result"]["scores"] == results[-1].scores
