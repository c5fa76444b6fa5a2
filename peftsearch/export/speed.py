"""How fast an exported model is on this machine: what one example takes, and how many it does a second in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peftsearch.domains.tasks.base import EXAMPLE, Prediction

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftsearch.domains import PreparedDomain

EXAMPLES = 50
"""Examples that latency is measured on at most, spread evenly over the split by length."""
SECONDS = 3.0
"""Time that each of the two measurements takes at most, once it has three readings."""
_FEWEST = 3


@dataclass(frozen=True)
class Speed:
    """What was measured; from tokenised text to predictions, without tokenisation.

    Attributes:
        latency_ms: Milliseconds for one example by itself: the median.
        latency_p95_ms: What 95 % of them stay below.
        examples_per_second: In batches, over the same examples' split.
        batch_size: Examples in such a batch.
        examples: How many examples latency was measured on.
        unit: What is meant by an example: a ``window`` where texts are cut into several, or put together.
        hardware: Name of the GPU or CPU.
        threads: CPU threads of PyTorch.
    """

    latency_ms: float
    latency_p95_ms: float
    examples_per_second: float
    batch_size: int
    examples: int
    hardware: str
    threads: int
    unit: str = "example"

    def sentence(self) -> str:
        """For a person who chooses by it."""
        threads = f", {self.threads} thread{'s' if self.threads != 1 else ''}" if "GPU" not in self.hardware else ""
        return (
            f"{self.latency_ms:.3g} ms for one {self.unit} by itself (median of {self.examples}; 95 % below "
            f"{self.latency_p95_ms:.3g} ms), {self.examples_per_second:,.3g} {self.unit}s a second in batches of "
            f"{self.batch_size}; {self.hardware}{threads}, without tokenisation"
        )

    def as_json(self) -> dict[str, Any]:
        """As it is written into files."""
        return asdict(self)


def measure_speed(model: nn.Module, domain: PreparedDomain, split: str, batch_size: int, device: torch.device) -> Speed:
    """Measure a loaded model on tokenised examples.

    Args:
        model: In evaluation mode, on ``device``.
        domain: Its data and task.
        split: Where the examples come from.
        batch_size: Of the throughput.
        device: ``cpu`` or ``cuda``.
    """
    import torch

    from peftsearch.training.batches import collated

    data, task = domain.split(split), domain.task
    order = np.argsort(domain.lengths(split), kind="stable")
    how = Prediction(domain.architecture, tokenizer=domain.tokenizer if task.decodes else None)

    def predict(rows: Sequence[int]) -> None:
        batch: Mapping[str, Any] = collated(task, data[list(rows)], domain.pad_token_id, device)
        seen = {name: value for name, value in batch.items() if name not in task.hidden}
        # What writes its answer needs no pass over the right one.
        output = None if task.decodes else model(**seen)
        task.predict(model, output, batch, how)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    spread = order[np.unique(np.linspace(0, len(order) - 1, min(EXAMPLES, len(order))).astype(int))]
    batches = [order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)]
    # Should time run out, what was timed is short and long texts alike.
    shuffled = np.random.default_rng(0)
    chosen = shuffled.permutation(spread).tolist()
    batches = [batches[number] for number in shuffled.permutation(len(batches))]
    with torch.no_grad():
        predict(chosen[:1])
        single = _timed(predict, [[row] for row in chosen])
        predict(batches[0])
        batched = _timed(predict, batches)
    done = sum(len(rows) for rows in batches[: len(batched)])
    return Speed(
        latency_ms=1000 * float(np.median(single)),
        latency_p95_ms=1000 * float(np.quantile(single, 0.95)),
        examples_per_second=done / sum(batched),
        batch_size=min(batch_size, len(order)),
        examples=len(single),
        hardware=_hardware(device),
        threads=torch.get_num_threads(),
        unit="window" if EXAMPLE in data.column_names else "example",
    )


def _timed(predict: Callable[[Sequence[int]], None], batches: Sequence[Sequence[int]]) -> list[float]:
    found: list[float] = []
    for rows in batches:
        begin = time.perf_counter()
        predict(rows)
        found.append(time.perf_counter() - begin)
        if len(found) >= _FEWEST and sum(found) > SECONDS:
            break
    return found


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        import torch

        return f"GPU {torch.cuda.get_device_name(device)}"
    from peftsearch.tracking.provenance import cpu_name

    return cpu_name()
