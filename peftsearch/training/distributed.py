"""The worker group that trains one trial; one worker is a group of one, with the same code."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Literal, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from peftsearch.training.memory import describe
from peftsearch.training.sharding import clip_gradients, gather_in_half, is_part, shard_trial, whole

T = TypeVar("T")


_PATIENCE = timedelta(seconds=20)
"""How long a worker that failed waits for the others to fail at the same place; they are in step, so it is ample."""


_NOTICE_SECONDS = 30.0
"""How often workers that wait for the first one hear that it goes on."""


_KNOWN = "known to all workers"


class PeerError(RuntimeError):
    """Another worker of the group failed, and said why."""


class WorkerGroup:
    """Rank and size of this worker's group, and the few collectives that training needs.

    Args:
        rank: This worker's rank; rank 0 speaks for the group.
        size: Number of workers.
        device: Where this worker computes.
        strategy: ``ddp``: each worker holds the whole model; ``fsdp``: a part of it, see `sharding`.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: torch.device | None = None,
        strategy: Literal["ddp", "fsdp"] = "ddp",
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")
        self.place = ""
        """What this worker is doing; it names every stretch of work that has no collectives in it."""
        self._failures = 0
        self.mesh: DeviceMesh | None = None
        """The workers, where each holds a part of the base."""
        if strategy == "fsdp" and size > 1:
            # Not by init_device_mesh, which may choose another GPU for this process than Ray has.
            world = distributed.group.WORLD
            assert world is not None
            self.mesh = DeviceMesh.from_group(world, self.device.type)

    def wrap(self, model: nn.Module, half: bool = False) -> nn.Module:
        """The model as trained by the group: under DDP or FSDP2 where there are several workers.

        Every rank builds the trial from the same seed, so only the trained parameters are synchronised at the start
        (DDP itself would broadcast the frozen base for every trial).

        Args:
            model: A trial's model; its parameters may be others afterwards.
            half: Whether it is trained under bf16 autocast.
        """
        if self.size == 1:
            return model
        if self.mesh is not None:
            shard_trial(model, self.mesh, half)
        for parameter in model.parameters():
            if parameter.requires_grad and not is_part(parameter):
                distributed.broadcast(parameter.data, src=0)
        if self.mesh is not None:
            return model
        return DistributedDataParallel(model, init_sync=False, broadcast_buffers=False, find_unused_parameters=True)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that some ranks may fail at alone; then all do. Within it no rank may wait for another one.

        Raises:
            PeerError: It failed on another rank.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        found = [] if self.size == 1 else self.gather("" if error is None else describe(error))
        if error is not None:
            # A mark on the error itself: whoever kept the error would keep all that its trial had in memory.
            vars(error)[_KNOWN] = True
            raise error
        for rank, text in enumerate(found):
            if text:
                raise PeerError(f"worker {rank}: {text}")

    def told(self, error: Exception) -> bool:
        """Whether the other workers know of this worker's error, from `together`."""
        return self.size == 1 or _KNOWN in vars(error)

    def all_know(self, error: Exception) -> bool:
        """After a failure of this worker: whether none of the others waits for it in vain, so that the group can go on.

        They do not where it happened under `together`, or where all failed at the same place, as equal work does on
        equal workers. Where weights are in parts, forward and backward passes are full of collectives: never there.
        """
        if self.told(error):
            return True
        if self.sharded:
            return False
        store = distributed.distributed_c10d._get_default_store()
        self._failures += 1
        keys = [f"peftsearch/failure/{self._failures}/{rank}" for rank in range(self.size)]
        store.set(keys[self.rank], self.place)
        try:
            store.wait(keys, _PATIENCE)
        except RuntimeError:
            return False
        return all(store.get(key).decode() == self.place for key in keys)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Within it, gradients of a wrapped model stay on their rank: more of the batch is to come."""
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def prepare(self, model: nn.Module, half: bool) -> None:
        """Before the first of some forward passes: whether they run under bf16 autocast."""
        if self.mesh is not None:
            gather_in_half(model, half)

    def average_gradients(self, parameters: Collection[nn.Parameter]) -> None:
        """After the backward passes of a step: what DDP or FSDP2 have not averaged over the workers yet."""
        if self.mesh is None:
            return
        own = [parameter for parameter in parameters if not is_part(parameter)]
        if not own:
            return
        # What no example of this worker's reached has no gradient here, and may have one elsewhere.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
        flat = torch.cat([gradient.float().reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.size
        for parameter, averaged in zip(own, torch.split(flat, [p.numel() for p in own]), strict=True):
            parameter.grad = averaged.reshape(parameter.shape).to(parameter.dtype)

    def clip_gradients(self, parameters: Collection[nn.Parameter], max_norm: float) -> None:
        """Scale the gradients down to a norm where it is larger."""
        if self.mesh is None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        else:
            clip_gradients(parameters, max_norm)

    @property
    def sharded(self) -> bool:
        """Whether each forward pass gathers weights from all workers, so that they must make equally many."""
        return self.mesh is not None

    def collected(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors, on the CPU of rank 0 where they were in parts; the others get none."""
        if self.mesh is None:
            return dict(tensors)
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            # One at a time: no device has to hold the whole model.
            complete = whole(tensor)
            if self.rank == 0:
                found[name] = complete.cpu()
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def first_alone(self, work: Callable[[Callable[[], None]], None]) -> None:
        """Have rank 0 do something by itself, however long it takes, while the others wait for its end.

        The others are told now and then that it goes on: a collective that waits for longer than the process group's
        timeout ends the group.

        Args:
            work: Calls what it is given now and then.
        """
        if self.size == 1:
            work(lambda: None)
            return
        if self.rank != 0:
            while self.any(False):
                pass
            return
        told = time.monotonic()

        def goes_on() -> None:
            nonlocal told
            if time.monotonic() - told > _NOTICE_SECONDS:
                self.any(True)
                told = time.monotonic()

        try:
            work(goes_on)
        finally:
            self.any(False)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first worker's tensor, in place of the others'."""
        distributed.broadcast(tensor, src=0)
        return tensor

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
