"""What a study found out before and beside its trials; kept as ``facts.json`` in the study's folder.

Fronts, tables, MLflow and exports are made from the ledger's trials and these facts alone, without the data.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from peftsearch.spec.trial import FolderName

Direction = Literal["maximize", "minimize"]


THREADS = "threads per worker"
"""The entry of `StudyFacts.provenance` that says with how many threads trials were trained and scored."""


ALL_BASELINES = "all"
"""The name in `DomainFacts.failed_baselines` for whatever kept all of a domain's baselines from being computed."""


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Baseline(_Facts):
    """What one gets without tuning the model, on the validation split and, beside confirmations, on the test split."""

    title: str = Field(description="For people, for example 'majority class'")
    value: float = Field(description="In the domain's metric")
    scores: dict[str, float] = Field(default_factory=dict)
    examples: int | None = Field(
        default=None, description="Validation examples that the value rests on: prompting takes a sample"
    )
    test_value: float | None = Field(default=None, description="In the domain's metric, on the test split")
    test_scores: dict[str, float] = Field(default_factory=dict)
    test_examples: int | None = Field(default=None, description="Test examples that test_value rests on")
    test_read_at: str | None = Field(default=None, description="When the test split was read: ISO 8601, UTC")
    trainable_parameters: int = 0
    detail: str = Field(default="", description="How it was made, for example the regularisation that was picked")


class FailedBaseline(_Facts):
    """A baseline that could not be computed; it is not tried again in its study."""

    title: str = Field(description="As `Baseline.title`")
    split: Literal["validation", "test"] = Field(description="Where it failed; on test, validation has a value")
    error: str = Field(description="Why, in one sentence")


class DomainFacts(_Facts):
    """One domain as it was prepared."""

    task: str
    metric: str
    direction: Direction
    labels: tuple[str, ...] = ()
    rows: dict[str, int] = Field(description="Examples per split")
    max_length: int
    fingerprint: str = Field(description="Hash of the texts, labels and splits")
    source: str = Field(
        description="Where the data came from, as the study file says; with the commit of a data set of the Hub"
    )
    warnings: tuple[str, ...] = Field(default=(), description="What a careful reader should know about the data")
    baselines: dict[str, dict[str, Baseline]] = Field(
        default_factory=dict, description="By model path, then by name ('majority', 'linear_probe')"
    )
    failed_baselines: dict[str, dict[str, FailedBaseline]] = Field(
        default_factory=dict, description="By model path, then by name; `ALL_BASELINES` where no baseline was reached"
    )


class ModelFacts(_Facts):
    """One base model as it was loaded."""

    location: str = Field(description="Folder or Hub id")
    revision: str | None = Field(default=None, description="Hub revision, as the study file says")
    commit: str | None = Field(default=None, description="Commit that the revision was, where the Hub said so")
    trust_remote_code: bool = Field(default=False, description="Whether code that the model brings along was run")
    architecture: str
    total_parameters: int
    fingerprint: str = Field(description="Hash of its weights' files, or the Hub commit")


class StudyFacts(_Facts):
    """Everything beside the trials."""

    study: str
    id: str | None = Field(
        default=None, description="Tells the study from others of its name; studies of earlier versions have none here"
    )
    description: str | None = None
    trials_per_cell: int
    methods: tuple[str, ...]
    domains: dict[FolderName, DomainFacts]
    models: dict[str, ModelFacts]
    steps: dict[str, int] = Field(
        default_factory=dict,
        description="Steps of a trial's full budget, by DOMAIN/METHOD; not known of earlier versions",
    )
    provenance: dict[str, str] = Field(description="Package versions, hardware, git commit of the study file, ...")
