"""Running a study: Ray, slots, search, observers; started in order, and taken down whatever happens."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from peftsearch.baselines import Wanted, missing_baselines, record_baselines
from peftsearch.events import StudyEvents
from peftsearch.files import Place, StorageError, is_local
from peftsearch.frontier.front import finalists
from peftsearch.held_folder import held_folder
from peftsearch.monitoring import StudyMetrics
from peftsearch.ray_access import HOW_TO_SWITCH_ON, check_access, token_of_our_own, token_of_the_user
from peftsearch.ray_folder import private_ray_folder
from peftsearch.search.cells import Cell
from peftsearch.search.confirmation import Confirmations
from peftsearch.search.counts import ParameterCount
from peftsearch.search.estimate import Format, TrialCosts, measured_speeds, number_formats
from peftsearch.search.plan import StudyPlan
from peftsearch.search.run import Observer, StudyRun, TrialCost
from peftsearch.spec import THREADS, StudyError, StudyFacts
from peftsearch.stopping import StopRequest
from peftsearch.tracking import Ledger
from peftsearch.training.segment import Segment
from peftsearch.training.shared_data import publish
from peftsearch.training.threads import kept_threads
from peftsearch.workers import LEAVE_SECONDS, SlotPlan, SlotPool, live_nodes, nodes_to_come, quiet_ray_environment

log = logging.getLogger(__name__)

_THREADS_SECONDS = 5.0
"""The threads beside the search have so long to notice that nobody needs them any more."""

_TELL_SECONDS = 1.0
"""How often it is looked whether somebody has asked to stop."""


@contextlib.contextmanager
def ray_cluster(address: str | None, warn: Callable[[str], None] = log.warning) -> Iterator[list[dict[str, float]]]:
    """Connect to a Ray cluster, or start one on this machine; yields the resources of its nodes.

    A cluster that is started here listens on loopback alone, and only to those who show its token; other users cannot
    reach its files.

    Args:
        address: A cluster's address; None starts a cluster of this machine's cores that ends with the study.
        warn: Told of a cluster that anybody may use.

    Raises:
        StudyError: The cluster cannot be reached, or refuses us; or there is no place for the files of one of our own.
    """
    quiet_ray_environment()
    import ray

    if ray.is_initialized():
        yield list(live_nodes().values())
        return
    local = address in (None, "local")
    with (
        token_of_our_own() if local else token_of_the_user(),
        _for_this_machine() if local else contextlib.nullcontext(),
        private_ray_folder() if local else contextlib.nullcontext() as folder,
    ):
        with _handlers_kept():
            if folder:
                _start_ray(folder)
            else:
                _join_ray(str(address), warn)
        try:
            yield list(live_nodes().values())
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _for_this_machine() -> Iterator[None]:
    """Have the Ray that is started within listen on loopback alone, and not wait for this machine to be drained.

    Ray listens everywhere, and replaces even a ``_node_ip_address="127.0.0.1"`` by an address that others can reach
    (``services.resolve_ip_for_localhost``). Only where it is for one machine, as by default on macOS and Windows, it
    stays on loopback: https://github.com/ray-project/ray/issues/18730.
    """
    from ray._private import ray_constants

    # What Ray Train watches for on a cluster, in a process of its own for each slot, no autoscaler does here.
    off = (ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER")
    before, written = ray_constants.ENABLE_RAY_CLUSTER, {name: os.environ.get(name) for name in off}
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.update(dict.fromkeys(off, "0"))
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        for name, value in written.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Give signals their handlers back afterwards: ``ray.init`` puts handlers of its own in their place (for SIGTERM
    one in Python and then one in C++; ran, 2.60.0), which end the driver where it is instead of asking the study to
    stop."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _join_ray(address: str, warn: Callable[[str], None]) -> None:
    """Connect to a cluster that somebody else has started; arguments and errors as `ray_cluster`."""
    import ray

    if check_access(address):
        warn(f"anybody who reaches the Ray cluster at {address} can run code on it: {HOW_TO_SWITCH_ON}")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        reason = " ".join(str(error).split())
        raise StudyError(f"cannot connect to the Ray cluster at {address!r}: {reason}") from None


def _start_ray(folder: Path) -> None:
    """Start Ray on this machine's loopback.

    Args:
        folder: Where it keeps its files.

    Raises:
        RuntimeError: It does not come up.
    """
    import psutil
    import ray

    for attempts_left in (2, 1, 0):
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        try:
            ray.init(
                # "local" and not None: a stale address file would otherwise have us join somebody else's cluster.
                address="local",
                _temp_dir=str(folder),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:
            # Ray gives its processes 30 seconds, whatever else the machine does (`ray._private.node.Node`), and leaves
            # those behind that have come up too late.
            for child in psutil.Process().children(recursive=True):
                if child.pid not in before:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            if "timed out during startup" not in str(error):
                raise
            if not attempts_left:
                raise RuntimeError("Ray does not start: this machine is too busy, or short of memory") from None
            log.warning("Ray has not started within its 30 seconds; trying again")


def run_study(
    plan: StudyPlan,
    ledger: Ledger,
    facts: StudyFacts,
    folder: Place,
    address: str | None,
    events: StudyEvents,
    observers: Sequence[Observer],
    save_facts: Callable[[StudyFacts], None],
    stopped: StopRequest,
    guesses: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    backlog: Callable[[], int] = lambda: 0,
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
        backlog: How much MLflow does not have yet.

    Raises:
        StudyError: The cluster cannot hold a slot.
        RuntimeError: No worker could be started.
    """
    spec = plan.spec
    metrics = StudyMetrics(facts, ledger.records, backlog)
    listeners = [events, *observers, metrics]
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

    if (
        run.finished()
        and (confirming := confirmations()).finished
        and not missing_baselines(facts, plan.models)
        and not (confirming.planned and missing_baselines(facts, plan.models, read_test=True))
    ):
        events.planned(run)
        return
    if stopped():
        return
    if not run.finished():
        costs.measure()
    events.phase("starting Ray")
    with (
        ray_cluster(address, events.warning) as nodes,
        metrics.exporting(folder, run.planned) as measured_as,
    ):
        embedded = address in (None, "local")
        slots = SlotPlan.fit(
            spec.resources,
            nodes,
            [] if embedded else nodes_to_come(),
            grows=not embedded,
            worker_bytes=costs.worker_bytes,
            trials=run.planned,
            threads=int(facts.provenance.get(THREADS, 0)) or None,
            tell=events.warning,
        )
        costs.slot(slots)
        workers = plan.for_workers(folder, slots.cpus)
        if not is_local(folder):
            events.phase("copying the prepared data to the storage")
            workers = publish(workers, folder.parent.parent)
        # Another number of threads adds numbers in another order: exports are verified with this one.
        if not workers.measure_threads:
            facts.provenance[THREADS] = str(slots.cpus)
        save_facts(facts)
        pool = SlotPool(
            workers,
            slots,
            spec.resources.max_retries,
            folder / "ray",
            events.warning,
            measured_as,
            embedded=embedded,
        )
        events.phase(f"warming up {slots.slots} slot{'s' if slots.slots > 1 else ''}")
        pool.start()
        state_seconds = LEAVE_SECONDS
        probes: list[threading.Thread] = []
        enough = threading.Event()
        telling = threading.Thread(target=_tell_slots, args=(pool, stopped, enough), name="stop", daemon=True)
        telling.start()
        try:
            from peftsearch.search.tune import run_trials

            pool.wait_ready(stopped)
            if workers.measure_threads and (threads := kept_threads(folder)) is not None:
                facts.provenance[THREADS] = str(threads)
                save_facts(facts)

            def over() -> bool:
                return stopped() or pool.lost() or run.broken is not None

            probes.append(_start_probes(pool, plan, facts, save_facts, events, enough))
            events.planned(run)
            run.at_once = pool.at_once
            with held_folder(Path(tempfile.gettempdir()), "ps-tune-") as scratch:
                run_trials(run, pool.dispatcher, pool.concurrency, over, scratch)
            if spec.confirm.seeds and not over():
                confirming = confirmations()
                if confirming.planned:
                    probes.append(_start_probes(pool, plan, facts, save_facts, events, enough, after=probes[0]))
                _confirm(confirming, pool, over, events)
            while any(thread.is_alive() for thread in probes) and not over():
                time.sleep(0.2)
            if run.broken is not None:
                raise RuntimeError(run.broken)
            if pool.lost() and not stopped():
                raise RuntimeError(pool.why_lost())
        except KeyboardInterrupt:
            # Asked for a second time: what has not written its state by then goes on from the one before.
            state_seconds = 5.0
            raise
        finally:
            enough.set()
            try:
                deadline = time.monotonic() + _THREADS_SECONDS
                for thread in (*probes, telling):
                    thread.join(max(0.0, deadline - time.monotonic()))
            finally:
                # Who is asked to stop waits for the states of what is being trained, and for nothing else.
                pool.stop(timeout=5.0 if stopped() else 30.0, state_timeout=state_seconds)


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

    @property
    def worker_bytes(self) -> int:
        """Memory that a worker is expected to take at its peak."""
        return self._costs.largest()[0]

    def slot(self, slots: SlotPlan) -> None:
        """From now on, say how long a trial takes on one of these slots."""
        import torch

        if self._speeds is not None:
            share = slots.workers * (1 if slots.gpus else slots.cpus / torch.get_num_threads())
            self._costs = TrialCosts(self._plan, {name: speed * share for name, speed in self._speeds.items()})

    def __call__(self, cell: Cell, hyperparameters: Mapping[str, Any], count: ParameterCount) -> TrialCost:
        return self._costs(cell, hyperparameters, count)


