"""What a worker uses of its machine: processor, memory, GPU."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

_LEAST_SECONDS = 0.2


class UsageMeter:
    """Reads what this process uses, as MLflow names such numbers (its *System metrics* show them as they are called
    here, behind ``system/``); one megabyte is 10^6 bytes there.

    - ``cpu_utilization_percentage``: this process's share of the machine's processors since the reading before.
    - ``system_memory_usage_megabytes``, ``system_memory_usage_percentage``: of the whole machine.
    - ``process_memory_usage_megabytes``: resident memory of this process.
    - ``gpu_0_memory_usage_megabytes``, ``gpu_0_memory_usage_percentage``: of the whole GPU that this process computes
      on, whatever its number on the machine.
    - ``gpu_0_utilization_percentage``, where NVIDIA's library can be asked.

    One meter per process: trials that are trained together read it one right after the other, and then get the same
    share of the processors.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process = psutil.Process()
        self._since = time.monotonic()
        self._busy = self._seconds()
        self._share = 0.0

    def read(self, device: torch.device) -> dict[str, float]:
        """The numbers now, for a process that computes on this device; takes well under a millisecond."""
        if self._process.pid != os.getpid():
            # A fork of the process in which it was made.
            self._begin()
        now = time.monotonic()
        if now - self._since >= _LEAST_SECONDS:
            busy = self._seconds()
            self._share = 100 * (busy - self._busy) / (now - self._since) / (os.cpu_count() or 1)
            self._since, self._busy = now, busy
        memory = psutil.virtual_memory()
        found = {
            "cpu_utilization_percentage": self._share,
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "process_memory_usage_megabytes": self._process.memory_info().rss / 1e6,
        }
        if device.type == "cuda":
            found |= _gpu(device)
        return {name: round(value, 1) for name, value in found.items()}

    def _seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def _gpu(device: torch.device) -> dict[str, float]:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    found = {
        "gpu_0_memory_usage_megabytes": (total - free) / 1e6,
        "gpu_0_memory_usage_percentage": 100 * (total - free) / total,
    }
    # PyTorch asks through the package nvidia-ml-py, which need not be there and has errors of its own.
    with contextlib.suppress(Exception):
        found["gpu_0_utilization_percentage"] = float(torch.cuda.utilization(device))
    return found


def of_workers(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the workers of a group used, in order of rank: the first one's numbers under their own names, the others'
    behind ``worker_1/`` and so on, as MLflow has them of several nodes."""
    named = {f"worker_{rank}/{name}": value for rank, found in enumerate(readings) for name, value in found.items()}
    return {name.removeprefix("worker_0/"): value for name, value in named.items()}


METER = UsageMeter()
"""Of this process."""
