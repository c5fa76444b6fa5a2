"""Running a study: Ray, slots, search, observers; started in order, and taken down whatever happens."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peftsearch.events import StudyEvents
from peftsearch.search.plan import StudyPlan
from peftsearch.search.run import Observer, StudyRun
from peftsearch.spec import Baseline, StudyFacts
from peftsearch.tracking import Ledger
from peftsearch.workers import SlotPlan, SlotPool, quiet_ray_environment

log = logging.getLogger(__name__)

_BASELINE_TITLES = {"majority": "majority class", "linear_probe": "logistic regression on frozen embeddings"}


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
) -> None:
    """Run the remaining trials of a study.

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

    Raises:
        StudyError: The cluster cannot hold a slot.
        RuntimeError: No worker could be started.
    """
    spec = plan.spec
    run = StudyRun(
        spec.search, [item.cell for item in plan.cells], plan.searches(), plan.count, ledger, [events, *observers]
    )
    if run.finished() and not _missing_baselines(plan, facts):
        events.planned(run)
        return
    if stopped():
        return
    events.phase("starting Ray")
    with ray_cluster(address) as nodes:
        slots = SlotPlan.fit(spec.resources, nodes)
        workers = plan.for_workers(folder, slots.cpus)
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
            while probes.is_alive() and not over():
                probes.join(0.2)
            if pool.lost() and not stopped():
                raise RuntimeError(pool.why_lost())
        finally:
            # An interrupted segment is not waited for: it is trained again from its checkpoint.
            pool.stop(timeout=5.0 if stopped() else 30.0)


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
                    title=_BASELINE_TITLES[name],
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
