"""Gradient checkpointing: the same numbers for less memory, where it is asked for or needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from tiny_models import SAMPLES, tiny_decoder, tiny_encoder_decoder

from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training import session as session_module
from peftsearch.training.activations import activation_bytes, recomputed_bytes
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import Failure, Segment, TrialPlan
from peftsearch.training.session import TrialSession
from peftsearch.training.worker import Worker

TRAINING = {"epochs": 2, "evaluations": 2, "batch_size": 16, "max_length": 32, "precision": "fp32"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "decoder": tiny_decoder(folder / "decoder"),
        "encoder-decoder": tiny_encoder_decoder(folder / "encoder-decoder"),
    }


def planned(write: Callable[..., Path], folder: Path, method: str, model: Path | None, **sections: Any) -> StudyPlan:
    sections = {"methods": {method: {}}, "training": TRAINING} | sections | ({"model": str(model)} if model else {})
    return plan_study(StudyFile.load(write(**sections)), folder / "cache")


def session(plan: StudyPlan, folder: Path, method: str) -> TrialSession:
    worker = Worker(plan.for_workers(folder / "out", threads=1), WorkerGroup())
    values = SAMPLES[method] | ({"dropout": 0.2} if "dropout" in SAMPLES[method] else {})
    return worker._session(Segment(TrialPlan(0, next(iter(plan.models)), "topics", method, values, seed=0), 1))


class Kept:
    """Bytes that autograd keeps from the forward pass for the backward pass, of the largest step."""

    def __enter__(self) -> Kept:
        self.most = self.now = 0
        hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks = hooks
        hooks.__enter__()
        return self

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.now += tensor.numel() * tensor.element_size()
        return tensor

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder-decoder"])
@pytest.mark.parametrize("method", [name for name in SAMPLES if name not in ("qlora", "hybrid")])
def test_the_numbers_are_the_same(
    method: str, kind: str, models: dict[str, Path], write_study: Callable[..., Path], tmp_path: Path
) -> None:
    if method == "bitfit" and kind != "encoder":
        pytest.skip("it refuses models without biases")
    found = []
    for wanted in (False, True):
        training = TRAINING | {"gradient_checkpointing": wanted}
        plan = planned(write_study, tmp_path, method, models.get(kind), training=training)
        trained = session(plan, tmp_path, method)
        inner: Any = getattr(trained.model, "get_base_model", lambda m=trained.model: m)()
        assert inner.is_activation_checkpointing is wanted
        loss = torch.tensor(trained._train(3))
        found.append([loss, *(parameter.detach().clone() for parameter in trained.parameters.values())])
    # Gradients meet in another order where every layer of a decoder attends to the encoder.
    tolerance = 1e-3 if kind == "encoder-decoder" else 0.0
    for kept, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=tolerance, atol=tolerance)


def test_fewer_activations_are_kept(write_study: Callable[..., Path], tmp_path: Path) -> None:
    kept = []
    for wanted in (False, True):
        plan = planned(
            write_study, tmp_path, "lora", None, training=TRAINING | {"gradient_checkpointing": wanted, "epochs": 1}
        )
        trained = session(plan, tmp_path, "lora")
        trained.wrapped.train()
        loaded = trained._loaded(0)[2][0][0].values
        with Kept() as found:
            trained.wrapped(**{name: value for name, value in loaded.items() if name != "labels"})
        kept.append(found.now)
    assert kept[1] < kept[0] / 2
    assert recomputed_bytes(12, 768, 4096, 2) < activation_bytes(12, 768, 4096, 2) / 6


def test_memory_that_is_scarce_asks_for_it(
    write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(write_study, tmp_path, "lora", None)
    assert not session(plan, tmp_path, "lora").model.get_base_model().is_activation_checkpointing  # type: ignore[operator]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    assert session(plan, tmp_path, "lora").model.get_base_model().is_activation_checkpointing  # type: ignore[operator]


def test_a_limit_on_memory_asks_for_it(write_study: Callable[..., Path], tmp_path: Path) -> None:
    training = TRAINING | {"batch_size": 2048}

    def plan(gib: float | None) -> StudyPlan:
        search = {"trials": 3} | ({"max_memory": gib} if gib else {})
        return planned(write_study, tmp_path, "lora", None, training=training, search=search)

    # 2048 texts of 32 tokens: 0.27 GiB of activations in fp32, or 0.15, beside a process of 0.59 GiB.
    assert plan(0.8).for_workers(tmp_path, 1).training["lora"].gradient_checkpointing is True
    assert plan(2.0).for_workers(tmp_path, 1).training["lora"].gradient_checkpointing == "auto"
    assert plan(None).for_workers(tmp_path, 1).training["lora"].gradient_checkpointing == "auto"


def test_a_model_that_cannot_says_so(
    write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertPreTrainedModel

    monkeypatch.setattr(BertPreTrainedModel, "supports_gradient_checkpointing", False)
    plan = planned(write_study, tmp_path, "lora", None, training=TRAINING | {"gradient_checkpointing": True})
    worker = Worker(plan.for_workers(tmp_path / "out", threads=1), WorkerGroup())
    outcome = worker.do(Segment(TrialPlan(0, next(iter(plan.models)), "topics", "lora", SAMPLES["lora"], 0), 1))
    assert isinstance(outcome, Failure)
    assert "does not support gradient checkpointing" in outcome.error


@pytest.mark.parametrize("wanted", [False, True])
def test_what_is_below_the_first_adapted_layer_builds_no_graph(
    wanted: bool, write_study: Callable[..., Path], tmp_path: Path
) -> None:
    plan = planned(write_study, tmp_path, "lora", None, training=TRAINING | {"gradient_checkpointing": wanted})
    worker = Worker(plan.for_workers(tmp_path / "out", threads=1), WorkerGroup())
    values = SAMPLES["lora"] | {"targets": "encoder.layer.1.attention.self.query"}
    model = next(iter(plan.models))
    trained = worker._session(Segment(TrialPlan(0, model, "topics", "lora", values, seed=0), 1))
    bert: Any = trained.model.get_base_model().bert  # type: ignore[operator]
    graphs: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            graphs[name] = first.requires_grad

        return hook

    bert.embeddings.register_forward_hook(note("embeddings"))
    for number, layer in enumerate(bert.encoder.layer):
        layer.register_forward_hook(note(f"layer {number}"))
    trained._train(1)
    assert graphs == {"embeddings": False, "layer 0": False, "layer 1": True}


def test_nothing_is_recomputed_by_default(write_study: Callable[..., Path], tmp_path: Path) -> None:
    assert session_module.recompute.__module__ == "peftsearch.training.recompute"
    trained = session(planned(write_study, tmp_path, "full", None), tmp_path, "full")
    assert not trained.model.is_activation_checkpointing
