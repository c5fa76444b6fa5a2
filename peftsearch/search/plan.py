"""Everything about a study that can be known, and be wrong, before a worker starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftsearch.domains import CheckedDomain, ExpectedDomain, PreparedDomain, check_domain, expected_domain, load_domain
from peftsearch.files import Place
from peftsearch.methods import BYTES_PER_WEIGHT, Quantization
from peftsearch.search.cells import Cell, base_forms, corners, study_cells, trials_of
from peftsearch.search.counts import ParameterCount, ParameterCounter
from peftsearch.search.estimate import MemoryCosts, ModelShape, example_tokens, model_shapes
from peftsearch.search.loss_options import check_loss_options
from peftsearch.search.run import DomainSearch, TrialCost, excesses
from peftsearch.search.strategy import check_strategy
from peftsearch.search.unchecked import Unchecked, planned_place
from peftsearch.search.vocabulary import ScoredPositions
from peftsearch.spec import (
    ModelFacts,
    ModelSpec,
    StudyError,
    StudyFile,
    StudySpec,
    TrainingSpec,
    UnreachableError,
    model_location,
)
from peftsearch.spec.locations import PACKAGE_PREFIX
from peftsearch.training.budget import Budget, batch_sizes
from peftsearch.training.forgetting import general_texts, measurable
from peftsearch.training.segment import ModelPlace, WorkerPlan


@dataclass(frozen=True)
class CellPlan:
    """A cell with what its configurations cost.

    Attributes:
        cell: The cell.
        smallest: Parameters of the smallest configuration of the space.
        largest: Parameters of the largest.
    """

    cell: Cell
    smallest: ParameterCount
    largest: ParameterCount


@dataclass(frozen=True)
class StudyPlan:
    """A checked study: its data is prepared, its models can be read, its spaces fit the models."""

    spec: StudySpec
    cells: tuple[CellPlan, ...]
    domains: Mapping[str, PreparedDomain]
    """Each domain as prepared for the first model; labels, rows and metric are the same for every model."""
    prepared: Mapping[tuple[str, str], PreparedDomain]
    """The data by model and domain: models have tokenizers of their own."""
    budgets: Mapping[tuple[str, str], Budget]
    """By domain and method: methods may have a training of their own."""
    models: Mapping[str, ModelPlace]
    model_facts: Mapping[str, ModelFacts]
    counter: ParameterCounter
    example_tokens: Mapping[tuple[str, str], int]
    """Tokens that a model computes for one example at most, by model and domain."""
    general_texts: tuple[str, ...] = ()
    """On which forgetting is measured."""
    ignoring: tuple[str, ...] = ()
    """Options of the training that some of the domains have no use for, one clause each."""
    unchecked: tuple[str, ...] = ()
    """What could not be checked here, one sentence each; empty for a plan that can be run."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What whoever runs the study should know about its training and its models, one clause each."""
        return self.ignoring + tuple(
            f"the model {path!r} runs Python code that it brings along, with all rights of whoever runs the study "
            f"(trust_remote_code){_unpinned(self.spec, path)}"
            for path, place in self.models.items()
            if place.trust_remote_code
        )

    def count(self, cell: Cell, hyperparameters: Mapping[str, Any]) -> ParameterCount:
        """Parameters of a configuration; raises ValueError where it does not fit the model."""
        return self.counter.count(cell.model, cell.domain, cell.space, hyperparameters)

    def trials(self, cell: Cell) -> int:
        """Trials of a cell: as many as every other's, unless its grid has fewer."""
        return trials_of(self.spec.search, cell.space)

    def memory(self, shapes: Mapping[str, ModelShape]) -> MemoryCosts:
        """What single configurations take, given the models' shapes."""
        scored = {key: ScoredPositions.of(domain) for key, domain in self.prepared.items()}
        return MemoryCosts(self.spec, [item.cell for item in self.cells], shapes, self.example_tokens, scored)

    def _training(self, method: str) -> TrainingSpec:
        """A method's training, with gradient checkpointing where one of its cells is known to need it."""
        training = self.spec.training_of(method)
        memory = self.memory(model_shapes(self.models, self.model_facts, self.counter))
        mine = (item for item in self.cells if item.cell.method == method)
        if training.gradient_checkpointing != "auto" or not any(memory.recomputes(i.cell, i.largest) for i in mine):
            return training
        return training.model_copy(update={"gradient_checkpointing": True})

    @property
    def steps(self) -> dict[str, int]:
        """Steps of a trial's full budget, by DOMAIN/METHOD."""
        return {f"{domain}/{method}": budget.total_steps for (domain, method), budget in self.budgets.items()}

    def searches(self) -> dict[str, DomainSearch]:
        """What the search needs to know of each domain."""
        return {
            name: DomainSearch(
                domain.metric, domain.direction, {method: self.budgets[name, method] for method in self.spec.methods}
            )
            for name, domain in self.domains.items()
        }

    def for_workers(self, study_folder: Place, threads: int) -> WorkerPlan:
        """What the workers need to know."""
        return WorkerPlan(
            study_folder=study_folder,
            models={model: replace(place, form=self._common_form(model)) for model, place in self.models.items()},
            domains={key: domain.folder for key, domain in self.prepared.items()},
            budgets=dict(self.budgets),
            training={method: self._training(method) for method in self.spec.methods},
            threads=threads,
            measure_threads=self.spec.resources.threads_per_worker == "auto",
            general_texts=self.general_texts,
            pack=self.spec.trials_at_once,
            spaces={item.cell.method: item.cell.space for item in self.cells},
            bare=frozenset(key for key, domain in self.prepared.items() if domain.head.bare),
            strategy=self.spec.resources.strategy,
        )

    def _common_form(self, model: str) -> Quantization | None:
        """How a base is stored for what is not a trial: in the largest form that trials need in any case."""
        forms = {form for of, form in base_forms(item.cell for item in self.cells) if of == model}
        if None in forms:
            return None
        return max((form for form in forms if form is not None), key=lambda form: BYTES_PER_WEIGHT[form], default=None)


