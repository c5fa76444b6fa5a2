"""The slots of a study: one Ray Train run each, beside one dispatcher; as many as the machines hold by now.

Ray Train starts a slot's workers again when they die. Everything else is decided here: a slot whose controller died is
started anew; one that finds no room is given up, and started when there is room; one that cannot load the model is not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil

from peftsearch.files import Place
from peftsearch.spec import first_line
from peftsearch.training.packing_key import pack_key
from peftsearch.training.segment import WorkerPlan
from peftsearch.workers.cluster_state import (
    controllers,
    end_controllers,
    end_coordinator,
    end_processes,
    live_nodes,
    remove_orphaned_groups,
)
from peftsearch.workers.dispatcher import Dispatcher
from peftsearch.workers.metrics import DispatcherMeter, Meter
from peftsearch.workers.packing import Sizes
from peftsearch.workers.slot_plan import Node, SlotPlan

log = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0
"""How often the machines and slots are looked at."""

_START_FAILURES = 5
"""A slot that ends so often before it was ever warm is not started again."""

_ROOM_SECONDS = 30
"""A slot that finds no room for so long is given up until the machines that are there hold it."""

_TIDY_SECONDS = 20.0
"""For so long after a slot's end it is looked after what its controller has left; Ray notices its death a bit later."""

_HEAD_SECONDS = 30.0
"""The Ray head may be away for so long; half of what Ray's own processes wait before they end themselves."""

LEAVE_SECONDS = 60.0
"""A slot that is told to leave while it trains has so long for the step that it is at, and for writing its state."""

_EXIT_SECONDS = 10.0
"""A process whose work is done has so long to exit."""

_UNWIND_SECONDS = 15.0
"""A study whose head is lost has so long to end in good order."""


@dataclass
class _Run:
    """A slot's Ray Train run, or what is left of it."""

    thread: threading.Thread | None = None
    error: Exception | None = None
    """What ended it."""
    warm: bool = False
    """Whether it has worked since it was started."""
    failures: int = 0
    """How often it ended before it was warm, one after the other."""
    again: float = 0.0
    """When it may be started again."""
    broken: str = ""
    """Why it is not started again."""

    @property
    def alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


@dataclass
class _Cluster:
    """The machines, as last seen."""

    nodes: dict[str, Node] = field(default_factory=dict)
    address: str = ""
    unseen_since: float | None = None
    """Since when the head has not answered."""


