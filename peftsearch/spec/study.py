"""The study file: what may stand in it, what it means, and its defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from peftsearch.spec.space import Space

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


def check_name(value: str) -> str:
    """Refuse names that could leave the storage folder or confuse a table.

    Raises:
        ValueError: The name is not letters, digits, ``.``, ``_`` and ``-``.
    """
    if not re.fullmatch(NAME_PATTERN, value):
        raise ValueError(
            f"{value!r} is not a name: use letters, digits, '.', '_' and '-' (no slash or space), "
            "beginning with a letter or digit, at most 100 characters"
        )
    return value


Name = Annotated[str, BeforeValidator(lambda value: check_name(value) if isinstance(value, str) else value)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSpec(_Section):
    """A base model. A plain string in the study file is its ``path``."""

    path: str = Field(
        min_length=1, description="Hub id, folder, or package:NAME/FOLDER for a folder inside an installed package"
    )
    revision: str | None = Field(default=None, description="Hub revision to pin: a commit, tag or branch")


class ColumnsSpec(_Section):
    """Which columns of the data hold what."""

    text: str = Field(default="text", description="The text to classify")
    text_pair: str | None = Field(default=None, description="A second text, for sentence pairs")
    label: str = Field(default="label", description="The label")


class SplitSpec(_Section):
    """How to cut splits that the data does not bring."""

    validation: float = Field(default=0.15, ge=0, lt=1, description="Share of the groups for validation")
    test: float = Field(default=0.15, ge=0, lt=1, description="Share of the groups for testing")
    group: str | None = Field(default=None, description="Column that keeps rows together: no group crosses splits")
    seed: int = Field(default=0, ge=0, description="Another seed, another cut")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must stay below 1, so that something is left to train on")
        return self


class LimitSpec(_Section):
    """Use at most so many rows of a split, chosen deterministically by the split's seed."""

    train: int | None = Field(default=None, ge=1)
    validation: int | None = Field(default=None, ge=1)
    test: int | None = Field(default=None, ge=1)


class DataSpec(_Section):
    """Where the labelled text is. Either ``source`` (splits found or cut) or one file per split."""

    source: str | None = Field(
        default=None,
        min_length=1,
        description="A file, a folder of datasets.save_to_disk, hub:ID, package:NAME/FILE, or recipe:NAME",
    )
    train: str | None = Field(default=None, description="File of the training split (CSV, TSV, JSON, JSONL or Parquet)")
    validation: str | None = Field(
        default=None, description="File of the validation split; cut from train where absent"
    )
    test: str | None = Field(default=None, description="File of the test split; cut from train where absent")
    config: str | None = Field(default=None, description="Configuration (subset) of a Hub data set")
    revision: str | None = Field(default=None, description="Revision of a Hub data set")
    format: Literal["auto", "csv", "tsv", "json", "jsonl", "parquet"] = Field(
        default="auto", description="Format of the files"
    )
    header: list[str] | None = Field(
        default=None, min_length=1, description="Column names of a CSV or TSV file without a header line"
    )
    columns: ColumnsSpec = ColumnsSpec()
    split: SplitSpec = SplitSpec()
    limit: LimitSpec = LimitSpec()

    @field_validator("limit", mode="before")
    @classmethod
    def _limit(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source is None) == (self.train is None):
            raise ValueError("name the data: either 'source', or 'train' with optional 'validation' and 'test'")
        if self.source is not None and (self.validation or self.test):
            raise ValueError("'validation' and 'test' go with 'train', not with 'source'")
        return self


class DomainSpec(_Section):
    """A data set with a task and a metric."""

    task: str = Field(default="classification", description="What the model must do with a text")
    data: DataSpec
    metric: str | None = Field(default=None, description="The objective; the task's first metric where absent")
    max_length: int | None = Field(default=None, ge=4, description="Tokens per text; training.max_length where absent")


