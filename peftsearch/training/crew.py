"""The trials that a worker trains at once: they join and leave between steps, each with its own end."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from random import Random

import torch

from peftsearch.files import StorageError
from peftsearch.methods import METHODS
from peftsearch.training.memory import describe, out_of_memory
from peftsearch.training.packing import MemberError, NotPackableError, Pack
from peftsearch.training.packing.host import Host
from peftsearch.training.packing.measure import measured_size
from peftsearch.training.packing_key import pack_key
from peftsearch.training.segment import Failure, HandedBack, Outcome, Segment, SegmentResult, SetAside, Work
from peftsearch.training.session import LeavingError, Part, TrialSession
from peftsearch.training.worker import Worker

log = logging.getLogger(__name__)

_DRAWS = 16
"""Configurations that are drawn at most for each trial that is measured beside another."""

_MORE = 10**6
"""Seeds of random numbers after a pack: not those of any trial's own beginning."""


@dataclass
class Member:
    """A segment in training.

    Attributes:
        lease: By which its slot knows it.
        segment: What is to be done.
        session: The trial.
        stops: Evaluations to be passed by, and the segment's end.
        done: What is done since the last stop.
        peak_memory: Bytes, on a GPU; 0 elsewhere.
        steps: How many it has made here.
        shared: These, each times the number of trials that made it.
    """

    lease: int
    segment: Segment
    session: TrialSession
    stops: list[int]
    done: Part = field(default_factory=Part)
    peak_memory: int = 0
    steps: int = 0
    shared: int = 0


