"""The dispatcher: one async Ray actor that hands segments to slots and answers back to whoever asked.

It holds the only queue of the study. Slots come and take; nobody is ever killed to end a trial.

Nothing in it needs to survive it: when its process dies, Ray starts it again and repeats the calls that were not
answered, so trials queue their segments again and slots join again, with what they hold and what they are doing.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftsearch.training.segment import Failure, Outcome, Segment, Work
from peftsearch.workers.metrics import TICK_SECONDS, DispatcherMeter, Meter
from peftsearch.workers.packing import Others, Sizes, Waiting, choose

STILLBIRTHS = 5
"""A slot whose worker groups die so often in a row before they are warm is given up."""

_POLL_SECONDS = 5.0
"""A slot's call returns after this long without work, so that a group never waits in a collective for minutes."""

BEAT_SECONDS = 2.0
"""A slot says this often that it is alive."""

_SETTLE_SECONDS = 2.5 * BEAT_SECONDS
"""A restarted dispatcher hears within this time what the slots are doing, and hands none of it to another slot."""


@dataclass(frozen=True)
class Order:
    """The dispatcher's answer to a slot that asks for work, or says that it lives."""

    lease: int | None = None
    work: Work | None = None
    beside: tuple[tuple[int, Work], ...] = ()
    """Leases of further work that is to be done at once with it."""
    at_once: int = 1
    """How many pieces of such work may be done at once: 1 is this one by itself, 0 is to be measured."""
    ended: tuple[str, ...] = ()
    """Keys of the trials that have ended since the slot last asked, or go on elsewhere: their state can be dropped."""
    stop: bool = False
    """There is no more work: the slot leaves. To one that is at work: it writes what it has, and hands it back."""
    rejoin: bool = False
    """The dispatcher was started anew and does not know the slot: it must `join` first."""


@dataclass
class _Job:
    work: Work
    answer: asyncio.Future[tuple[Outcome, int]]
    attempts: int = 0
    alone: bool = False
    """Whether it is to be done by itself: a slot broke over it and others, so that nobody knows which of them is to
    blame; or it cannot be packed."""
    last_error: str = ""
    queued_at: float = field(default_factory=time.monotonic)


@dataclass
class _Slot:
    incarnation: str
    ready: bool = False
    seen: float = field(default_factory=time.monotonic)
    leased: dict[int, _Job] = field(default_factory=dict)
    holds: set[str] = field(default_factory=set)
    ended: list[str] = field(default_factory=list)
    doing: list[Work] = field(default_factory=list)
    """Work that it was handed by a dispatcher that died since."""
    leaving: bool = False
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def at_work(self) -> list[Work]:
        """What it is working on, whoever handed it out."""
        return [*(job.work for job in self.leased.values()), *self.doing]


