"""What a slot's Ray Train workers run: take a segment, train it, answer; until told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import uuid
from dataclasses import replace
from typing import Any

from peftsearch.training.segment import Outcome, SegmentResult, WorkerPlan
from peftsearch.workers.dispatcher import Order

log = logging.getLogger(__name__)

_BEAT_SECONDS = 5.0


def slot_loop(config: dict[str, Any]) -> None:
    """The train loop of one slot, on each of its workers.

    Args:
        config: ``slot`` (its number), ``plan`` (`WorkerPlan`) and ``dispatcher`` (the actor's handle).
    """
    import ray
    import ray.train
    import ray.train.torch

    from peftsearch.training.distributed import WorkerGroup
    from peftsearch.training.worker import Worker

    plan: WorkerPlan = config["plan"]
    slot: int = config["slot"]
    dispatcher = config["dispatcher"]
    context = ray.train.get_context()
    group = WorkerGroup(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    leads = group.rank == 0
    incarnation = uuid.uuid4().hex
    me = f"slot {slot}, {socket.gethostname()}, process {os.getpid()}"
    if leads:
        ray.get(dispatcher.join.remote(slot, incarnation))
    worker = Worker(plan, group)
    try:
        worker.warm_up()
    except Exception as error:
        ray.get(
            dispatcher.unusable.remote(
                slot, incarnation, f"{me} cannot load model or data: {type(error).__name__}: {error}"
            )
        )
        return
    if not leads:
        _follow(worker, group)
        return
    ray.get(dispatcher.warm.remote(slot, incarnation, {"host": socket.gethostname(), "pid": os.getpid()}))
    with _heartbeat(dispatcher, slot, incarnation):
        while True:
            order: Order = ray.get(dispatcher.take.remote(slot, incarnation))
            group.from_first(order)
            if order.stop:
                return
            worker.forget(order.ended)
            if order.work is None:
                continue
            try:
                outcome: Outcome = worker.do(order.work)
            except Exception as error:
                ray.get(dispatcher.crashed.remote(slot, incarnation, order.lease, f"{type(error).__name__}: {error}"))
                raise
            if isinstance(outcome, SegmentResult):
                outcome = replace(outcome, worker=me)
            ray.get(dispatcher.finish.remote(slot, incarnation, order.lease, outcome))


def _follow(worker: Any, group: Any) -> None:
    """The other ranks do what rank 0 was handed."""
    while True:
        order: Order = group.from_first(None)
        if order.stop:
            return
        worker.forget(order.ended)
        if order.work is not None:
            worker.do(order.work)


@contextlib.contextmanager
def _heartbeat(dispatcher: Any, slot: int, incarnation: str) -> Any:
    """Tell the dispatcher that this slot lives, also while a long segment trains."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT_SECONDS):
            dispatcher.beat.remote(slot, incarnation)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
