"""Text in, tokenised Arrow splits out: sources, splits, tasks and metrics."""

from peftsearch.domains.expected import ExpectedDomain, expected_domain
from peftsearch.domains.prepare import (
    CheckedDomain,
    PreparedDomain,
    check_domain,
    prepare_domain,
)
from peftsearch.domains.raw import RawDomain, load_domain, load_raw
from peftsearch.domains.tasks import TASKS, Head, Metric, Task, get_metric, get_task

__all__ = [
    "TASKS",
    "CheckedDomain",
    "ExpectedDomain",
    "Head",
    "Metric",
    "PreparedDomain",
    "RawDomain",
    "Task",
    "check_domain",
    "expected_domain",
    "get_metric",
    "get_task",
    "load_domain",
    "load_raw",
    "prepare_domain",
]
