"""From chosen trials of a study to verified folders: all of them, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsearch.export.card import SPLIT, CardFacts, model_card, speed_section
from peftsearch.export.contents import (
    describe_folder,
    is_earlier_export,
    load_tokenizer,
    missing_weights,
    note_verified,
    trained_model,
    write_folder,
)
from peftsearch.export.convert import Form, check_form, convert
from peftsearch.export.folder import CARD, scoring_device
from peftsearch.export.hub import HubRepo, check_repo, push_folder
from peftsearch.export.registry import Registered, Registry, aliases_of, check_registry, register
from peftsearch.export.speed import Speed
from peftsearch.export.usage import Use
from peftsearch.export.verify import Job, Score, score_folders
from peftsearch.files import Place, check_bucket, copy_tree, delete_tree, exists, names, reason
from peftsearch.frontier.front import Choice, Pick, choose, domain_fronts
from peftsearch.methods import METHODS
from peftsearch.spec import THREADS, StudyError, StudyFacts, StudySpec, TrialRecord, model_location, suggest
from peftsearch.tracking.provenance import provenance

if TYPE_CHECKING:
    from torch import nn

    from peftsearch.domains import PreparedDomain
    from peftsearch.training.base_model import FrozenBase

_ENDINGS: dict[Form, str] = {"adapter": "", "merged": "-merged", "lora": "-as-lora"}
LOSS_TOLERANCE = 0.01
"""Allowed relative difference of the mean loss. A wrong model that answers the majority class scores what a trial that
does so too scores; their losses tell them apart."""


@dataclass(frozen=True)
class StudyToExport:
    """What an export needs to know of a study.

    Attributes:
        spec: The study.
        facts: What is known beside the trials.
        records: The ledger's trials.
        folder: The study's folder, with the trials' weights.
        data_folder: Relative paths in the study start there.
        cache: Where tokenised data is kept.
        ledger: URL of the ledger, without password.
    """

    spec: StudySpec
    facts: StudyFacts
    records: Sequence[TrialRecord]
    folder: Place
    data_folder: Path
    cache: Path
    ledger: str


@dataclass(frozen=True)
class ExportedAdapter:
    """A verified folder.

    Attributes:
        folder: Where it is; None where it was only pushed to the Hub.
        record: The trial, as in the ledger.
        score: The domain's metric that a fresh process found for the folder.
        form: What became of the adapter: ``adapter``, ``merged`` or ``lora``.
        speed: How fast it is on this machine.
        reason: Why it was picked rather than another trial, where error bars decided.
        repository: Address of the repository of the Hub, where it was pushed.
        registered: Its version in MLflow's registry, where it was registered.
    """

    folder: Place | None
    record: TrialRecord
    score: float
    form: Form = "adapter"
    speed: Speed | None = None
    reason: str | None = None
    repository: str | None = None
    registered: Registered | None = None

    def as_json(self) -> dict[str, Any]:
        """What ``export --json`` prints of it."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "repository": self.repository,
            "registered": self.registered.as_json() if self.registered else None,
            "domain": self.record.domain,
            "trial": self.record.number,
            "method": self.record.method,
            "form": self.form,
            "trainable_parameters": self.record.trainable_parameters,
            "score": self.score,
            "ledger_score": self.record.value,
            "speed": self.speed.as_json() if self.speed else None,
            "reason": self.reason,
        }


