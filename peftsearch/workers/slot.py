"""What a slot's Ray Train workers run: take a segment, train it, answer; until told to stop."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from peftsearch.training.segment import HandedBack, Outcome, Segment, SetAside, Work, WorkerPlan
from peftsearch.workers.departure import departure
from peftsearch.workers.dispatcher import BEAT_SECONDS, Order
from peftsearch.workers.metrics import Meter, SlotMeter

if TYPE_CHECKING:
    from peftsearch.training.crew import Crew
    from peftsearch.training.distributed import WorkerGroup
    from peftsearch.training.worker import Worker

log = logging.getLogger(__name__)


def slot_loop(config: dict[str, Any]) -> None:
    """The train loop of one slot, on each of its workers.

    Args:
        config: ``slot`` (its number), ``plan`` (`WorkerPlan`), ``dispatcher`` (the actor's handle) and ``measured_as``
            (the study in Ray's metrics, or None).
    """
    # A tenth of the imports' time goes into looking for garbage among what is being imported (measured).
    gc.disable()
    import ray
    import ray.train
    import ray.train.torch

    from peftsearch.training.distributed import WorkerGroup
    from peftsearch.training.worker import Worker

    plan: WorkerPlan = config["plan"]
    context = ray.train.get_context()
    group = WorkerGroup(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device(), plan.strategy)
    meter = SlotMeter(Meter(config["measured_as"]), config["slot"], group.rank)
    link = _Link(config["dispatcher"], config["slot"], meter)
    me = f"slot {link.slot}, {socket.gethostname()}, process {os.getpid()}"
    # Every rank speaks for the slot where it fails alone.
    link.incarnation = group.from_first(link.incarnation) or link.incarnation
    leads = group.rank == 0
    goes_on = True
    if leads:
        with contextlib.suppress(ray.exceptions.ActorDiedError):
            goes_on = link.tell("join")
    if not group.from_first(goes_on):
        return
    worker = Worker(plan, group)
    departs = departure()
    # The others of a group leave when the first does: they ask one another.
    worker.must_leave = lambda: link.stops.is_set() or departs()
    if leads:
        # Not waited for: no trial is to blame for a dispatcher that has gone.
        worker.tell = lambda text: link.begin("note", text)
    error = ""
    try:
        worker.warm_up()
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    # Libraries and base stay for as long as the process does: half a million objects that hold no garbage.
    gc.freeze()
    gc.enable()
    # One rank that cannot load model or data is enough, and all must leave: the others would wait for it for ever.
    error = next((found for found in group.gather(error) if found), "")
    nodes = group.gather(ray.get_runtime_context().get_node_id())
    watching = meter.watching(group.device if group.device.type == "cuda" else None)
    try:
        if error:
            if leads:
                link.tell("unusable", f"{me} cannot load model or data: {error}")
        elif leads:
            link.info = {"host": socket.gethostname(), "pid": os.getpid(), "nodes": nodes}
            link.tell("warm", link.info)
            link.holds = worker.held
            with link.beating(), watching:
                if plan.pack == 1:
                    _lead(worker, group, link)
                else:
                    _lead_several(worker, link)
        else:
            with watching:
                _follow(worker, group, link)
    except ray.exceptions.ActorDiedError:
        # The study is over: a dispatcher that died before that would have been started again.
        if not error:
            group.from_first(Order(stop=True))
    finally:
        worker.close()


def _lead(worker: Worker, group: WorkerGroup, link: _Link) -> None:
    """Rank 0 asks for work, and hands it to the other ranks."""
    while True:
        if worker.must_leave():
            group.from_first(Order(stop=True))
            return
        order: Order = link.ask("take")
        if order.rejoin:
            link.rejoin()
            continue
        group.from_first(order)
        if order.stop:
            return
        worker.forget(order.ended)
        if order.work is None:
            continue
        link.doing = [order.work]
        outcome = _do(worker, link, order, order.work)
        link.meter.answered(order.work, outcome)
        if isinstance(outcome, HandedBack):
            link.tell("hand_back", order.lease)
            return
        link.tell("finish", order.lease, outcome, order.work)
        link.doing = []


def _lead_several(worker: Worker, link: _Link) -> None:
    """The only rank trains several trials at once, and asks for more between their steps, without waiting for it."""
    import ray

    from peftsearch.training.crew import Crew

    crew = Crew(worker, lambda key, size, text: link.tell("fit", key, size, text))
    works: dict[int, Work] = {}
    asked: Any = None
    stopping = False
    while not (crew.idle and (stopping or worker.must_leave())):
        if asked is None and not stopping:
            asked = link.begin("take", at_work=bool(works))
        order = Order()
        if asked is not None and (crew.idle or ray.wait([asked], timeout=0)[0]):
            order = ray.get(asked)
            asked = None
        if order.rejoin:
            link.rejoin()
            continue
        stopping = stopping or order.stop
        worker.forget(order.ended)
        if order.lease is not None and order.work is not None:
            works |= {order.lease: order.work, **dict(order.beside)}
            link.doing = list(works.values())
        try:
            _begin(crew, worker, link, order)
            outcomes = crew.advance()
        except Exception as error:
            for lease in works:
                link.tell("crashed", lease, f"{type(error).__name__}: {error}")
            raise
        for lease, outcome in outcomes.items():
            _answer(link, lease, outcome, works)
        if any(isinstance(outcome, HandedBack) for outcome in outcomes.values()):
            return


def _begin(crew: Crew, worker: Worker, link: _Link, order: Order) -> None:
    """Let work that was handed out be trained with what the crew has, or do it at once where it is done alone."""
    size = order.at_once
    if order.lease is None:
        return
    if size == 0:
        assert isinstance(order.work, Segment)
        found = crew.size(order.work)
        if found is not None:
            link.tell("measured", order.lease, found)
        size = found or 1
    worker.at_once = max(worker.at_once, size)
    for lease, work in ((order.lease, order.work), *order.beside):
        assert work is not None
        if size == 1 or not isinstance(work, Segment):
            crew.let_go(work)
            crew.done(lease, _do(worker, link, order, work))
        else:
            crew.join(lease, work)


def _answer(link: _Link, lease: int, outcome: Outcome, works: dict[int, Work]) -> None:
    work = works.pop(lease)
    link.meter.answered(work, outcome)
    if isinstance(outcome, HandedBack):
        link.tell("hand_back", lease)
    elif isinstance(outcome, SetAside):
        link.tell("set_aside", lease, alone=outcome.alone)
    else:
        link.tell("finish", lease, outcome, work)
    link.doing = list(works.values())


def _do(worker: Worker, link: _Link, order: Order, work: Work) -> Outcome:
    """Do the work; what breaks this worker is told to the dispatcher, which may never hear of it otherwise."""
    from peftsearch.training.worker import LoneFailureError

    try:
        return worker.do(work)
    except LoneFailureError as error:
        # The group starts anew, for the other ranks wait for this one; the trial has failed all the same.
        link.tell("finish", order.lease, error.failure, work)
        raise
    except Exception as error:
        link.tell("crashed", order.lease, f"{type(error).__name__}: {error}")
        raise


def _follow(worker: Worker, group: WorkerGroup, link: _Link) -> None:
    """The other ranks do what rank 0 was handed."""
    while True:
        order: Order | None = group.from_first(None)
        assert isinstance(order, Order)
        if order.stop:
            return
        worker.forget(order.ended)
        if order.work is not None and isinstance(_do(worker, link, order, order.work), HandedBack):
            return


class _Link:
    """A slot's line to the dispatcher.

    Every call waits for its answer. Where the dispatcher's process dies meanwhile, Ray starts it again and repeats the
    call; the new one may not know the slot yet.

    Args:
        dispatcher: Handle of the actor.
        slot: The slot's number.
        meter: Told what the slot answers; nobody is where absent.
    """

    def __init__(self, dispatcher: Any, slot: int, meter: SlotMeter | None = None) -> None:
        self.slot = slot
        self.meter = meter or SlotMeter(Meter(), slot)
        self.info: dict[str, Any] = {}
        self.doing: list[Work] = []
        self.holds: Callable[[], list[str]] = list
        self.stops = threading.Event()
        """Set once the dispatcher has said that the study stops."""
        self._dispatcher = dispatcher
        self.incarnation = uuid.uuid4().hex

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call one of the dispatcher's methods in this slot's name."""
        import ray

        return ray.get(self.begin(method, *arguments, **options))

    def begin(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call it without waiting for the answer: what `ray.get` takes."""
        return getattr(self._dispatcher, method).remote(self.slot, self.incarnation, *arguments, **options)

    tell = ask

    def rejoin(self) -> None:
        """Join a dispatcher that was started anew; to one that knows this slot already, it changes nothing."""
        self.ask("join", info=self.info, holds=self.holds(), doing=self.doing)

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Tell the dispatcher that this slot lives, also while a long segment trains, and hear whether to stop it."""
        done = threading.Event()

        def beat() -> None:
            import ray

            while not done.wait(BEAT_SECONDS):
                with contextlib.suppress(ray.exceptions.RayError):
                    order: Order = self.ask("beat")
                    if order.stop:
                        self.stops.set()
                    if order.rejoin:
                        self.rejoin()

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()
        try:
            yield
        finally:
            done.set()