class Dispatcher:
    """See the module. Runs as a Ray actor; all methods run on one event loop, so no locks are needed.

    Args:
        max_retries: How often work is handed out again after a slot broke over it.
        lease_seconds: A slot that is silent for longer has lost its work.
        restarted: Whether an earlier dispatcher of this study died, and slots may be at work already.
        sizes: How many trials a slot trains at once; one where absent.
        meter: Told how it goes; nobody is where absent.
    """

    def __init__(
        self,
        max_retries: int,
        lease_seconds: float = 60.0,
        *,
        restarted: bool = False,
        sizes: Sizes | None = None,
        meter: DispatcherMeter | None = None,
    ) -> None:
        self.sizes = sizes or Sizes()
        self.meter = meter or DispatcherMeter(Meter())
        self.max_retries = max_retries
        self.lease_seconds = lease_seconds
        self._settled = time.monotonic() + (_SETTLE_SECONDS if restarted else 0.0)
        self._queue: deque[_Job] = deque()
        self._slots: dict[int, _Slot] = {}
        # Slots may still hold what a dispatcher that died has leased to them: no number means two works.
        self._leases = itertools.count(time.time_ns())
        self._changed = asyncio.Event()
        self._stopping = False
        self._unusable: dict[int, str] = {}
        self._unclaimed: list[tuple[Work, Outcome]] = []
        self._watch: asyncio.Task[None] | None = None
        self._measuring: asyncio.Task[None] | None = None
        self._notes: list[str] = []
        self._stillborn: dict[int, int] = {}

    # --- asked by trial actors and the driver ---

    async def submit(self, work: Work) -> tuple[Outcome, int]:
        """Queue work and wait for its outcome, and how often it had to be handed out again."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_leases())
            if self.meter.on:
                self._measuring = asyncio.create_task(self._measure())
        found = next((answer for done, answer in self._unclaimed if done == work), None)
        if found is not None and time.monotonic() < self._settled:
            return found, 0
        job = _Job(work, asyncio.get_running_loop().create_future())
        self._queue.append(job)
        self._wake()
        try:
            return await job.answer
        finally:
            # Whoever asked has given up (``ray.cancel``): nobody shall begin with it.
            if job.answer.cancelled() and job in self._queue:
                self._queue.remove(job)

    async def end(self, key: str) -> None:
        """A trial has ended (its plan's key): whoever holds its state may drop it. Its queued work is withdrawn."""
        for slot in self._slots.values():
            slot.holds.discard(key)
            slot.ended.append(key)
        for job in [job for job in self._queue if isinstance(job.work, Segment) and job.work.trial.key == key]:
            self._queue.remove(job)
            job.answer.cancel()

    async def wait_ready(self) -> None:
        """Return when a slot is warm."""
        while not any(slot.ready for slot in self._slots.values()):
            await self._wait()

    async def status(self) -> dict[str, Any]:
        """The slots, by number: which are warm, which train, which may still be writing, which cannot be used; how many
        are busy, and how much waits for them; and what there is to tell."""
        return {
            "busy": sum(bool(slot.leased) for slot in self._slots.values()),
            "queued": len(self._queue),
            "unusable": dict(self._unusable),
            "warm": sorted(number for number, slot in self._slots.items() if slot.ready),
            "slots": {number: slot.info for number, slot in self._slots.items()},
            "writing": sorted(number for number, slot in self._slots.items() if slot.ready or slot.leaving),
            "at_once": self.sizes.largest(),
            "notes": list(self._notes),
            "training": sorted(
                number
                for number, slot in self._slots.items()
                if any(isinstance(work, Segment) for work in slot.at_work)
            ),
        }

    async def stop(self) -> None:
        """Tell every slot to leave: those that train write the state at their next step, and hand their work back."""
        self._stopping = True
        self._wake()

    async def slot_ended(self, slot: int) -> None:
        """A slot's Train run has ended: its work is handed out again. No trial is to blame."""
        if (mine := self._slots.pop(slot, None)) is not None:
            self._requeue(mine, "its slot was lost", blame=False)

    async def nodes_left(self, nodes: Sequence[str]) -> None:
        """Machines have left the cluster: what their slots had leased is handed out again. No trial is to blame."""
        for mine in self._slots.values():
            if not set(nodes).isdisjoint(mine.info.get("nodes", ())):
                mine.ready, mine.doing = False, []
                self._requeue(mine, "its machine was lost", blame=False)

    # --- asked by slots ---

    async def join(
        self,
        slot: int,
        incarnation: str,
        *,
        info: Mapping[str, Any] | None = None,
        holds: Sequence[str] = (),
        doing: Sequence[Work] = (),
    ) -> bool:
        """A slot's worker group has started, or started anew: what it had leased before is handed out again.

        Args:
            slot: Its number.
            incarnation: Unique to this worker group.
            info: As for `warm`, where the group is warm already and joins a dispatcher that was started anew.
            holds: Keys of the trials whose state it holds in memory.
            doing: What it is working on.

        Returns:
            Whether it may go on. A slot whose worker groups die one after another while they load the model, as those
            do that the system kills for their memory, is given up: Ray Train would start it for ever.
        """
        before = self._slots.get(slot)
        if before is not None and before.incarnation == incarnation:
            return True
        stillborn = before is not None and not before.ready and not before.info and info is None
        self._stillborn[slot] = self._stillborn.get(slot, 0) + 1 if stillborn else 0
        if self._stillborn[slot] == STILLBIRTHS:
            del self._slots[slot], self._stillborn[slot]
            self._unusable[slot] = (
                f"slot {slot}: its worker died {STILLBIRTHS} times while it loaded model and data, as it does where "
                "memory does not hold them"
            )
            return False
        mine = self._slots[slot] = _Slot(incarnation, ready=info is not None, holds=set(holds), doing=list(doing))
        mine.info.update(info or {})
        self._unusable.pop(slot, None)
        if before is not None:
            self._requeue(before, "its worker died")
        self._wake()
        return True

    async def warm(self, slot: int, incarnation: str, info: dict[str, Any]) -> None:
        """The slot has loaded model and data."""
        if (mine := self._mine(slot, incarnation)) is not None:
            mine.ready, mine.info = True, info
            self._wake()

    async def unusable(self, slot: int, incarnation: str, reason: str) -> None:
        """The slot cannot load model or data and leaves. Its work waits for another slot: no trial is to blame."""
        if self._mine(slot, incarnation) is not None:
            self._unusable[slot] = reason
            del self._slots[slot]

    async def beat(self, slot: int, incarnation: str) -> Order:
        """The slot is alive; it is told to stop, or to rejoin, without waiting for its next question."""
        if (mine := self._mine(slot, incarnation)) is not None:
            mine.seen = time.monotonic()
        return Order(stop=self._stopping, rejoin=slot not in self._slots)

    async def take(self, slot: int, incarnation: str, *, at_work: bool = False) -> Order:
        """Wait for work. Trials whose state the slot holds come first, then whatever waits longest.

        Where slots train several trials at once: see `peftsearch.workers.packing.choose`.

        Args:
            slot: Its number.
            incarnation: As `join`.
            at_work: Whether it has work already and asks for more.
        """
        deadline = time.monotonic() + _POLL_SECONDS
        asking = self._mine(slot, incarnation)
        if asking is not None and asking.leased and not at_work:
            # An answer was lost on its way, and Ray asks again: nobody works on what it leased.
            self._queue.extendleft(job for job in reversed(asking.leased.values()) if not job.answer.done())
            asking.leased.clear()
        while True:
            if self._stopping:
                return Order(stop=True)
            if slot not in self._slots:
                return Order(rejoin=True)
            mine = self._mine(slot, incarnation)
            if mine is None:
                return Order(stop=True)
            if mine.leaving:
                return Order(stop=True)
            mine.seen, mine.ready = time.monotonic(), True
            if not at_work:
                mine.doing = []
            jobs = self._choose(mine, at_work=at_work)
            if jobs:
                return self._lease(mine, jobs)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                ended, mine.ended = tuple(mine.ended), []
                return Order(ended=ended)
            settling = self._settled - time.monotonic()
            await self._wait(min(remaining, settling) if settling > 0 else remaining)

    async def finish(self, slot: int, incarnation: str, lease: int, outcome: Outcome, work: Work | None = None) -> None:
        """The outcome of leased work.

        An answer to a lease that was given up is dropped where another slot has the work; where the work still waits
        (its lease was given by a dispatcher that died since), the answer is as good as any.
        """
        mine = self._mine(slot, incarnation)
        job = mine.leased.pop(lease, None) if mine is not None else None
        if job is None and work is not None:
            job = next((queued for queued in self._queue if queued.work == work), None)
            if job is not None:
                self._queue.remove(job)
            elif time.monotonic() < self._settled:
                # Whoever asked the dispatcher that died is about to ask again.
                self._unclaimed.append((work, outcome))
        if mine is not None:
            mine.doing = [doing for doing in mine.doing if doing != work]
        if job is not None and not job.answer.done():
            job.answer.set_result((outcome, job.attempts))
        if not self.sizes.alone:
            # The slot has room for more.
            self._wake()

    async def measured(self, slot: int, incarnation: str, lease: int, size: int) -> None:
        """So many trials like the leased one are worth training at once."""
        mine = self._mine(slot, incarnation)
        if mine is not None and lease in mine.leased:
            key = self.sizes.key(mine.leased[lease].work)
            # Another slot may have found room for fewer meanwhile.
            self.sizes.found[key] = min(size, self.sizes.found.get(key, size))
            self._wake()

    async def fit(self, slot: int, incarnation: str, key: Hashable, size: int, text: str) -> None:
        """No more than so many trials of a kind fit together, and what to tell a person about it."""
        known = self.sizes.of(key) or size
        self.sizes.found[key] = min(known, size)
        await self.note(slot, incarnation, text)

    async def note(self, slot: int, incarnation: str, text: str) -> None:
        """What a person should know, in a sentence; it is told once."""
        if text not in self._notes:
            self._notes.append(text)

    async def set_aside(self, slot: int, incarnation: str, lease: int, *, alone: bool = False) -> None:
        """The slot cannot do leased work beside the rest; its state is written. No trial is to blame.

        Args:
            slot: Its number.
            incarnation: As `join`.
            lease: Of the work.
            alone: Whether no slot can do it beside other work.
        """
        mine = self._mine(slot, incarnation)
        if mine is not None and (job := mine.leased.pop(lease, None)) is not None:
            mine.doing = [doing for doing in mine.doing if doing != job.work]
            job.alone = job.alone or alone
            self._queue.appendleft(job)
            self._wake()

    async def hand_back(self, slot: int, incarnation: str, lease: int) -> None:
        """The slot leaves with its work's state written: others go on with it. No trial is to blame."""
        mine = self._mine(slot, incarnation)
        if mine is not None and lease in mine.leased:
            mine.ready, mine.doing, mine.leaving = False, [], True
            self._requeue(mine, "the study stops" if self._stopping else "its machine was taken away", blame=False)

    async def crashed(self, slot: int, incarnation: str, lease: int, error: str) -> None:
        """The worker group is about to break over its work, and why; it will `join` again."""
        mine = self._mine(slot, incarnation)
        if mine is not None and lease in mine.leased:
            mine.leased[lease].last_error = error

    # --- inside ---

    def _mine(self, slot: int, incarnation: str) -> _Slot | None:
        mine = self._slots.get(slot)
        return mine if mine is not None and mine.incarnation == incarnation else None

    def _choose(self, slot: _Slot, *, at_work: bool) -> list[_Job]:
        if self.sizes.alone:
            job = self._choose_one(slot)
            return [] if job is None else [job]
        now = time.monotonic()
        # A trial whose actor was lost asks again for what is being trained: that comes when it is done.
        trained = {_trial(work) for other in self._slots.values() for work in other.at_work} - {None}
        free = [
            job
            for job in self._queue
            if _trial(job.work) not in trained
            # A slot whose leases ran out is at work all the same.
            and not (at_work and job.alone)
            and (_held(job, slot) or (now >= self._settled and self._is_nobodys(job, slot, now)))
        ]
        if any(job.alone for job in slot.leased.values()):
            return []
        in_hand = slot.at_work
        key = self.sizes.key(in_hand[0]) if in_hand else None
        waiting = [
            Waiting(job, None if job.alone else self.sizes.key(job.work), _held(job, slot), now - job.queued_at)
            for job in free
        ]
        warm = [
            other
            for other in self._slots.values()
            if other is not slot and other.ready and other.seen > now - 3 * _POLL_SECONDS
        ]
        others = Others(
            sum(not other.at_work for other in warm),
            tuple((self.sizes.key(other.at_work[0]), len(other.at_work)) for other in warm if other.at_work),
        )
        return [item.job for item in choose(waiting, key, len(in_hand), self.sizes, others)]

    def _is_nobodys(self, job: _Job, slot: _Slot, now: float) -> bool:
        """Whether no other slot does the work or is about to ask for it."""
        for other in self._slots.values():
            if other is slot:
                continue
            if job.work in other.doing and other.seen > now - self.lease_seconds:
                return False
            if not other.leased and other.seen > now - 3 * _POLL_SECONDS and _held(job, other):
                return False
        return True

    def _choose_one(self, slot: _Slot) -> _Job | None:
        for job in self._queue:
            if _held(job, slot):
                return job
        if time.monotonic() < self._settled:
            return None
        now = time.monotonic()
        return next((job for job in self._queue if self._is_nobodys(job, slot, now)), None)

    def _lease(self, slot: _Slot, jobs: Sequence[_Job]) -> Order:
        leases: list[tuple[int, Work]] = []
        for job in jobs:
            self._queue.remove(job)
            self.meter.waited(time.monotonic() - job.queued_at)
            lease = next(self._leases)
            slot.leased[lease] = job
            leases.append((lease, job.work))
            if isinstance(job.work, Segment):
                for other in self._slots.values():
                    if other is not slot and job.work.trial.key in other.holds:
                        other.holds.discard(job.work.trial.key)
                        other.ended.append(job.work.trial.key)
                slot.holds.add(job.work.trial.key)
        ended, slot.ended = tuple(slot.ended), []
        (lease, work), *beside = leases
        at_once = 1 if jobs[0].alone else self.sizes.of(self.sizes.key(work))
        return Order(lease, work, tuple(beside), at_once, ended)

    def _requeue(self, slot: _Slot, reason: str, *, blame: bool = True) -> None:
        several = len(slot.leased) > 1
        for job in slot.leased.values():
            if job.answer.done():
                continue
            self.meter.retried(reason)
            job.alone = job.alone or (blame and several)
            job.attempts += blame
            if job.attempts > self.max_retries:
                error = f"{reason} {job.attempts} times over it"
                job.answer.set_result(
                    (Failure(f"{error}: {job.last_error}" if job.last_error else error), job.attempts)
                )
            else:
                self._queue.appendleft(job)
        slot.leased.clear()
        slot.holds.clear()
        self._wake()

    async def _watch_leases(self) -> None:
        while not self._stopping:
            await asyncio.sleep(self.lease_seconds / 10)
            for slot in self._slots.values():
                if slot.leased and time.monotonic() - slot.seen > self.lease_seconds:
                    slot.ready = False
                    self._requeue(slot, "its slot was lost")

    async def _measure(self) -> None:
        while not self._stopping:
            held = {number: (slot.ready, len(slot.at_work)) for number, slot in self._slots.items()}
            self.meter.look(len(self._queue), len(self._unusable), held)
            await asyncio.sleep(TICK_SECONDS)

    def _wake(self) -> None:
        self._changed.set()

    async def _wait(self, seconds: float | None = None) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            return


def _held(job: _Job, slot: _Slot) -> bool:
    """Whether the slot has the trial's state in memory."""
    return isinstance(job.work, Segment) and job.work.trial.key in slot.holds


def _trial(work: Work) -> str | None:
    """The key of the trial that a segment is of."""
    return work.trial.key if isinstance(work, Segment) else None
