"""Being told to stop: Ctrl-C, SIGTERM, and a terminal that is lost."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

TWICE_SECONDS = 2.0
"""So soon after another signal SIGTERM is the same wish, heard twice."""


def interrupt() -> None:
    """Raise KeyboardInterrupt."""
    raise KeyboardInterrupt


class StopRequest:
    """Set by the first Ctrl-C; a second one interrupts at once."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """Ask the study to stop."""
        self._event.set()


@contextlib.contextmanager
def stop_on_signals(
    request: StopRequest, told: Callable[[], None], at_once: Callable[[], None] = interrupt
) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into a request to stop, and a further SIGINT or SIGTERM into a call of `at_once`.

    A SIGTERM that follows another signal within `TWICE_SECONDS` is not a further one: ``timeout`` sends it to its
    command and then to the whole group, and schedulers to a step and then to its processes.

    Only possible in the main thread. SIGHUP stays ignored where it is, which is what ``nohup`` means.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = -math.inf

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        now = time.monotonic()
        if number == signal.SIGTERM and now - asked < TWICE_SECONDS:
            return
        asked = now
        if number == signal.SIGHUP:
            _leave_terminal()
        elif request():
            at_once()
        request.set()
        told()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: set by something that is not Python, which cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _leave_terminal() -> None:
    """Let standard output and error lead nowhere where they led to a terminal: writing to one that is gone fails, and
    would end the study in the middle of stopping."""
    for file in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(file).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, file)
                os.close(nowhere)
