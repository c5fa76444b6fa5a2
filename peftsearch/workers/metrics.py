"""What a running study tells Prometheus, by way of Ray: every metric, and who sets it.

Ray collects the metrics of a node's processes once per interval (``RAY_metrics_report_interval_ms``, 10 seconds) and
serves them on the node's metrics port; `dashboards/README.md` says how Prometheus finds it. There, Ray puts ``ray_``
before each name, and ``_total`` behind that of a counter.

Where Ray exports nothing (``RAY_enable_metrics_collection=0``, or Ray without its extra ``default``), nothing is
measured. See https://docs.ray.io/en/latest/ray-observability/user-guides/add-app-metrics.html
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peftsearch.training.segment import Failure, HandedBack, Outcome, Segment, SegmentResult, SetAside, Work

TICK_SECONDS = 2.0
"""How often what has a value at any moment (a queue's length, memory) is looked at."""

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: As Ray is told it.
        kind: Prometheus's word for it.
        help: What it says, in a line; its unit is in the name.
        labels: Beside ``study``, which all have.
        buckets: Upper bounds, of a histogram. Ray keeps its buckets alone: its sum is that of their middles.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """The names of its series in Prometheus."""
        name = f"ray_{self.name}"
        if self.kind == "histogram":
            return (f"{name}_bucket", f"{name}_count", f"{name}_sum")
        return (f"{name}_total",) if self.kind == "counter" else (name,)


# Of the driver.
TRIALS = Metric(
    "peftsearch_trials",
    "gauge",
    "Trials of the study, by state (running, complete, pruned, failed)",
    ("domain", "method", "state"),
)
PLANNED = Metric("peftsearch_planned_trials", "gauge", "Trials that the study will have in all")
BEST = Metric(
    "peftsearch_best_metric_value",
    "gauge",
    "The best trial's metric on validation, at the full budget; in the metric's own unit",
    ("domain", "metric"),
)
METHOD_BEST = Metric(
    "peftsearch_method_best_metric_value",
    "gauge",
    "The same for each method",
    ("domain", "method", "metric"),
)
HYPERVOLUME = Metric(
    "peftsearch_hypervolume_ratio",
    "gauge",
    "The share of the unit square that a domain's front dominates",
    ("domain",),
)
FRONT = Metric("peftsearch_front_trials", "gauge", "Trials on a domain's front", ("domain",))
BACKLOG = Metric("peftsearch_mlflow_backlog_entries", "gauge", "Trials and domain pages that MLflow does not have yet")

# Of the dispatcher.
QUEUE = Metric("peftsearch_queue_segments", "gauge", "Segments that wait for a slot")
WAIT = Metric(
    "peftsearch_queue_wait_seconds", "histogram", "How long segments have waited for a slot", buckets=_SECONDS
)
SLOTS = Metric("peftsearch_slots", "gauge", "Slots, by state (busy, idle, starting, unusable)", ("state",))
BUSY = Metric("peftsearch_slot_busy_seconds", "counter", "Time in which a slot had work", ("slot",))
IN_HAND = Metric(
    "peftsearch_slot_trials",
    "gauge",
    "Pieces of work that a slot has in hand: trials that it trains at once, or one probe",
    ("slot",),
)
RETRIES = Metric(
    "peftsearch_retries", "counter", "Segments that were handed out again, by what became of the slot", ("reason",)
)

# Of the slots.
SEGMENTS = Metric(
    "peftsearch_segments",
    "counter",
    "Segments that a slot has answered, by outcome (done, failed, set aside, handed back)",
    ("slot", "domain", "method", "outcome"),
)
SEGMENT_SECONDS = Metric(
    "peftsearch_segment_seconds",
    "histogram",
    "A segment's time, by part (training, evaluation); of steps that trials share, each has its share",
    ("domain", "method", "part"),
    _SECONDS,
)
PACK = Metric(
    "peftsearch_pack_trials",
    "histogram",
    "How many trials shared a segment's steps, on average",
    ("slot",),
    (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0),
)
MEMORY = Metric("peftsearch_slot_memory_bytes", "gauge", "Resident memory of a slot's worker", ("slot", "rank"))
GPU_MEMORY = Metric(
    "peftsearch_slot_gpu_memory_bytes",
    "gauge",
    "Memory of a slot's GPU, by kind (allocated: tensors, reserved: PyTorch's, total: the device's)",
    ("slot", "rank", "kind"),
)

METRICS = (
    TRIALS,
    PLANNED,
    BEST,
    METHOD_BEST,
    HYPERVOLUME,
    FRONT,
    BACKLOG,
    QUEUE,
    WAIT,
    SLOTS,
    BUSY,
    IN_HAND,
    RETRIES,
    SEGMENTS,
    SEGMENT_SECONDS,
    PACK,
    MEMORY,
    GPU_MEMORY,
)


def metrics_targets() -> list[str]:
    """``HOST:PORT`` of every live node of the cluster that serves metrics; none where Ray's export is off."""
    import ray

    found = ((node["NodeManagerAddress"], node.get("MetricsExportPort", 0)) for node in ray.nodes() if node["Alive"])
    return sorted(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in found if port > 0)


class Meter:
    """Tells Ray the values of metrics; Ray hands them on in a thread of its own.

    Labels are names of a study file and words of this module. Ray 2.60 raises UnicodeEncodeError where one is not
    ASCII, so that what is not is told as ``\\xfc`` or ``\\U0001fa7a``.

    Args:
        study: Label of everything that is told; None where nothing is to be told.
    """

    def __init__(self, study: str | None = None) -> None:
        self._study = study
        self._instruments: dict[str, Any] = {}
        if study is None:
            return
        from ray.util import metrics

        for metric in METRICS:
            keys = ("study", *metric.labels)
            if metric.kind == "histogram":
                made = metrics.Histogram(metric.name, metric.help, list(metric.buckets), keys)
            else:
                made = (metrics.Counter if metric.kind == "counter" else metrics.Gauge)(metric.name, metric.help, keys)
            self._instruments[metric.name] = made.set_default_tags(_plain({"study": study}))

    @property
    def on(self) -> bool:
        """Whether anybody is told."""
        return self._study is not None

    def count(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        if self.on and amount > 0:
            self._instruments[metric.name].inc(amount, _plain(labels))

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add an observation to a histogram."""
        if self.on:
            self._instruments[metric.name].observe(value, _plain(labels))

    def show(self, metric: Metric, values: Mapping[tuple[str, ...], float]) -> None:
        """Set series of a gauge. Ray drops a series that is not set again within two of its intervals (ran, 2.60.0): to
        be called every few seconds, also where nothing has changed.

        Args:
            metric: The gauge.
            values: By the values of its labels, in their order.
        """
        if self.on:
            for key, value in values.items():
                labels = dict(zip(metric.labels, key, strict=True))
                self._instruments[metric.name].set(value, _plain(labels))


def _plain(labels: Mapping[str, str]) -> dict[str, str]:
    return {name: value.encode("ascii", "backslashreplace").decode() for name, value in labels.items()}


class DispatcherMeter:
    """What the dispatcher knows: the queue, who works, and what was handed out again."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._last = time.monotonic()

    @property
    def on(self) -> bool:
        """Whether anybody is told."""
        return self._meter.on

    def waited(self, seconds: float) -> None:
        """A segment was handed out after so long."""
        self._meter.observe(WAIT, seconds)

    def retried(self, reason: str) -> None:
        """Work was handed out again, or was so often that its trial has failed."""
        self._meter.count(RETRIES, reason=reason)

    def look(self, queued: int, unusable: int, slots: Mapping[int, tuple[bool, int]]) -> None:
        """Every few seconds.

        Args:
            queued: Pieces of work that wait.
            unusable: Slots that could not be made warm.
            slots: By number: whether it is warm, and how much work it has in hand.
        """
        now = time.monotonic()
        passed, self._last = now - self._last, now
        states = Counter("busy" if held else "idle" if ready else "starting" for ready, held in slots.values())
        self._meter.show(QUEUE, {(): float(queued)})
        self._meter.show(
            SLOTS,
            {
                **{(state,): float(states[state]) for state in ("busy", "idle", "starting")},
                ("unusable",): float(unusable),
            },
        )
        self._meter.show(IN_HAND, {(str(number),): float(held) for number, (_, held) in slots.items()})
        for number, (_, held) in slots.items():
            if held:
                self._meter.count(BUSY, passed, slot=str(number))


class SlotMeter:
    """What a slot's workers know: what they have answered, and their memory.

    Args:
        meter: Where to.
        slot: The slot's number.
        rank: This worker's.
    """

    def __init__(self, meter: Meter, slot: int, rank: int = 0) -> None:
        self._meter = meter
        self._slot = str(slot)
        self._rank = str(rank)

    def answered(self, work: Work, outcome: Outcome) -> None:
        """A piece of work is off this slot's hands."""
        if not (self._meter.on and isinstance(work, Segment)):
            return
        domain, method = work.trial.domain, work.trial.method
        self._meter.count(SEGMENTS, slot=self._slot, domain=domain, method=method, outcome=_OUTCOMES[type(outcome)])
        if isinstance(outcome, SegmentResult):
            for part, seconds in (("training", outcome.train_seconds), ("evaluation", outcome.evaluation_seconds)):
                self._meter.observe(SEGMENT_SECONDS, seconds, domain=domain, method=method, part=part)
            self._meter.observe(PACK, outcome.together, slot=self._slot)

    @contextlib.contextmanager
    def watching(self, gpu: Any | None) -> Iterator[None]:
        """Within the block, look at this worker's memory every few seconds.

        Args:
            gpu: Its device (``torch.device``); None without a GPU.
        """

        def look() -> None:
            self._meter.show(MEMORY, {(self._slot, self._rank): float(process.memory_info().rss)})
            if gpu is not None:
                found = {
                    "allocated": torch.cuda.memory_allocated(gpu),
                    "reserved": torch.cuda.memory_reserved(gpu),
                    "total": torch.cuda.get_device_properties(gpu).total_memory,
                }
                self._meter.show(
                    GPU_MEMORY, {(self._slot, self._rank, kind): float(value) for kind, value in found.items()}
                )

        if not self._meter.on:
            yield
            return
        import psutil
        import torch

        process = psutil.Process()
        with regularly(look, "metrics"):
            yield


_OUTCOMES: Mapping[type, str] = {
    SegmentResult: "done",
    Failure: "failed",
    SetAside: "set aside",
    HandedBack: "handed back",
}


@contextlib.contextmanager
def regularly(look: Callable[[], None], name: str, seconds: float = TICK_SECONDS) -> Iterator[None]:
    """Within the block, call a function every so many seconds, from a thread of its own."""
    done = threading.Event()

    def watch() -> None:
        look()
        while not done.wait(seconds):
            look()

    threading.Thread(target=watch, name=name, daemon=True).start()
    try:
        yield
    finally:
        done.set()
