"""How many trials at once are worth it: measured on the device, with a trial that waits to be trained and its like."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from peftsearch.training.memory import out_of_memory
from peftsearch.training.packing.host import Host
from peftsearch.training.packing.pack import Pack
from peftsearch.training.session import TrialSession

LARGEST = 64
"""Trials at once that are tried at most."""

_GAIN = 1.1
"""Twice as many trials must give so many times the examples per second, or the search for more ends."""

_SHARE_OF_MEMORY = 0.85
_WARM_UP, _TIMED = 2, 4
"""Steps per size."""


def measured_size(beside: Callable[[int], TrialSession], host: Host, device: torch.device) -> tuple[int, str]:
    """How many trials to train at once.

    Sizes are doubled for as long as throughput rises by `_GAIN` and memory holds twice as many. A pack computes with
    all its adapters padded to the largest, so what counts is the company that trials will have, not copies of one of
    them. Trials with more parameters or longer texts than these may find less room; then the crew lowers the number.

    Args:
        beside: Makes a session of a trial, by number: 0 is the one that waits, the others are such as may be beside it.
            Nothing of them is kept.
        host: What they run on.
        device: Where.

    Returns:
        The size, and a sentence that says what was found.

    Raises:
        NotPackableError: Such trials cannot be trained together.
    """
    sessions: list[TrialSession] = []
    best, fastest, found = 1, 0.0, ""
    size = 1
    while size <= LARGEST:
        try:
            sessions += [beside(number) for number in range(len(sessions), size)]
            rate, peak = _rate(sessions, host, device)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not out_of_memory(error):
                raise
            return best, f"{found}; {size} do not fit into memory"
        found += f"{', ' if found else ''}{size}: {rate:.0f} examples/s"
        if rate < _GAIN * fastest:
            return best, f"{found}; more are not faster"
        best, fastest = size, rate
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            if 2 * peak > _SHARE_OF_MEMORY * total:
                return best, f"{found}; twice as many would not fit into memory"
        size *= 2
    return best, found


def _rate(sessions: list[TrialSession], host: Host, device: torch.device) -> tuple[float, int]:
    """Examples per second, and the peak of memory in bytes (0 on a CPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    pack = Pack(sessions, host)
    try:
        for _ in range(_WARM_UP):
            pack.step()
        _wait(device)
        began, before = time.perf_counter(), sum(pack.examples)
        for _ in range(_TIMED):
            pack.step()
        _wait(device)
        rate = (sum(pack.examples) - before) / (time.perf_counter() - began)
    finally:
        pack.close()
    return rate, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
