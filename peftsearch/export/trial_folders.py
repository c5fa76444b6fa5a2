"""A study's trials as folders: base model, data and weights of each are brought together, and described in a card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsearch.export.card import SPLIT, CardFacts
from peftsearch.export.contents import describe_folder, load_tokenizer, trained_model, write_folder
from peftsearch.export.convert import Form, convert
from peftsearch.export.exported_data import prepare_with
from peftsearch.export.folder import scoring_device
from peftsearch.export.hub import HubRepo
from peftsearch.export.places import writing
from peftsearch.export.purpose import columns_read
from peftsearch.export.usage import Use
from peftsearch.export.verify import Job
from peftsearch.files import Place
from peftsearch.frontier.front import front
from peftsearch.methods import METHODS
from peftsearch.spec import THREADS, StudyError, StudyFacts, StudySpec, TrialRecord, model_location

if TYPE_CHECKING:
    from torch import nn

    from peftsearch.domains import PreparedDomain
    from peftsearch.training.base_model import FrozenBase


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
            with writing(to):
                tokenizer.save_pretrained(str(tokenizers[model]))
        if (model, record.domain) not in domains:
            domains[model, record.domain] = _data(study, record.domain, bases[model], tokenizers[model])
        base, prepared = bases[model], domains[model, record.domain]
        trained = trained_model(base, prepared, record, weights_of(study, record))
        card = replace(_card(study, record, target, base, trained, prepared), form=form)
        other = form != "adapter" and not METHODS[record.method].trains_copy
        adapter = staging / f"adapter-{record.number}" if other else folder
        with writing(to):
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


def weights_of(study: StudyToExport, record: TrialRecord) -> Place:
    """Where a trial's weights are."""
    from peftsearch.training.checkpoint import WEIGHTS, trial_folder

    folder = (
        study.folder / record.checkpoint if record.checkpoint else trial_folder(study.folder, f"{record.number:05d}")
    )
    return folder / WEIGHTS


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
    try:
        prepared = prepare_with(
            tokenizer,
            domain,
            study.spec,
            folder=study.data_folder,
            cache=study.cache,
            base=base.location,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
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
    use = Use(
        prepared.task,
        study.facts.domains[record.domain],
        prepared.architecture,
        "text_pair" in columns_read(study.spec.domains[record.domain]),
    )
    rivals = [other for other in study.records if other.domain == record.domain]
    return CardFacts(
        spec=study.spec,
        facts=study.facts,
        record=record,
        folder=target,
        location=base.location,
        revision=base.revision,
        trust_remote_code=base.trust_remote_code,
        auto_model=prepared.head.auto_model,
        use=use,
        base_has_head=any(head in name for name in config.architectures or ()),
        pad_token_id=getattr(core.config, "pad_token_id", None) if silent else None,
        quantization=_quantization(core.config),
        on_front=record in front(rivals, study.facts.domains[record.domain].direction),
    )


def _quantization(config: Any) -> dict[str, Any] | None:
    """How the base of a model was quantised while loading it, in words that JSON and a reader of the card know."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return {name: value for name, value in found.to_diff_dict().items() if not name.startswith(("_", "quant_method"))}