class Crew:
    """Trains segments of several trials in step with each other, on one worker.

    All of them have the same `pack_key`. A trial whose segment ends is evaluated by itself while the others wait, and
    its outcome is handed out; the others go on, with whoever has joined since.

    Args:
        worker: Holds base, data and trials.
        tell: Told, in a sentence, what a person should know; and by its key, how many trials of a kind fit together
            from now on.
    """

    def __init__(self, worker: Worker, tell: Callable[[Hashable, int, str], None]) -> None:
        self.worker = worker
        self._tell = tell
        self.members: list[Member] = []
        self._pack: Pack | None = None
        self._steps, self._began = 0, 0.0
        self._resident = 0
        self._hosts: dict[Hashable, Host] = {}
        self._ready: dict[int, Outcome] = {}
        self._ended: list[Member] = []
        self._checked: set[Hashable] = set()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.members and not self._ready

    def size(self, segment: Segment) -> int | None:
        """How many trials like a segment's are worth training at once; measured here, with it and others of its kind.

        None where that trial is to be done by itself, for a reason of its own that says nothing of others.
        """
        worker, trial = self.worker, segment.trial
        # Where leases ran out there may be one, over the same host.
        self._open()

        size: int | None = None
        try:
            size, why = measured_size(
                lambda number: self._beside(segment, number), self._host(segment), worker.group.device
            )
        except StorageError:
            raise
        except NotPackableError as error:
            size, why = 1 if error.session is None else None, str(error)
        except Exception as error:
            # The trial itself will say what is wrong with it.
            why = describe(error)
        _give_back(worker.group.device)
        log.info("trials of %s at once: %s (%s)", trial.domain, "not measured" if size is None else size, why)
        return size

    def _beside(self, segment: Segment, number: int) -> TrialSession:
        """A trial such as may be in a pack with a segment's: of any method of its kind, drawn from the study's ranges.

        The first is the segment's own; so are others in whose place nothing that fits is drawn.
        """
        worker, plan = self.worker, self.worker.plan
        mine = replace(segment, trial=replace(segment.trial, number=-1 - number))
        key, generator = pack_key(plan, segment), Random(number)
        for _ in range(_DRAWS if number and plan.spaces else 0):
            method = generator.choice(sorted(plan.spaces))
            drawn = plan.spaces[method].draw(generator)
            other = replace(mine, trial=replace(mine.trial, method=method, hyperparameters=drawn))
            try:
                METHODS[method].check(drawn)
                if pack_key(plan, other) == key:
                    return worker.new_session(other)
            except ValueError:
                # Such a trial fails when it is its turn; here it is another's.
                continue
        return worker.new_session(mine)

    def join(self, lease: int, segment: Segment) -> None:
        """Let a segment's trial train with the others, from the next step on.

        Where the others are of another kind (their leases ran out, so that nobody knew of them), it is set aside.
        """
        self.let_go(segment)
        plan = self.worker.plan
        if self.members and pack_key(plan, segment) != pack_key(plan, self.members[0].segment):
            self._ready[lease] = SetAside()
            return
        found: list[TrialSession] = []

        def opened() -> Outcome:
            session = self.worker.opened(segment)
            if isinstance(session, SegmentResult):
                return session
            found.append(session)
            return SetAside()

        outcome = self.worker.guarded(segment, opened)
        if not found:
            self._ready[lease] = outcome
            return
        session = found[0]
        passed = session.owed(segment.to_step)
        if session.step >= next(iter(passed), segment.to_step):
            # The steps are done and their evaluation was lost.
            self._ready[lease] = self.worker.do(segment)
            return
        self._open()
        self.members.append(Member(lease, segment, session, [*passed, segment.to_step], session.part))
        session.part = Part()

    def let_go(self, work: Work) -> None:
        """A trial is handed out a second time: whoever was training it here gives it up, and what it has not written.

        That happens to a slot that was silent for longer than its leases last, and lives.
        """
        if not isinstance(work, Segment):
            return
        for member in [member for member in self.members if member.segment.trial.key == work.trial.key]:
            self._open()
            self.members.remove(member)
            self._ended = [ended for ended in self._ended if ended is not member]
            self.worker.drop(member.segment)
            self._ready[member.lease] = SetAside()

    def done(self, lease: int, outcome: Outcome) -> None:
        """Hand out, with the next outcomes, that of work that was done by itself."""
        self._ready[lease] = outcome

    def advance(self) -> dict[int, Outcome]:
        """Train one step, or make one evaluation; returns what has come to its end, by lease.

        Trials whose segments end together are evaluated in turn, so that the first one's next segment can be asked for
        while the others are.
        """
        if self._ready:
            ready, self._ready = self._ready, {}
            if any(isinstance(outcome, HandedBack) for outcome in ready.values()):
                # One that was trained by itself: the worker leaves, and so do the others.
                ready |= self._leave()
            return ready
        if self.worker.must_leave():
            return self._leave()
        if self._ended:
            member = self._ended.pop(0)
            outcome = self._stop(member)
            if outcome is None:
                return {}
            self.members.remove(member)
            return {member.lease: outcome}
        if not self.members:
            return {}
        trouble = self._step()
        if trouble is not None:
            return self._mend(trouble)
        self._ended = [member for member in self.members if member.session.step >= member.stops[0]]
        if self._ended:
            self._open()
        return {}

    # --- inside ---

    def _step(self) -> Exception | None:
        """One step of all; what went wrong, without what it holds on to."""
        try:
            if self._pack is None:
                self._close()
            assert self._pack is not None
            self._pack.step()
        except Exception as error:
            error.__traceback__ = None
            error.__context__ = None
            return error
        self._steps += 1
        return None

    def _close(self) -> None:
        """Put the members into one pack."""
        device = self.worker.group.device
        sessions = [member.session for member in self.members]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._resident = torch.cuda.memory_allocated(device)
        first = self.members[0].segment
        pack = Pack(sessions, self._host(first))
        kind = (pack_key(self.worker.plan, first), frozenset(session.plan.method for session in sessions))
        if len(sessions) > 1 and kind not in self._checked:
            try:
                pack.check()
            except BaseException:
                pack.close()
                raise
            self._checked.add(kind)
        self._pack, self._steps, self._began = pack, 0, time.perf_counter()

    def _open(self) -> None:
        """Take the pack apart; what its members have done is theirs."""
        pack, self._pack = self._pack, None
        if pack is None:
            return
        pack.close()
        losses = dict(zip(map(id, pack.sessions), zip(pack.total.tolist(), pack.examples, strict=True), strict=True))
        seconds = (time.perf_counter() - self._began) / len(self.members)
        device = self.worker.group.device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        share = self._resident + max(0, peak - self._resident) // len(self.members)
        for member in self.members:
            loss, examples = losses[id(member.session)]
            done = member.done
            member.done = Part(done.loss + loss, done.examples + examples, done.seconds + seconds)
            member.steps += self._steps
            member.shared += self._steps * len(self.members)
            member.peak_memory = max(member.peak_memory, share if peak else 0)
            if self._steps:
                member.session.draw_anew(member.session.plan.seed * 65_537 + _MORE + member.session.step)

    def _stop(self, member: Member) -> Outcome | None:
        """A member is at an evaluation: its outcome, or None where it only passes by."""
        outcome = self.worker.guarded(member.segment, lambda: self._evaluated(member))
        if isinstance(outcome, SetAside):
            return None
        if isinstance(outcome, SegmentResult) and (member.segment.final or outcome.stopped):
            self.worker.drop(member.segment)
        return outcome

    def _evaluated(self, member: Member) -> Outcome:
        session, segment, done = member.session, member.segment, member.done
        stop = member.stops[0]
        session.check_loss(done.loss / max(1, done.examples), stop)
        last = stop == segment.to_step
        if last or session.training.patience is not None:
            # Early stopping goes by every evaluation.
            try:
                result = session.conclude(
                    done,
                    final=segment.final and last,
                    read_test=segment.read_test and last,
                    peak_memory=member.peak_memory or None,
                )
            except LeavingError:
                # All leave next, this one with its evaluation still to be made.
                return SetAside()
            if last or result.stopped:
                return replace(result, together=round(member.shared / max(1, member.steps), 3))
        member.stops.pop(0)
        member.done = Part()
        return SetAside()

    def _leave(self) -> dict[int, Outcome]:
        """The worker must leave: everybody's state is written."""
        return {member.lease: self._set_aside(member, HandedBack()) for member in self._all_out()}

    def _all_out(self) -> list[Member]:
        self._open()
        members, self.members, self._ended = self.members, [], []
        return members

    def _set_aside(self, member: Member, outcome: Outcome) -> Outcome:
        def write() -> Outcome:
            member.session.part = member.done
            member.session.pause()
            return outcome

        return self.worker.guarded(member.segment, write)

    def _mend(self, trouble: Exception) -> dict[int, Outcome]:
        """After a step that failed, and that nobody has made: whoever is to blame leaves, or fewer go on."""
        if isinstance(trouble, StorageError):
            raise trouble
        if isinstance(trouble, MemberError):
            self._open()
            member = next(member for member in self.members if member.session is trouble.session)
            self.members.remove(member)
            self.worker.drop(member.segment)
            return {member.lease: Failure(describe(trouble.error))}
        if isinstance(trouble, NotPackableError) and trouble.session is not None:
            self._open()
            member = next(member for member in self.members if member.session is trouble.session)
            self.members.remove(member)
            log.info("trial %s is trained alone: %s", member.segment.trial.key, trouble)
            return {member.lease: self._set_aside(member, SetAside(alone=True))}
        members = self._all_out()
        first = members[0].segment
        key = pack_key(self.worker.plan, first)
        _give_back(self.worker.group.device)
        if out_of_memory(trouble) and len(members) > 1:
            fewer = len(members) // 2
            self._tell(
                key,
                fewer,
                f"{len(members)} trials of {first.trial.domain} at once do not fit into memory: {fewer} from now on "
                f"({describe(trouble).partition(';')[0]})",
            )
            self.members = members[:fewer]
            return {member.lease: self._set_aside(member, SetAside()) for member in members[fewer:]}
        if not out_of_memory(trouble) and (len(members) > 1 or isinstance(trouble, NotPackableError)):
            # What a pack cannot do, each trial does by itself; or says itself what is wrong.
            reason = f"{type(trouble).__name__}: {trouble}" if not isinstance(trouble, NotPackableError) else trouble
            self._tell(key, 1, f"trials of {first.trial.domain} are trained one at a time: {reason}")
        if len(members) > 1:
            self._ready |= {member.lease: self._set_aside(member, SetAside()) for member in members[1:]}
        alone = members[0]
        alone.session.part = alone.done
        self._ready[alone.lease] = self.worker.do(alone.segment)
        return self.advance()

    def _host(self, segment: Segment) -> Host:
        trial = segment.trial
        quantization = METHODS[trial.method].quantization(trial.hyperparameters)
        key = (trial.model, trial.domain, quantization)
        if key not in self._hosts:
            base, domain = self.worker.base(trial.model), self.worker.domain(trial.model, trial.domain)
            self._hosts[key] = Host(base, domain, quantization)
        return self._hosts[key]


def _give_back(device: torch.device) -> None:
    """Memory that nobody has any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
