"""What one gets without tuning the model: guesses from the data alone, and linear models on frozen features."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from peftsearch.domains import PreparedDomain
from peftsearch.training.base_model import FrozenBase
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.evaluate import to_device
from peftsearch.training.segment import ProbeResult


def probe(base: FrozenBase, domain: PreparedDomain, batch_size: int, group: WorkerGroup) -> ProbeResult:
    """Score the domain's baselines on the validation split.

    Args:
        base: The frozen base.
        domain: Its task says which baselines there are.
        batch_size: Texts per forward pass.
        group: Only rank 0 computes; the others wait at the next collective.
    """
    task, labels = domain.task, domain.labels
    result = ProbeResult()
    if group.rank != 0:
        return result
    train, validation = domain.split("train")[:], domain.split("validation")[:]
    references = task.references(validation)
    for name, guess in task.guesses(train, validation, labels).items():
        result.add(name, guess.title, guess.detail, task.score(guess.predictions, references, labels))
    if task.probe == "text" and domain.architecture == "encoder":
        _text_probe(result, base, domain, batch_size, group.device)
    return result


def _text_probe(
    result: ProbeResult, base: FrozenBase, domain: PreparedDomain, batch_size: int, device: torch.device
) -> None:
    """A linear model on mean-pooled, L2-normalised hidden states of the last layer.

    Its regularisation is picked on the validation split, as the trials' hyperparameters are.
    """
    task, labels = domain.task, domain.labels
    sign = 1.0 if domain.direction == "maximize" else -1.0
    features = {split: _features(base, domain, split, batch_size, device) for split in ("train", "validation")}
    targets = np.asarray(task.references(domain.split("train")[:]))
    references = task.references(domain.split("validation")[:])
    best: tuple[float, str, dict[str, float], Any] | None = None
    for setting, model in task.probes():
        with warnings.catch_warnings():
            # A probe that has not quite converged is a probe with a little more regularisation.
            warnings.simplefilter("ignore")
            model.fit(features["train"], targets)
        scores = task.score(model.predict(features["validation"]).tolist(), references, labels)
        if best is None or sign * scores[domain.metric] > sign * best[0]:
            best = (scores[domain.metric], setting, scores, model)
    if best is not None:
        _, setting, scores, model = best
        outputs = targets.shape[1] if targets.ndim > 1 else max(len(labels), 1)
        result.add(
            "linear_probe",
            "linear model on frozen features",
            f"{type(model).__name__} on mean-pooled frozen features, {setting} picked on validation",
            scores,
            (features["train"].shape[1] + 1) * outputs,
        )


@torch.no_grad()
def _features(
    base: FrozenBase, domain: PreparedDomain, split: str, batch_size: int, device: torch.device
) -> np.ndarray:
    model = base.trial_model(domain, seed=0, copy_weights=False)
    backbone = model.base_model
    backbone.eval()
    data, task = domain.split(split), domain.task
    order = np.argsort(domain.lengths(split), kind="stable")
    chunks: list[np.ndarray] = []
    for start in range(0, len(order), batch_size):
        rows = data[order[start : start + batch_size].tolist()]
        batch = to_device(task.collate(rows, domain.pad_token_id), device)
        inputs = {name: value for name, value in batch.items() if name not in task.hidden}
        hidden = backbone(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        chunks.append(torch.nn.functional.normalize(pooled, dim=1).cpu().numpy())
    features = np.concatenate(chunks)
    back = np.empty_like(features)
    back[order] = features
    return back
