"""Batches on their way to the device, so that it never waits for the host, nor the host for it.

On a GPU the next step's batches are made by a thread while the host launches this step's kernels, in pinned memory,
from which they are copied without waiting. On the CPU both would only take time from the step: making a batch is about
two thousandths of it (tests/benchmarks/README.md, "Steps").

`transformers` asks the attention mask itself whether anything is padded, which on a GPU makes the host wait for all
that was launched before, at every forward pass. Here the host finds out before the batch leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from peftsearch.domains.tasks.base import Task

T = TypeVar("T")
R = TypeVar("R")

_MASK = "attention_mask"


@dataclass(frozen=True)
class Batch:
    """A batch on the device.

    Attributes:
        values: What `Task.collate` made.
        full: Whether nothing in it is padded; None where that is not known.
    """

    values: Mapping[str, Any]
    full: bool | None


def load(values: Mapping[str, Any], device: torch.device) -> Batch:
    """A batch that was made on the host, on its way to a device."""
    mask = values.get(_MASK)
    # A decoder with a mask of its own makes the answer ambiguous; without, only its encoder's texts are padded.
    known = isinstance(mask, torch.Tensor) and "decoder_attention_mask" not in values
    full = bool(mask.numpy().all()) if known else None  # type: ignore[union-attr]
    return Batch(to_device(values, device), full)


def padded_to(device: torch.device) -> int:
    """What number of tokens texts are padded to a multiple of, for `Task.collate`'s ``multiple_of``.

    Kernels of GPUs (tensor cores) want multiples of eight. On a CPU a token more is only more work: a fifth of
    a batch of short texts (tests/benchmarks/README.md, "Steps").
    """
    return 8 if device.type == "cuda" else 1


def collated(task: Task, rows: Mapping[str, Sequence[Any]], pad_token_id: int, device: torch.device) -> dict[str, Any]:
    """A batch of some rows of a tokenised split (`Task.collate`) on a device."""
    return to_device(task.collate(rows, pad_token_id, multiple_of=padded_to(device)), device)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {name: moved(value, device) for name, value in batch.items()}


def moved(value: Any, device: torch.device) -> Any:
    """What the host has made, on its way to a device, without waiting for it; other things than tensors as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    if device.type != "cuda":
        return value.to(device)
    # torch keeps pinned memory from being used again until the copy is done.
    return value.pin_memory().to(device, non_blocking=True)


def ahead(items: Iterable[T], make: Callable[[T], R], device: torch.device) -> Generator[R, None, None]:
    """What ``make`` makes of the items, in order; on a GPU always one item ahead, in a thread.

    Args:
        items: May be drawn from one further than is asked for.
        make: Must not draw random numbers of torch's.
        device: Where training computes.
    """
    if device.type != "cuda":
        yield from map(make, items)
        return
    # A thread's own device is the first one, on which pinning would open a context.
    yield from in_thread(items, make, lambda: None if device.index is None else torch.cuda.set_device(device))


def in_thread(
    items: Iterable[T], make: Callable[[T], R], begin: Callable[[], None] = lambda: None
) -> Generator[R, None, None]:
    """What ``make`` makes of the items, in order, the next one made in a thread while this one is used.

    An error comes with the item that it is about; whoever stops asking waits for at most one item. ``begin`` is called
    in the thread before anything else.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=begin) as thread:
        waiting: Future[R] | None = None
        for item in items:
            coming = thread.submit(make, item)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


@contextmanager
def padding_known(full: bool | None) -> Iterator[None]:
    """Within it, forward passes are told whether their batch is full, and do not ask the device.

    Soft tokens in front of a text are never padding, so the answer holds for masks that are wider for them.
    The functions that ask are private to `transformers` and have no argument for the answer; where another version has
    none of them, it goes on asking.
    """
    from transformers import masking_utils

    names = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
    asking = {name: getattr(masking_utils, name) for name in names if hasattr(masking_utils, name)}
    if full is None:
        yield
        return

    def told(function: Callable[..., bool]) -> Callable[..., bool]:
        def answer(padding_mask: torch.Tensor | None, *args: Any, **kwargs: Any) -> bool:
            if padding_mask is None or full:
                return bool(function(None, *args, **kwargs))
            return False

        return answer

    try:
        for name, function in asking.items():
            setattr(masking_utils, name, told(function))
        yield
    finally:
        for name, function in asking.items():
            setattr(masking_utils, name, function)