def _confirm(confirmations: Confirmations, pool: SlotPool, over: Callable[[], bool], events: StudyEvents) -> None:
    """Train the finalists again, as many at once as there are slots; the same slots that ran the trials."""
    import ray

    def tell() -> None:
        events.confirmations(confirmations.done, confirmations.failed, confirmations.planned)

    def submit(segment: Segment) -> None:
        pending[pool.dispatcher.submit.remote(segment)] = segment

    if confirmations.finished:
        return
    before = confirmations.done + confirmations.failed
    events.phase(
        f"confirming the finalists: {confirmations.planned} trainings with further seeds"
        + (f", {before} of them done before" if before else "")
    )
    tell()
    pending: dict[Any, Segment] = {}
    while not over():
        while len(pending) < pool.concurrency() and (first := confirmations.next()) is not None:
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
    for unanswered in pending:
        ray.cancel(unanswered)


def _tell_slots(pool: SlotPool, stopped: Callable[[], bool], enough: threading.Event) -> None:
    """Have the slots write what they train as soon as somebody asks to stop.

    Ray Tune takes seconds to wind up, ten of them on a busy machine (seen); a ledger or a tracking server that does not
    answer may hold its thread for longer. Said again and again: a dispatcher that was started anew has not heard it.
    """
    while not enough.wait(_TELL_SECONDS):
        if stopped():
            pool.leave()


