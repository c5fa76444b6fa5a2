"""Whether a study slows down as trials pile up, and whether the driver keeps many slots busy.

    python tests/benchmarks/scale.py [--trials 10000] [--slots 1] [--segment-seconds 0] [--json FILE]
    python tests/benchmarks/scale.py --trials 1500 --slots 64 --segment-seconds 1

Everything is the project's own and real (Ray Tune with its trial actors, the dispatcher, Optuna's TPE, front-aware
ASHA, the ledger in SQLite, MLflow in SQLite) but the training: a slot answers a segment after so many seconds with
scores from a formula. Two domains with three methods each, four evaluations.

By tenths of the trials: the driver's overhead per trial (wall time, with what the slots spent "training" left out, and
the driver's own CPU time, which a busy machine does not change), its resident memory, how many trials MLflow was
behind, and how many Tune still held. Then how much of the slots' time was spent training, the first and last tenth of
it left out.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METHODS = ("lora", "adapter", "prompt")
DOMAINS = ("clinical", "legal")
MODEL = "simulated"
EVALUATIONS = 4
STEPS = 40
TOTAL_PARAMETERS = 22_000_000


def parameters(method: str, hyperparameters: Mapping[str, Any]) -> int:
    """Trainable parameters, about as MiniLM would have them."""
    if method == "lora":
        return 4600 * int(hyperparameters.get("rank", 8))
    if method == "adapter":
        return 9300 * int(hyperparameters.get("bottleneck", 32))
    return 384 * int(hyperparameters.get("tokens", 20))


def score(number: int, method: str, hyperparameters: Mapping[str, Any], done: float) -> float:
    """A made-up learning curve: more parameters help, a learning rate off the best one hurts, seeds differ.

    Args:
        number: Of the trial; its noise.
        method: Its method.
        hyperparameters: Its configuration.
        done: Share of the full budget.
    """
    size = math.log10(parameters(method, hyperparameters)) / math.log10(TOTAL_PARAMETERS)
    rate = math.log10(float(hyperparameters.get("learning_rate", 1e-3)))
    best = {"lora": -3.0, "adapter": -3.3, "prompt": -1.8}[method]
    top = 0.35 + 0.6 * size - 0.08 * (rate - best) ** 2 + random.Random(number).gauss(0, 0.01)
    return min(0.99, max(0.05, top * (1 - math.exp(-4 * done))))


class SimulatedSlots:
    """So many slots in one process, each with a dispatcher's segment at a time; an asynchronous Ray actor."""

    def __init__(self, dispatcher: Any, slots: int, seconds: float) -> None:
        self._dispatcher = dispatcher
        self._seconds = seconds
        self._spans: list[tuple[float, float]] = []
        self._tasks = [asyncio.ensure_future(self._slot(number)) for number in range(slots)]

    async def spans(self) -> list[tuple[float, float]]:
        """When each segment was begun and ended; call it after the dispatcher was told to stop."""
        await asyncio.gather(*self._tasks)
        return self._spans

    async def _slot(self, slot: int) -> None:
        from peftsearch.training.segment import Probe, ProbeResult, SegmentResult

        ask, me = self._dispatcher, (slot, f"simulated-{slot}")
        await ask.join.remote(*me)
        await ask.warm.remote(*me, {})
        while True:
            order = await ask.take.remote(*me)
            if order.stop:
                return
            if order.lease is None:
                continue
            began = time.monotonic()
            work = order.work
            if isinstance(work, Probe):
                await ask.finish.remote(*me, order.lease, ProbeResult(), work)
                continue
            if self._seconds:
                await asyncio.sleep(self._seconds)
            trial, done = work.trial, work.to_step / STEPS
            value = score(trial.number, trial.method, trial.hyperparameters, done)
            result = SegmentResult(work.to_step, 1 - value, 1 - value, {"accuracy": value}, self._seconds, 0.0, 10**8)
            self._spans.append((began, time.monotonic()))
            await ask.finish.remote(*me, order.lease, result, work)


