"""A worker by itself, in the test's process, and what its segments came to."""

from __future__ import annotations

from typing import Any

from peftsearch.files import Place
from peftsearch.search.plan import StudyPlan
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import SegmentResult
from peftsearch.training.worker import Worker


def new_worker(plan: StudyPlan, folder: Place) -> Worker:
    """A fresh worker that keeps its trials in a folder."""
    return Worker(plan.for_workers(folder, threads=1), WorkerGroup())


def numbers(outcome: object) -> tuple[Any, ...]:
    """What a segment must come to again, whoever trains it."""
    assert isinstance(outcome, SegmentResult), outcome
    return outcome.step, outcome.loss, outcome.train_loss, outcome.scores
