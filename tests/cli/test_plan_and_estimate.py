"""The printed plan, and the arithmetic of its estimates."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cli_study import Result, small_study, tree, write_study
from rich.console import Console

from peftsearch.cli.plan import print_plan, totals
from peftsearch.search import estimate as module
from peftsearch.search.estimate import (
    Estimate,
    ModelShape,
    TrialCosts,
    activation_bytes,
    estimate,
    evaluation_operations,
    frozen_bytes,
    measured_speed,
    memory_here,
    training_operations,
    trial_bytes,
)
from peftsearch.study import Study

SHAPE = ModelShape(parameters=1_000_000, embeddings=400_000, layers=6, hidden=384, weight_bytes=4)


@pytest.fixture
def study(base: Path, project: Path, storage: Path) -> Study:
    description = "Which adaptation [is] best?"
    return Study.from_file(write_study(project, {**small_study(base), "description": description}), storage=storage)


def test_validate_prints_the_plan(study: Study) -> None:
    file = io.StringIO()
    plan = study.validate()
    print_plan(Console(file=file, soft_wrap=True, highlight=False), study, plan)
    words = [line.split() for line in file.getvalue().splitlines()]
    assert ["small", "is", "a", "valid", "study."] in words
    assert "Which adaptation [is] best?" in file.getvalue()
    rows = plan.domains["clinical"].rows
    counts = [str(rows[split]) for split in ("train", "validation", "test")]
    steps = str(plan.budgets["clinical", "lora"].total_steps)
    assert ["clinical", "classification", "accuracy", *counts, "2", "16", steps, "2", "notes.csv"] in words
    total = plan.model_facts[str(study.spec.models[0].path)].total_parameters
    assert any("BertForSequenceClassification" in line and f"{total:,}" in line for line in words)
    smallest, largest = plan.cells[0].smallest.trainable, plan.cells[0].largest.trainable
    (lora,) = (line for line in words if line[:2] == ["legal", "lora"])
    assert lora[2:6] == ["2", f"{smallest:,}", "..", f"{largest:,}"]
    assert " ".join(lora[9:]).startswith("rank 1..4, ")
    (full,) = (line for line in words if line[:2] == ["legal", "full"])
    assert full[2:5] == ["2", f"{total:,}", "100"]
    # Two domains with as many steps each, two methods, two trials.
    steps_of_all = 4 * sum(plan.budgets[name, "lora"].total_steps for name in plan.domains)
    assert f"8 trials in 4 cells, {steps_of_all} optimiser steps if none is pruned" in file.getvalue()
    assert "Rough estimate: about" in file.getvalue()
    assert "without pruning on this machine" in file.getvalue()


def test_warnings_are_sentences(study: Study, project: Path) -> None:
    text = (project / "notes.csv").read_text()
    (project / "notes.csv").write_text(text + "".join(f"the tenant {n},yes\n" for n in range(400)))
    file = io.StringIO()
    print_plan(Console(file=file, soft_wrap=True), study, study.validate())
    notes = [line for line in file.getvalue().splitlines() if line.startswith("Note on clinical: ")]
    assert any("of train has the label 'yes'" in note for note in notes)
    assert all(note.endswith(".") for note in notes)


def test_validate_on_the_command_line(
    peftsearch: Callable[..., Result], base: Path, project: Path, storage: Path
) -> None:
    path = write_study(project, small_study(base))
    result = peftsearch("validate", path, "--storage", storage, "--set", "search.trials=7")
    assert (result.status, result.err) == (0, "")
    assert "28 trials in 4 cells" in result.out
    # Tokenised data is kept for the run; the study has not begun.
    assert {name.split("/")[0] for name in tree(storage)} == {"note.txt", "cache"}


def test_time_on_a_gpu_that_is_not_there_is_assumed_and_said_so(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = study.validate()
    resources = plan.spec.resources.model_copy(update={"gpus_per_worker": 1.0})
    plan.spec.__dict__["resources"] = resources
    found = estimate(plan)
    assert found.assumed
    assert found.device.startswith("NVIDIA A100 (")
    assert any("GPU hours" in line and "this machine has no GPU" in line for line in totals(plan, found))
    assert any("of GPU memory per worker" in line for line in totals(plan, found))


def test_estimate_of_a_study(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured_speed", lambda *_: 1e9)
    plan = study.validate()
    found = estimate(plan)
    assert found.largest == "full"
    assert found.worker_bytes > module.PROCESS_BYTES
    twice = study.spec.search.model_copy(update={"trials": 4})
    plan.spec.__dict__["search"] = twice
    assert estimate(plan).seconds == pytest.approx(2 * (found.seconds or 0))
    assert estimate(plan).worker_bytes == found.worker_bytes
    # Four trials per cell, and each cell's best twice more.
    plan.spec.__dict__["confirm"] = plan.spec.confirm.model_copy(update={"seeds": 2})
    assert estimate(plan).seconds == pytest.approx(3 * (found.seconds or 0))


def test_sentences_of_an_estimate(study: Study) -> None:
    plan = study.validate()
    lines = totals(plan, Estimate(3 * 2**30, "full", 4000.0, "2 CPU cores"))
    assert lines[1] == "Rough estimate: about 3.0 GiB of memory per worker (full needs most)."
    assert lines[2].startswith("Rough estimate: about 1 h 07 min without pruning on this machine (2 CPU cores)")
    fits = Estimate(3 * 2**30, "full", 4000.0, "2 CPU cores", memory_here=3 * 2**30)
    assert totals(plan, fits) == lines
    too_large = totals(plan, dataclasses.replace(fits, memory_here=2 * 2**30))
    assert too_large[2].startswith("This machine has 2.0 GiB: such trials would probably fail here.")
    assert memory_here(on_gpu=False) == psutil.virtual_memory().total == estimate(plan).memory_here


def test_memory() -> None:
    # Equation 2 of Korthikanti et al. with 2 bytes per number: 34 s b h for each layer.
    assert activation_bytes(SHAPE, batch=16, length=64, compute_bytes=2) == 34 * 64 * 16 * 384 * 6
    assert activation_bytes(SHAPE, 16, 64, 4) == 2 * activation_bytes(SHAPE, 16, 64, 2)
    # An adapter: weights, gradients and two moments in four bytes each.
    assert trial_bytes(SHAPE, trainable=1000, trains_copy=False, activations=7) == 16_000 + 7
    # Full fine-tuning: the same for every weight.
    assert trial_bytes(SHAPE, trainable=1_000_000, trains_copy=True, activations=0) == 16_000_000
    assert trial_bytes(SHAPE, trainable=1_000_000, trains_copy=True, activations=0, moments=2) == 10_000_000
    # Half precision is trained by way of a copy in full precision.
    half = dataclasses.replace(SHAPE, weight_bytes=2)
    assert trial_bytes(half, trainable=1_000_000, trains_copy=True, activations=0) == 18_000_000


def test_quantised_bases() -> None:
    # 600,000 weights that are multiplied with, and embeddings of 4 bytes each.
    assert frozen_bytes(SHAPE, None) == 4_000_000
    assert frozen_bytes(SHAPE, "int8") == 600_000 + 1_600_000
    # 4 bits, and 0.127 bits of constants per weight (Dettmers et al. 2023).
    assert frozen_bytes(SHAPE, "nf4") == pytest.approx(600_000 * 4.127 / 8 + 1_600_000, abs=10)


def test_costs_of_single_configurations(study: Study) -> None:
    plan = study.validate()
    lora = next(item for item in plan.cells if item.cell.method == "lora")
    full = next(item for item in plan.cells if item.cell.method == "full" and item.cell.domain == lora.cell.domain)
    assert TrialCosts(plan).seconds(lora.cell) is None
    costs = TrialCosts(plan, {"fp32": 1e9, "bf16": 1e9})
    small, large = costs(lora.cell, {}, lora.smallest), costs(lora.cell, {}, lora.largest)
    # Weights, gradients and two moments of every further parameter.
    assert large.memory_bytes - small.memory_bytes == 16 * (lora.largest.trainable - lora.smallest.trainable)
    assert small.seconds == large.seconds
    assert (costs.seconds(full.cell) or 0) > (small.seconds or 0)
    twice = TrialCosts(plan, {"fp32": 2e9, "bf16": 2e9})
    assert twice.seconds(full.cell) == pytest.approx((costs.seconds(full.cell) or 0) / 2)


def test_a_methods_own_training_decides_its_budget_and_costs(base: Path, project: Path, storage: Path) -> None:
    document = small_study(base)
    document["methods"]["full"] = {"training": {"epochs": 3, "batch_size": 8}}
    plan = Study.from_file(write_study(project, document), storage=storage).validate()
    lora, full = plan.budgets["legal", "lora"], plan.budgets["legal", "full"]
    assert lora.steps_per_epoch == -(-plan.domains["legal"].rows["train"] // 4)
    assert full.steps_per_epoch == -(-plan.domains["legal"].rows["train"] // 8)
    assert full.total_steps == 3 * full.steps_per_epoch
    workers = plan.for_workers(storage, threads=1)
    assert (workers.training["lora"].batch_size, workers.training["full"].batch_size) == (4, 8)
    assert workers.budgets["legal", "full"] == full
    # Twice the batch: twice the activations.
    cell = next(item for item in plan.cells if item.cell.method == "full")
    plain = Study.from_file(write_study(project, small_study(base)), storage=storage).validate()
    assert TrialCosts(plan).memory(cell.cell, cell.largest) > TrialCosts(plain).memory(cell.cell, cell.largest)


def test_the_plan_says_what_limits_grids_and_confirmations_do(
    base: Path, project: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measured_speeds", lambda formats, on_gpu: dict.fromkeys(formats, 1e9))
    document = small_study(base)
    document["methods"] = {
        "lora": {"rank": [1, 2], "targets": "attention", "learning_rate": [1e-3, 1e-2]},
        "full": {"learning_rate": [1e-4]},
    }
    document["search"] = {"trials": 3, "sampler": "grid", "max_parameters": 100_000, "max_memory": 4}
    document["confirm"] = {"seeds": 3, "finalists": "methods"}
    study = Study.from_file(write_study(project, document), storage=storage)
    plan = study.validate()
    lines = totals(plan, Estimate(3 * 2**30, "full", 4000.0, "2 CPU cores"))
    assert lines[0].startswith("8 trials in 4 cells, ")
    assert any(line.startswith("The grid of full has fewer combinations than search.trials (3)") for line in lines)
    assert "Of these grids only the first 3 combinations are run (search.trials): lora 4." in lines
    assert "Configurations with more than 100,000 parameters are not run." in lines
    assert "Configurations with more than 4.0 GiB of memory per worker are not run." in lines
    sentence = (
        "Then each method's best trials are trained again with 3 further seeds, and scored once on the test split"
    )
    assert f"{sentence}." in lines
    assert "without pruning, the confirmation of each method's best included, on this machine" in lines[-1]
    costs = {}
    for finalists, most in (("methods", None), ("all", None), ("all", 2)):
        document["confirm"] = {"seeds": 3, "finalists": finalists, "max_finalists": most}
        again = Study.from_file(write_study(project, document), storage=storage).validate()
        estimated = estimate(again)
        assert estimated is not None
        costs[finalists, most] = estimated.seconds
        assert any(
            "all trials of the full budget (at most 2 per domain) are" in line for line in totals(again, None)
        ) == (most is not None)
    # Per domain, LoRA's three trials and one of full fine-tuning: all of them three times more, or two of the four.
    assert costs["all", None] > costs["methods", None]
    assert costs["all", 2] == pytest.approx((4 + 2 * 3) / (4 + 4 * 3) * costs["all", None])
    document["confirm"] = {"seeds": 3, "finalists": "methods"}
    document["domains"]["clinical"]["data"]["split"] = {"test": 0}
    untested = Study.from_file(write_study(project, document), storage=storage).validate()
    assert f"{sentence}, clinical apart, which has none." in totals(untested, None)


def test_operations() -> None:
    assert training_operations(SHAPE, tokens=10, trains_copy=True) == 6 * 600_000 * 10
    assert training_operations(SHAPE, tokens=10, trains_copy=False) == 4 * 600_000 * 10
    assert evaluation_operations(SHAPE, tokens=10) == 2 * 600_000 * 10


def test_shapes_of_architectures() -> None:
    from transformers import BertConfig, GPT2Config, T5Config

    bert = ModelShape.of(BertConfig(vocab_size=100, hidden_size=8, num_hidden_layers=3, dtype="bfloat16"), 5000)
    assert bert == ModelShape(5000, 800, 3, 8, 2, 100, tied=True)
    gpt = ModelShape.of(GPT2Config(vocab_size=100, n_embd=8, n_layer=3, tie_word_embeddings=False), 5000)
    assert gpt == ModelShape(5000, 800, 3, 8, 4, 100, tied=False)
    encoder_decoder = T5Config(vocab_size=100, d_model=8, num_layers=3, num_decoder_layers=2)
    assert ModelShape.of(encoder_decoder, 5000) == ModelShape(5000, 800, 5, 8, 4, 100, tied=True)
    assert ModelShape.of(object(), 5000) == ModelShape(5000, 0, 0, 0, 4)


def test_speed_is_measured_and_leaves_the_threads_alone() -> None:
    import torch

    threads = torch.get_num_threads()
    assert measured_speed(torch.device("cpu"), "fp32", seconds=0.02) > 1e8
    assert torch.get_num_threads() == threads
