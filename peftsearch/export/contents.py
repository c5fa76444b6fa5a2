"""What goes into an exported folder."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsearch.export.card import SPLIT, CardFacts, model_card, speed_section
from peftsearch.export.folder import CARD, LABELS, PROVENANCE
from peftsearch.files import Place, read_json
from peftsearch.methods import METHODS
from peftsearch.spec import StudyError, TrialRecord, first_line, without_passwords

if TYPE_CHECKING:
    from torch import nn

    from peftsearch.domains import PreparedDomain
    from peftsearch.export.speed import Speed
    from peftsearch.training.base_model import FrozenBase


def load_tokenizer(location: str, revision: str | None) -> Any:
    """A base's tokenizer as the study used it: padding on the right, with the end token where it has no other.

    Raises:
        StudyError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
    except Exception as error:  # missing files, unknown ids and missing networks all raise differently
        raise StudyError(f"cannot load the tokenizer of {location!r}: {first_line(error).rstrip('.')}") from None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def trained_model(base: FrozenBase, domain: PreparedDomain, record: TrialRecord, weights: Place) -> nn.Module:
    """A finished trial's model, in evaluation mode, ready for ``save_pretrained``.

    Raises:
        StudyError: The weights are damaged or do not belong to the trial, or the base cannot be loaded.
    """
    from peft import PeftModel

    from peftsearch.training.checkpoint import CorruptCheckpointError
    from peftsearch.training.session import build_model, load_trained

    try:
        model = build_model(base, domain, record.method, record.hyperparameters, record.seed)
        load_trained(model, weights)
        if isinstance(model, PeftModel):
            quantization = METHODS[record.method].quantization(record.hyperparameters)
            _keep_untrained(model, base.template(domain, quantization).fresh)
            model.peft_config["default"].revision = base.revision
    except OSError as error:
        raise StudyError(
            f"trial {record.number} ({record.method}) cannot be exported, as its base model {base.location!r} or its "
            f"weights {str(weights)!r} cannot be read: {first_line(error).rstrip('.')}"
        ) from None
    except (CorruptCheckpointError, ValueError, RuntimeError) as error:
        raise StudyError(
            f"trial {record.number} ({record.method}) cannot be exported: {first_line(error).rstrip('.')}: restore "
            f"{str(weights)!r} from a copy, or leave the trial out (--pick, --max-parameters, --min-metric)"
        ) from None
    return model.eval()


def missing_weights(record: TrialRecord, weights: Place) -> str:
    """The sentence about weights that are not there."""
    return (
        f"the weights of trial {record.number} ({record.method}) are not there: restore {str(weights)!r} from a copy, "
        "or leave the trial out (--pick, --max-parameters, --min-metric)"
    )


def write_folder(folder: Path, model: nn.Module, card: CardFacts, labels: tuple[str, ...], ledger: str) -> None:
    """Write model, labels, card and provenance; the tokenizer is the caller's.

    Args:
        folder: Made here.
        model: As `trained_model` returns it.
        card: What is known of the trial.
        labels: Label names in the order of their ids.
        ledger: URL of the ledger, without password.

    Raises:
        OSError: The folder cannot be written.
    """
    from peft import PeftModel

    from peftsearch.training.base_model import quiet_loading

    folder.mkdir(parents=True)
    with quiet_loading():
        if isinstance(model, PeftModel):
            # Embeddings are never resized here, and looking whether they were would ask the Hub.
            model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            model.save_pretrained(str(folder))  # type: ignore[operator]
    describe_folder(folder, card, labels, ledger)


def describe_folder(folder: Path, card: CardFacts, labels: tuple[str, ...], ledger: str) -> None:
    """Write labels, card and provenance beside a model; arguments and errors as `write_folder`."""
    (folder / CARD).write_text(model_card(card), encoding="utf-8")
    _write_json(folder / LABELS, list(labels))
    _write_json(folder / PROVENANCE, _provenance(folder, card, ledger))
    # safetensors writes files that only their owner may read.
    for file in folder.iterdir():
        file.chmod((folder / CARD).stat().st_mode)


def note_verified(
    folder: Path, score: float, loss: float, examples: int, speed: Speed | None, packages: dict[str, str]
) -> None:
    """Add to the provenance, and to the card, what the fresh process found."""
    path = folder / PROVENANCE
    known = json.loads(path.read_text(encoding="utf-8"))
    known["verified"] = {"score": score, "loss": loss, "split": SPLIT, "examples": examples, "environment": packages}
    if speed is not None:
        known["speed"] = speed.as_json()
        with (folder / CARD).open("a", encoding="utf-8") as card:
            card.write(f"\n{speed_section(speed)}")
    _write_json(path, known)


def is_earlier_export(folder: Place, study: str, record: TrialRecord) -> bool:
    """Whether a folder is an export of this very trial; a study of the same name elsewhere began at another moment."""
    try:
        known = read_json(folder / PROVENANCE)
        trial = known["trial"]
        found = (known["study"], trial["number"], trial["started"], trial["method"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return found == (study, record.number, record.started, record.method)


def _keep_untrained(model: Any, fresh: frozenset[str]) -> None:
    """Have PEFT save what was drawn anew for the trial and is not trained, such as the pooler of a BERT whose
    checkpoint has none: whoever loads the base would draw other numbers.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    core = model.get_base_model()
    for path in sorted({name.rpartition(".")[0] for name in fresh}):
        names = path.split(".") if path else []
        parent, module = None, core
        for name in names:
            parent, module = module, getattr(module, name)
            if isinstance(module, ModulesToSaveWrapper):
                break
        if isinstance(module, ModulesToSaveWrapper):
            continue
        if parent is None:
            raise ValueError("the base model's checkpoint lacks a parameter that belongs to no layer")
        if isinstance(module, BaseTunerLayer):
            # PEFT does not adapt what it saves in full, so the update goes into the (trial's own) weights.
            module.merge()
            module = module.get_base_layer()
        setattr(parent, names[-1], ModulesToSaveWrapper(module, "default"))
        config = model.peft_config["default"]
        config.modules_to_save = [*(config.modules_to_save or ()), path]


def _provenance(folder: Path, card: CardFacts, ledger: str) -> dict[str, Any]:
    record = card.record
    weights = min(folder.glob("*.safetensors"))
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "study": card.facts.study,
        "form": card.form,
        "trial": record.model_dump(mode="json"),
        "score": {"metric": card.domain.metric, "value": record.value, "split": SPLIT},
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        "ledger": ledger,
        "model": {
            "path": record.model,
            **card.model.model_dump(mode="json"),
            "pad_token_id": card.pad_token_id,
            "quantization": card.quantization,
        },
        "domain": {
            "name": record.domain,
            **card.domain.model_dump(mode="json", exclude={"baselines", "failed_baselines"}),
        },
        "weights": {"file": weights.name, "sha256": digest},
        "trained_with": card.facts.provenance,
        "specification": _without_passwords(card.spec.model_dump(mode="json")),
    }


def _without_passwords(specification: dict[str, Any]) -> dict[str, Any]:
    tracking = {key: without_passwords(value) for key, value in specification["tracking"].items()}
    return {**specification, "tracking": tracking}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