class SlotPool:
    """The slots of one study.

    Args:
        plan: What the workers need to know.
        slots: Their number and size.
        max_retries: See `Dispatcher`.
        folder: Where Ray Train keeps its run's state; on shared storage where there are several machines.
        tell: Told, in a sentence, of what a person should know: no machine holds a slot, say.
        measured_as: The study's name in Ray's metrics; None where nothing is to be measured.
        embedded: Whether the cluster is the study's own.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        slots: SlotPlan,
        max_retries: int,
        folder: Place,
        tell: Callable[[str], None] = log.warning,
        measured_as: str | None = None,
        *,
        embedded: bool = False,
    ) -> None:
        self._embedded = embedded
        self.plan = plan
        self.measured_as = measured_as
        self.slots = slots
        self.max_retries = max_retries
        self.folder = folder
        self.dispatcher: Any = None
        self._tell = tell
        self._runs: dict[int, _Run] = {}
        self._cluster = _Cluster()
        self._wanted = slots.slots
        self._sizes = Sizes(partial(pack_key, plan), plan.pack)
        self._at_once = self._sizes.largest()
        self._told: set[str] = set()
        self._stop = threading.Event()
        self._leaving = False
        self._waiting = False
        self._head_lost = ""
        self._supervisor: threading.Thread | None = None
        self._untidy_until = 0.0
        self._own_timeout = False

    def start(self) -> None:
        """Start the dispatcher and all slots; returns at once, while they warm up."""
        import ray

        # Imported here, in the caller's thread: two threads that import parts of Ray at once trip over its cycles.
        import peftsearch.workers.slot_trainer  # noqa: F401

        # A fixed number of slots is asked for with patience, which is what an autoscaler needs to see.
        room_seconds = _ROOM_SECONDS if self.slots.follows else 10 * _ROOM_SECONDS
        self._own_timeout = _START_TIMEOUT not in os.environ
        if self._own_timeout:
            os.environ[_START_TIMEOUT] = str(room_seconds)
        context = ray.get_runtime_context()
        self._cluster = _Cluster(live_nodes(), context.gcs_address)
        self.dispatcher = (
            ray.remote(_DispatcherActor)
            .options(
                num_cpus=0,
                max_concurrency=10_000,
                # Calls that a dead dispatcher has not answered are made again to the one that follows it.
                max_restarts=-1,
                max_task_retries=-1,
                # It lives with the driver: on a machine that outlives spot workers, and without which nothing goes on.
                scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                    context.get_node_id(), soft=False
                ),
            )
            .remote(self.max_retries, self._sizes, self.measured_as)
        )
        self._start_slots()
        self._supervisor = threading.Thread(target=self._supervise, name="slots", daemon=True)
        self._supervisor.start()
        threading.Thread(target=self._watch_head, name="ray-head", daemon=True).start()

    def concurrency(self) -> int:
        """How many trials can be trained at once: by the slots that there is room for and that are not broken."""
        broken = sum(bool(run.broken) for run in list(self._runs.values()))
        return max(1, self._wanted - broken) * self._at_once

    def at_once(self) -> int:
        """How many trials one slot trains at once at most, as far as is known by now."""
        return self._at_once

    def wait_ready(self, stopped: Callable[[], bool]) -> None:
        """Wait until a first slot is warm (the others join when they are), none can be, or somebody asked to stop."""
        import ray

        pending = self.dispatcher.wait_ready.remote()
        while not self.lost() and not stopped():
            ready, _ = ray.wait([pending], timeout=0.5)
            if ready:
                return
        ray.cancel(pending)

    def lost(self) -> bool:
        """Whether nothing would ever be trained again: no slot can work though there is room, or the head has died."""
        if self._stop.is_set():
            return False
        if self._head_lost:
            return True
        runs = list(self._runs.values())
        return bool(runs) and all(run.broken for run in runs)

    def why_lost(self) -> str:
        """The reason, in one sentence."""
        if self._head_lost:
            return self._head_lost
        reasons = [run.broken for run in self._runs.values() if run.broken]
        return f"no slot can work: {(reasons or ['their Ray Train runs ended'])[-1]}"

    def leave(self) -> None:
        """Tell the slots to leave, and do not wait for them: whoever trains writes its state at its next step."""
        self._leaving = True
        self.dispatcher.stop.remote()

    def stop(self, timeout: float = 30.0, state_timeout: float = LEAVE_SECONDS) -> None:
        """Tell the slots to leave, and wait for them.

        Args:
            timeout: Seconds for those that are not warm yet, and for each question to the cluster.
            state_timeout: Seconds for those that are, and may have the states of trials to write first.
        """
        import ray

        self._stop.set()
        if self._own_timeout:
            # The next study of this process may want another.
            os.environ.pop(_START_TIMEOUT, None)
            self._own_timeout = False
        if self.dispatcher is None:
            return
        if self._supervisor is not None:
            self._supervisor.join(_LOOK_SECONDS)
        if self._head_lost:
            # Nothing that is asked of the cluster is sure to return; its processes end themselves in a while.
            self.dispatcher.stop.remote()
            return
        # One that waits for room hears of nothing; it ends with the driver, or when it gives up.
        patience = {number: state_timeout if run.warm else 0.0 for number, run in self._runs.items()}
        ending: list[psutil.Process] = []
        try:
            ending = controllers()
        except Exception as error:  # the cluster is busy, or going down
            log.warning("the cluster did not say what runs on it: %s", error)
        try:
            ray.get(self.dispatcher.stop.remote(), timeout=timeout)
            status = ray.get(self.dispatcher.status.remote(), timeout=timeout)
            # A slot that trains nothing any more may still write its last state.
            patience |= dict.fromkeys(status["slots"], timeout) | dict.fromkeys(status["writing"], state_timeout)
        except Exception as error:  # the dispatcher may be gone; then the slots fail and leave by themselves
            log.warning("the dispatcher did not answer: %s", error)
        told = time.monotonic()
        for number, run in self._runs.items():
            if run.thread is not None:
                run.thread.join(max(0.0, told + patience.get(number, 0.0) - time.monotonic()))
        late = [run.thread for run in self._runs.values() if run.thread is not None and run.thread.is_alive()]
        for tidy in (
            # A thread that still waits for its controller while Ray is shut down may take the process with it.
            *((end_controllers, partial(_join, late, _LOOK_SECONDS)) if late else ()),
            partial(end_processes, ending, _EXIT_SECONDS),
            partial(ray.kill, self.dispatcher),
            remove_orphaned_groups,
            partial(end_coordinator, timeout),
        ):
            try:
                tidy()
            except Exception as error:  # the cluster is going down
                log.warning("the cluster could not be tidied up: %s", error)

    # --- inside ---

    def _supervise(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            try:
                # Slots that end while all leave are not to be started again.
                if self._cluster.unseen_since is None and not self._leaving:
                    self._look()
            except Exception as error:  # a call that the cluster did not answer: looked at again
                log.warning("the slots could not be looked at: %s", error)

    def _watch_head(self) -> None:
        """In a thread of its own: what looks at the slots may wait for the head."""
        host, _, port = self._cluster.address.rpartition(":")
        while port and not self._stop.wait(_LOOK_SECONDS):
            if _answers(host.strip("[]"), int(port)):
                self._cluster.unseen_since = None
                continue
            now = time.monotonic()
            since = self._cluster.unseen_since = self._cluster.unseen_since or now
            if now - since > _head_patience():
                self._head_lost = (
                    f"the Ray head at {self._cluster.address} has not answered for {now - since:.0f} s: "
                    "nothing is lost, and the same command continues the study"
                )
                if not self._stop.wait(_UNWIND_SECONDS):
                    # Some of Ray's calls wait for the head and cannot be interrupted; Ray would end this process soon,
                    # without a sentence. The ledger is written at every event, not at the end.
                    self._tell(self._head_lost)
                    _end_children()
                    os._exit(1)

    def _look(self) -> None:
        import ray

        nodes = live_nodes()
        left, joined = self._cluster.nodes.keys() - nodes.keys(), nodes.keys() - self._cluster.nodes.keys()
        if left:
            ray.get(self.dispatcher.nodes_left.remote(sorted(left)), timeout=_HEAD_SECONDS)
        self._cluster.nodes = nodes
        if joined:
            # What a slot lacked (a mount, a driver of a GPU) another machine may have.
            for run in self._runs.values():
                run.broken, run.failures = "", 0
        status = ray.get(self.dispatcher.status.remote(), timeout=_HEAD_SECONDS)
        self._at_once = status["at_once"]
        for note in status["notes"]:
            if note not in self._told:
                self._told.add(note)
                self._tell(note)
        for number in status["warm"]:
            self._runs[number].warm, self._runs[number].failures = True, 0
        for number, run in self._runs.items():
            if run.thread is not None and not run.thread.is_alive():
                self._ended(number, run, status["unusable"].get(number, ""))
        if self.slots.follows:
            # One at least: its request for room is what makes an autoscaler bring a machine.
            self._wanted = max(1, self.slots.room(list(nodes.values())))
        if self._stop.is_set() or self._leaving:
            return
        if time.monotonic() < self._untidy_until:
            remove_orphaned_groups()
        self._start_slots()
        self._say_whether_waiting(bool(status["warm"]))

    def _start_slots(self) -> None:
        """Start slots until there are as many as wanted."""
        held = sum(run.alive or bool(run.broken) for run in self._runs.values())
        number = 0
        while held < self._wanted:
            run = self._runs.setdefault(number, _Run())
            if not (run.alive or run.broken):
                held += 1
                if time.monotonic() >= run.again:
                    run.error, run.warm = None, False
                    run.thread = threading.Thread(
                        target=self._run_slot, args=(number, run), name=f"slot-{number}", daemon=True
                    )
                    run.thread.start()
            number += 1

    def _ended(self, number: int, run: _Run, unusable: str) -> None:
        """A slot's Train run has ended though nobody told it to."""
        import ray
        from ray.train import ControllerError

        run.thread = None
        ray.get(self.dispatcher.slot_ended.remote(number), timeout=_HEAD_SECONDS)
        self._untidy_until = time.monotonic() + _TIDY_SECONDS
        if unusable:
            run.broken = unusable
            return
        no_room = isinstance(run.error, ControllerError) and "Timeout" in type(run.error.controller_failure).__name__
        if not (run.warm or no_room):
            run.failures += 1
        if run.failures >= _START_FAILURES:
            run.broken = _why(run.error)
            self._tell(f"slot {number} could not be started {run.failures} times and is given up: {run.broken}")
            return
        run.again = time.monotonic() + (2.0**run.failures - 1.0)
        log.warning("slot %d ended and is started again: %s", number, _why(run.error))

    def _say_whether_waiting(self, warm: bool) -> None:
        """One sentence when the last machine with room has gone, and one when there is room again."""
        waits = not warm and self.slots.room(list(self._cluster.nodes.values())) == 0
        if waits and not self._waiting:
            gpus = f" and {self.slots.gpus:g} GPUs" if self.slots.gpus else ""
            workers = f"{self.slots.workers} workers with " if self.slots.workers > 1 else ""
            self._tell(
                f"no machine of the cluster has room for a slot ({workers}{self.slots.cpus} CPUs{gpus}): the study "
                "waits until one joins; Ctrl-C stops it, and the same command continues it"
            )
        elif self._waiting and not waits:
            self._tell("the cluster has room again: the study goes on")
        self._waiting = waits

    def _run_slot(self, slot: int, run: _Run) -> None:
        from peftsearch.workers.slot_trainer import SlotTrainer

        config = {"plan": self.plan, "slot": slot, "dispatcher": self.dispatcher, "measured_as": self.measured_as}
        try:
            SlotTrainer(self.slots, slot, config, self.folder, embedded=self._embedded).fit()
        except Exception as error:
            run.error = error


