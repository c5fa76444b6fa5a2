"""The Python API: everything that the command line does is one call here.

Example:
    >>> from peftsearch import Study
    >>> study = Study.from_file("studies/quickstart.yaml")
    >>> fronts = study.run()
    >>> study.export("adapters", pick="knee")
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsearch import results
from peftsearch.files import Place, writable_place
from peftsearch.handle import StudyHandle
from peftsearch.preparing import check_same_data, check_unchanged, make_plan
from peftsearch.running import StudyInterrupted, run
from peftsearch.saved import as_saved, data_folder, specification
from peftsearch.spec import StudyError, first_line
from peftsearch.spec.changes import compare
from peftsearch.storage import list_studies, reaching, read_json
from peftsearch.study_mlflow import artifact_location, sync
from peftsearch.tracking.ledger import hide_password

if TYPE_CHECKING:
    from peftsearch.events import StudyEvents
    from peftsearch.export import ExportedAdapter
    from peftsearch.export.convert import Form
    from peftsearch.frontier import Frontier, Trials
    from peftsearch.search.plan import StudyPlan

__all__ = ["Study", "StudyInterrupted", "read_statuses"]


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
        return run(self, address=address, events=events, fork=fork, at_once=at_once)

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
            storage=self.folder.option,
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
        method: str | None = None,
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
        left_out: Callable[[str], None] | None = None,
    ) -> list[ExportedAdapter]:
        """Pareto-optimal trials as verified PEFT folders; arguments and errors as `peftsearch.export.export_trials`.

        With ``register`` they are versions in MLflow's registry too, of the model ``register_as`` or of the domain's
        name, with the aliases ``best``, ``knee`` and ``smallest``. The trials' runs in MLflow have tags that say where
        the exports are, if MLflow can be reached.
        """
        from peftsearch.export import StudyToExport, export_trials
        from peftsearch.export.noted import note_exports
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
            data_folder=data_folder(saved or {}, self.folder),
            cache=self.folder.cache,
            ledger=hide_password(self.ledger_url),
        )
        exported = export_trials(
            study,
            None if to is None else writable_place(to),
            domain=domain,
            method=method,
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
            left_out=left_out,
        )
        # A store that was copied into an object store holds no runs of it there.
        with suppress(StudyError):
            uri = self.mlflow_tracking_uri
            runs = {str(item.record.mlflow_run_id): item.tags() for item in exported if item.record.mlflow_run_id}
            why = None if uri is None else note_exports(uri, runs)
            if why is not None and told is not None:
                told(why)
        return exported

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


def read_statuses(storage: Place) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What `Study.status` says of each study in a storage, and why the others cannot be read, by their names."""
    statuses: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    for name in list_studies(storage):
        try:
            statuses.append(Study.open(name, storage).status())
        except Exception as error:  # whatever is wrong with one study, the others are still there
            unreadable[name] = first_line(error)
    return statuses, unreadable
