"""Options of the loss that a study's tasks must know: one that nothing heeds is refused rather than ignored."""

from __future__ import annotations

from peftsearch.domains import get_task
from peftsearch.spec import StudyError, StudySpec
from peftsearch.spec.yaml_file import Loc

# What each option says where it is off.
_OFF = {"label_smoothing": 0.0, "class_weights": "none"}
_WHY = {
    "label_smoothing": "spreads a target over classes or tokens",
    "class_weights": "weighs classes or tags",
}


def check_loss_options(spec: StudySpec, *, begun: bool = False) -> tuple[str, ...]:
    """Check ``training.label_smoothing`` and ``training.class_weights``, and those of methods, against the tasks.

    Args:
        spec: The study.
        begun: Whether it exists already: what it was begun with cannot be left out any more.

    Returns:
        For each that some domains heed and others do not, a clause that names the latter.

    Raises:
        StudyError: No domain of a new study heeds an option that is switched on.
    """
    found = []
    for option, loc in _switched_on(spec):
        deaf = [name for name in spec.domains if option not in _heeded(spec, name)]
        if not deaf:
            continue
        if len(deaf) == len(spec.domains) and not begun:
            tasks = ", ".join(sorted({item.task for item in spec.domains.values()}))
            raise StudyError(f"{option} {_WHY[option]}, and no domain's task has any ({tasks}): leave it out", loc)
        place = ".".join(map(str, loc))
        found.append(f"{place} does nothing in {', '.join(repr(name) for name in deaf)}: it {_WHY[option]}")
    return tuple(found)


def _heeded(spec: StudySpec, domain: str) -> frozenset[str]:
    return get_task(spec.domains[domain].task, ("domains", domain)).loss_options


def _switched_on(spec: StudySpec) -> list[tuple[str, Loc]]:
    places: list[tuple[str, Loc]] = [
        (option, ("training", option)) for option, off in _OFF.items() if getattr(spec.training, option) != off
    ]
    for method, item in spec.methods.items():
        if item.training.label_smoothing:
            places.append(("label_smoothing", ("methods", method, "training", "label_smoothing")))
    return places