def _start_probes(
    pool: SlotPool,
    plan: StudyPlan,
    facts: StudyFacts,
    save_facts: Callable[[StudyFacts], None],
    events: StudyEvents,
    enough: threading.Event,
    *,
    after: threading.Thread | None = None,
) -> threading.Thread:
    """Have the slots score the baselines, and record them as they come.

    Args:
        enough: Set when nobody waits for them any more. The thread ends soon then: one that waits for Ray while it is
            shut down takes the process with it (seen with Ray 2.60: SIGSEGV, or an exit without a word;
            https://github.com/ray-project/ray/issues/31145).
        after: Scores them on validation; then the test split is read by those that have a score there, as confirmations
            read it. None: on validation, ahead of the first trials.
    """
    import ray

    from peftsearch.training.segment import Probe

    read_test = after is not None

    def submit() -> list[tuple[Wanted, ray.ObjectRef[Any]]]:
        limit = {"prompted": plan.spec.confirm.prompted_examples} if read_test else {}
        return [
            (
                wanted,
                pool.dispatcher.submit.remote(Probe(wanted.model, wanted.domain, read_test, wanted.names, **limit)),
            )
            for wanted in missing_baselines(facts, plan.models, read_test=read_test)
        ]

    # Before any trial is.
    submitted = submit() if after is None else None

    def save() -> None:
        try:
            save_facts(facts)
        except StorageError as error:  # what was found stays in memory, and is in what is saved next
            log.warning("%s", error)

    def collect() -> None:
        if after is not None:
            after.join()
            if enough.is_set():
                return
        pending = submit() if submitted is None else submitted
        for number, (wanted, reference) in enumerate(pending):
            try:
                while not enough.is_set() and not ray.wait([reference], timeout=0.5)[0]:
                    pass
                if enough.is_set():
                    # Else Ray would ask the dispatcher again for ever, and say so.
                    for _, unanswered in pending[number:]:
                        ray.cancel(unanswered)
                    return
                outcome, _ = ray.get(reference)
            except Exception as error:  # the cluster is going down: the next run scores the baselines
                log.warning("baselines of %s: %s", wanted.domain, error)
                return
            domain = facts.domains[wanted.domain]
            record_baselines(domain, wanted, outcome, read_test=read_test)
            save()
            if not read_test and wanted.model in domain.baselines:
                events.baselines(wanted.domain, domain.baselines[wanted.model])

    thread = threading.Thread(target=collect, name="baselines", daemon=True)
    thread.start()
    return thread
