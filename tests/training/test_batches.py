"""Batches on their way: in order, one ahead, and without a step that waits for the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SAMPLES, tiny_decoder
from torch.utils._python_dispatch import TorchDispatchMode

from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training import evaluate as evaluate_module
from peftsearch.training import session as session_module
from peftsearch.training.batches import in_thread, load, padded_to
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.evaluate import evaluate
from peftsearch.training.segment import Segment, TrialPlan
from peftsearch.training.session import LeavingError, TrialSession
from peftsearch.training.worker import Worker

METHODS = ("lora", "adapter", "prompt", "prefix", "full")


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for its GPU: reading a number out of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.count += func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
        if func in (aten.index.Tensor, aten.index_put.default, aten._index_put_impl_.default):
            # A mask in brackets is looked up as the numbers of its places.
            self.count += any(at is not None and at.dtype == torch.bool for at in args[1])
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def new_session(
    write_study: Callable[..., Path], decoder: Path, tmp_path: Path
) -> Iterator[Callable[..., TrialSession]]:
    threads = torch.get_num_threads()

    def make(method: str, kind: str = "encoder", **training: Any) -> TrialSession:
        training = {"epochs": 2, "evaluations": 2, "batch_size": 16, "max_length": 32, "precision": "fp32"} | training
        sections = {"model": str(decoder)} if kind == "decoder" else {}
        path = write_study(methods={method: {}}, training=training, **sections)
        plan: StudyPlan = plan_study(StudyFile.load(path), tmp_path / "cache")
        worker = Worker(plan.for_workers(tmp_path / "out", threads=1), WorkerGroup())
        return worker._session(Segment(TrialPlan(0, next(iter(plan.models)), "topics", method, SAMPLES[method], 0), 1))

    yield make
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_device(method: str, kind: str, new_session: Callable[..., TrialSession]) -> None:
    session = new_session(method, kind, gradient_accumulation=2)
    counts = []
    for to_step in (1, 2, 6):
        with Waits() as waits:
            session._train(to_step)
        counts.append(waits.count)
    # The loss is read once, at the end of a segment.
    assert counts == [1, 1, 1]


def test_texts_are_padded_for_the_device_that_reads_them(new_session: Callable[..., TrialSession]) -> None:
    assert [padded_to(torch.device(device)) for device in ("cpu", "cuda")] == [1, 8]
    session = new_session("lora")
    lengths = session.domain.lengths("train")
    widths = set()
    for step in range(4):
        _, _, ((batch, _),) = session._loaded(step)
        assert batch.values["input_ids"].shape[1] == max(lengths[row] for row in session.order.batch(step))
        widths.add(batch.values["input_ids"].shape[1])
    assert any(width % 8 for width in widths)


def test_what_is_known_of_the_padding_changes_no_number(
    new_session: Callable[..., TrialSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [new_session("lora", kind)._train(4) for kind in ("encoder", "decoder")]
    monkeypatch.setattr(session_module, "padding_known", lambda full: nullcontext())
    with Waits() as waits:
        asked = [new_session("lora", kind)._train(4) for kind in ("encoder", "decoder")]
    assert known == asked
    assert waits.count >= 8, "transformers asks the device no more: padding_known can go"


def test_whether_a_batch_is_full_is_found_on_the_host() -> None:
    mask = torch.tensor([[1, 1], [1, 0]])
    assert load({"attention_mask": mask}, torch.device("cpu")).full is False
    assert load({"attention_mask": mask[:1]}, torch.device("cpu")).full is True
    assert load({"input_ids": mask}, torch.device("cpu")).full is None
    # A decoder without a mask of its own reads nothing padded but its encoder's texts.
    both = {"attention_mask": mask, "decoder_input_ids": mask}
    assert load(both, torch.device("cpu")).full is False
    assert load({**both, "decoder_attention_mask": mask}, torch.device("cpu")).full is None


def test_the_next_item_is_made_while_one_is_used() -> None:
    made: list[int] = []
    second = threading.Event()

    def make(item: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        made.append(item)
        if item == 1:
            second.set()
        return 10 * item

    items = in_thread(range(4), make)
    assert next(items) == 0
    assert second.wait(10)
    assert list(items) == [10, 20, 30]
    assert made == [0, 1, 2, 3]


def test_an_error_comes_with_the_item_that_it_is_about() -> None:
    def make(item: int) -> float:
        return 1 / (2 - item)

    items = in_thread(range(4), make)
    assert [next(items), next(items)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert list(in_thread([], make)) == []


def test_training_from_batches_made_ahead_gives_the_same_numbers(
    new_session: Callable[..., TrialSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Over the end of a pass, where the order of the next one is dealt in the thread.
    expected = new_session("lora")._train(12)
    monkeypatch.setattr(session_module, "ahead", lambda items, make, device: in_thread(items, make))
    assert new_session("lora")._train(12) == expected


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_evaluating_batches_made_ahead_gives_the_same_numbers(
    kind: str, new_session: Callable[..., TrialSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session("lora", kind)
    session._train(2)
    expected = evaluate(session.model, session.domain, "validation", 4)
    monkeypatch.setattr(evaluate_module, "ahead", lambda items, make, device: in_thread(items, make))
    found = evaluate(session.model, session.domain, "validation", 4)
    assert (found.loss, found.scores, found.predictions) == (expected.loss, expected.scores, expected.predictions)


def test_an_evaluation_that_is_ended_stops_making_batches(
    new_session: Callable[..., TrialSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session("lora")
    monkeypatch.setattr(evaluate_module, "ahead", lambda items, make, device: in_thread(items, make))

    def leave() -> None:
        raise LeavingError("now")

    with pytest.raises(LeavingError):
        evaluate(session.model, session.domain, "validation", 4, between=leave)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
    assert session.model.training
