"""Running a study: Ray, slots, search, observers; started in order, and taken down whatever happens."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from peftsearch.events import StudyEvents
from peftsearch.frontier.front import finalists
from peftsearch.search.cells import Cell
from peftsearch.search.confirmation import Confirmations
from peftsearch.search.counts import ParameterCount
from peftsearch.search.estimate import Format, TrialCosts, measured_speeds, number_formats
from peftsearch.search.plan import StudyPlan
from peftsearch.search.run import Observer, StudyRun, TrialCost
from peftsearch.spec import THREADS, Baseline, StudyFacts
from peftsearch.tracking import Ledger
from peftsearch.training.segment import Segment
from peftsearch.workers import SlotPlan, SlotPool, quiet_ray_environment

log = logging.getLogger(__name__)


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
def stop_on_signals(request: StopRequest, told: Callable[[], None]) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a request to stop; only possible in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if request():
            raise KeyboardInterrupt
        request.set()
        told()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ray_cluster(address: str | None) -> Iterator[list[dict[str, float]]]:
    """Connect to a Ray cluster, or start one on this machine; yields the resources of its nodes.

    Args:
        address: A cluster's address; None starts a cluster of this machine's cores that ends with the study.
    """
    quiet_ray_environment()
    import ray

    started = not ray.is_initialized()
    if started:
        local = address in (None, "local")
        ray.init(
            # "local" and not None: a stale address file would otherwise have us join somebody else's cluster.
            address="local" if local else address,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        if started:
            ray.shutdown()


def run_study(
    plan: StudyPlan,
    ledger: Ledger,
    facts: StudyFacts,
    folder: Path,
    address: str | None,
    events: StudyEvents,
    observers: Sequence[Observer],
    save_facts: Callable[[StudyFacts], None],
    stopped: StopRequest,
    guesses: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Run the remaining trials of a study, and then confirm its finalists.

    Args:
        plan: The checked study.
        ledger: Its ledger.
        facts: What is known beside the trials; baselines are added as they are found.
        folder: The study's folder.
        address: Ray cluster to use, or None for this machine.
        events: The progress display.
        observers: Further observers of trials.
        save_facts: Called when facts have been added.
        stopped: Whether somebody asked to stop.
        guesses: By method, configurations of another study to try first.

    Raises:
        StudyError: The cluster cannot hold a slot.
        RuntimeError: No worker could be started.
    """
    spec = plan.spec
    listeners = [events, *observers]
    costs = _Costs(plan)
    run = StudyRun(
        spec.search,
        [item.cell for item in plan.cells],
        plan.searches(),
        plan.count,
        ledger,
        listeners,
        cost=costs,
        guesses=guesses,
    )

    def confirmations() -> Confirmations:
        seeds = range(spec.search.seed + 1, spec.search.seed + 1 + spec.confirm.seeds)
        chosen = finalists(ledger.records, facts, spec.confirm)
        return Confirmations(chosen, seeds, run.domains, ledger, folder, listeners, events.warning)

    if run.finished() and confirmations().finished and not _missing_baselines(plan, facts):
        events.planned(run)
        return
    if stopped():
        return
    if not run.finished():
        costs.measure()
    events.phase("starting Ray")
    with ray_cluster(address) as nodes:
        slots = SlotPlan.fit(spec.resources, nodes)
        costs.slot(slots)
        workers = plan.for_workers(folder, slots.cpus)
        # Another number of threads adds numbers in another order: exports are verified with this one.
        facts.provenance[THREADS] = str(slots.cpus)
        save_facts(facts)
        pool = SlotPool(workers, slots, spec.resources.max_retries, folder / "ray")
        events.phase(f"warming up {slots.slots} slot{'s' if slots.slots > 1 else ''}")
        pool.start()
        try:
            from peftsearch.search.tune import run_trials

            pool.wait_ready(stopped)

            def over() -> bool:
                return stopped() or pool.lost()

            probes = _start_probes(pool, plan, facts, save_facts, events)
            events.planned(run)
            run_trials(run, pool.dispatcher, slots.slots, over)
            if spec.confirm.seeds and not over():
                _confirm(confirmations(), pool, slots.slots, over, events)
            while probes.is_alive() and not over():
                probes.join(0.2)
            if pool.lost() and not stopped():
                raise RuntimeError(pool.why_lost())
        finally:
            # An interrupted segment is not waited for: it is trained again from its checkpoint.
            pool.stop(timeout=5.0 if stopped() else 30.0)


