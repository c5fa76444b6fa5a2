"""The tasks: what a model must do with a text, and how that is scored."""

from peftsearch.domains.tasks.base import Metric, Task
from peftsearch.domains.tasks.registry import TASKS, get_metric, get_task

__all__ = ["TASKS", "Metric", "Task", "get_metric", "get_task"]
