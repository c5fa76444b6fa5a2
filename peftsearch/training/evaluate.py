"""Scoring a model on one split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from peftsearch.domains import PreparedDomain
from peftsearch.training.distributed import WorkerGroup


@dataclass(frozen=True)
class Evaluation:
    """Mean loss, all scores of the task, and the number of examples they rest on."""

    loss: float
    scores: dict[str, float]
    examples: int


@torch.no_grad()
def evaluate(
    model: nn.Module, domain: PreparedDomain, split: str, batch_size: int, group: WorkerGroup | None = None
) -> Evaluation:
    """Predict a split and score it; in the weights' own precision, unless called under autocast.

    Rows are ordered by length so that little is padded; several workers take every n-th batch each.

    Args:
        model: On ``group.device``; is put into evaluation mode and back.
        domain: Tokenised data and task.
        split: ``train``, ``validation`` or ``test``.
        batch_size: Examples per forward pass.
        group: The workers that share the work.
    """
    group = group or WorkerGroup()
    task, data = domain.task, domain.split(split)
    order = np.argsort(domain.lengths(split), kind="stable").tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    was_training = model.training
    model.eval()
    try:
        losses: list[np.ndarray] = []
        predictions: list[np.ndarray] = []
        references: list[np.ndarray] = []
        rows: list[int] = []
        for indices in batches[group.rank :: group.size]:
            raw = data[indices]
            batch = task.collate(raw, domain.pad_token_id)
            batch = {name: tensor.to(group.device, non_blocking=True) for name, tensor in batch.items()}
            output = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
            losses.append(task.losses(output, batch).float().cpu().numpy())
            predictions.append(task.predictions(output, batch))
            references.append(task.references(raw))
            rows.extend(indices)
    finally:
        model.train(was_training)
    parts = group.gather((rows, losses, predictions, references))
    position = np.argsort(np.concatenate([np.asarray(part[0], dtype=np.int64) for part in parts]), kind="stable")
    columns = [np.concatenate([array for part in parts for array in part[column]])[position] for column in (1, 2, 3)]
    return Evaluation(
        # Summed in the split's own order and in double precision: the same number for any number of workers.
        loss=float(columns[0].astype(np.float64).mean()),
        scores=task.score(columns[1], columns[2], domain.labels),
        examples=len(position),
    )
