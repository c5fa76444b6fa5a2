"""torch.compile of a trial's layers: the same numbers, and one graph for all layers and all trials of a shape."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SAMPLES, tiny_decoder

from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyError, StudyFile
from peftsearch.training.compiled import compile_layers
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import Segment, TrialPlan
from peftsearch.training.session import Part, TrialSession
from peftsearch.training.worker import Worker

TRAINING = {"epochs": 1, "evaluations": 2, "batch_size": 16, "max_length": 32, "precision": "fp32"}

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """How many graphs were made since."""
    import torch._dynamo

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    yield lambda: counters["stats"]["unique_graphs"] - before
    torch._dynamo.reset()


def planned(write: Callable[..., Path], folder: Path, method: str, model: Path | None, **training: Any) -> StudyPlan:
    sections = {"methods": {method: {}}, "training": TRAINING | training} | ({"model": str(model)} if model else {})
    return plan_study(StudyFile.load(write(**sections)), folder / "cache")


def session(worker: Worker, plan: StudyPlan, number: int, method: str, values: dict[str, Any]) -> TrialSession:
    return worker._session(Segment(TrialPlan(number, next(iter(plan.models)), "topics", method, values, seed=0), 1))


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), [("encoder", "lora"), ("decoder", "adapter")])
def test_trials_train_as_without(
    kind: str, method: str, write_study: Callable[..., Path], tmp_path: Path, graphs: Callable[[], int]
) -> None:
    model = tiny_decoder(tmp_path / "model") if kind == "decoder" else None
    found = []
    for wanted in (False, True):
        plan = planned(write_study, tmp_path / str(wanted), method, model, compile=wanted)
        worker = Worker(plan.for_workers(tmp_path / f"out-{wanted}", threads=1), WorkerGroup())
        trial = session(worker, plan, 0, method, SAMPLES[method] | {"dropout": 0.0})
        for module in trial.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        result = trial.run(trial.budget.total_steps, final=True)
        assert (graphs() > 0) == wanted
        found.append((result.train_loss, result.loss, *trial.parameters.values()))
    for plainly, compiled in zip(*found, strict=True):
        assert torch.allclose(torch.as_tensor(plainly), torch.as_tensor(compiled), rtol=1e-3, atol=1e-4)


@compiles
@pytest.mark.slow
def test_a_trial_that_is_forgotten_leaves_nothing(
    write_study: Callable[..., Path], tmp_path: Path, graphs: Callable[[], int]
) -> None:
    plan = planned(write_study, tmp_path, "full", None, compile=True)
    worker = Worker(plan.for_workers(tmp_path / "out", threads=1), WorkerGroup())
    trial = session(worker, plan, 0, "full", SAMPLES["full"])
    trial._train(2)
    assert graphs()
    weights = [weakref.ref(parameter) for parameter in trial.parameters.values()]
    gc.collect()
    gc.disable()
    try:
        worker.forget([trial.plan.key])
        del trial
        assert not [weight() for weight in weights if weight() is not None]
    finally:
        gc.enable()


@compiles
@pytest.mark.slow
def test_layers_and_trials_of_a_rank_share_a_graph_and_evaluations_make_none(
    write_study: Callable[..., Path], tmp_path: Path, graphs: Callable[[], int]
) -> None:
    plan = planned(write_study, tmp_path, "lora", None, compile=True)
    worker = Worker(plan.for_workers(tmp_path / "out", threads=1), WorkerGroup())
    made = []
    for number, rank in enumerate((4, 4, 8)):
        trial = session(
            worker, plan, number, "lora", SAMPLES["lora"] | {"rank": rank, "learning_rate": 0.001 * (1 + number)}
        )
        before = graphs()
        trial._train(2)
        trained = graphs()
        trial._train(4)
        trial.conclude(Part(1.0, 1, 1.0), final=False)
        assert graphs() == trained
        made.append(trained - before)
    # The first layer's input needs no gradient: it has a graph of its own.
    assert made == [2, 0, 2]


def test_what_cannot_be_compiled_is_said_first(
    write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    plan = planned(write_study, tmp_path, "lora", None, compile=True)
    worker = Worker(plan.for_workers(tmp_path / "out", threads=1), WorkerGroup())
    with pytest.raises(
        ValueError, match=r"^training.compile: torch.compile does not work here \(.*compiler.*\): install"
    ):
        worker.warm_up()
    with pytest.raises(ValueError, match="no layers were found in Linear"):
        compile_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("resources", "why"),
    [
        ({"pack": 4}, "pack: 4 several"),
        ({"strategy": "fsdp", "workers_per_trial": 2}, "does not go with strategy: fsdp"),
    ],
)
def test_it_is_refused_beside(resources: dict[str, Any], why: str, write_study: Callable[..., Path]) -> None:
    with pytest.raises(StudyError, match=why):
        StudyFile.load(write_study(training={"compile": True}, resources=resources))


def test_a_study_that_compiles_measures_no_packs(write_study: Callable[..., Path]) -> None:
    at_once = [
        StudyFile.load(write_study(training={"compile": wanted}, resources={"gpus_per_worker": 1})).spec.trials_at_once
        for wanted in (False, True)
    ]
    assert at_once == ["auto", 1]
