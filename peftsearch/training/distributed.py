"""The worker group that trains one trial; one worker is a group of one, with the same code."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class WorkerGroup:
    """Rank and size of this worker's group, and the few collectives that training needs.

    Args:
        rank: This worker's rank; rank 0 speaks for the group.
        size: Number of workers.
        device: Where this worker computes.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as trained by the group: under DDP where there are several workers.

        Every rank builds the trial from the same seed, so only the trained parameters are synchronised at the start
        (DDP itself would broadcast the frozen base for every trial).
        """
        if self.size == 1:
            return model
        for parameter in model.parameters():
            if parameter.requires_grad:
                distributed.broadcast(parameter.data, src=0)
        return DistributedDataParallel(model, init_sync=False, broadcast_buffers=False, find_unused_parameters=True)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Within it, gradients of a wrapped model stay on their rank: more of the batch is to come."""
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def from_first(self, value: T | None) -> T | None:
        """The value that rank 0 holds, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self._object_device())
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        box: list[T | None] = [None] * self.size
        distributed.all_gather_object(box, value)
        return [item for item in box if item is not None]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def _object_device(self) -> torch.device | None:
        return self.device if self.device.type == "cuda" else None
