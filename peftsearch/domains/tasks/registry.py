"""The tasks by name: an explicit list, so that a reader sees what there is."""

from __future__ import annotations

from collections.abc import Sequence

from peftsearch.domains.tasks.base import Metric, Task
from peftsearch.domains.tasks.classification import Classification
from peftsearch.spec import StudyError, suggest
from peftsearch.spec.yaml_file import Loc

TASKS: dict[str, Task] = {task.name: task for task in (Classification(),)}


def get_task(name: str, loc: Loc = ()) -> Task:
    """The task of that name.

    Raises:
        StudyError: There is none.
    """
    task = TASKS.get(name)
    if task is None:
        raise StudyError(f"unknown task {name!r}{suggest(name, TASKS)}", loc)
    return task


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
        if labels is not None and label not in labels:
            raise StudyError(
                f"metric {name!r} is about the label {label!r}, which the data lacks{suggest(label, labels)}", loc
            )
        metric = task.label_metrics[kind]
        return Metric(name, metric.direction, f"{metric.title} of {label}")
    known = [*task.metrics, *(f"{kind}/LABEL" for kind in task.label_metrics)]
    raise StudyError(f"{task.name} has no metric {name!r}{suggest(name, known)}", loc)