def plan_study(file: StudyFile, cache: Path, *, partial: bool = False, begun: bool = False) -> StudyPlan:
    """Check a study against methods, models and data, and prepare its data once nothing was found wrong.

    Args:
        file: The study file.
        cache: Where tokenised data goes.
        partial: Where a model or data is not at hand, plan with what the study file says of it and list it under
            `StudyPlan.unchecked`, rather than refuse. Such a plan is for reading, not for running.
        begun: Whether the study exists already.

    Raises:
        UnreachableError: A model or data is not at hand, unless `partial`.
        StudyError: The first thing that is wrong, with its place in the file.
    """
    from peftsearch.domains.models import is_commit

    spec = file.spec
    cells = study_cells(spec)
    check_strategy(spec, cells)
    ignoring = check_loss_options(spec, begun=begun)
    unchecked = Unchecked(allowed=partial)
    models = _places(spec, file.folder, cache, unchecked)
    cells = [cell for cell in cells if cell.model in models]
    # Everything is checked before anything is written: a mistake in the last domain leaves nothing of the first.
    checked = _check_domains(spec, file.folder, models, unchecked)
    first_model, _ = next(iter(checked))
    counter = ParameterCounter(models, {name: checked[first_model, name] for name in spec.domains})
    for path in models:
        for name in spec.domains:
            try:
                counter.total(path, name)
            except StudyError as error:
                raise error.at(_model_loc(spec, path)) from None
    cell_plans = tuple(_cell_plan(cell, counter) for cell in cells)
    first = next(iter(spec.domains))
    facts = {
        path: ModelFacts(
            location=place.location,
            revision=next(model.revision for model in spec.models if model.path == path),
            commit=place.revision if is_commit(place.revision) else None,
            trust_remote_code=place.trust_remote_code,
            architecture=counter.architecture(path, first),
            total_parameters=max(counter.total(path, name) for name in spec.domains),
            fingerprint=_fingerprint(place),
        )
        for path, place in models.items()
    }
    lengths = {key: example_tokens(domain, spec.domains[key[1]].data) for key, domain in checked.items()}
    _check_tokens(spec)
    scored = {key: ScoredPositions.of(domain) for key, domain in checked.items()}
    _check_limits(spec, cell_plans, MemoryCosts(spec, cells, model_shapes(models, facts, counter), lengths, scored))
    general = _general_texts(spec, file.folder, checked.values(), unchecked)
    prepared = {key: domain.prepare(cache) for key, domain in checked.items()}
    domains = {name: prepared[first_model, name] for name in spec.domains}
    budgets = {
        (name, method): _budget(name, list(prepared.values()), spec.training_of(method))
        for name in domains
        for method in spec.methods
    }
    return StudyPlan(
        spec,
        cell_plans,
        domains,
        prepared,
        budgets,
        models,
        facts,
        counter,
        lengths,
        general,
        ignoring,
        unchecked.sentences,
    )


