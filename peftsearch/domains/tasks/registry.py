"""The tasks by name: an explicit list, so that a reader sees what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from peftsearch.domains.tasks.base import Metric, Task
from peftsearch.domains.tasks.classification import Classification
from peftsearch.domains.tasks.instruction import Instruction
from peftsearch.domains.tasks.language_modeling import LanguageModeling
from peftsearch.domains.tasks.multi_label import MultiLabel
from peftsearch.domains.tasks.multiple_choice import MultipleChoice
from peftsearch.domains.tasks.question_answering import QuestionAnswering
from peftsearch.domains.tasks.relation import Relation
from peftsearch.domains.tasks.similarity import Similarity
from peftsearch.domains.tasks.summarization import Summarization
from peftsearch.domains.tasks.token_classification import TokenClassification
from peftsearch.spec import StudyError, problem, suggest
from peftsearch.spec.yaml_file import Loc

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Classification,
        Summarization,
        Instruction,
        QuestionAnswering,
        MultipleChoice,
        LanguageModeling,
        TokenClassification,
        MultiLabel,
        Similarity,
        Relation,
    )
}


def get_task(name: str, loc: Loc = (), options: Mapping[str, Any] | None = None) -> Task:
    """The task of that name.

    Args:
        name: As the study file says.
        loc: Where the domain stands in the study file.
        options: The domain's ``options``.

    Raises:
        StudyError: There is no such task, or an option that it does not take.
    """
    task = TASKS.get(name)
    if task is None:
        raise StudyError(f"unknown task {name!r}{suggest(name, TASKS)}", (*loc, "task") if loc else ())
    try:
        return task(task.Options.model_validate(dict(options or {})))
    except ValidationError as error:
        first = error.errors()[0]
        place: Loc = (*loc, "options", *first["loc"]) if loc else ()
        if first["type"] == "extra_forbidden":
            known = task.Options.model_fields
            message = f"{name} has no such option" + (suggest(str(first["loc"][-1]), known) if known else "")
        else:
            message = problem(first)
        raise StudyError(message, place) from None


def get_metric(task: Task, name: str | None, loc: Loc = (), labels: Sequence[str] | None = None) -> Metric:
    """The metric a domain is judged by.

    Args:
        task: The domain's task.
        name: As the study file says; the task's first metric for None.
        loc: Where the study file says it.
        labels: The domain's labels; None where they are not known yet, and any label passes.

    Raises:
        StudyError: The task has no such metric, or the data no such label.
    """
    if name is None:
        return next(iter(task.metrics.values()))
    if name in task.metrics:
        return task.metrics[name]
    kind, slash, label = name.partition("/")
    if slash and kind in task.label_metrics:
        known_labels = None if labels is None else task.metric_labels(labels)
        if known_labels is not None and label not in known_labels:
            raise StudyError(
                f"metric {name!r} is about the label {label!r}, which the data lacks{suggest(label, known_labels)}", loc
            )
        metric = task.label_metrics[kind]
        return Metric(name, metric.direction)
    if name in task.optional_metrics:
        needed = task.optional_metrics[name]
        raise StudyError(f"{task.name} has no metric {name!r} without the option {needed!r}: set options.{needed}", loc)
    known = [*task.metrics, *(f"{kind}/LABEL" for kind in task.label_metrics)]
    raise StudyError(f"{task.name} has no metric {name!r}{suggest(name, known)}", loc)
