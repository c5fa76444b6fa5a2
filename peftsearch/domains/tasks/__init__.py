"""The tasks: what a model must do with a text, and how that is scored."""

from peftsearch.domains.tasks.base import Head, LossOptions, Metric, Prediction, Task, Tokenization
from peftsearch.domains.tasks.registry import TASKS, get_metric, get_task

__all__ = ["TASKS", "Head", "LossOptions", "Metric", "Prediction", "Task", "Tokenization", "get_metric", "get_task"]