@dataclass
class Tenth:
    """One tenth of the trials.

    Attributes:
        trials: Trials that had ended.
        segments: That were trained in this tenth.
        overhead_ms: Wall time per trial, without training.
        cpu_ms: The driver's CPU time per trial.
        memory_mb: The driver's resident memory.
        behind: Trials that MLflow had not seen.
        tune: Trials that Ray Tune held in memory.
    """

    trials: int
    segments: int
    overhead_ms: float
    cpu_ms: float
    memory_mb: int
    behind: int
    tune: int


class Clock:
    """Takes the time at every tenth; an observer of the study."""

    def __init__(self, trials: int, slots: int, seconds: float, tracker: Any) -> None:
        import psutil

        self.tenths: list[Tenth] = []
        self._marks = [round(trials * (tenth + 1) / 10) for tenth in range(10)]
        self._slots, self._seconds, self._tracker = slots, seconds, tracker
        self._process = psutil.Process()
        self._ended = self._segments = 0
        self._last: tuple[int, int, float, float] | None = None

    def trial_changed(self, record: Any) -> None:
        """See `peftsearch.search.run.Observer`."""
        from peftsearch.spec import TrialState

        if self._last is None:
            self._last = (0, 0, time.monotonic(), time.process_time())
        self._segments += bool(record.rungs)
        if record.state is TrialState.RUNNING:
            return
        self._ended += 1
        if self._ended == self._marks[len(self.tenths)]:
            now = (self._ended, self._segments, time.monotonic(), time.process_time())
            trials, segments, wall, cpu = (after - before for after, before in zip(now, self._last, strict=True))
            training = segments * self._seconds / self._slots
            self.tenths.append(
                Tenth(
                    self._ended,
                    int(segments),
                    1000 * max(0.0, wall - training) / trials,
                    1000 * cpu / trials,
                    self._process.memory_info().rss >> 20,
                    self._tracker.backlog,
                    _tune_trials(),
                )
            )
            self._last = now


def _tune_trials() -> int:
    from ray.tune.experiment import Trial

    return sum(type(item) is Trial for item in gc.get_objects())


def utilisation(spans: list[tuple[float, float]], slots: int) -> float:
    """Share of the slots' time in which they trained, between a tenth and nine tenths of the whole."""
    begin, end = min(began for began, _ in spans), max(ended for _, ended in spans)
    left, right = begin + 0.1 * (end - begin), begin + 0.9 * (end - begin)
    busy = sum(max(0.0, min(ended, right) - max(began, left)) for began, ended in spans)
    return busy / (slots * max(right - left, 1e-9))