def _general_texts(
    spec: StudySpec, folder: Path, domains: Iterable[CheckedDomain | ExpectedDomain], unchecked: Unchecked
) -> tuple[str, ...]:
    """The texts on which forgetting is measured.

    Raises:
        StudyError: They cannot be read, or no domain's model has the head that it takes.
    """
    if spec.forgetting is None:
        return ()
    if not any(measurable(domain.head) for domain in domains):
        raise StudyError(
            "forgetting is measured with the language-modelling head, which no domain's task uses (summarization, "
            "instruction and language_modeling do): leave it out",
            ("forgetting",),
        )
    try:
        return general_texts(spec.forgetting, folder)
    except UnreachableError as error:
        unchecked.general_text(spec.forgetting.source, error)
        return ()


def _check_tokens(spec: StudySpec) -> None:
    """A batch has room for the longest text that a domain may have.

    Raises:
        StudyError: It has not.
    """
    for method in spec.methods:
        limit, own = spec.training_of(method).tokens_per_batch, spec.methods[method].training.tokens_per_batch
        for name in spec.domains:
            longest = spec.domain_max_length(name)
            if limit is not None and limit < longest:
                place = ("training",) if own is None else ("methods", method, "training")
                raise StudyError(
                    f"{limit} tokens have no room for one text of domain {name!r}, which may have {longest} "
                    "(max_length): raise tokens_per_batch",
                    (*place, "tokens_per_batch"),
                )


def _check_limits(spec: StudySpec, cells: Iterable[CellPlan], memory: MemoryCosts) -> None:
    """In every cell something is within the limits.

    Raises:
        StudyError: Names the first cell of which even the smallest configuration is too large.
    """
    search = spec.search
    for item in cells:
        cell, cost = item.cell, TrialCost(memory(item.cell, item.smallest))
        exceeded = excesses(search, item.smallest, cost)
        where = f"the smallest configuration of {cell.method} in domain {cell.domain!r}"
        if exceeded.get("max_parameters", 0) > 0:
            raise StudyError(
                f"{where} trains {item.smallest.trainable:,} parameters, more than {search.max_parameters:,}: raise "
                f"the limit, let methods.{cell.method} search smaller sizes, or leave the method out",
                ("search", "max_parameters"),
            )
        if exceeded.get("max_memory", 0) > 0:
            raise StudyError(
                f"{where} is expected to need {cost.memory_bytes / 2**30:.2f} GiB per worker, more than "
                f"{search.max_memory:g}: raise the limit, lower training.batch_size, or leave the method out",
                ("search", "max_memory"),
            )


def _budget(name: str, prepared: Iterable[PreparedDomain], training: TrainingSpec) -> Budget:
    """The steps of a domain's trials; for all models as many as for the one whose tokens make the most batches.

    Where windows or blocks are counted, other models than that one pass over their rows more often.
    """
    lengths = [domain.lengths("train") for domain in prepared if domain.name == name]
    if training.tokens_per_batch is None:
        return Budget.of(max(map(len, lengths)), training.batch_size, training.epochs, training.evaluations)
    steps = max(len(batch_sizes(each, training.batch_size, training.tokens_per_batch)) for each in lengths)
    return Budget.of_steps(steps, training.epochs, training.evaluations)


def _places(spec: StudySpec, folder: Path, cache: Path, unchecked: Unchecked) -> dict[str, ModelPlace]:
    """Where each model is, by its path; without those of which nothing is known here."""
    places = {}
    for model in spec.models:
        loc = _model_loc(spec, model.path)
        try:
            places[model.path] = _place(model, folder)
        except UnreachableError as error:
            unchecked.model(model, error.at(loc), len(spec.domains) * len(spec.methods))
            if model.config is not None:
                places[model.path] = planned_place(model.config, cache, (*loc, "config"))
        except StudyError as error:
            raise error.at(loc) from None
    return places


