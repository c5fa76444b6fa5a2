"""What one gets without tuning the model: the majority class, and a linear probe on its frozen features."""

from __future__ import annotations

import numpy as np
import torch

from peftsearch.domains import PreparedDomain
from peftsearch.training.base_model import FrozenBase
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import ProbeResult

_INVERSE_REGULARISATION = (1.0, 10.0, 100.0)


def probe(base: FrozenBase, domain: PreparedDomain, batch_size: int, group: WorkerGroup) -> ProbeResult:
    """Score both baselines on the validation split.

    The probe is a logistic regression on mean-pooled, L2-normalised hidden states of the last layer. Its regularisation
    is picked on the validation split, as the trials' hyperparameters are.

    Args:
        base: The frozen base.
        domain: A classification domain.
        batch_size: Texts per forward pass.
        group: Only rank 0 computes; the others wait at the next collective.
    """
    from sklearn.linear_model import LogisticRegression

    task, labels = domain.task, domain.labels
    train = task.references(domain.split("train")[:])
    validation = task.references(domain.split("validation")[:])
    result = ProbeResult()
    majority = int(np.bincount(train).argmax())
    result.scores["majority"] = task.score(np.full_like(validation, majority), validation, labels)
    result.details["majority"] = f"always {labels[majority]!r}"
    result.parameters["majority"] = 0
    if group.rank != 0:
        return result
    features = {split: _features(base, domain, split, batch_size, group.device) for split in ("train", "validation")}
    best: tuple[float, float, dict[str, float]] | None = None
    for c in _INVERSE_REGULARISATION:
        classifier = LogisticRegression(C=c, max_iter=500, random_state=0)
        classifier.fit(features["train"], train)
        scores = task.score(classifier.predict(features["validation"]), validation, labels)
        if best is None or scores[domain.metric] > best[0]:
            best = (scores[domain.metric], c, scores)
    assert best is not None
    result.scores["linear_probe"] = best[2]
    result.details["linear_probe"] = f"on mean-pooled frozen features, C = {best[1]:g} picked on validation"
    result.parameters["linear_probe"] = (features["train"].shape[1] + 1) * len(labels)
    return result


@torch.no_grad()
def _features(
    base: FrozenBase, domain: PreparedDomain, split: str, batch_size: int, device: torch.device
) -> np.ndarray:
    model = base.trial_model(domain, seed=0, copy_weights=False)
    backbone = model.base_model
    backbone.eval()
    data = domain.split(split)
    order = np.argsort(domain.lengths(split), kind="stable")
    chunks: list[np.ndarray] = []
    for start in range(0, len(order), batch_size):
        batch = domain.task.collate(data[order[start : start + batch_size].tolist()], domain.pad_token_id)
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        hidden = backbone(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        chunks.append(torch.nn.functional.normalize(pooled, dim=1).cpu().numpy())
    features = np.concatenate(chunks)
    back = np.empty_like(features)
    back[order] = features
    return back