def export_trials(
    study: StudyToExport,
    to: Place | None,
    *,
    domain: str | None = None,
    pick: Pick | str = "frontier",
    max_parameters: int | None = None,
    min_metric: float | None = None,
    max_latency: float | None = None,
    form: Form = "adapter",
    push: str | None = None,
    private: bool = True,
    registry: Registry | None = None,
    tolerance: float | None = None,
    told: Callable[[str], None] | None = None,
) -> list[ExportedAdapter]:
    """Write trials of the front as folders ``TO/DOMAIN/NUMBER-METHOD``, and score each again in a fresh process.

    The folders appear when all of them are verified; until then, and after an error, nothing is to be seen of them. A
    folder that is an earlier export of the same trial is replaced.

    Args:
        study: The study.
        to: Folder for the adapters, or a place in an object store; made where it does not exist. None with ``push``.
        domain: Only this domain.
        pick: ``frontier``, ``best``, ``knee`` or ``smallest`` of each domain, see `peftsearch.frontier.choose`.
        max_parameters: Only trials with at most so many trainable parameters.
        min_metric: Only trials whose metric is at least this good.
        max_latency: Only trials that take at most so many milliseconds for one example by itself, in the form that is
            exported, on this machine (`Speed.latency_ms`): whatever the other limits leave is loaded and measured.
        form: ``adapter``; ``merged``: a complete model, which needs nothing but `transformers` (folders end in
            ``-merged``); ``lora``: a plain LoRA, made by PEFT (``-as-lora``).
        push: ``OWNER/NAME`` of a repository of the Hub that the one exported trial goes to.
        private: Whether only its owner sees a repository that is new.
        registry: MLflow's registry, where to register what is exported; see `peftsearch.export.registry`.
        tolerance: Allowed difference between the score of the folder and the ledger's; 1e-6 where absent, and 1e-3 for
            merged and converted ones, whose weights are rounded anew.
        told: Told of progress, in sentences.

    Returns:
        By domain, then trainable parameters.

    Raises:
        StudyError: No trial is left to export, or none can have the form; the folder cannot be written or is taken; the
            same of the repository; weights, data or base model are gone or damaged, or a folder does not score what the
            ledger says.
        RuntimeError: The fresh process died.
    """
    told = told or (lambda _: None)
    allowed = tolerance if tolerance is not None else 1e-6 if form == "adapter" else 1e-3
    if not allowed >= 0:
        raise StudyError(f"the tolerance must be at least 0, not {allowed:g}")
    if max_latency is not None and not max_latency > 0:
        raise StudyError(f"the latency must be above 0 ms, not {max_latency:g}")
    if to is None and push is None:
        raise StudyError("say where to export to: a folder or a URI with --to, or a repository of the Hub with --push")
    if isinstance(to, Path):
        to = to.expanduser().absolute()
    repo = HubRepo(push) if push is not None else None
    limits: dict[str, Any] = {"max_parameters": max_parameters, "min_metric": min_metric}
    chosen = _choose(study, domain, pick, told, **limits)
    if max_latency is not None:
        # What is fast enough is known later.
        chosen = _choose(study, domain, "frontier", lambda _: None, **limits)
    chosen = _with_form(chosen, form, told)
    records = [choice.record for choice in chosen]
    if repo is not None:
        # A latency may leave one of several.
        if max_latency is None or pick == "frontier" or len({record.domain for record in records}) > 1:
            _check_one(repo, records)
        check_repo(repo, study.facts.study, records[0].domain)
    if registry is not None:
        check_registry(registry, study.facts.study, records)

    named = [f"{record.domain}/{_name_of(record, form)}" for record in records]
    if to is not None:
        _check_targets(to, [to / name for name in named], records, study.facts.study)
    for record in records:
        if not exists(_weights(study, record)):
            raise StudyError(missing_weights(record, _weights(study, record)))

    with _staging(to) as (staging, local):
        places = [(to or local) / name for name in named]
        staged = [staging / name for name in named]
        shown: list[Place | HubRepo] = [repo if to is None and repo is not None else place for place in places]
        told(f"Exporting {len(records)} trial{'s' if len(records) != 1 else ''} to {to or repo}")
        written = write_folders(study, to or local, staging, staged, shown, records, form)
        told("Verifying in a fresh process")
        jobs = [replace(job, measure=True) for job, _ in written]
        scores = score_folders(jobs, lambda index, score: told(_account(records[index], study, score)))
        kept = list(range(len(records)))
        if max_latency is not None:
            latencies = {
                record.number: score.measured["latency_ms"]
                for record, score in zip(records, scores, strict=True)
                if score.measured is not None
            }
            fast = {"max_latency": max_latency, "latencies": latencies}
            chosen = _choose(study, domain, pick, told, **limits, **fast)
            kept = [[record.number for record in records].index(choice.record.number) for choice in chosen]
            if repo is not None:
                _check_one(repo, [records[index] for index in kept])
        for choice in chosen:
            if choice.reason is not None:
                told(f"{choice.record.domain}: {choice.reason}")
        for index in kept:
            record = records[index]
            _check_score(record, study.facts.domains[record.domain].metric, scores[index], allowed)
        environment = provenance(study.data_folder)
        exported = []
        with _writing(to or local):
            for index, choice in zip(kept, chosen, strict=True):
                record, score = records[index], scores[index]
                value = score.scores[study.facts.domains[record.domain].metric]
                speed = Speed(**score.measured) if score.measured is not None else None
                note_verified(staged[index], value, score.loss, score.examples, speed, environment)
                place = None if to is None else places[index]
                exported.append(ExportedAdapter(place, record, value, form, speed, choice.reason))
            if to is not None:
                for index in kept:
                    _put(staged[index], places[index], staging / "replaced")
        if repo is not None:
            (index,) = kept
            source = places[index] if isinstance(to, Path) else staged[index]
            assert isinstance(source, Path)
            address = _push(source, repo, written[index][1], exported[0], staging, private)
            told(f"Pushed to {address}")
            exported = [replace(exported[0], repository=address)]
        if registry is not None:
            aliases = aliases_of(study.records, study.facts, _ENDINGS[form])
            for position, (index, item) in enumerate(zip(kept, exported, strict=True)):
                source = places[index] if isinstance(to, Path) else staged[index]
                assert isinstance(source, Path)
                mine = aliases.get(item.record.number, ())
                version = register(registry, study.facts.study, item.record, source, form, mine)
                told(f"Registered as {' and '.join(version.uris)}")
                exported[position] = replace(item, registered=version)
    return exported


