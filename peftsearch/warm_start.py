"""Starting a search from the fronts of a study that has finished."""

from __future__ import annotations

from typing import Any

from peftsearch.handle import StudyHandle
from peftsearch.results import frontier, status
from peftsearch.spec import StudyError, TrialRecord


def warm_start(study: StudyHandle) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """What ``search.warm_start`` brings: configurations by method, best first, and where they are from.

    A study's fronts are taken model by model. Scores of different domains do not compare: the best trials of all
    fronts come first, then the second ones, and so on.

    Raises:
        StudyError: There is no such study, it has not finished, or it is this one.
    """
    name = study.spec.search.warm_start
    if name is None or study.spec.search.sampler == "grid":
        # A grid has its own order, and the plan says so.
        return {}, ""
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
        if record.method in study.spec.methods:
            guesses.setdefault(record.method, []).append(dict(record.hyperparameters))
            used.append(record.number)
    trials = ", ".join(map(str, sorted(used))) or "none of its trials has a method of this study"
    return guesses, f"{name}: {trials}"