class _Costs:
    """`TrialCosts` for the slots of this run. How fast they are is measured on the driver's machine, before the workers
    take its cores; without that measurement, time is not estimated."""

    def __init__(self, plan: StudyPlan) -> None:
        self._plan = plan
        self._costs = TrialCosts(plan)
        self._speeds: dict[Format, float] | None = None

    def measure(self) -> None:
        """Take about 0.2 s to see how fast this machine is."""
        formats = number_formats(self._plan.spec)
        if not self._plan.spec.resources.gpus_per_worker:
            self._speeds = measured_speeds(formats, on_gpu=False)
            return
        # A process that has touched a GPU keeps some of its memory, which the workers need: another one does it.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                self._speeds = process.submit(measured_speeds, formats, True).result()
            except Exception as error:  # the GPU's driver, the machine's limits: only an estimate is missing then
                log.warning("the speed of this machine's GPU could not be measured: %s", error)

    def slot(self, slots: SlotPlan) -> None:
        """From now on, say how long a trial takes on one of these slots."""
        import torch

        if self._speeds is not None:
            share = slots.workers * (1 if slots.gpus else slots.cpus / torch.get_num_threads())
            self._costs = TrialCosts(self._plan, {name: speed * share for name, speed in self._speeds.items()})

    def __call__(self, cell: Cell, hyperparameters: Mapping[str, Any], count: ParameterCount) -> TrialCost:
        return self._costs(cell, hyperparameters, count)


def _confirm(
    confirmations: Confirmations, pool: SlotPool, concurrency: int, over: Callable[[], bool], events: StudyEvents
) -> None:
    """Train the finalists again, as many at once as there are slots; the same slots that ran the trials."""
    import ray

    def tell() -> None:
        events.confirmations(confirmations.done, confirmations.failed, confirmations.planned)

    def submit(segment: Segment) -> None:
        pending[pool.dispatcher.submit.remote(segment)] = segment

    if confirmations.finished:
        return
    events.phase("confirming the finalists with further seeds")
    tell()
    pending: dict[Any, Segment] = {}
    while not over():
        while len(pending) < concurrency and (first := confirmations.next()) is not None:
            submit(first)
        if not pending:
            return
        ready, _ = ray.wait(list(pending), timeout=0.5)
        for reference in ready:
            segment = pending.pop(reference)
            outcome, _ = ray.get(reference)
            following = confirmations.answered(segment, outcome)
            if following is not None:
                submit(following)
            else:
                pool.dispatcher.end.remote(segment.trial.key)
                tell()


def _missing_baselines(plan: StudyPlan, facts: StudyFacts) -> list[tuple[str, str]]:
    return [
        (domain, model)
        for domain, item in facts.domains.items()
        for model in plan.models
        if model not in item.baselines
    ]


def _start_probes(
    pool: SlotPool,
    plan: StudyPlan,
    facts: StudyFacts,
    save_facts: Callable[[StudyFacts], None],
    events: StudyEvents,
) -> threading.Thread:
    """Have the slots score the baselines, ahead of the first trials, and record them as they come."""
    import ray

    from peftsearch.training.segment import Failure, Probe, ProbeResult

    pending = [
        (domain, model, pool.dispatcher.submit.remote(Probe(model, domain)))
        for domain, model in _missing_baselines(plan, facts)
    ]

    def collect() -> None:
        for domain, model, reference in pending:
            try:
                outcome, _ = ray.get(reference)
            except Exception as error:  # the cluster is going down: the next run scores the baselines
                log.warning("baselines of %s: %s", domain, error)
                return
            if isinstance(outcome, Failure):
                log.warning("baselines of %s: %s", domain, outcome.error)
                continue
            assert isinstance(outcome, ProbeResult)
            metric = facts.domains[domain].metric
            found = {
                name: Baseline(
                    title=outcome.titles[name],
                    value=scores[metric],
                    scores=scores,
                    trainable_parameters=outcome.parameters[name],
                    detail=outcome.details[name],
                )
                for name, scores in outcome.scores.items()
            }
            facts.domains[domain].baselines[model] = found
            save_facts(facts)
            events.baselines(domain, found)

    thread = threading.Thread(target=collect, name="baselines", daemon=True)
    thread.start()
    return thread
