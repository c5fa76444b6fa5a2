"""Running a study: from checking it to its fronts, with ledger, lease and MLflow in order whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from peftsearch.files import persist
from peftsearch.fork import find_origin, shared_cells, take_over_into
from peftsearch.handle import StudyHandle
from peftsearch.holder import hold
from peftsearch.kept_weights import KeptWeights
from peftsearch.preparing import (
    check_ledger,
    check_same_data,
    check_unchanged,
    make_plan,
    plan_facts,
    save_facts,
    write_files,
)
from peftsearch.ray_access import check_address
from peftsearch.results import frontier
from peftsearch.saved import as_saved, now
from peftsearch.spec import StudyError, StudyFacts, hide_secrets
from peftsearch.storage import mendable
from peftsearch.study_ledger import driver_ledger
from peftsearch.study_mlflow import ToMlflow, open_tracker, write_reports
from peftsearch.warm_start import warm_start

if TYPE_CHECKING:
    from peftsearch.events import StudyEvents
    from peftsearch.frontier import Frontier
    from peftsearch.search.run import Observer


class StudyInterrupted(KeyboardInterrupt):
    """A study was stopped on request and can be continued.

    Args:
        study: Its name.
    """

    def __init__(self, study: str) -> None:
        super().__init__(f"the study {study!r} was stopped; the same command continues it")
        self.study = study


def run(
    study: StudyHandle,
    *,
    address: str | None = None,
    events: StudyEvents | None = None,
    fork: str | None = None,
    at_once: Callable[[], None] | None = None,
) -> Frontier:
    """Run a study, or continue it; arguments, result and errors as `peftsearch.study.Study.run`."""
    from peftsearch.driver import run_study
    from peftsearch.events import SilentEvents
    from peftsearch.stopping import StopRequest, interrupt, stop_on_signals

    if address not in (None, "local"):
        check_address(str(address))
    events = events or SilentEvents()
    stopped = StopRequest()
    with stop_on_signals(stopped, events.stopping, at_once or interrupt):
        events.phase("checking the study and preparing its data")
        check_unchanged(study)
        origin = find_origin(study, fork)
        plan = make_plan(study, partial=False)
        check_same_data(study, plan)
        for warning in plan.warnings:
            events.warning(warning)
        begins_with = warm_start(study)
        if origin is not None:
            # Refused before the study has a folder.
            shared_cells(origin, as_saved(study.spec), plan_facts(study, plan))
        check_ledger(study)
        study.folder.create()
        with (
            mendable(),
            hold(study.folder.path, study.name, lost=stopped.set, waiting=events.phase, stopped=stopped) as lease,
        ):
            facts = plan_facts(study, plan)
            if begins_with is not None:
                facts.provenance["warm_start"] = f"{begins_with.study}: {begins_with.trials}"
            if origin is not None:
                facts.provenance["forked_from"] = f"{origin.name} ({origin.id})"
            write_files(study, origin, begins_with)
            save_facts(study, facts)

            def save_while_held(known: StudyFacts) -> None:
                if lease.lost is None:
                    save_facts(study, known)

            with closing(driver_ledger(study, plan, lease)) as ledger:
                notes = study.folder.path / "driver.json"
                persist(notes, lambda: lease.note(state="running", since=now(), until=None, error=None))
                if origin is not None:
                    events.phase(f"taking over the trials of {origin.name}")
                    take_over_into(study, origin, facts, ledger)
                tracker = open_tracker(study, facts, ledger, lease)
                hurried = False
                try:
                    if tracker is not None:
                        for record in ledger.records:
                            tracker.update(record)
                    with KeptWeights(study.folder.path, facts, ledger.records) as weights:
                        observers: list[Observer] = [weights]
                        if tracker is not None:
                            observers.append(ToMlflow(tracker, lambda: ledger.records, facts, study.folder.option))
                        try:
                            run_study(
                                plan,
                                ledger,
                                facts,
                                study.folder.path,
                                address,
                                events,
                                observers,
                                save_while_held,
                                stopped,
                                begins_with.guesses if begins_with else None,
                                backlog=lambda: tracker.backlog if tracker else 0,
                            )
                        except StudyError as error:
                            assert study.file is not None
                            raise StudyError(study.file.explain(error)) from None
                        lease.check()
                        if not stopped():
                            weights.sweep(ledger.records)
                except BaseException as error:
                    hurried = isinstance(error, KeyboardInterrupt) or lease.lost is not None
                    # Where the ledger could not be written, Ray Tune has wrapped that up in a traceback.
                    why = ledger.failure or error
                    with contextlib.suppress(OSError):
                        lease.note(state="interrupted", until=now(), error=hide_secrets(str(why)) or None)
                    if why is not error:
                        raise why from error
                    raise
                finally:
                    if tracker is not None:
                        events.phase("writing MLflow")
                        # Somebody who wants to stop does not wait long: the next run, or sync, writes the rest.
                        patience = 0.0 if hurried else 15.0 if stopped() else 120.0
                        if not hurried:
                            # The last runs' ids first: the reports hold them.
                            tracker.flush(patience / 2)
                            for sentence in write_reports(tracker, ledger.records, facts, study.folder.option):
                                events.warning(sentence)
                        if not tracker.close(timeout=patience):
                            events.warning(
                                f"MLflow at {study.public_tracking_uri} could not be brought up to date; "
                                f"run 'peftsearch sync {study.name}' when it is back"
                            )
                state = "interrupted" if stopped() else "finished"
                persist(notes, lambda: lease.note(state=state, until=now()))
    if stopped():
        raise StudyInterrupted(study.name)
    return frontier(study)
