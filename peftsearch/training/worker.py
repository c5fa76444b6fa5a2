"""A worker's memory across trials: frozen bases, data, and the trials in progress."""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch

from peftsearch.domains import PreparedDomain
from peftsearch.files import StorageError, patiently
from peftsearch.spec import StudyError
from peftsearch.training.attention import leave_out_cudnn
from peftsearch.training.base_model import FrozenBase
from peftsearch.training.compiled import check_compiler, release_layers
from peftsearch.training.distributed import PeerError, WorkerGroup
from peftsearch.training.forgetting import GeneralText, measurable
from peftsearch.training.memory import describe, out_of_memory
from peftsearch.training.packing_key import pack_key
from peftsearch.training.probe import probe
from peftsearch.training.segment import Failure, HandedBack, Outcome, Probe, Segment, SegmentResult, Work, WorkerPlan
from peftsearch.training.session import DivergedError, LeavingError, TrialSession, finished_result
from peftsearch.training.shared_data import fetch
from peftsearch.training.state_writer import WRITER, wait_for_state
from peftsearch.training.threads import counts_up_to, fastest, keep_threads, kept_threads, training_step

log = logging.getLogger(__name__)

_SESSIONS_KEPT = 2
"""Trials kept in memory for each one that is trained at a time; any other is restored from its checkpoint when its turn
comes. Those that are trained alone (some of them copies of the whole base) are trained one at a time in any case."""


