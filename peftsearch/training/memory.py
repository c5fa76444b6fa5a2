"""Running out of memory: recognised on every device, and said in one sentence."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from peftsearch.spec import StudyError

_WANTED = re.compile(r"Tried to allocate ([\d.]+ \w+)")
_WANTED_BYTES = re.compile(r"you tried to allocate (\d+) bytes")
# What allocations say that are not torch's own: of the host, of a GPU's driver, and of its libraries.
_FAILED = (
    "DefaultCPUAllocator",
    "Cannot allocate memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
# What a study may be continued with (`peftsearch.spec.changes`), and what takes a new one.
_ADVICE = (
    "raise training.gradient_accumulation, write training.gradient_checkpointing: true or lower "
    "training.evaluation_batch_size, and the study goes on with that; in a new study a smaller training.batch_size (or "
    "tokens_per_batch) or training.max_length needs less too, and search.max_memory leaves such trials out"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, or on the CPU (in torch, or in Python itself)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FAILED)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: what a GPU has free and what torch holds in reserve of it, or main memory."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserve


def forget_peak() -> None:
    """From now on, `peak_resident` is counted anew, where the system can do that (Linux: man 5 proc, clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Bytes of main memory that this process has had at once since `forget_peak`; elsewhere than on Linux, has now."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def describe(error: BaseException) -> str:
    """An error as a trial's own: of failed allocations how much was wanted, and what to lower."""
    if not out_of_memory(error):
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return f"{_lacking(error)}; {_ADVICE}"


@contextlib.contextmanager
def within_memory(advice: str) -> Iterator[None]:
    """Around what somebody waits for and may not fit.

    Args:
        advice: What to do then.

    Raises:
        StudyError: An allocation failed.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise StudyError(f"{_lacking(error)}; {advice}") from None


def _lacking(error: BaseException) -> str:
    text = str(error)
    on_gpu = isinstance(error, torch.OutOfMemoryError) or any(words in text for words in ("CUDA", "CUBLAS", "CUDNN"))
    where = "GPU memory" if on_gpu else "memory"
    if found := _WANTED.search(text):
        wanted = f": {found[1]} more were wanted"
    elif found := _WANTED_BYTES.search(text):
        wanted = f": {int(found[1]) / 2**30:.2f} GiB more were wanted"
    else:
        wanted = ""
    return f"out of {where}{wanted}"