def run(folder: Path, trials: int, slots: int, seconds: float, scheduler: str) -> dict[str, Any]:
    """Run the simulated study; returns the figures."""
    import ray

    from peftsearch.driver import ray_cluster
    from peftsearch.methods import method_space
    from peftsearch.search.cells import Cell
    from peftsearch.search.counts import ParameterCount
    from peftsearch.search.run import DomainSearch, StudyRun
    from peftsearch.search.tune import run_trials
    from peftsearch.spec import DomainFacts, ModelFacts, SearchSpec, StudyFacts, TrialState
    from peftsearch.tracking import Ledger, LedgerCell
    from peftsearch.tracking.mlflow_tracker import MlflowTracker, default_artifacts, default_tracking_uri
    from peftsearch.training.budget import Budget
    from peftsearch.workers.dispatcher import Dispatcher

    cells = [Cell(MODEL, domain, method_space(method, {})) for domain in DOMAINS for method in METHODS]
    budget = Budget(STEPS // EVALUATIONS, tuple(STEPS * (place + 1) // EVALUATIONS for place in range(EVALUATIONS)))
    domains = {name: DomainSearch("accuracy", "maximize", dict.fromkeys(METHODS, budget)) for name in DOMAINS}
    share = max(1, round(trials / len(cells)))
    facts = StudyFacts(
        study="scale",
        trials_per_cell=share,
        methods=METHODS,
        domains={
            name: DomainFacts(
                task="classification",
                metric="accuracy",
                direction="maximize",
                labels=("a", "b"),
                rows={"train": 1000, "validation": 500},
                max_length=64,
                fingerprint="none",
                source="simulated",
            )
            for name in DOMAINS
        },
        models={
            MODEL: ModelFacts(
                location="nowhere", architecture="Formula", total_parameters=TOTAL_PARAMETERS, fingerprint="none"
            )
        },
        provenance={},
    )

    def count(cell: Cell, hyperparameters: Mapping[str, Any]) -> ParameterCount:
        return ParameterCount(*[parameters(cell.method, hyperparameters)] * 2)

    ledger = Ledger(
        f"sqlite:///{folder / 'ledger.db'}",
        "scale",
        [LedgerCell(cell.key, cell.model, cell.domain, cell.method, "accuracy", "maximize") for cell in cells],
    )
    tracker = MlflowTracker(default_tracking_uri(folder), default_artifacts(folder), facts, ledger.set_run_id)
    clock = Clock(share * len(cells), slots, seconds, tracker)

    class ToMlflow:
        def trial_changed(self, record: Any) -> None:
            tracker.update(record)

    search = SearchSpec(trials=share, scheduler=scheduler)  # type: ignore[arg-type]
    study = StudyRun(search, cells, domains, count, ledger, [clock, ToMlflow()])
    with ray_cluster(None):
        dispatcher = ray.remote(Dispatcher).options(num_cpus=0, max_concurrency=10_000).remote(2)
        simulated = (
            ray.remote(SimulatedSlots).options(num_cpus=0, max_concurrency=10).remote(dispatcher, slots, seconds)
        )
        ray.get(dispatcher.wait_ready.remote())
        began = time.monotonic()
        run_trials(study, dispatcher, lambda: slots, lambda: False, folder)
        wall = time.monotonic() - began
        ray.get(dispatcher.stop.remote())
        spans = ray.get(simulated.spans.remote())
    began = time.monotonic()
    behind = tracker.backlog
    written = tracker.close(timeout=3600)
    states = [record.state for record in ledger.records]
    ledger.close()
    assert len(clock.tenths) == 10
    first, last = clock.tenths[0], clock.tenths[-1]
    return {
        "trials": len(states),
        "complete": states.count(TrialState.COMPLETE),
        "pruned": states.count(TrialState.PRUNED),
        "failed": states.count(TrialState.FAILED),
        "segments": len(spans),
        "slots": slots,
        "segment_seconds": seconds,
        "wall_seconds": round(wall, 1),
        "tenths": [{name: round(value, 1) for name, value in asdict(tenth).items()} for tenth in clock.tenths],
        "overhead_last_over_first": round(last.overhead_ms / max(first.overhead_ms, 1e-9), 3),
        "cpu_last_over_first": round(last.cpu_ms / first.cpu_ms, 3),
        "memory_kb_per_trial": round(1024 * (last.memory_mb - first.memory_mb) / (last.trials - first.trials), 1),
        "utilisation": round(utilisation(spans, slots), 3),
        "mlflow_behind_at_the_end": behind,
        "mlflow_seconds_after_the_end": round(time.monotonic() - began, 1),
        "mlflow_complete": written,
        "cpus": os.cpu_count(),
    }


def main() -> None:
    """Run the benchmark."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000, help="over six cells")
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--segment-seconds", type=float, default=0.0, help="how long a slot pretends to train")
    parser.add_argument("--scheduler", default="pareto_asha", choices=("pareto_asha", "asha", "none"))
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), options.trials, options.slots, options.segment_seconds, options.scheduler)
    print("  trials  segments  overhead ms  driver CPU ms  memory MB  MLflow behind  in Tune")
    for tenth in figures["tenths"]:
        print(
            f"{tenth['trials']:>8}{tenth['segments']:>10}{tenth['overhead_ms']:>13.1f}{tenth['cpu_ms']:>15.1f}"
            f"{tenth['memory_mb']:>11}{tenth['behind']:>15}{tenth['tune']:>9}"
        )
    for name, value in figures.items():
        if name != "tenths":
            print(f"{name:>30}  {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
