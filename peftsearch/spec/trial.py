"""A trial as everything outside the ledger sees it: the shape that ``peftsearch trials --json`` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from statistics import fmean, stdev
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def one_folder(name: str) -> str:
    """Refuse a name that is a path: folders are named after it, and whoever can write a ledger names only those.

    Raises:
        ValueError: It is empty, or holds a slash, or climbs.
    """
    if name in ("", ".", "..") or any(character in "/\\\0" for character in name):
        raise ValueError(f"{name[:60]!r} is no name of a folder")
    return name


def within(path: str) -> str:
    """Refuse a path that leaves the folder that it is relative to.

    Raises:
        ValueError: It is absolute, or climbs.
    """
    parts = path.replace("\\", "/").split("/")
    if path.startswith(("/", "\\")) or ".." in parts or "\0" in path or ":" in parts[0]:
        raise ValueError(f"{path[:60]!r} leaves the study's folder")
    return path


FolderName = Annotated[str, AfterValidator(one_folder)]
PathWithin = Annotated[str, AfterValidator(within)]


class TrialState(StrEnum):
    """One meaning each; MLflow shows them as RUNNING, FINISHED, KILLED and FAILED."""

    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    """Reached the full budget. Only these can be on a front."""
    PRUNED = "PRUNED"
    """Stopped by the scheduler."""
    FAILED = "FAILED"


class Rung(BaseModel):
    """One evaluation on the validation split."""

    model_config = ConfigDict(extra="forbid")

    step: int = Field(description="Optimiser steps done")
    epoch: float = Field(description="Passes over the training split done")
    value: float = Field(description="The domain's metric")
    loss: float = Field(description="Mean validation loss (breaks ties of value)")
    train_loss: float = Field(description="Mean training loss since the evaluation before")
    train_seconds: float = Field(default=0.0, description="Seconds of training in this segment: the trial's share")
    together: float = Field(
        default=1.0, description="How many trials shared the segment's steps, on average: their time is so much longer"
    )
    evaluation_seconds: float = Field(default=0.0, description="Seconds of evaluation in this segment")
    scores: dict[str, float] = Field(
        default_factory=dict, description="All scores of the task, per-class ones included"
    )
    usage: dict[str, float] = Field(
        default_factory=dict,
        description="What the worker used of its machine then, by MLflow's names of system metrics; of several, what "
        "those after the first used has worker_1/ and so on before these names",
    )


class Reading(BaseModel):
    """One re-training of a confirmed configuration, and its one reading of the test split."""

    model_config = ConfigDict(extra="forbid")

    seed: int = Field(description="Seed of the re-training")
    value: float = Field(description="The domain's metric on the validation split, at the full budget")
    loss: float = Field(description="Mean validation loss")
    test: float | None = Field(default=None, description="The domain's metric on the test split; None without one")
    test_loss: float | None = None
    test_scores: dict[str, float] = Field(default_factory=dict, description="All scores of the task on the test split")
    test_examples: int = 0
    read_at: str | None = Field(default=None, description="When the test split was read: ISO 8601, UTC")
    predictions: PathWithin | None = Field(
        default=None, description="File of the predictions on the test split, relative to the study's folder"
    )
    steps: int = 0
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    examples_per_second: float | None = Field(default=None, description="Inference on the test split")


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation: 0 of a single value, not a number where one of them is none or infinite."""
    if not all(math.isfinite(value) for value in values):
        return math.nan
    return stdev(values) if len(values) > 1 else 0.0


class Confirmed(BaseModel):
    """The same configuration with further seeds: mean and sample standard deviation over its readings."""

    model_config = ConfigDict(extra="forbid")

    seeds: int
    mean: float
    std: float
    test_mean: float | None = None
    test_std: float | None = None
    readings: tuple[Reading, ...] = ()

    @classmethod
    def of(cls, readings: Sequence[Reading]) -> Confirmed:
        """Summarise readings (at least one); the deviation of a single one is 0."""
        values = [reading.value for reading in readings]
        tests = [reading.test for reading in readings if reading.test is not None]
        return cls(
            seeds=len(readings),
            mean=fmean(values),
            std=deviation(values),
            test_mean=fmean(tests) if tests else None,
            test_std=deviation(tests) if tests else None,
            readings=tuple(readings),
        )


class TrialRecord(BaseModel):
    """One (model, domain, method, hyperparameters, seed), as recorded in the ledger."""

    model_config = ConfigDict(extra="forbid")

    number: int = Field(ge=0, description="Unique within the study, in the order of proposal")
    model: str
    domain: FolderName
    method: FolderName
    state: TrialState
    seed: int
    value: float | None = Field(default=None, description="The metric at the full budget, or at the last evaluation")
    trainable_parameters: int
    exported_parameters: int | None = None
    hyperparameters: dict[str, Any]
    rungs: list[Rung] = Field(default_factory=list)
    train_seconds: float = 0.0
    mlflow_run_id: str | None = None
    confirmed: Confirmed | None = None
    failed_confirmations: dict[int, str] = Field(
        default_factory=dict, description="Re-trainings that could not go on: by seed, why"
    )
    error: str | None = None

    evaluation_seconds: float = 0.0
    total_steps: int = Field(default=0, description="Steps of the full budget")
    peak_memory_bytes: int | None = Field(
        default=None, description="Peak of the worker: GPU memory, or resident memory on CPU"
    )
    checkpoint: PathWithin | None = Field(
        default=None, description="Where the weights are, relative to the study's folder"
    )
    started: str | None = Field(default=None, description="ISO 8601, UTC")
    finished: str | None = Field(default=None, description="ISO 8601, UTC")
    stopped_early: bool = Field(default=False, description="Early stopping ended the trial before the full budget")
    retries: int = Field(default=0, description="Segments done again because a worker died")
    estimated_memory_bytes: int | None = Field(default=None, description="Peak expected before the trial was run")
    estimated_seconds: float | None = Field(default=None, description="Training and evaluation expected beforehand")

    @property
    def packed(self) -> bool:
        """Whether other trials shared its steps, so that its time is a share of theirs."""
        return any(rung.together > 1 for rung in self.rungs)

    @property
    def scores(self) -> dict[str, float]:
        """All scores at the last evaluation."""
        return self.rungs[-1].scores if self.rungs else {}
