"""Scoring an exported adapter from disk, on any domain with the same labels."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from peftsearch.export.exported_data import prepare_with
from peftsearch.export.folder import LABELS, ExportedFolder, scoring_device
from peftsearch.spec import StudyError, StudyFile, model_location


def evaluate_adapter(
    adapter: Path, file: StudyFile, domain: str, split: str, cache: Path | None = None
) -> dict[str, Any]:
    """Score an exported adapter on a split of a study's domain.

    Args:
        adapter: The exported folder. Its own tokenizer is used.
        file: The study file that describes the data.
        domain: One of its domains.
        split: ``train``, ``validation`` or ``test``.
        cache: Where tokenised data is kept for the next time; nowhere if None.

    Returns:
        ``adapter``, ``domain``, ``split``, ``metric`` (the domain's), ``value`` (in that metric), ``examples`` (how
        many), ``loss`` and ``scores`` (all of the task's).

    Raises:
        StudyError: The folder is no exported adapter, the domain's data is wrong, it has no such split, its labels are
            not the adapter's, or a batch does not fit into memory.
    """
    from peftsearch.training.distributed import WorkerGroup
    from peftsearch.training.evaluate import evaluate
    from peftsearch.training.memory import within_memory

    exported = ExportedFolder.read(adapter)
    trusted = _trusted(exported, file)
    with tempfile.TemporaryDirectory(prefix="peftsearch-evaluate-") as temporary:
        prepared = prepare_with(
            adapter,
            domain,
            file.spec,
            folder=file.folder,
            cache=cache or Path(temporary),
            base=exported.base or str(adapter),
            revision=exported.revision,
            trust_remote_code=trusted,
        )
        if split not in prepared.rows:
            known = ", ".join(prepared.rows)
            raise StudyError(f"the domain {domain!r} has no split {split!r}; its splits: {known}")
        _check_labels(exported, prepared.labels, domain)
        device = scoring_device(file.spec.resources.gpus_per_worker)
        model = exported.load(prepared, device, trust_remote_code=trusted)
        size = file.spec.training.evaluation_batch_size
        with within_memory(f"lower --set training.evaluation_batch_size=N, which is {size}"):
            found = evaluate(model, prepared, split, size, WorkerGroup(device=device))
    return {
        "adapter": str(adapter),
        "domain": domain,
        "split": split,
        "metric": prepared.metric,
        "value": found.scores[prepared.metric],
        "examples": found.examples,
        "loss": found.loss,
        "scores": found.scores,
    }


def _trusted(exported: ExportedFolder, file: StudyFile) -> bool:
    """Whether the study file trusts the code of the very base that an adapter names; an exported folder cannot say so
    about itself."""
    for model in file.spec.models:
        with suppress(StudyError):
            if model.trust_remote_code and model_location(model.path, file.folder) == exported.base:
                return True
    return False


def _check_labels(exported: ExportedFolder, labels: tuple[str, ...], domain: str) -> None:
    if exported.labels == labels:
        return
    own = f"the adapter {str(exported.folder)!r}"
    extra = [label for label in labels if label not in exported.labels]
    missing = [label for label in exported.labels if label not in labels]
    if not (extra or missing):
        raise StudyError(
            f"{own} and the domain {domain!r} have the same labels in another order: compare {LABELS} with the data"
        )
    parts = [
        *([f"the data has {_listed(extra)}, which the adapter does not know"] if extra else []),
        *([f"the adapter has {_listed(missing)}, which the data lacks"] if missing else []),
    ]
    raise StudyError(f"{own} has other labels than the domain {domain!r}: {'; '.join(parts)}")


def _listed(labels: list[str]) -> str:
    shown = ", ".join(repr(label) for label in labels[:5])
    return shown if len(labels) <= 5 else f"{shown} and {len(labels) - 5} more"