def _check_one(repo: HubRepo, records: Sequence[TrialRecord]) -> None:
    if len(records) != 1:
        numbers = ", ".join(f"{record.number} ({record.domain}, {record.method})" for record in records[:5])
        more = ", ..." if len(records) > 5 else ""
        raise StudyError(
            f"a repository of the Hub holds one adapter, and {len(records)} trials are picked: {numbers}{more}; pick "
            f"the one for {repo.id} with --domain and --pick best, knee or smallest"
        )


def _push(folder: Path, repo: HubRepo, card: CardFacts, item: ExportedAdapter, staging: Path, private: bool) -> str:
    """Upload a folder, with a card that loads it from there."""
    copy = Path(shutil.copytree(folder, staging / "pushed"))
    text = model_card(replace(card, folder=repo))
    if item.speed is not None:
        text += f"\n{speed_section(item.speed)}"
    (copy / CARD).write_text(text, encoding="utf-8")
    message = f"Trial {item.record.number} ({item.record.method}) of the peftsearch study {card.facts.study}"
    return push_folder(copy, repo, private=private, message=message)


def _name_of(record: TrialRecord, form: Form) -> str:
    return f"{record.number:05d}-{record.method}{_ENDINGS[form]}"


def _with_form(chosen: Sequence[Choice], form: Form, told: Callable[[str], None]) -> list[Choice]:
    """The trials that can have that form; the others are told of."""
    left: list[Choice] = []
    refused: list[StudyError] = []
    for choice in chosen:
        try:
            check_form(form, choice.record)
            left.append(choice)
        except StudyError as error:
            refused.append(error)
    if not left:
        raise refused[0]
    for reason_why in refused:
        told(f"Left out: {reason_why.message}")
    return left


def _choose(
    study: StudyToExport, domain: str | None, how: str, told: Callable[[str], None], **limits: Any
) -> list[Choice]:
    facts = study.facts
    if domain is not None and domain not in facts.domains:
        raise StudyError(f"the study {facts.study!r} has no domain {domain!r}{suggest(domain, facts.domains)}")
    chosen: list[Choice] = []
    refused: list[str] = []
    for name, front in domain_fronts(study.records, facts).items():
        if domain not in (None, name):
            continue
        try:
            chosen += choose(front.front, how, front.facts.direction, **limits)
        except StudyError as error:
            refused.append(f"{name}: {error.message}")
    if not chosen:
        raise StudyError(f"there is nothing to export ({'; '.join(refused) or 'the study has no domain'})")
    for sentence in refused:
        told(f"Nothing of {sentence}")
    return chosen


def _weights(study: StudyToExport, record: TrialRecord) -> Place:
    from peftsearch.training.checkpoint import WEIGHTS, trial_folder

    folder = (
        study.folder / record.checkpoint if record.checkpoint else trial_folder(study.folder, f"{record.number:05d}")
    )
    return folder / WEIGHTS


def _check_targets(to: Place, targets: Sequence[Place], chosen: Sequence[TrialRecord], study: str) -> None:
    if isinstance(to, Path):
        place = to
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise StudyError(f"cannot write to {str(to)!r}: choose another folder with --to")
    else:
        try:
            check_bucket(to)
        except OSError as error:
            raise StudyError(f"cannot write to {str(to)!r}: {reason(error)}") from None
    for target, record in zip(targets, chosen, strict=True):
        there = os.path.lexists(target) if isinstance(target, Path) else bool(names(target))
        if there and not is_earlier_export(target, study, record):
            raise StudyError(
                f"{str(target)!r} exists and is not an earlier export of trial {record.number} of the study "
                f"{study!r}: move it away, or choose another folder with --to"
            )