_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"


class _DispatcherActor(Dispatcher):
    """The dispatcher as a Ray actor, which knows whether it follows one that died."""

    def __init__(self, max_retries: int, sizes: Sizes, measured_as: str | None = None) -> None:
        import ray

        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        meter = DispatcherMeter(Meter(measured_as))
        super().__init__(max_retries, restarted=restarted, sizes=sizes, meter=meter)


def _end_children() -> None:
    """End what this process has started: of an embedded cluster, all that is left."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def _join(threads: Sequence[threading.Thread], seconds: float) -> None:
    """Wait for all of them, so long together."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _answers(host: str, port: int) -> bool:
    """Whether somebody accepts connections there. Asked without Ray, whose calls would wait for the head."""
    try:
        with socket.create_connection((host, port), timeout=5.0):
            return True
    except OSError:
        return False


def _head_patience() -> float:
    """Seconds; a cluster whose head is started again after a fault sets Ray's own patience, and ours is half of it."""
    return float(os.environ.get(_RECONNECT, 2 * _HEAD_SECONDS)) / 2


def quiet_ray_environment() -> None:
    """Settings of Ray that the environment does not already decide; call before ``ray.init``."""
    for name, value in {
        # Metrics of Train's controllers cost a thread each and are not read by anybody here.
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        # OpenMP threads that wait for work by spinning take the cores from the driver, the other slots and whatever
        # else runs here: on two contended cores a step with two threads took up to ten times as long (ran).
        "OMP_WAIT_POLICY": "PASSIVE",
        # Without this Ray overrides CUDA_VISIBLE_DEVICES of processes that ask for no GPU, and warns about it.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Controllers, dispatcher and trial actors are processes without a CPU of their own; with as few cores as a
        # laptop's Ray takes their number for a mistake and says so on standard output.
        "RAY_worker_maximum_startup_concurrency": "16",
        # The head of a cluster that we start has one machine to watch, its own: on a busy one it took it for dead
        # after 5 checks without an answer (seen), and ended a study that had nothing but patience to lose.
        "RAY_health_check_failure_threshold": "100",
    }.items():
        os.environ.setdefault(name, value)


def _why(error: BaseException | None) -> str:
    return "its Ray Train run ended" if error is None else first_line(error)
