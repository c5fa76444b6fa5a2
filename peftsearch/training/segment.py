"""What is sent to a slot and what comes back: small, picklable, free of torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peftsearch.files import Place
from peftsearch.methods import MethodSpace, Quantization
from peftsearch.spec import TrainingSpec
from peftsearch.training.budget import Budget


@dataclass(frozen=True)
class ModelPlace:
    """Where a base model is loaded from."""

    location: str
    revision: str | None = None
    trust_remote_code: bool = False
    """Whether the study file says that code which the model brings along may run."""
    form: Quantization | None = None
    """How it is stored for what is not a trial (baselines, measurements): as it is, or quantised where all trials are,
    since a model may be too large otherwise."""


@dataclass(frozen=True)
class WorkerPlan:
    """All that a worker needs to know of a study, once."""

    study_folder: Place
    models: Mapping[str, ModelPlace]
    domains: Mapping[tuple[str, str], Place]
    """Folder of the prepared data by model and domain: models have tokenizers of their own."""
    budgets: Mapping[tuple[str, str], Budget]
    """By domain and method: methods may have a training of their own."""
    training: Mapping[str, TrainingSpec]
    """By method."""
    threads: int
    """CPU threads per worker."""
    measure_threads: bool = False
    """Whether the study's first worker finds out how many of these threads are the fastest, and all use so many."""
    general_texts: tuple[str, ...] = ()
    """On which forgetting is measured; () where it is not."""
    pack: int | Literal["auto"] = 1
    """Trials that a slot trains at once; auto measures how many are worth it."""
    spaces: Mapping[str, MethodSpace] = field(default_factory=dict)
    """What each method's trials are drawn from: tells which trials may be beside one another in a pack."""
    bare: frozenset[tuple[str, str]] = frozenset()
    """Models and domains for which the model has no head: tasks that read the base's own output."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What each of several workers holds of the model: all, or a part."""


@dataclass(frozen=True)
class TrialPlan:
    """One trial: everything that decides its result, given the `WorkerPlan`."""

    number: int
    model: str
    domain: str
    method: str
    hyperparameters: Mapping[str, Any]
    seed: int
    confirmation: bool = False
    """Whether a finished trial's configuration is trained again, with another seed."""

    @property
    def key(self) -> str:
        """Unique among everything that is trained in a study; names the folder of its files."""
        return f"{self.number:05d}" + (f"-seed{self.seed}" if self.confirmation else "")

    @property
    def digest(self) -> str:
        """Equal for equal configurations, whatever their numbers: tells whose a checkpoint is.

        A ledger that was restored from a copy may give the number of a trial whose files are still there to another
        configuration.
        """
        decides = [self.model, self.domain, self.method, dict(self.hyperparameters), self.seed]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Segment:
    """Train a trial up to ``to_step`` and evaluate it; the unit of work that a slot is handed."""

    trial: TrialPlan
    to_step: int
    final: bool = False
    """Whether ``to_step`` is the full budget: the weights are then kept for export."""
    read_test: bool = False
    """Whether the test split is read after the last step; only for confirmations."""
    answered: int = 0
    """The trial's last step that was answered: its state is in the storage, or on its way there."""


PROMPTED = 200
"""Validation examples that prompting baselines are computed on at most."""


@dataclass(frozen=True)
class Probe:
    """Score a domain without tuning the model: guesses, a linear probe on frozen features, prompting."""

    model: str
    domain: str
    read_test: bool = False
    """Whether the test split is scored, and not validation; only beside confirmations."""
    names: tuple[str, ...] | None = None
    """The baselines that are wanted; all that the task has where None."""
    prompted: int | None = PROMPTED
    """Examples that are prompted at most; the whole split where None."""


@dataclass(frozen=True)
class TestReading:
    """What a confirmed model scored on the test split.

    Attributes:
        loss: Mean loss.
        scores: All of the task's scores.
        examples: How many they rest on.
        seconds: Time that predicting took.
        predictions: File of the predictions, relative to the study's folder.
        read_at: When: ISO 8601, UTC.
    """

    loss: float
    scores: dict[str, float]
    examples: int
    seconds: float
    predictions: str
    read_at: str


@dataclass(frozen=True)
class SegmentResult:
    """What a segment found.

    Attributes:
        step: Steps done in all.
        loss: Mean validation loss.
        train_loss: Mean training loss over the segment.
        scores: All of the task's scores on the validation split.
        train_seconds: Time in training steps; of steps that several trials share, each has its share.
        evaluation_seconds: Time in evaluation.
        peak_memory_bytes: Peak GPU memory of the trial so far; on a CPU, of the worker in this segment (resident). Of
            trials that are trained together on a GPU: the base and a trial's share of what was on top of it.
        usage: What the workers used of their machines at the end, see `UsageMeter` and `of_workers`.
    """

    step: int
    loss: float
    train_loss: float
    scores: dict[str, float]
    train_seconds: float
    evaluation_seconds: float
    peak_memory_bytes: int
    usage: dict[str, float] = field(default_factory=dict)
    test: TestReading | None = None
    stopped: bool = False
    """Whether early stopping ended the trial: this is its last result."""
    together: float = 1.0
    """How many trials shared the segment's steps, on average."""


@dataclass(frozen=True)
class Failure:
    """The trial cannot go on, for a reason of its own."""

    error: str
    of_study: bool = False
    """Whether no trial can go on, and none is to blame: the storage is full. The study stops, and continues later."""


@dataclass(frozen=True)
class HandedBack:
    """The slot has to leave (its machine is about to be taken away, or the study stops): the state is written, and
    whoever trains the trial next goes on from it."""


@dataclass(frozen=True)
class SetAside:
    """The slot cannot train the trial beside the others that it has; the state is written, and it is queued again."""

    alone: bool = False
    """Whether no slot can train it beside any others."""


@dataclass
class ProbeResult:
    """Baselines of a domain by name: how each was made, in words, and what it scored on the split asked for.

    Attributes:
        examples: How many the scores rest on.
        parameters: How many it trains.
        failures: Why a baseline could not be computed; it has a title, and nothing else.
        read_at: When the test split was read (ISO 8601, UTC); None where it was not.
    """

    titles: dict[str, str] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    read_at: str | None = None

    def add(
        self, name: str, title: str, detail: str, scores: dict[str, float], examples: int, parameters: int = 0
    ) -> None:
        """Add a baseline."""
        self.titles[name], self.details[name] = title, detail
        self.scores[name], self.examples[name], self.parameters[name] = scores, examples, parameters

    def fail(self, name: str, title: str, error: str) -> None:
        """Note that a baseline could not be computed."""
        self.titles[name], self.failures[name] = title, error


Work = Segment | Probe
Outcome = SegmentResult | ProbeResult | Failure | HandedBack | SetAside
