"""Before a study runs: it is checked and planned, and what is known of it is written down."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from peftsearch.files import persist, write_bytes
from peftsearch.fork import Origin
from peftsearch.handle import StudyHandle
from peftsearch.saved import SUBMITTED_FROM, as_saved, known_facts, now, specification
from peftsearch.spec import THREADS, StudyError, StudyFacts, hide_secrets, without_passwords
from peftsearch.spec.changes import compare
from peftsearch.storage import check_storage, read_json, write_json
from peftsearch.study_ledger import open_ledger
from peftsearch.warm_start import WarmStart, warm_start

if TYPE_CHECKING:
    from peftsearch.search.plan import StudyPlan


def check_unchanged(study: StudyHandle) -> None:
    """A study goes on only with the question that it began with.

    Raises:
        StudyError: Shows what has changed, and says what to do; or the storage cannot be used.
    """
    check_databases(study)
    check_storage(study.folder.storage)
    if study.folder.exists():
        before = specification(read_json(study.folder.spec), study.folder)
        compare(as_saved(before), as_saved(study.spec)).check(study.name)


def check_databases(study: StudyHandle) -> None:
    """See that the storage can hold what is to be in it.

    Raises:
        StudyError: It is an object store, and ledger or MLflow would be SQLite in it.
    """
    try:
        # Both say so, where they are asked.
        _ = study.ledger_url, study.mlflow_tracking_uri
    except StudyError as error:
        raise StudyError(study.file.explain(error) if study.file else str(error)) from None


def check_ledger(study: StudyHandle) -> None:
    """See that a database elsewhere answers, before the study has a folder that remembers its address.

    Raises:
        StudyError: It does not.
    """
    if study.spec.tracking.ledger == "auto":
        return
    try:
        open_ledger(study).close()
    except StudyError as error:
        raise StudyError(study.file.explain(error) if study.file else str(error)) from None


def make_plan(study: StudyHandle, *, partial: bool) -> StudyPlan:
    """The study's plan, with its data prepared.

    Args:
        partial: Whether models and data that are not at hand here become the plan's ``unchecked``; else they are
            an error.

    Raises:
        StudyError: The first thing that is wrong, with its place in the study file; or there is no file.
    """
    from peftsearch.search.plan import plan_study

    if study.file is None:
        raise StudyError("this study was opened by name: load it from its file to validate or run it")
    try:
        warm_start(study)
        begun = read_json(study.folder.facts) is not None
        return plan_study(study.file, study.folder.cache, partial=partial, begun=begun)
    except StudyError as error:
        raise StudyError(study.file.explain(error)) from None


def check_same_data(study: StudyHandle, plan: StudyPlan) -> None:
    """The study goes on with the texts and weights that it began with.

    Raises:
        StudyError: A file has changed; says which.
    """
    from peftsearch.domains.expected import UNCHECKED

    before = read_json(study.folder.facts)
    if before is None:
        return
    known = known_facts(before, study.folder)
    advice = "restore it, or start a new study with --name"
    for name, domain in ((name, item.facts()) for name, item in plan.domains.items()):
        old = known.domains.get(name)
        # What is not at hand here was not read: a run does not get this far.
        if old is not None and domain.fingerprint not in (old.fingerprint, UNCHECKED):
            rows = [split for split in old.rows if old.rows[split] != domain.rows.get(split)]
            others = f"; other numbers of examples in {', '.join(rows)}" if rows else ""
            others += f"; it was {old.source} then" if old.source != domain.source else ""
            raise StudyError(
                f"the data of domain {name!r} ({domain.source}) has changed since the study {study.name!r} began"
                f"{others}: {advice}"
            )
    for path, model in plan.model_facts.items():
        old_model = known.models.get(path)
        if old_model is not None and old_model.fingerprint != model.fingerprint:
            raise StudyError(f"the model {path!r} has changed since the study {study.name!r} began: {advice}")
    for cell, steps in ({} if plan.unchecked else plan.steps).items():
        if known.steps.get(cell, steps) != steps:
            raise StudyError(
                f"trials of {cell} take {known.steps[cell]:,} steps in the study {study.name!r} so far, and would take "
                f"{steps:,} now, as the tokens of another model make other batches: leave its models as they are, "
                "and compare the further one in a study of its own (--name)"
            )


def plan_facts(study: StudyHandle, plan: StudyPlan) -> StudyFacts:
    """What is known beside the trials before there are any, and what an earlier run has measured."""
    from peftsearch.tracking.provenance import provenance

    assert study.file is not None
    before = read_json(study.folder.facts)
    facts = StudyFacts(
        study=study.name,
        id=study.id,
        description=study.spec.description and hide_secrets(study.spec.description),
        trials_per_cell=study.spec.search.trials,
        methods=tuple(study.spec.methods),
        domains={name: domain.facts() for name, domain in plan.domains.items()},
        models=dict(plan.model_facts),
        steps=plan.steps,
        provenance=provenance(study.file.folder),
    )
    if trusted := [path for path, place in plan.models.items() if place.trust_remote_code]:
        facts.provenance["trust_remote_code"] = ", ".join(trusted)
    if before is not None:
        known = known_facts(before, study.folder)
        if THREADS in known.provenance:
            facts.provenance[THREADS] = known.provenance[THREADS]
        for name, domain in facts.domains.items():
            if name in known.domains:
                domain.baselines.update(known.domains[name].baselines)
                domain.failed_baselines.update(known.domains[name].failed_baselines)
    return facts


def save_facts(study: StudyHandle, facts: StudyFacts) -> None:
    """Write what is known beside the trials into the study's folder."""
    persist(study.folder.facts, lambda: write_json(study.folder.facts, facts.model_dump(mode="json")))


def write_files(study: StudyHandle, origin: Origin | None = None, begins_with: WarmStart | None = None) -> None:
    """Write the specification, what the study begins with and its file into its folder, without passwords."""
    assert study.file is not None
    known = read_json(study.folder.spec) or {"begun": now()}
    if origin is not None:
        known["forked_from"] = {"study": origin.name, "id": origin.id, "done": False}
    if begins_with is not None:
        known["warm_start"] = asdict(begins_with)
    written = {
        "study": as_saved(study.spec),
        "folder": str(study.file.folder),
        "file": study.file.where,
        "submitted_from": os.environ.get(SUBMITTED_FROM),
    }
    saved = {**known, "id": study.id, **written}
    persist(study.folder.spec, lambda: write_json(study.folder.spec, saved))
    if study.file.text is not None:
        text = hide_secrets(without_passwords(study.file.text)).encode()
        persist(study.folder.study_file, lambda: write_bytes(study.folder.study_file, text))
