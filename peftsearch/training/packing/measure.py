"""How many trials at once are worth it: measured on the device, with a trial that waits to be trained and its like."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from peftsearch.training.memory import out_of_memory
from peftsearch.training.packing.host import Host
from peftsearch.training.packing.pack import MemberError, Pack
from peftsearch.training.packing.parts import NotPackableError
from peftsearch.training.session import TrialSession

LARGEST = 64
"""Trials at once that are tried at most."""

_GAIN = 1.1
"""Twice as many trials must give so many times the examples per second, or the search for more ends."""

_SHARE_OF_MEMORY = 0.85
_WARM_UP, _TIMED = 2, 8
"""Steps per size: the first ones of every trial, so that all sizes compute the same texts."""


def measured_size(beside: Callable[[int], TrialSession], host: Host, device: torch.device) -> tuple[int, str]:
    """How many trials to train at once.

    Sizes are doubled for as long as throughput rises by `_GAIN` and memory holds twice as many. A pack computes with
    all its adapters padded to the largest, so what counts is the company that trials will have, not copies of one of
    them. Trials with more parameters or longer texts than these may find less room; then the crew lowers the number.

    Args:
        beside: Makes a session of a trial, by number: 0 is the one that waits, the others are such as may be beside it;
            where one of those cannot be in a pack, the one that waits is in its place once more. Nothing of them is
            kept.
        host: What they run on.
        device: Where.

    Returns:
        The size, and a sentence that says what was found.

    Raises:
        NotPackableError: Such trials cannot be trained together.
        MemberError: The trial that waits cannot be trained at all.
    """
    sessions: list[TrialSession] = []
    best, fastest, found = 1, 0.0, ""
    size = 1
    while size <= LARGEST:
        try:
            sessions += [beside(number) for number in range(len(sessions), size)]
            rate, resident, peak = _rate(sessions, host, device)
        except (MemberError, NotPackableError) as error:
            blamed = [place for place, session in enumerate(sessions) if place and session is error.session]
            if not blamed:
                raise
            sessions[blamed[0]] = beside(0)
            continue
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
            # Of twice as many the base is there once.
            if 2 * peak - resident > _SHARE_OF_MEMORY * total:
                return best, f"{found}; twice as many would not fit into memory"
        size *= 2
    return best, found


def _rate(sessions: list[TrialSession], host: Host, device: torch.device) -> tuple[float, int, int]:
    """Examples per second, and in bytes the memory that was taken before, and its peak (both 0 on a CPU)."""
    resident = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        resident = torch.cuda.memory_allocated(device)
    for session in sessions:
        session.step = 0
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
    return rate, resident, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
