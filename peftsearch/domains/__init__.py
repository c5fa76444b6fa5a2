"""Text in, tokenised Arrow splits out: sources, splits, tasks and metrics."""

from peftsearch.domains.prepare import PreparedDomain, RawDomain, load_domain, load_raw, prepare_domain
from peftsearch.domains.tasks import TASKS, Metric, Task, get_metric, get_task

__all__ = [
    "TASKS",
    "Metric",
    "PreparedDomain",
    "RawDomain",
    "Task",
    "get_metric",
    "get_task",
    "load_domain",
    "load_raw",
    "prepare_domain",
]