@contextmanager
def _staging(to: Place | None) -> Iterator[tuple[Path, Path]]:
    """A folder to work in, and the folder of this machine that it is in.

    For a local ``to`` it is inside of that (renaming needs the same file system) and gone afterwards, and with it
    ``to`` and its parents where they were made for it and stayed empty.
    """
    if not isinstance(to, Path):
        with tempfile.TemporaryDirectory(prefix="peftsearch-export-") as folder:
            yield Path(folder) / "staging", Path(folder)
        return
    made = [place for place in (to, *to.parents) if not place.exists()]
    staging = to / f".export-{uuid.uuid4().hex[:8]}"
    try:
        with _writing(to):
            staging.mkdir(parents=True)
        yield staging, to
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for place in made:
            try:
                place.rmdir()
            except OSError:
                break


@contextmanager
def _writing(to: Place) -> Iterator[None]:
    """Around what fails only where the folder cannot be written or the disk is full."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StudyError(f"cannot write to {str(to)!r}: {getattr(error, 'strerror', None) or error}") from None


def write_trials(
    study: StudyToExport,
    to: Place,
    staging: Path,
    staged: Sequence[Path],
    targets: Sequence[Place | HubRepo],
    chosen: Sequence[TrialRecord],
) -> list[Job]:
    """Write every adapter; returns how to score them."""
    return [job for job, _ in write_folders(study, to, staging, staged, targets, chosen, "adapter")]


def write_folders(
    study: StudyToExport,
    to: Place,
    staging: Path,
    staged: Sequence[Path],
    targets: Sequence[Place | HubRepo],
    chosen: Sequence[TrialRecord],
    form: Form,
) -> list[tuple[Job, CardFacts]]:
    """Write every folder.

    Args:
        study: The study.
        to: What to name where nothing can be written.
        staging: For what is only needed meanwhile.
        staged: The folders, by trial.
        targets: What their cards say of where they are.
        chosen: The trials.
        form: What becomes of the adapters.

    Returns:
        For each how to score it, and its card.
    """
    spec = study.spec
    device = scoring_device(spec.resources.gpus_per_worker)
    bases: dict[str, FrozenBase] = {}
    tokenizers: dict[str, Path] = {}
    domains: dict[tuple[str, str], PreparedDomain] = {}
    written = []
    for record, folder, target in zip(chosen, staged, targets, strict=True):
        model = record.model
        if model not in bases:
            bases[model] = _base(study, model, device.type)
            tokenizers[model] = staging / f"tokenizer-{len(tokenizers)}"
            tokenizer = load_tokenizer(bases[model].location, bases[model].revision)
            with _writing(to):
                tokenizer.save_pretrained(str(tokenizers[model]))
        if (model, record.domain) not in domains:
            domains[model, record.domain] = _data(study, record.domain, bases[model], tokenizers[model])
        base, prepared = bases[model], domains[model, record.domain]
        trained = trained_model(base, prepared, record, _weights(study, record))
        card = replace(_card(study, record, target, base, trained, prepared), form=form)
        other = form != "adapter" and not METHODS[record.method].trains_copy
        adapter = staging / f"adapter-{record.number}" if other else folder
        with _writing(to):
            write_folder(adapter, trained, card, prepared.labels, study.ledger)
            if other:
                convert(adapter, folder, form, prepared, trust_remote_code=base.trust_remote_code)
                describe_folder(folder, card, prepared.labels, study.ledger)
                shutil.rmtree(adapter)
            shutil.copytree(tokenizers[model], folder, dirs_exist_ok=True)
        threads = study.facts.provenance.get(THREADS)
        job = Job(
            str(folder),
            str(prepared.folder),
            SPLIT,
            spec.training.evaluation_batch_size,
            device.type,
            int(threads) if threads is not None else None,
            base.trust_remote_code,
        )
        written.append((job, card))
    return written


def _base(study: StudyToExport, model: str, device: str) -> FrozenBase:
    import torch

    from peftsearch.domains.models import model_config
    from peftsearch.training.base_model import FrozenBase

    chosen = next((item for item in study.spec.models if item.path == model), None)
    trusted = chosen is not None and chosen.trust_remote_code
    location = model_location(model, study.data_folder)
    # The commit that was trained on, where it is known: a branch may have moved on since.
    known = study.facts.models.get(model)
    revision = (known.commit if known else None) or (chosen.revision if chosen else None)
    model_config(location, revision, trust_remote_code=trusted)
    return FrozenBase(location, revision, torch.device(device), trust_remote_code=trusted)


def _data(study: StudyToExport, domain: str, base: FrozenBase, tokenizer: Path) -> PreparedDomain:
    """The domain's data as the exported tokenizer makes it: where that is the base's, as it is in the cache already."""
    from peftsearch.domains import prepare_domain
    from peftsearch.domains.models import architecture_of, model_config

    config = model_config(base.location, base.revision, trust_remote_code=base.trust_remote_code)
    try:
        prepared = prepare_domain(
            domain,
            study.spec,
            folder=study.data_folder,
            model_location=str(tokenizer),
            revision=None,
            cache=study.cache,
            architecture=architecture_of(config),
            config=config,
        )
    except StudyError as error:
        raise StudyError(
            f"exports of domain {domain!r} cannot be verified, as its data cannot be prepared: {error.message}"
        ) from None
    if prepared.fingerprint != study.facts.domains[domain].fingerprint:
        raise StudyError(
            f"the data of domain {domain!r} has changed since the study {study.facts.study!r} scored its trials on it: "
            "restore it, so that exports can be verified"
        )
    return prepared


def _card(
    study: StudyToExport,
    record: TrialRecord,
    target: Place | HubRepo,
    base: FrozenBase,
    trained: nn.Module,
    prepared: PreparedDomain,
) -> CardFacts:
    from peft import PeftModel

    from peftsearch.domains.models import model_config

    config = model_config(base.location, base.revision, trust_remote_code=base.trust_remote_code)
    core: Any = trained.get_base_model() if isinstance(trained, PeftModel) else trained
    silent = getattr(config, "pad_token_id", None) is None
    head = prepared.head.auto_model.removeprefix("AutoModel")
    return CardFacts(
        spec=study.spec,
        facts=study.facts,
        record=record,
        folder=target,
        location=base.location,
        revision=base.revision,
        trust_remote_code=base.trust_remote_code,
        auto_model=prepared.head.auto_model,
        use=Use(
            prepared.task,
            study.facts.domains[record.domain],
            prepared.architecture,
            study.spec.domains[record.domain].data.columns.text_pair is not None,
        ),
        base_has_head=any(head in name for name in config.architectures or ()),
        pad_token_id=getattr(core.config, "pad_token_id", None) if silent else None,
        quantization=_quantization(core.config),
    )


def _quantization(config: Any) -> dict[str, Any] | None:
    """How the base of a model was quantised while loading it, in words that JSON and a reader of the card know."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return {name: value for name, value in found.to_diff_dict().items() if not name.startswith(("_", "quant_method"))}


