"""The memory that the scores of a vocabulary take, against what tensors of the real losses take."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftsearch.domains import get_task
from peftsearch.search.estimate import (
    ModelShape,
    TrialCosts,
    evaluation_operations,
    model_shapes,
    training_operations,
)
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.search.vocabulary import ScoredPositions
from peftsearch.spec import StudyFile
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.evaluate import evaluate
from peftsearch.training.session import build_model
from peftsearch.training.worker import Worker

TEXTS, LENGTH, WORDS = 24, 24, 2000


class Peak(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.bytes = max(self.bytes, self.now)
        return made

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


# What a task predicts in a text of LENGTH tokens, and whether the text begins with a prompt.
KINDS = {
    "masked": ("language_modeling", 4, False, ScoredPositions(LENGTH, 0)),
    "causal": ("language_modeling", LENGTH - 1, False, ScoredPositions(LENGTH, 0)),
    "encoder-decoder": ("summarization", LENGTH, False, ScoredPositions(LENGTH, LENGTH)),
    "decoder": ("summarization", 6, True, ScoredPositions(LENGTH, 6)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("doing", ["training in bf16", "training in fp32", "evaluation"])
def test_scores_take_what_is_estimated(kind: str, doing: str) -> None:
    name, predicted, prompted, scored = KINDS[kind]
    task = get_task(name)
    labels = torch.full((TEXTS, LENGTH), -100)
    labels[:, -predicted:] = 3
    batch = {"labels": labels, "bytes": [1] * TEXTS} | ({"prompt_ids": labels} if prompted else {})
    states = torch.randn(TEXTS, LENGTH, 2, requires_grad=True)
    head = torch.randn(WORDS, 2)
    half = doing == "training in bf16"
    with Peak() as peak, torch.set_grad_enabled(doing != "evaluation"):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = SimpleNamespace(logits=torch.nn.functional.linear(states, head))
        losses = task.losses(output, batch)  # type: ignore[arg-type]
        if doing != "evaluation":
            losses.mean().backward()  # type: ignore[no-untyped-call]
    if doing == "evaluation":
        estimated = scored.evaluation_bytes(TEXTS, WORDS, 4)
    else:
        estimated = scored.training_bytes(TEXTS, WORDS, 2 if half else 4)
    assert 0.75 * estimated < peak.bytes < 1.25 * estimated


def language_study(write_study: Callable[..., Path], topics_csv: Path, folder: Path, **training: Any) -> StudyPlan:
    data = {"source": str(topics_csv), "split": {"group": "document", "validation": 0.25, "test": 0.2}}
    path = write_study(
        domains={"topics": {"data": data}, "language": {"task": "language_modeling", "data": data}},
        methods={"lora": {}},
        training={"epochs": 1, "evaluations": 1, "batch_size": 16, "max_length": 16, "precision": "fp32"} | training,
    )
    return plan_study(StudyFile.load(path), folder / "cache")


def test_the_estimate_of_a_language_model_counts_its_vocabulary(
    write_study: Callable[..., Path], topics_csv: Path, tmp_path: Path
) -> None:
    def memory(**training: Any) -> dict[str, int]:
        plan = language_study(write_study, topics_csv, tmp_path, **training)
        costs = TrialCosts(plan)
        return {item.cell.domain: costs.memory(item.cell, item.largest) for item in plan.cells}

    plan = language_study(write_study, topics_csv, tmp_path)
    (words,) = (shape.vocabulary for shape in model_shapes(plan.models, plan.model_facts, plan.counter).values())
    small, large = memory(evaluation_batch_size=1), memory(evaluation_batch_size=100_000)
    # One forward pass scores every word at every position, in four bytes each.
    assert large["language"] - small["language"] > 0.9 * 100_000 * 16 * words * 4
    assert large["topics"] == small["topics"]
    assert small["language"] > small["topics"]


def test_a_head_that_shares_the_embeddings_multiplies_all_the_same() -> None:
    tied = ModelShape(parameters=1000, embeddings=400, layers=1, hidden=4, weight_bytes=4, vocabulary=100, tied=True)
    assert training_operations(tied, 10, False, scored=5) == 4 * (600 * 10 + 400 * 5)
    assert evaluation_operations(tied, 10, scored=5) == 2 * (600 * 10 + 400 * 5)
    own = ModelShape(parameters=1400, embeddings=400, layers=1, hidden=4, weight_bytes=4, vocabulary=100)
    assert evaluation_operations(own, 10, scored=10) == evaluation_operations(tied, 10, scored=10)


def test_an_evaluation_keeps_the_scores_of_one_batch(
    write_study: Callable[..., Path], topics_csv: Path, tmp_path: Path
) -> None:
    plan = language_study(write_study, topics_csv, tmp_path)
    (path,) = plan.models
    worker = Worker(plan.for_workers(tmp_path, threads=1), WorkerGroup())
    domain = worker.domain(path, "language")
    model = build_model(worker.base(path), domain, "layer_norm", {"learning_rate": 1e-3}, seed=0)
    made: list[Any] = []
    alive: list[int] = []
    model.register_forward_pre_hook(lambda *_: alive.append(sum(ref() is not None for ref in made)))
    model.register_forward_hook(lambda _model, _inputs, output: made.append(weakref.ref(output.logits)))
    evaluate(model, domain, "validation", 8)
    assert len(made) > 2
    assert set(alive) == {0}
