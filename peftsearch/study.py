"""The Python API: everything that the command line does is one call here.

Example:
    >>> from peftsearch import Study
    >>> study = Study.from_file("studies/quickstart.yaml")
    >>> fronts = study.run()
    >>> study.export("adapters", pick="knee")
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsearch import results
from peftsearch.files import delete_tree, persist, place
from peftsearch.fork import find_origin, shared_cells, take_over_into
from peftsearch.handle import StudyHandle
from peftsearch.holder import hold
from peftsearch.preparing import (
    check_ledger,
    check_same_data,
    check_unchanged,
    make_plan,
    plan_facts,
    save_facts,
    write_files,
)
from peftsearch.saved import as_saved, data_folder, now, specification
from peftsearch.spec import (
    StudyError,
    StudyFacts,
    TrialRecord,
    TrialState,
    hide_secrets,
)
from peftsearch.spec.changes import compare
from peftsearch.storage import (
    mendable,
    reaching,
    read_json,
)
from peftsearch.study_ledger import driver_ledger
from peftsearch.study_mlflow import ToMlflow, artifact_location, open_tracker, sync, write_reports
from peftsearch.tracking.ledger import hide_password
from peftsearch.warm_start import warm_start

if TYPE_CHECKING:
    from peftsearch.events import StudyEvents
    from peftsearch.export import ExportedAdapter
    from peftsearch.export.convert import Form
    from peftsearch.frontier import Frontier, Trials
    from peftsearch.search.plan import StudyPlan


class Study(StudyHandle):
    """One study: its specification, its folder, and what is done with them.

    Use `from_file` to run a study, `open` to read one.

    Args:
        spec: The checked specification.
        folder: Where the study's files are.
        file: The study file, where there is one at hand.
    """

    # --- before and while it runs ---

    def validate(self) -> StudyPlan:
        """Check the study against methods, models and data, and prepare its data; nothing is trained.

        Returns:
            The plan. What could not be checked here, because a model or data is not at hand, is its ``unchecked``.

        Raises:
            StudyError: The first thing that is wrong; or the storage has a study of this name that was begun with
                other settings or other data.
        """
        check_unchanged(self)
        plan = make_plan(self, partial=True)
        check_same_data(self, plan)
        return plan

    def extending(self) -> tuple[str, ...] | None:
        """What the study, which exists, gets more of with this file, in words; None where there is none yet."""
        if not self.folder.exists():
            return None
        return compare(as_saved(specification(read_json(self.folder.spec), self.folder)), as_saved(self.spec)).extending

    def run(
        self,
        *,
        address: str | None = None,
        events: StudyEvents | None = None,
        fork: str | None = None,
        at_once: Callable[[], None] | None = None,
    ) -> Frontier:
        """Run the study, or continue it where it stands; what has finished is not run again.

        Args:
            address: Address of a Ray cluster; a cluster of this machine is started where absent.
            fork: Another study of the same storage. Before this one begins, it takes over that one's trials, in the
                cells whose model, data, method, training and search are the same in both (`peftsearch.fork`).
            events: Told of progress.
            at_once: Called in the main thread at a second Ctrl-C; KeyboardInterrupt is raised where absent.

        Returns:
            The front of every domain.

        Raises:
            StudyError: The study file is wrong, has changed since the study began, or another driver runs it, or has
                taken it over from this one.
            StudyInterrupted: Ctrl-C or SIGTERM; the same call continues the study.
            RuntimeError: The ledger's database or the workers stayed away for long.
        """
        from peftsearch.driver import run_study
        from peftsearch.events import SilentEvents
        from peftsearch.stopping import StopRequest, interrupt, stop_on_signals

        events = events or SilentEvents()
        stopped = StopRequest()
        with stop_on_signals(stopped, events.stopping, at_once or interrupt):
            events.phase("checking the study and preparing its data")
            check_unchanged(self)
            origin = find_origin(self, fork)
            plan = make_plan(self, partial=False)
            check_same_data(self, plan)
            for warning in plan.warnings:
                events.warning(warning)
            guesses, found_in = warm_start(self)
            if origin is not None:
                # Refused before the study has a folder.
                shared_cells(origin, as_saved(self.spec), plan_facts(self, plan))
            check_ledger(self)
            self.folder.create()
            with (
                mendable(),
                hold(self.folder.path, self.name, lost=stopped.set, waiting=events.phase, stopped=stopped) as lease,
            ):
                facts = plan_facts(self, plan)
                if found_in:
                    facts.provenance["warm_start"] = found_in
                if origin is not None:
                    facts.provenance["forked_from"] = f"{origin.name} ({origin.id})"
                write_files(self, origin)
                save_facts(self, facts)

                def save_while_held(known: StudyFacts) -> None:
                    if lease.lost is None:
                        save_facts(self, known)

                with closing(driver_ledger(self, plan, lease)) as ledger:
                    notes = self.folder.path / "driver.json"
                    persist(notes, lambda: lease.note(state="running", since=now(), error=None))
                    if origin is not None:
                        events.phase(f"taking over the trials of {origin.name}")
                        take_over_into(self, origin, facts, ledger)
                    tracker = open_tracker(self, facts, ledger)
                    hurried = False
                    try:
                        if tracker is not None:
                            for record in ledger.records:
                                tracker.update(record)
                        observers = [ToMlflow(tracker)] if tracker else []
                        try:
                            run_study(
                                plan,
                                ledger,
                                facts,
                                self.folder.path,
                                address,
                                events,
                                observers,
                                save_while_held,
                                stopped,
                                guesses,
                                backlog=lambda: tracker.backlog if tracker else 0,
                            )
                        except StudyError as error:
                            assert self.file is not None
                            raise StudyError(self.file.explain(error)) from None
                        lease.check()
                        if not stopped():
                            self._discard_dominated_weights(ledger.records, facts)
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
                                write_reports(tracker, ledger.records, facts)
                            if not tracker.close(timeout=patience):
                                events.warning(
                                    f"MLflow at {self.public_tracking_uri} could not be brought up to date; "
                                    f"run 'peftsearch sync {self.name}' when it is back"
                                )
                    state = "interrupted" if stopped() else "finished"
                    persist(notes, lambda: lease.note(state=state, until=now()))
        if stopped():
            raise StudyInterrupted(self.name)
        return self.frontier()

    # --- afterwards, or from another terminal ---

    def trials(self) -> Trials:
        """Every trial of the ledger, whatever its state: a list, with ``to_pandas`` and ``to_arrow``."""
        return results.trials(self)

    def frontier(self, domain: str | None = None) -> Frontier:
        """The front of each domain, or of one: a dict, with ``to_pandas`` and ``to_arrow``; a notebook shows it as the
        Pareto page.

        Raises:
            StudyError: The study has no such domain.
        """
        return results.frontier(self, domain)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """In a notebook: the Pareto page of what the ledger holds by now."""
        from peftsearch.frontier.notebook import display

        if not self.folder.exists() or read_json(self.folder.facts) is None:
            return {"text/plain": f"The study {self.name!r} has not begun yet: nothing in {self.folder.path}"}
        facts, standing = self.facts(), self.status()
        return display(
            self.trials(),
            facts,
            facts.domains,
            state=standing["state"],
            planned=standing["planned"],
            storage=standing["storage"],
        )

    def status(self) -> dict[str, Any]:
        """Where the study stands, in the shape of ``status --json``.

        ``confirmations.planned`` is None until the search has ended: who the finalists are is not known before.
        """
        return results.status(self)

    def sync(self) -> int:
        """Bring MLflow up to date from the ledger; returns the number of trials.

        Raises:
            StudyError: Tracking is off, or the server cannot be reached.
        """
        return sync(self)

    def export(
        self,
        to: str | os.PathLike[str] | None = None,
        *,
        domain: str | None = None,
        pick: str = "frontier",
        max_parameters: int | None = None,
        min_metric: float | None = None,
        max_latency: float | None = None,
        form: Form = "adapter",
        push: str | None = None,
        private: bool = True,
        register: bool = False,
        register_as: str | None = None,
        tolerance: float | None = None,
        told: Callable[[str], None] | None = None,
    ) -> list[ExportedAdapter]:
        """Pareto-optimal trials as verified PEFT folders; arguments and errors as `peftsearch.export.export_trials`.

        With ``register`` they are versions in MLflow's registry too, of the model ``register_as`` or of the domain's
        name, with the aliases ``best``, ``knee`` and ``smallest``.
        """
        from peftsearch.export import StudyToExport, export_trials
        from peftsearch.export.registry import Registry

        registry = None
        if register or register_as is not None:
            uri = self.mlflow_tracking_uri
            if uri is None:
                raise StudyError(f"the study {self.name!r} has tracking.mlflow: off: there is no registry")
            registry = Registry(uri, artifact_location(self), register_as)

        folder = self.folder.require()
        with reaching(folder.storage):
            saved = read_json(folder.spec)
        study = StudyToExport(
            spec=specification(saved, folder),
            facts=self.facts(),
            records=self.trials(),
            folder=self.folder.path,
            data_folder=data_folder(saved or {}),
            cache=self.folder.cache,
            ledger=hide_password(self.ledger_url),
        )
        return export_trials(
            study,
            None if to is None else place(to),
            domain=domain,
            pick=pick,
            max_parameters=max_parameters,
            min_metric=min_metric,
            max_latency=max_latency,
            form=form,
            push=push,
            private=private,
            registry=registry,
            tolerance=tolerance,
            told=told,
        )

    def report(self, to: str | os.PathLike[str]) -> list[Path]:
        """Write the study's report into a folder, from what the ledger holds by now; see `write_report`.

        Raises:
            StudyError: The folder cannot be written.
        """
        from peftsearch.frontier.report import check_target, write_report

        target = Path(to)
        check_target(target)
        status = self.status()
        return write_report(
            target, self.trials(), self.facts(), self.spec, self.folder.path, status["state"], status["planned"]
        )

    def _discard_dominated_weights(self, records: list[TrialRecord], facts: StudyFacts) -> None:
        """Keep the weights of the trials that can be exported: those on the front of their domain and model, and those
        that were confirmed.

        A trial that is dominated stays so, whatever is tried later; full fine-tuning would otherwise fill the disk.
        """
        from peftsearch.frontier import front

        kept: set[int] = set()
        for name, domain in facts.domains.items():
            for model in facts.models:
                own = [record for record in records if record.domain == name and record.model == model]
                kept |= {record.number for record in front(own, domain.direction)}
                kept |= {record.number for record in own if record.confirmed}
        for record in records:
            if record.state is not TrialState.RUNNING and record.number not in kept:
                delete_tree(self.folder.path / "trials" / f"{record.number:05d}")


class StudyInterrupted(KeyboardInterrupt):
    """A study was stopped on request and can be continued.

    Args:
        study: Its name.
    """

    def __init__(self, study: str) -> None:
        super().__init__(f"the study {study!r} was stopped; the same command continues it")
        self.study = study
