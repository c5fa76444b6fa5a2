"""Taking over the trials of another study, in the cells that both have."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from peftsearch.files import Place, copy_tree, names
from peftsearch.handle import StudyHandle
from peftsearch.holder import is_held
from peftsearch.saved import as_saved
from peftsearch.spec import StudyError, StudyFacts
from peftsearch.spec.changes import compare, unchanged_cells, written
from peftsearch.storage import damaged, read_json, write_json
from peftsearch.tracking.ledger import Ledger


@dataclass(frozen=True)
class Origin:
    """The study that trials are taken over from.

    Attributes:
        name: Its name.
        id: Its identity.
        folder: Its folder.
        ledger_url: Its ledger.
        spec: Its specification, as JSON.
        facts: Its facts.
    """

    name: str
    id: str
    folder: Place
    ledger_url: str
    spec: Mapping[str, Any]
    facts: StudyFacts


def find_origin(study: StudyHandle, fork: str | None) -> Origin | None:
    """The study whose trials are to be taken over; None where that was done already, too.

    Raises:
        StudyError: There is none of that name, or this study was begun otherwise.
    """
    forked = (read_json(study.folder.spec) or {}).get("forked_from")
    if forked is not None and not (isinstance(forked, dict) and {"study", "done"} <= forked.keys()):
        raise damaged(study.folder.spec, "it does not say which study this one was forked from")
    if fork is not None:
        if fork == study.name:
            raise StudyError("--fork names the study to take trials from: give this one another name with --name")
        if study.folder.exists() and (forked is None or forked["study"] != fork):
            raise StudyError(
                f"the study {study.name!r} was begun without --fork {fork}: leave that away to continue it, or give "
                "the fork another --name"
            )
    if forked is not None and (forked["done"] or fork is None):
        if forked["done"]:
            return None
        fork = forked["study"]
    if fork is None:
        return None
    other = StudyHandle.open(fork, study.folder.storage)
    spec = as_saved(other.spec)
    return Origin(other.name, other.id, other.folder.path, other.ledger_url, spec, other.facts())


def shared_cells(origin: Origin, spec: Mapping[str, Any], facts: StudyFacts) -> set[tuple[str, str, str]]:
    """The (model, domain, method) whose trials would be the same in both studies, data and weights included.

    Raises:
        StudyError: There are none; says what differs.
    """

    def same(mine: Any, theirs: Any) -> bool:
        return theirs is not None and mine.fingerprint == theirs.fingerprint

    found = {
        (model, domain, method)
        for model, domain, method in unchanged_cells(origin.spec, spec)
        if same(facts.models[model], origin.facts.models.get(model))
        and same(facts.domains[domain], origin.facts.domains.get(domain))
        # Beside other models it may take other steps.
        and facts.steps.get(key := f"{domain}/{method}") in (origin.facts.steps.get(key), None)
    }
    if not found:
        changed = ", ".join(written(change.key) for change in compare(origin.spec, spec).refused)
        why = f"what has changed concerns all of them: {changed}" if changed else "its data or models have changed"
        raise StudyError(f"no cell of the study {origin.name!r} can be taken over ({why}): leave --fork away")
    return found


def take_over(
    origin: Origin, ledger: Ledger, cells: set[tuple[str, str, str]], trials: int, seeds: range, folder: Place
) -> list[int]:
    """Copy the trials of some cells, with their weights and confirmations; done again, it copies what is missing.

    Trials keep their numbers, so that one can be looked up in both studies. A trial that is unfinished there is tried
    from its beginning here.

    Args:
        origin: The other study.
        ledger: This study's ledger, whose cells exist.
        cells: As `shared_cells` says.
        trials: At most so many per cell, the first ones.
        seeds: Confirmations with other seeds are left behind.
        folder: This study's folder.

    Returns:
        The trials' numbers.

    Raises:
        StudyError: The other study is being run, so that its trials change.
    """
    if is_held(origin.folder):
        raise StudyError(
            f"the study {origin.name!r} is being run: wait for its end, or stop it, to take over its trials"
        )
    taken: list[int] = []
    with closing(Ledger(origin.ledger_url, origin.name)) as source:
        weights = set(names(origin.folder / "trials"))
        for model, domain, method in sorted(cells):
            key = f"{domain}/{method}/{model}"
            numbers = source.finished(key)[:trials]
            for number in numbers:
                # With its re-trainings' predictions, on which comparisons rest.
                for name in (f"{number:05d}", *(f"{number:05d}-seed{seed}" for seed in seeds)):
                    if name in weights:
                        # Gone where the other study was run on meanwhile, and found a better trial.
                        with suppress(FileNotFoundError):
                            copy_tree(origin.folder / "trials" / name, folder / "trials" / name)
            ledger.take_over(key, source, numbers, seeds)
            taken += numbers
    return sorted(taken)


def take_over_into(study: StudyHandle, origin: Origin, facts: StudyFacts, ledger: Ledger) -> None:
    """Begin a study with the trials of another; what is done is noted, and not done again.

    Raises:
        StudyError: As `shared_cells` and `take_over`.
    """
    cells = shared_cells(origin, as_saved(study.spec), facts)
    seeds = range(study.spec.search.seed + 1, study.spec.search.seed + 1 + study.spec.confirm.seeds)
    take_over(origin, ledger, cells, study.spec.search.trials, seeds, study.folder.path)
    saved = read_json(study.folder.spec) or {}
    write_json(study.folder.spec, {**saved, "forked_from": {**saved["forked_from"], "done": True}})