def _place(model: ModelSpec, folder: Path) -> ModelPlace:
    from peftsearch.domains.models import model_commit, model_config

    try:
        location = model_location(model.path, folder)
    except StudyError as error:
        # A study file that brings the configuration knows that not everybody has the folder.
        raise error if model.config is None else UnreachableError(error.message) from None
    model_config(location, model.revision, trust_remote_code=model.trust_remote_code)
    # A branch of the Hub moves on: from here to the last worker, the study uses the commit that was found.
    revision = model_commit(location, model.revision) or model.revision
    place = ModelPlace(location, revision, model.trust_remote_code)
    _check_weights(place)
    return place


def _unpinned(spec: StudySpec, path: str) -> str:
    """A reminder to pin a Hub model's code; a folder has its fingerprint."""
    model = next(model for model in spec.models if model.path == path)
    on_hub = not path.startswith((PACKAGE_PREFIX, ".", "/", "~"))
    return "; pin it with 'revision'" if model.revision is None and on_hub else ""


def _check_weights(place: ModelPlace) -> None:
    """A folder's weights can be read; of a Hub model only the workers know, after downloading it."""
    from safetensors import SafetensorError, safe_open

    folder = Path(place.location)
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StudyError(
            f"the model folder {place.location!r} holds no model.safetensors: save the model with "
            "save_pretrained (pickled weights such as pytorch_model.bin can run code and are not loaded: whoever "
            "trusts them converts them once, with AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise StudyError(f"cannot read the weights {str(file)!r}: {error}") from None


def _model_loc(spec: StudySpec, path: str) -> tuple[str | int, ...]:
    if len(spec.models) == 1:
        return ("model",)
    return ("models", [model.path for model in spec.models].index(path))


def _check_domains(
    spec: StudySpec, folder: Path, models: Mapping[str, ModelPlace], unchecked: Unchecked
) -> dict[tuple[str, str], CheckedDomain | ExpectedDomain]:
    checked: dict[tuple[str, str], CheckedDomain | ExpectedDomain] = {}
    # Where nothing is known of any model, the data is checked all the same.
    for path in models or [spec.models[0].path]:
        for name in spec.domains:
            try:
                checked[path, name] = _check_domain(name, spec, folder, path, models.get(path), unchecked)
            except StudyError as error:
                loc = _model_loc(spec, path) if error.loc == ("model",) else error.loc
                raise error.at(loc) from None
    return checked


def _check_domain(
    name: str, spec: StudySpec, folder: Path, path: str, place: ModelPlace | None, unchecked: Unchecked
) -> CheckedDomain | ExpectedDomain:
    """A domain for a model, as far as both are at hand."""
    from peftsearch.domains.models import architecture_of, model_config

    if path not in unchecked.models and place is not None:
        try:
            return check_domain(
                name,
                spec,
                folder=folder,
                model_location=place.location,
                revision=place.revision,
                config=model_config(place.location, place.revision, trust_remote_code=place.trust_remote_code),
            )
        except UnreachableError as error:
            if error.loc[:1] != ("domains",):
                unchecked.tokenizer(path, error)
    try:
        raw = load_domain(name, spec, folder)
    except UnreachableError as error:
        unchecked.data(name, spec.domains[name].data, error)
        raw = None
    kind = None
    if place is not None:
        kind = architecture_of(model_config(place.location, place.revision, trust_remote_code=place.trust_remote_code))
    return expected_domain(name, spec, kind, path, raw)


def _cell_plan(cell: Cell, counter: ParameterCounter) -> CellPlan:
    counts = []
    for corner in corners(cell):
        try:
            counts.append(counter.count(cell.model, cell.domain, cell.space, corner))
        except ValueError:
            # A configuration that does not fit is a FAILED trial, not a wrong study, as long as another one fits.
            continue
    if not counts:
        try:
            counter.count(cell.model, cell.domain, cell.space, corners(cell)[0])
        except ValueError as error:
            raise StudyError(
                f"no configuration fits the model {cell.model!r}: {error}", ("methods", cell.method)
            ) from None
    ordered = sorted(counts, key=lambda count: count.trainable)
    return CellPlan(cell, ordered[0], ordered[-1])


def _fingerprint(place: ModelPlace) -> str:
    """Hash of a folder's configuration, weights, and code that may run; a Hub model is named by its commit."""
    folder = Path(place.location)
    if not folder.is_dir():
        return place.revision or "latest"
    digest = hashlib.sha256()
    code = folder.rglob("*.py") if place.trust_remote_code else ()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *code]):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
