"""Starting a search from the fronts of a study that has finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftsearch.files import Place
from peftsearch.handle import StudyHandle
from peftsearch.results import frontier, status
from peftsearch.spec import StudyError, TrialRecord
from peftsearch.storage import damaged, read_json


@dataclass(frozen=True)
class WarmStart:
    """What a study begins with.

    Attributes:
        study: The study that it was found in.
        trials: The numbers of its trials, or why there are none.
        guesses: Configurations by method, the best ones first.
    """

    study: str
    trials: str
    guesses: dict[str, list[dict[str, Any]]]


def warm_start(study: StudyHandle) -> WarmStart | None:
    """What ``search.warm_start`` brings; None where the study file does not name a study.

    A study that has begun goes on with what it began with, whatever has become of the other one since: its folder
    keeps it (`StudyFolder.spec`).

    A study's fronts are taken model by model. Scores of different domains do not compare: the best trials of all
    fronts come first, then the second ones, and so on.

    Raises:
        StudyError: There is no such study, it has not finished, or it is this one.
    """
    name = study.spec.search.warm_start
    if name is None or study.spec.search.sampler == "grid":
        # A grid has its own order, and the plan says so.
        return None
    kept = _kept(study.folder.spec)
    if kept is not None and kept.study == name:
        return kept
    loc = ("search", "warm_start")
    if name == study.name:
        raise StudyError("a study cannot start from its own front: name another one", loc)
    try:
        other = StudyHandle.open(name, study.folder.storage)
        if status(other)["state"] != "finished":
            raise StudyError(f"the study {name!r} has not finished: run it to its end first")
        fronts = frontier(other)
    except StudyError as error:
        raise StudyError(error.message, loc) from None
    ranked: list[tuple[int, TrialRecord]] = []
    for front in fronts.values():
        for records in front.by_model.values():
            sign = 1 if front.facts.direction == "maximize" else -1
            best_first = sorted(records, key=lambda record: (-sign * (record.value or 0.0), record.number))
            methods: dict[str, int] = {}
            for record in best_first:
                methods[record.method] = methods.get(record.method, -1) + 1
                ranked.append((methods[record.method], record))
    guesses: dict[str, list[dict[str, Any]]] = {}
    used: list[int] = []
    for _, record in sorted(ranked, key=lambda item: item[0]):
        # Of methods, too, that the study has not: it may be given them when it is continued.
        guesses.setdefault(record.method, []).append(dict(record.hyperparameters))
        if record.method in study.spec.methods:
            used.append(record.number)
    trials = ", ".join(map(str, sorted(used))) or "none of its trials has a method of this study"
    return WarmStart(name, trials, guesses)


def _kept(where: Place) -> WarmStart | None:
    found = (read_json(where) or {}).get("warm_start")
    try:
        return None if found is None else WarmStart(**found)
    except TypeError:
        raise damaged(where, "what it says of warm_start cannot be read") from None
