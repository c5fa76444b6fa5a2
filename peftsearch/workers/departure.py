"""Notices that a worker is about to lose its machine: Ray's of a node that is drained, and SIGTERM."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable

_terminated: threading.Event | None = None


def departure() -> Callable[[], bool]:
    """For a worker's train loop: whether the worker has been told to leave. Cheap enough to be asked at every step."""
    terminated = _terminations()
    return lambda: terminated.is_set() or _drained()


def _drained() -> bool:
    """Whether Ray drains a node of this slot, as autoscalers do when a spot machine is reclaimed.

    `ray.train.get_preemption_info` says so too, but is a barrier of all workers by way of an actor, at every call; the
    workers of a slot agree among themselves. So what is asked here is what that function asks first.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
    except (
        ImportError,
        AttributeError,
        RuntimeError,
    ):  # another Ray: the worker dies, and its work is handed out again
        return False


def _terminations() -> threading.Event:
    """Set once this process was sent SIGTERM; from then on the signal alone does not end it.

    Ray ends a worker at SIGTERM as soon as its main thread runs Python code. Python lets only that thread set handlers,
    and the train loop runs in another one; faulthandler's can be set from any. It writes to a pipe.
    """
    global _terminated
    if _terminated is None:
        reading, writing = os.pipe()
        faulthandler.register(signal.SIGTERM, file=writing, all_threads=False, chain=False)
        noticed = _terminated = threading.Event()

        def wait() -> None:
            os.read(reading, 1)
            noticed.set()

        threading.Thread(target=wait, name="sigterm", daemon=True).start()
    return _terminated
