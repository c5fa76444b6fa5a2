"""From chosen trials of a study to verified folders: all of them, or none."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsearch.export.card import SPLIT, CardFacts
from peftsearch.export.contents import (
    is_earlier_export,
    load_tokenizer,
    missing_weights,
    note_verified,
    trained_model,
    write_folder,
)
from peftsearch.export.folder import scoring_device
from peftsearch.export.usage import Use
from peftsearch.export.verify import Job, Score, score_folders
from peftsearch.files import Place, exists
from peftsearch.frontier.front import Pick, domain_fronts, pick
from peftsearch.spec import THREADS, StudyError, StudyFacts, StudySpec, TrialRecord, model_location, suggest
from peftsearch.tracking.provenance import provenance

if TYPE_CHECKING:
    from torch import nn

    from peftsearch.domains import PreparedDomain
    from peftsearch.training.base_model import FrozenBase

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
        folder: Where it is.
        record: The trial, as in the ledger.
        score: The domain's metric that a fresh process found for the folder.
    """

    folder: Path
    record: TrialRecord
    score: float


def export_trials(
    study: StudyToExport,
    to: Path,
    *,
    domain: str | None = None,
    pick: Pick | str = "frontier",
    max_parameters: int | None = None,
    min_metric: float | None = None,
    tolerance: float = 1e-6,
    told: Callable[[str], None] | None = None,
) -> list[ExportedAdapter]:
    """Write trials of the front as folders ``TO/DOMAIN/NUMBER-METHOD``, and score each again in a fresh process.

    The folders appear when all of them are verified; until then, and after an error, nothing is to be seen of them. A
    folder that is an earlier export of the same trial is replaced.

    Args:
        study: The study.
        to: Folder for the adapters; made where it does not exist.
        domain: Only this domain.
        pick: ``frontier``, ``best`` or ``knee`` of each domain, see `peftsearch.frontier.pick`.
        max_parameters: Only trials with at most so many trainable parameters.
        min_metric: Only trials whose metric is at least this good.
        tolerance: Allowed difference between the score of the folder and the ledger's.
        told: Told of progress, in sentences.

    Returns:
        By domain, then trainable parameters.

    Raises:
        StudyError: No trial is left to export, the folder cannot be written or is taken, weights, data or base model
            are gone or damaged, or a folder does not score what the ledger says.
        RuntimeError: The fresh process died.
    """
    told = told or (lambda _: None)
    if not tolerance >= 0:
        raise StudyError(f"the tolerance must be at least 0, not {tolerance:g}")
    to = to.expanduser().absolute()
    chosen = _choose(study, domain, pick, max_parameters, min_metric, told)
    targets = [to / record.domain / f"{record.number:05d}-{record.method}" for record in chosen]
    _check_targets(to, targets, chosen, study.facts.study)
    for record in chosen:
        if not exists(_weights(study, record)):
            raise StudyError(missing_weights(record, _weights(study, record)))

    with _staging(to) as staging:
        staged = [staging / target.relative_to(to) for target in targets]
        told(f"Exporting {len(chosen)} trial{'s' if len(chosen) != 1 else ''} to {to}")
        jobs = write_trials(study, to, staging, staged, targets, chosen)
        told("Verifying in a fresh process")
        scores = score_folders(jobs, lambda index, score: told(_account(chosen[index], study, score)))
        for record, score in zip(chosen, scores, strict=True):
            _check_score(record, study.facts.domains[record.domain].metric, score, tolerance)
        environment = provenance(study.data_folder)
        exported = []
        with _writing(to):
            for record, score, folder, target in zip(chosen, scores, staged, targets, strict=True):
                value = score.scores[study.facts.domains[record.domain].metric]
                note_verified(folder, value, score.loss, score.examples, environment)
                exported.append(ExportedAdapter(target, record, value))
            for folder, target in zip(staged, targets, strict=True):
                _put(folder, target, staging / "replaced")
    return exported