def _account(record: TrialRecord, study: StudyToExport, score: Score) -> str:
    metric = study.facts.domains[record.domain].metric
    named = f"Trial {record.number} ({record.domain}, {record.method})"
    if score.error is not None:
        return f"{named}: {score.error}"
    speed = f"; {Speed(**score.measured).sentence()}" if score.measured is not None else ""
    return f"{named}: {metric} {score.scores[metric]:.4f} from disk{speed}"


def _check_score(record: TrialRecord, metric: str, score: Score, tolerance: float) -> None:
    trial = f"trial {record.number} ({record.domain}, {record.method})"
    if score.error is not None:
        raise StudyError(f"{trial} is not exported, as a fresh process could not load its folder: {score.error}")
    assert record.value is not None
    found = score.scores[metric]
    advice = (
        "the base model, the libraries or the machine are not those that trained it, or its weights were changed: "
        "restore them"
    )
    # "not <=", so that a score that is no number is refused too.
    if not abs(found - record.value) <= tolerance:
        raise StudyError(
            f"{trial} is not exported: its folder scores {metric} {found:.6f} and the ledger says {record.value:.6f}; "
            f"{advice}, or allow the difference with --tolerance"
        )
    loss = record.rungs[-1].loss
    if not abs(score.loss - loss) <= LOSS_TOLERANCE * max(abs(loss), 1e-3) + tolerance:
        raise StudyError(
            f"{trial} is not exported: its folder scores the ledger's {metric} {record.value:.6f}, but with the loss "
            f"{score.loss:.6f} and not {loss:.6f}; {advice}"
        )


def _put(folder: Path, target: Place, replaced: Path) -> None:
    """Bring a finished folder into its place; an earlier one is kept until that is done."""
    if not isinstance(target, Path):
        try:
            copy_tree(folder, target)
        except OSError:
            # A part of a folder is no adapter. (What an earlier export left is no longer whole either.)
            delete_tree(target)
            raise
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    earlier = replaced / target.parent.name / target.name
    if target.exists():
        earlier.parent.mkdir(parents=True, exist_ok=True)
        target.rename(earlier)
    try:
        folder.rename(target)
    except BaseException:
        if earlier.exists():
            earlier.rename(target)
        raise
