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
    trust_remote_code: bool = Field(
        default=False,
        description="Run the Python code that the model brings along (its auto_map), with all rights of whoever runs "
        "the study: only for code that you have read, at a pinned revision; tokenizers' code is never run",
    )
    config: dict[str, Any] | None = Field(
        default=None,
        description="Configuration of transformers (model_type and sizes) that validate plans with where the model "
        "itself cannot be read; a run never uses it",
    )

    @field_validator("config")
    @classmethod
    def _config(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("model_type"), str):
            raise ValueError("'model_type' is missing: name the architecture, for example model_type: t5")
        return value


class ColumnsSpec(_Section):
    """Which columns of the data hold what. A task reads the roles that it needs; a role's default is its own name."""

    text: str = Field(default="text", description="The text, or the first of a pair")
    text_pair: str | None = Field(default=None, description="A second text, for sentence pairs")
    label: str = Field(default="label", description="The label; a list of labels, or a number, where the task says so")
    tokens: str = Field(default="tokens", description="A list of words, for token classification")
    tags: str = Field(default="tags", description="A list of IOB tags, one for each word")
    question: str = Field(default="question", description="The question to answer")
    context: str = Field(default="context", description="The text that holds the answer")
    answers: str = Field(default="answers", description="{text: [...], answer_start: [...]}; empty if unanswerable")
    choices: str | list[str] = Field(
        default="choices", description="A column with a list of choices, or one column for each choice"
    )
    target: str = Field(default="target", description="The text to write: a summary, a response")


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

    train: int | tuple[int, ...] | None = Field(
        default=None, description="A list makes one domain for each size: a few-shot curve from one study file"
    )
    validation: int | None = Field(default=None, ge=1)
    test: int | None = Field(default=None, ge=1)

    @field_validator("train", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        if isinstance(value, list) and not all(type(size) is int for size in value):
            raise ValueError(f"the sizes of a few-shot curve are whole numbers, for example [16, 64, 256], not {value}")
        return value

    @field_validator("train")
    @classmethod
    def _sizes(cls, value: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        sizes = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(size < 1 for size in sizes):
            raise ValueError("must be a whole number of at least 1")
        if isinstance(value, tuple) and (not value or len(set(value)) < len(value)):
            raise ValueError("list at least one size, and each only once")
        return value


class ExpectedSpec(_Section):
    """What data holds that a machine may not have: ``validate`` plans with it where the data is not at hand."""

    train: int = Field(ge=1, description="Rows of the training split")
    validation: int | None = Field(default=None, ge=1, description="Rows; cut from train where absent")
    test: int | None = Field(default=None, ge=1, description="Rows; cut from train where absent")
    tokens: int | None = Field(default=None, ge=1, description="Tokens per text on average; max_length where absent")
    windows: int = Field(
        default=1,
        ge=1,
        description="Windows of max_length tokens that a row makes on average, where the task cuts some",
    )
    labels: Annotated[int, Field(ge=1)] | list[str] | None = Field(
        default=None, description="Names of the labels, or how many there are; 2 where absent"
    )


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
    format: Literal["auto", "csv", "tsv", "json", "jsonl", "parquet", "iob"] = Field(
        default="auto",
        description="Format of the files; iob: one word and its tag per line, a blank line after each sentence",
    )
    header: list[str] | None = Field(
        default=None, min_length=1, description="Column names of a CSV or TSV file without a header line"
    )
    columns: ColumnsSpec = ColumnsSpec()
    split: SplitSpec = SplitSpec()
    limit: LimitSpec = LimitSpec()
    join: dict[Name, DataSpec] | None = Field(
        default=None,
        description="Several data sets of the same task, learned by one adapter; each scored by itself too",
    )
    expected: ExpectedSpec | None = Field(
        default=None,
        description="What to plan with where the data is not at hand: local files may then be missing in validate",
    )

    @field_validator("limit", mode="before")
    @classmethod
    def _limit(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return {"train": value} if whole or isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.join is not None:
            if beside := self._beside_join():
                raise ValueError(f"'join' names the data of each part: {beside!r} stands there, not beside it")
            if any(part.join is not None for part in self.join.values()):
                raise ValueError("a part of 'join' cannot join others itself")
            if any(isinstance(part.limit.train, tuple) for part in self.join.values()):
                raise ValueError("a part of 'join' has one size: write the list of a few-shot curve's beside 'join'")
            if len(self.join) < 2:
                raise ValueError("'join' needs at least two parts")
            return self
        if (self.source is None) == (self.train is None):
            raise ValueError("name the data: either 'source', or 'train' with optional 'validation' and 'test'")
        if self.source is not None and (self.validation or self.test):
            raise ValueError("'validation' and 'test' go with 'train', not with 'source'")
        for key, value in (("config", self.config), ("revision", self.revision)):
            if value is not None and not (self.source or "").startswith("hub:"):
                raise ValueError(f"{key!r} is about data on the Hub (source: hub:ID): leave it out")
        return self

    def _beside_join(self) -> str | None:
        """A key that nothing reads where data sets are joined; ``limit`` and its seed are about their union."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name not in ("join", "limit")}
        given["split"] = self.split.model_copy(update={"seed": 0})
        unset: dict[str, Any] = {"format": "auto", "columns": ColumnsSpec(), "split": SplitSpec()}
        return next((name for name, value in given.items() if value != unset.get(name)), None)


class DomainSpec(_Section):
    """A data set with a task and a metric."""

    task: str = Field(default="classification", description="What the model must do with a text")
    data: DataSpec
    metric: str | None = Field(default=None, description="The objective; the task's first metric where absent")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the task, for example template, generation, stride"
    )
    max_length: int | None = Field(default=None, ge=4, description="Tokens per text; training.max_length where absent")


class SearchSpec(_Section):
    """How configurations are proposed and pruned."""

    trials: int = Field(default=16, ge=1, le=1_000_000, description="Trials per cell; every cell gets the same number")
    allocation: Literal["equal", "joint"] = Field(
        default="equal",
        description="equal: every cell gets its trials; joint: the methods of a model and domain share theirs, and the "
        "sampler chooses each trial's method",
    )
    scheduler: Literal["pareto_asha", "asha", "none"] = Field(
        default="pareto_asha",
        description="pareto_asha ranks by accuracy and parameters, asha by accuracy alone, none never prunes",
    )
    sampler: Literal["tpe", "random", "grid"] = Field(
        default="tpe",
        description="How configurations are proposed; grid: combinations of the listed values in order, up to trials",
    )
    startup_trials: int | None = Field(
        default=None, ge=1, description="Random trials per cell before TPE takes over; a quarter (4 to 10) where absent"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the sampler and of the trials")
    eta: float = Field(default=3.0, gt=1, le=100, description="A rung lets the top 1/eta go on")
    grace: int = Field(default=1, ge=1, description="Evaluations before the first rung that may prune")
    warm_start: str | None = Field(
        default=None, min_length=1, description="A finished study of the same storage: its fronts are the first guesses"
    )
    max_parameters: int | None = Field(
        default=None, ge=1, description="Configurations that train more are not run (an Optuna constraint)"
    )
    max_memory: float | None = Field(
        default=None, gt=0, description="GiB per worker: configurations expected to need more are not run"
    )


class TrainingSpec(_Section):
    """The budget of a trial, and what is not searched."""

    epochs: float = Field(default=3.0, gt=0, le=10_000, description="Full budget, in passes over the training split")
    evaluations: int = Field(default=9, ge=1, le=1000, description="Evenly spread evaluations; each may be a rung")
    batch_size: int = Field(default=16, ge=1, description="Examples per optimiser step, over all workers of a trial")
    tokens_per_batch: int | None = Field(
        default=None,
        ge=8,
        description="Padded tokens per optimiser step at most, beside batch_size: short texts make larger batches "
        "than long ones",
    )
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
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Share of the target spread over all classes")
    class_weights: Literal["none", "balanced"] = Field(
        default="none",
        description="balanced weighs rare classes up: n / (classes * count) (scikit-learn's formula), at most "
        "100 times as much as the most frequent one; of several labels at once each one's presence, by (n - count) / "
        "count, at most 100",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Early stopping: evaluations without improvement after which a trial ends with its best weights",
    )
    gradient_accumulation: int = Field(
        default=1, ge=1, description="Forward passes per optimiser step: the batch is cut into so many parts"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="Compute activations a second time in the backward pass instead of keeping them: a third more "
        "work, and much less memory; auto: where they would not fit",
    )
    compile: bool = Field(
        default=False,
        description="Train the transformer's layers with torch.compile, for GPUs; one trial at a time",
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="adamw_8bit (bitsandbytes) keeps its moments in 8 bits"
    )

    @property
    def batch(self) -> str:
        """How large a batch is, in words."""
        if self.tokens_per_batch is None:
            return f"{self.batch_size} examples"
        return f"at most {self.batch_size} examples and {self.tokens_per_batch:,} tokens"


class MethodTraining(_Section):
    """What one method does otherwise than ``training`` says, for comparisons as others published them.

    Methods with settings of their own do not have equal budgets, and the report says so.
    """

    epochs: float | None = Field(default=None, gt=0, le=10_000)
    batch_size: int | None = Field(default=None, ge=1)
    tokens_per_batch: int | None = Field(default=None, ge=8)
    warmup: float | None = Field(default=None, ge=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] | None = None
    weight_decay: float | None = Field(default=None, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0, le=1)
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    gradient_accumulation: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool | Literal["auto"] | None = None
    optimizer: Literal["adamw", "adamw_8bit"] | None = None


class MethodSpec(_Section):
    """One method of a study: its search space, and its training where that differs.

    In the study file both stand in one section: ``lora: {rank: [4, 8], training: {epochs: 5}}``.
    """

    space: dict[str, Space] = Field(default_factory=dict)
    training: MethodTraining = MethodTraining()


class ConfirmSpec(_Section):
    """Re-training the finalists with further seeds; the test split is read only then."""

    seeds: int = Field(default=0, ge=0, le=100, description="Seeds per finalist; 0 leaves the front unconfirmed")
    finalists: Literal["front", "methods", "both", "all"] = Field(
        default="both",
        description="front: each domain's front; methods: each method's best trial per model; both: their union; "
        "all: every trial of the full budget, for grids whose every cell shall have error bars",
    )
    max_finalists: int | None = Field(
        default=None,
        ge=1,
        description="Per domain at most so many; each method's best first, then the front, then others",
    )
    prompted_examples: int | None = Field(
        default=500,
        ge=1,
        description="Test examples that prompting baselines are computed on at most, spread evenly over the split; "
        "null: all. On validation they are at most 200",
    )


class ResourcesSpec(_Section):
    """What a slot (a warm worker group) takes, and how many there are."""

    workers_per_trial: int = Field(default=1, ge=1, le=4096, description="Workers that train one trial together")
    strategy: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="ddp: every worker of a trial holds the whole model; fsdp: each holds a part of it (FSDP2), for "
        "models that do not fit one GPU",
    )
    gpus_per_worker: float = Field(default=0, ge=0, description="GPUs per worker")
    cpus_per_worker: int | None = Field(
        default=None, ge=1, description="Threads per worker; the cores, shared by the slots, where absent"
    )
    threads_per_worker: Literal["cpus", "auto"] = Field(
        default="cpus",
        description="cpus: as many as cpus_per_worker; auto: the number up to that with which the study's first "
        "worker finds training to be the fastest",
    )
    slots: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Worker groups; auto fills the machines that are there, also later ones: on CPUs with a worker per "
        "core",
    )
    pack: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Trials that a slot trains at once over one frozen base; auto: measured on a GPU, 1 on CPUs",
    )
    max_retries: int = Field(default=3, ge=0, description="A trial that breaks a slot more often is FAILED")

    @model_validator(mode="after")
    def _several_workers(self) -> Self:
        if self.strategy == "fsdp" and self.workers_per_trial == 1:
            raise ValueError(
                "strategy fsdp puts parts of a model on the workers of a trial, and there is one: write "
                "workers_per_trial: 2 or more, or strategy: ddp"
            )
        return self

    @model_validator(mode="after")
    def _threads_that_train(self) -> Self:
        if self.threads_per_worker == "auto" and (self.gpus_per_worker or self.strategy == "fsdp"):
            where = "gpus_per_worker leaves little to do to threads" if self.gpus_per_worker else "strategy is fsdp"
            raise ValueError(
                "threads_per_worker: auto measures one worker by itself, where it trains on CPUs, "
                f"and {where}: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _packs_of_one_worker(self) -> Self:
        if self.pack not in (1, "auto") and self.workers_per_trial > 1:
            raise ValueError(
                f"pack: {self.pack} puts several trials on one worker, and workers_per_trial one trial on "
                f"{self.workers_per_trial}: write pack: auto or 1, or workers_per_trial: 1"
            )
        return self


class TrackingSpec(_Section):
    """Where the study is recorded."""

    mlflow: str = Field(
        default="auto", min_length=1, description="auto (SQLite in the storage folder), off, or a tracking URI"
    )
    ledger: str = Field(
        default="auto", min_length=1, description="auto (SQLite in the study's folder) or an SQLAlchemy URL"
    )


class ForgettingSpec(_Section):
    """General text on which a model's loss is measured before and after it is adapted (the score ``forgetting``)."""

    source: str = Field(
        min_length=1,
        description="As data.source: a file, a folder, hub:ID or package:NAME/FILE; its test "
        "split is read, or validation where it has none, or else train",
    )
    config: str | None = Field(default=None, description="Configuration (subset) of a Hub data set")
    format: Literal["auto", "csv", "tsv", "json", "jsonl", "parquet"] = Field(
        default="auto", description="Format of a file; auto goes by the name"
    )
    column: str = Field(default="text", description="The column of texts")
    rows: int = Field(default=200, ge=1, le=100_000, description="Texts at most, evenly over the source")


class StudySpec(_Section):
    """One study: base models, domains, methods and budget."""

    name: Name = Field(description="Names the ledger, the MLflow experiment and the folder")
    description: str | None = Field(default=None, description="What the study is for; shown in MLflow")
    models: tuple[ModelSpec, ...] = Field(min_length=1, description="Base models to compare ('model: ...' for one)")
    domains: dict[Name, DomainSpec] = Field(min_length=1)
    methods: dict[str, MethodSpec] = Field(
        min_length=1, description="Methods to compare, each with its search space ({} for the default one)"
    )
    search: SearchSpec = SearchSpec()
    training: TrainingSpec = TrainingSpec()
    confirm: ConfirmSpec = ConfirmSpec()
    forgetting: ForgettingSpec | None = Field(
        default=None, description="Measure the rise of the loss on general text, where a task uses the base's own head"
    )
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
            data["methods"] = {key: _method(written) for key, written in methods.items()}
        domains = data.get("domains")
        if isinstance(domains, Mapping):
            data["domains"] = _few_shot_curves(domains)
        return data

    @model_validator(mode="after")
    def _distinct_models(self) -> Self:
        paths = [model.path for model in self.models]
        if len(set(paths)) < len(paths):
            raise ValueError("a model is listed twice")
        return self

    @model_validator(mode="after")
    def _compiled_by_one(self) -> Self:
        if self.training.compile and self.resources.strategy == "fsdp":
            raise ValueError("training.compile does not go with strategy: fsdp: leave one of them out")
        if self.training.compile and self.resources.pack not in (1, "auto"):
            raise ValueError(
                f"training.compile trains one trial at a time, and pack: {self.resources.pack} several: write pack: "
                "auto or 1, or leave compile out"
            )
        return self

    @property
    def trials_at_once(self) -> int | Literal["auto"]:
        """How many trials a slot trains at once; auto where that is measured, as it is on a GPU alone."""
        resources = self.resources
        measures = resources.workers_per_trial == 1 and resources.gpus_per_worker > 0 and not self.training.compile
        return 1 if resources.pack == "auto" and not measures else resources.pack

    def domain_max_length(self, domain: str) -> int:
        """Tokens per text in a domain."""
        return self.domains[domain].max_length or self.training.max_length

    def training_of(self, method: str) -> TrainingSpec:
        """``training`` with what a method does otherwise."""
        own = self.methods[method].training.model_dump(exclude_none=True) if method in self.methods else {}
        return self.training.model_copy(update=own)


def _method(written: Any) -> Any:
    """Tell a method's search space from its ``training``; what was dumped from a `MethodSpec` passes as it is."""
    if written is None:
        return {}
    if not isinstance(written, Mapping) or set(written) == {"space", "training"}:
        return written
    space = {key: value for key, value in written.items() if key != "training"}
    return {"space": space, **({"training": written["training"]} if "training" in written else {})}


def _few_shot_curves(domains: Mapping[Any, Any]) -> dict[Any, Any]:
    """A domain whose training limit is a list becomes one domain for each size, ``NAME-SIZE``."""
    found: dict[Any, Any] = {}
    for name, domain in domains.items():
        data = domain.get("data") if isinstance(domain, Mapping) else None
        limit = data.get("limit") if isinstance(data, Mapping) else None
        sizes = limit.get("train") if isinstance(limit, Mapping) else limit
        if not isinstance(sizes, list) or not all(type(size) is int for size in sizes) or _repeats(sizes):
            # What is no curve is as it is; what is a wrong one is refused where it stands.
            found[name] = domain
            continue
        assert isinstance(domain, Mapping)
        assert isinstance(data, Mapping)
        others = limit if isinstance(limit, Mapping) else {}
        for size in sizes:
            if f"{name}-{size}" in domains:
                raise ValueError(
                    f"the few-shot curve of {name!r} makes a domain '{name}-{size}', and there is one: rename either"
                )
            found[f"{name}-{size}"] = {**domain, "data": {**data, "limit": {**others, "train": size}}}
    return found


def _repeats(sizes: list[int]) -> bool:
    return not sizes or len(set(sizes)) < len(sizes)