def _choose(
    study: StudyToExport,
    domain: str | None,
    how: str,
    max_parameters: int | None,
    min_metric: float | None,
    told: Callable[[str], None],
) -> list[TrialRecord]:
    facts = study.facts
    if domain is not None and domain not in facts.domains:
        raise StudyError(f"the study {facts.study!r} has no domain {domain!r}{suggest(domain, facts.domains)}")
    chosen: list[TrialRecord] = []
    refused: list[str] = []
    for name, front in domain_fronts(study.records, facts).items():
        if domain not in (None, name):
            continue
        try:
            chosen += pick(
                front.front, how, front.facts.direction, max_parameters=max_parameters, min_metric=min_metric
            )
        except StudyError as error:
            refused.append(f"{name}: {error.message}")
    if not chosen:
        raise StudyError(f"there is nothing to export ({'; '.join(refused) or 'the study has no domain'})")
    for reason in refused:
        told(f"Nothing of {reason}")
    return chosen


def _weights(study: StudyToExport, record: TrialRecord) -> Place:
    from peftsearch.training.checkpoint import WEIGHTS, trial_folder

    folder = (
        study.folder / record.checkpoint if record.checkpoint else trial_folder(study.folder, f"{record.number:05d}")
    )
    return folder / WEIGHTS


def _check_targets(to: Path, targets: Sequence[Path], chosen: Sequence[TrialRecord], study: str) -> None:
    place = to
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise StudyError(f"cannot write to {str(to)!r}: choose another folder with --to")
    for target, record in zip(targets, chosen, strict=True):
        if os.path.lexists(target) and not is_earlier_export(target, study, record):
            raise StudyError(
                f"{str(target)!r} exists and is not an earlier export of trial {record.number} of the study "
                f"{study!r}: move it away, or choose another folder with --to"
            )


@contextmanager
def _staging(to: Path) -> Iterator[Path]:
    """A folder inside ``to`` (renaming needs the same file system) that is gone afterwards, and with it ``to`` and its
    parents where they were made for it and stayed empty.
    """
    made = [folder for folder in (to, *to.parents) if not folder.exists()]
    staging = to / f".export-{uuid.uuid4().hex[:8]}"
    try:
        with _writing(to):
            staging.mkdir(parents=True)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                break


@contextmanager
def _writing(to: Path) -> Iterator[None]:
    """Around what fails only where the folder cannot be written or the disk is full."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StudyError(f"cannot write to {str(to)!r}: {getattr(error, 'strerror', None) or error}") from None


def write_trials(
    study: StudyToExport,
    to: Path,
    staging: Path,
    staged: Sequence[Path],
    targets: Sequence[Path],
    chosen: Sequence[TrialRecord],
) -> list[Job]:
    """Write every folder; returns how to score them."""
    spec = study.spec
    device = scoring_device(spec.resources.gpus_per_worker)
    bases: dict[str, FrozenBase] = {}
    tokenizers: dict[str, Path] = {}
    domains: dict[tuple[str, str], PreparedDomain] = {}
    jobs = []
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
        card = _card(study, record, target, base, trained, prepared)
        with _writing(to):
            write_folder(folder, trained, card, prepared.labels, study.ledger)
            shutil.copytree(tokenizers[model], folder, dirs_exist_ok=True)
        threads = study.facts.provenance.get(THREADS)
        jobs.append(
            Job(
                str(folder),
                str(prepared.folder),
                SPLIT,
                spec.training.evaluation_batch_size,
                device.type,
                int(threads) if threads is not None else None,
                base.trust_remote_code,
            )
        )
    return jobs


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
    target: Path,
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
    if score.error is not None:
        return f"Trial {record.number} ({record.domain}, {record.method}): {score.error}"
    return f"Trial {record.number} ({record.domain}, {record.method}): {metric} {score.scores[metric]:.4f} from disk"


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


def _put(folder: Path, target: Path, replaced: Path) -> None:
    """Move a finished folder into its place; the earlier one is kept until that is done."""
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