class LoneFailureError(RuntimeError):
    """A trial failed for a reason of its own on one worker of a group: the group has to start anew, the trial not."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.error)
        self.failure = failure


class Worker:
    """Does segments, one after another, for one rank of a slot.

    Args:
        plan: The study as workers see it.
        group: This worker's rank and device.
    """

    def __init__(self, plan: WorkerPlan, group: WorkerGroup) -> None:
        self.plan = plan
        self.group = group
        self.must_leave: Callable[[], bool] = bool
        """Asked at every step: whether this worker is to leave, because its machine is about to be taken away or the
        study stops."""
        self.tell: Callable[[str], None] = log.warning
        """Told, in a sentence, what a person should know."""
        torch.set_num_threads(plan.threads)
        leave_out_cudnn(group.device)
        self.at_once = 1
        """Trials that are trained together."""
        self._bases: dict[str, FrozenBase] = {}
        self._domains: dict[tuple[str, str], PreparedDomain] = {}
        self._sessions: OrderedDict[str, TrialSession] = OrderedDict()
        self._general_texts: dict[tuple[str, str], GeneralText] = {}

    def warm_up(self) -> None:
        """Load what the first segment would wait for: the first model with each domain's head, and the data.

        Raises:
            ValueError: Layers are to be compiled, and cannot be here.
        """
        if any(training.compile for training in self.plan.training.values()):
            check_compiler(self.group.device)
        first = next(iter(self.plan.models))
        for model, name in self.plan.domains:
            if model == first:
                self.base(first).common_model(self.domain(model, name))
        if self.plan.measure_threads:
            torch.set_num_threads(self._study_threads(first))

    def _study_threads(self, model: str) -> int:
        """How many threads the study computes with; measured where no worker has done so before.

        All workers of a group measure at once, as they train at once, and the first one's finding counts.
        """
        folder, group = self.plan.study_folder, self.group
        with group.together():
            kept = kept_threads(folder) if group.rank == 0 else None
        kept = group.from_first(kept)
        if kept is not None:
            # More threads than cores wait for one another. Where there are fewer cores than when it was measured, sums
            # round differently from here on.
            return min(kept, self.plan.threads)
        method, training = next(iter(self.plan.training.items()))
        domains = {
            name: (self.domain(of, name), self.plan.budgets[name, method])
            for of, name in self.plan.domains
            if of == model
        }
        found: int = self.plan.threads
        seconds: dict[int, float] = {}
        with group.together():
            try:
                step = training_step(self.base(model), domains, training, group.size)
                found, seconds = fastest(counts_up_to(self.plan.threads), step)
            except (RuntimeError, MemoryError) as error:
                # Trials save memory in ways that the measurement does not: they may fit.
                if not out_of_memory(error):
                    raise
            if group.rank == 0:
                found = keep_threads(folder, found, seconds)
        chosen = group.from_first(found)
        assert chosen is not None
        return chosen

    def base(self, model: str) -> FrozenBase:
        """The frozen base of a model, loaded at first use."""
        if model not in self._bases:
            place = self.plan.models[model]
            self._bases[model] = FrozenBase(
                place.location,
                place.revision,
                self.group.device,
                trust_remote_code=place.trust_remote_code,
                form=place.form,
                group=self.group,
            )
        return self._bases[model]

    def domain(self, model: str, name: str) -> PreparedDomain:
        """A domain's data, tokenised for a model and memory-mapped at first use.

        Raises:
            StorageError: It is not there, or not whole.
        """
        key = (model, name)
        if key not in self._domains:
            where = self.plan.domains[key]
            try:
                self._domains[key] = patiently(where, lambda: fetch(where), "read")
            except StudyError:
                # The trial that asks first is not to blame, as it would be for a ValueError.
                raise StorageError(f"the prepared data of domain {name!r} in {where} is gone or not whole") from None
        return self._domains[key]

    def do(self, work: Work) -> Outcome:
        """Do one piece of work. What is the trial's own fault comes back as a `Failure`; the worker stays usable.

        Raises:
            LoneFailureError: The work failed for a reason of its own, and the other workers wait for this one in vain.
            Exception: The worker is broken.
        """
        return self.guarded(work, lambda: self._attempt(work))

    def guarded(self, work: Work, doing: Callable[[], Outcome]) -> Outcome:
        """Do something for a piece of work; what goes wrong is told apart as `do` does it.

        Raises:
            LoneFailureError, Exception: As `do`.
        """
        outcome = self._outcome(work, doing)
        if isinstance(outcome, Failure):
            # Only now: while an error is handled, its traceback holds on to what the trial had in memory.
            gc.collect()
            if self.group.device.type == "cuda":
                torch.cuda.empty_cache()
        return outcome

    def _attempt(self, work: Work) -> Outcome:
        if isinstance(work, Probe):
            return probe(
                self.base(work.model),
                self.domain(work.model, work.domain),
                # The same for every method.
                next(iter(self.plan.training.values())).evaluation_batch_size,
                self.group,
                "test" if work.read_test else "validation",
                work.names,
                work.prompted,
                self.must_leave,
            )
        return self._segment(work)

    def _outcome(self, work: Work, doing: Callable[[], Outcome]) -> Outcome:
        try:
            return doing()
        except (DivergedError, ValueError) as error:
            self.drop(work)
            return Failure(str(error))
        except StorageError as error:
            self.drop(work)
            failure = Failure(f"{error}: mend that and run the study again, it continues", of_study=True)
            if self.group.size > 1:
                raise LoneFailureError(failure) from error
            return failure
        except LeavingError:
            self.drop(work)
            return HandedBack()
        except PeerError as error:
            self.drop(work)
            return Failure(str(error))
        except Exception as error:
            self.drop(work)
            if out_of_memory(error):
                failure = Failure(describe(error))
                if self.group.all_know(error):
                    return failure
                raise LoneFailureError(failure) from error
            # With several workers the others may wait in a collective: only a new worker group is safe then.
            if isinstance(error, OSError) or not self.group.told(error):
                raise
            log.exception("trial failed")
            return Failure(f"{type(error).__name__}: {error}")

    def forget(self, keys: Iterable[str]) -> None:
        """Drop ended trials from memory."""
        for key in keys:
            session = self._sessions.pop(key, None)
            if session is not None and session.training.compile:
                release_layers(session.model)

    def held(self) -> list[str]:
        """Keys of the trials that are in memory."""
        return list(self._sessions)

    def drop(self, work: Work) -> None:
        """Forget a trial's state in memory."""
        if isinstance(work, Segment):
            self.forget([work.trial.key])

    def close(self) -> None:
        """Drop every trial from memory, once the last state is in its storage; before the worker's process group is
        destroyed.

        Ray Train kills a worker whose train loop has ended, whatever threads it has.

        A DDP reducer that outlives `destroy_process_group` has the group's last reference: its destructor then waits,
        with the GIL held, for gloo's threads, which may wait for the GIL to drop a tensor, and the process hangs
        (https://github.com/pytorch/pytorch/issues/56297).
        """
        try:
            WRITER.wait()
        except StorageError as error:  # its trial goes on from the state before, and says so where it cannot
            log.warning("%s", error)
        self._sessions.clear()
        # Models and what wraps them refer to one another.
        gc.collect()

    def opened(self, segment: Segment) -> TrialSession | SegmentResult:
        """The trial's state, ready for what is left of a segment; or the segment's result, where nothing is.

        Raises:
            Exception: As `do`, before it is told apart.
        """
        key = segment.trial.key
        if key not in self._sessions:
            # The answer to a trial's last segment may have been lost with the driver; its weights were not.
            folder = self.plan.study_folder
            done = None
            if self.group.rank == 0:
                done = patiently(folder, lambda: finished_result(folder, segment.trial), "read")
            done = self.group.from_first(done)
            if done is not None and (done.step == segment.to_step or done.stopped):
                return done
        session = self._session(segment)
        session.must_leave = self.must_leave
        if session.last is not None and session.last.step == segment.to_step:
            return session.last
        return session

    def _segment(self, segment: Segment) -> Outcome:
        session = self.opened(segment)
        if isinstance(session, SegmentResult):
            return session
        for step in session.owed(segment.to_step):
            session.catch_up(step)
        result = session.run(segment.to_step, final=segment.final, read_test=segment.read_test)
        if segment.final or result.stopped:
            self.drop(segment)
        return result

    def _session(self, segment: Segment) -> TrialSession:
        number, key = segment.trial.number, segment.trial.key
        session = self._sessions.get(key)
        if session is not None and session.step <= segment.to_step:
            self._sessions.move_to_end(key)
            return session
        session = self.new_session(segment)
        session.tell = self.tell
        self._wait_for_state(session, segment)
        # Where no state is left of those up to the segment's end, because they were damaged, or because a trial whose
        # actor was lost is asked for an earlier step, it is trained from its start: that gives the same numbers.
        session.resume(segment.to_step)
        if len(set(self.group.gather(session.step))) > 1:
            raise OSError(f"the workers read different checkpoints of trial {number}: is the storage shared?")
        self._sessions[key] = session
        self._make_room()
        return session

    def _wait_for_state(self, session: TrialSession, segment: Segment) -> None:
        """The worker that answered the trial's last segment may still be writing its state."""
        if segment.answered and self.group.rank == 0:
            patiently(session.folder, lambda: wait_for_state(session.folder, segment.answered), "read")
        # Nobody of the group looks for the state before the first has seen it.
        self.group.from_first(None)

    def _make_room(self) -> None:
        """Forget the trials that were not trained for longest, beyond those that are kept."""
        packed: list[str] = []
        alone: list[str] = []
        for key, session in self._sessions.items():
            packs = self.at_once == 1 or pack_key(self.plan, Segment(session.plan, session.step)) is not None
            (packed if packs else alone).append(key)
        self.forget([*alone[:-_SESSIONS_KEPT], *packed[: -_SESSIONS_KEPT * self.at_once]])

    def new_session(self, segment: Segment) -> TrialSession:
        """A trial before its first step, which is not kept.

        Raises:
            ValueError: The configuration does not fit the model.
        """
        trial = segment.trial
        return TrialSession(
            trial,
            self.base(trial.model),
            self.domain(trial.model, trial.domain),
            self.plan.training[trial.method],
            self.plan.budgets[trial.domain, trial.method],
            self.group,
            self.plan.study_folder,
            self._general_text(trial.model, trial.domain),
        )

    def _general_text(self, model: str, domain: str) -> GeneralText | None:
        """What forgetting is measured on; None where it is not measured."""
        prepared = self.domain(model, domain)
        if not self.plan.general_texts or not measurable(prepared.head):
            return None
        key = (model, domain)
        if key not in self._general_texts:
            size = next(iter(self.plan.training.values())).evaluation_batch_size
            self._general_texts[key] = GeneralText(self.plan.general_texts, self.base(model), prepared, size)
        return self._general_texts[key]
