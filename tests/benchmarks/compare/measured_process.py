"""A contender in a process of its own: how long it took, and how much memory it and its children had at most."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SECONDS_BETWEEN_SAMPLES = 2.0
SAMPLES_BETWEEN_PSS = 10
"""Sampling takes time from what is measured; the proportional size takes the kernel a walk through page tables."""
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Measured:
    """One run of a contender.

    Attributes:
        began: When its process was started: seconds since 1970.
        ended: When it had ended.
        status: Exit status; negative where a signal ended it.
        peak_rss: Largest sum of resident sizes over its process tree, in bytes. Pages that processes share count for
            each of them.
        peak_pss: The same of proportional sizes: shared pages count once. None where the kernel does not tell.
        output: The end of what it wrote.
    """

    began: float
    ended: float
    status: int
    peak_rss: int
    peak_pss: int | None
    output: str


def measure(arguments: Sequence[str], *, kill_after: float, log: Path) -> Measured:
    """Run a Python script, and sample its process tree's memory.

    What the caller's environment says of threads is taken out of it: each contender sets its own.

    Args:
        arguments: Script and arguments.
        kill_after: Seconds after which it is killed, with all of its children.
        log: Where its output goes.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _THREAD_SETTINGS}
    # The model is a folder: nobody shall wait for an answer from the Hub.
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        began = time.time()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            status, peaks = _watch(process, began + kill_after)
        except BaseException:
            # Ctrl-C, above all: nobody watches it any more.
            for one in reversed(_tree(process.pid)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            raise
        ended = time.time()
    text = log.read_text(errors="replace")
    return Measured(began, ended, status, peaks.get("rss", 0), peaks.get("pss"), text[-3000:])


def _watch(process: subprocess.Popen[bytes], kill_at: float) -> tuple[int, dict[str, int]]:
    peaks: dict[str, int] = {}
    seen: set[psutil.Process] = set()
    samples = 0
    while True:
        tree = _tree(process.pid)
        seen.update(tree)
        for kind, value in memory_of(tree, proportional=samples % SAMPLES_BETWEEN_PSS == 0).items():
            peaks[kind] = max(peaks.get(kind, 0), value)
        samples += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(SECONDS_BETWEEN_SAMPLES)
            break
        if time.time() >= kill_at:
            process.kill()
            status = process.wait()
            break
    # What it has left behind would take the cores from the next contender. psutil knows a process by its start, too.
    left = [child for child in seen if child.pid != process.pid and child.is_running()]
    psutil.wait_procs(left, timeout=10.0)
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    return status, peaks


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(processes: Sequence[psutil.Process], *, proportional: bool) -> dict[str, int]:
    """Sums over some processes, in bytes: ``rss``, and ``pss`` where it is asked for and all of them may be read."""
    sizes: list[Mapping[str, int]] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            sizes.append((process.memory_full_info() if proportional else process.memory_info())._asdict())
    sums = {"rss": sum(size["rss"] for size in sizes)}
    if sizes and all("pss" in size for size in sizes):
        sums["pss"] = sum(size["pss"] for size in sizes)
    return sums


def hardware() -> dict[str, str | int]:
    """What the figures were taken on; ``bf16``: whether the processor multiplies bf16 itself."""
    import platform

    # Before torch is imported.
    load = round(os.getloadavg()[0], 2)

    import torch

    from peftsearch.training.precision import computes_bf16

    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "load_before": load,
        "bf16": computes_bf16(torch.device("cpu")),
    }


@contextlib.contextmanager
def scratch(keep: Path | None):  # type: ignore[no-untyped-def]
    """A folder for what the contenders write: a temporary one, or one to keep."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="compare-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