class SearchSpec(_Section):
    """How configurations are proposed and pruned."""

    trials: int = Field(default=16, ge=1, le=1_000_000, description="Trials per cell; every cell gets the same number")
    scheduler: Literal["pareto_asha", "asha", "none"] = Field(
        default="pareto_asha",
        description="pareto_asha ranks by accuracy and parameters, asha by accuracy alone, none never prunes",
    )
    sampler: Literal["tpe", "random"] = Field(default="tpe", description="How Optuna proposes configurations")
    startup_trials: int | None = Field(
        default=None, ge=1, description="Random trials per cell before TPE takes over; a quarter (4 to 10) where absent"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the sampler and of the trials")
    eta: float = Field(default=3.0, gt=1, le=100, description="A rung lets the top 1/eta go on")
    grace: int = Field(default=1, ge=1, description="Evaluations before the first rung that may prune")


class TrainingSpec(_Section):
    """The budget of a trial, and what is not searched."""

    epochs: float = Field(default=3.0, gt=0, le=10_000, description="Full budget, in passes over the training split")
    evaluations: int = Field(default=9, ge=1, le=1000, description="Evenly spread evaluations; each may be a rung")
    batch_size: int = Field(default=16, ge=1, description="Examples per optimiser step, over all workers of a trial")
    evaluation_batch_size: int = Field(default=64, ge=1, description="Examples per forward pass in evaluation")
    max_length: int = Field(default=128, ge=4, description="Tokens per text; longer ones are truncated")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="auto trains in bf16 (autocast) where the hardware has it; the final evaluation never does",
    )
    warmup: float = Field(default=0.1, ge=0, le=1, description="Share of the steps with rising learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="Learning rate after warm-up"
    )
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm")
    head_learning_rate: float | None = Field(
        default=None, gt=0, le=1, description="Learning rate of the task head; the trial's learning rate where absent"
    )


class ConfirmSpec(_Section):
    """Re-training the front with further seeds; the test split is read only then."""

    seeds: int = Field(default=0, ge=0, le=100, description="Seeds per finalist; 0 leaves the front unconfirmed")

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: int) -> int:
        if value:
            raise ValueError("confirmation with further seeds is not available yet: write 0 or leave 'confirm' out")
        return value


class ResourcesSpec(_Section):
    """What a slot (a warm worker group) takes, and how many there are."""

    workers_per_trial: int = Field(default=1, ge=1, le=4096, description="Workers that train one trial together (DDP)")
    gpus_per_worker: float = Field(default=0, ge=0, description="GPUs per worker")
    cpus_per_worker: int | None = Field(
        default=None, ge=1, description="Threads per worker; the machine's cores, shared, where absent"
    )
    slots: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="Worker groups; auto fills the cluster"
    )
    pack: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="Trials trained at once per slot"
    )
    max_retries: int = Field(default=3, ge=0, description="A trial that breaks a slot more often is FAILED")

    @field_validator("pack")
    @classmethod
    def _pack(cls, value: int | str) -> int | str:
        if value not in (1, "auto"):
            raise ValueError("packing several trials per slot is not available yet: write 'auto' or 1")
        return value


class TrackingSpec(_Section):
    """Where the study is recorded."""

    mlflow: str = Field(
        default="auto", min_length=1, description="auto (SQLite in the storage folder), off, or a tracking URI"
    )
    ledger: str = Field(
        default="auto", min_length=1, description="auto (SQLite in the study's folder) or an SQLAlchemy URL"
    )


class StudySpec(_Section):
    """One study: base models, domains, methods and budget."""

    name: Name = Field(description="Names the ledger, the MLflow experiment and the folder")
    description: str | None = Field(default=None, description="What the study is for; shown in MLflow")
    models: tuple[ModelSpec, ...] = Field(min_length=1, description="Base models to compare ('model: ...' for one)")
    domains: dict[Name, DomainSpec] = Field(min_length=1)
    methods: dict[str, dict[str, Space]] = Field(
        min_length=1, description="Methods to compare, each with its search space ({} for the default one)"
    )
    search: SearchSpec = SearchSpec()
    training: TrainingSpec = TrainingSpec()
    confirm: ConfirmSpec = ConfirmSpec()
    resources: ResourcesSpec = ResourcesSpec()
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="before")
    @classmethod
    def _one_model(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        data = dict(value)
        if "model" in data:
            if "models" in data:
                raise ValueError("'model' and 'models' both stand there: keep one")
            data["models"] = [data.pop("model")]
        if "models" not in data:
            raise ValueError("'model' is missing: name a Hub id, a folder or package:NAME/FOLDER")
        if isinstance(data["models"], list | tuple):
            data["models"] = [{"path": item} if isinstance(item, str) else item for item in data["models"]]
        methods = data.get("methods")
        if isinstance(methods, Mapping):
            data["methods"] = {key: {} if space is None else space for key, space in methods.items()}
        return data

    @model_validator(mode="after")
    def _distinct_models(self) -> Self:
        paths = [model.path for model in self.models]
        if len(set(paths)) < len(paths):
            raise ValueError("a model is listed twice")
        return self

    def domain_max_length(self, domain: str) -> int:
        """Tokens per text in a domain."""
        return self.domains[domain].max_length or self.training.max_length
