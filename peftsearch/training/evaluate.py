"""Scoring a model on one split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from peftsearch.domains import PreparedDomain
from peftsearch.domains.tasks.base import EXAMPLE, PART, Prediction
from peftsearch.training.batches import Batch, ahead, load, padded_to, padding_known
from peftsearch.training.distributed import WorkerGroup


@dataclass(frozen=True)
class Evaluation:
    """What a model made of one split.

    Attributes:
        loss: Mean over the rows.
        scores: All scores of the task; of joined data sets also metrics and objective of each by itself, as
            ``PART/SCORE``.
        examples: How many the scores rest on.
        predictions: One for each example, in the split's order.
        references: What they should be.
    """

    loss: float
    scores: dict[str, float]
    examples: int
    predictions: list[Any] = field(default_factory=list, repr=False)
    references: list[Any] = field(default_factory=list, repr=False)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    domain: PreparedDomain,
    split: str,
    batch_size: int,
    group: WorkerGroup | None = None,
    *,
    final: bool = True,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Predict a split and score it; in the weights' own precision, unless called under autocast.

    Rows are ordered by length so that little is padded; several workers take every n-th batch each. On a GPU the next
    batch is made meanwhile.

    Args:
        model: On ``group.device``; is put into evaluation mode and back.
        domain: Tokenised data and task.
        split: ``train``, ``validation`` or ``test``.
        batch_size: Examples per forward pass.
        group: The workers that share the work.
        final: Whether this is more than a rung on the way (`Prediction.final`).
        between: Called before every batch; what it raises ends the evaluation.
    """
    group = group or WorkerGroup()
    task, data, device = domain.task, domain.split(split), group.device
    how = Prediction(domain.architecture, final, domain.tokenizer if task.decodes else None)
    order = np.argsort(domain.lengths(split), kind="stable").tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    was_training = model.training
    model.eval()
    losses: list[np.ndarray] = []
    predictions: list[Any] = []
    references: list[Any] = []
    rows: list[int] = []

    def made(share: tuple[list[int], bool]) -> tuple[list[int], bool, dict[str, Any], Batch]:
        indices, counts = share
        raw = data[indices]
        values = task.collate(raw, domain.pad_token_id, multiple_of=padded_to(device))
        return indices, counts, raw, load(values, device)

    try:
        # The longest texts are one worker's: it may run out of memory alone.
        with (
            nullcontext() if group.sharded else group.together(),
            closing(ahead(_shares(batches, group, task.decodes), made, device)) as coming,
        ):
            for indices, counts, raw, loaded in coming:
                between()
                batch = loaded.values
                with padding_known(loaded.full):
                    output = model(**{name: value for name, value in batch.items() if name not in task.hidden})
                if counts:
                    losses.append(task.losses(output, batch).float().cpu().numpy())
                    predictions.extend(task.predict(model, output, batch, how))
                    references.extend(task.references(raw))
                    rows.extend(indices)
                # Scores of a whole vocabulary are often the most of all memory: never two batches' at once.
                del output
    finally:
        model.train(was_training)
    if group.sharded and task.decodes:
        # Every worker has done everything.
        group = WorkerGroup(device=device)
    collected = group.gather((rows, losses, predictions, references))
    order = [row for part in collected for row in part[0]]
    position = np.argsort(order, kind="stable")
    row_losses = np.concatenate([array for part in collected for array in part[1]])[position]
    predicted = [value for part in collected for value in part[2]]
    expected = [value for part in collected for value in part[3]]
    columns = set(data.column_names)
    examples: dict[int, list[int]] = {}
    # As a list: a column of `datasets` reads its file anew for every number (80 us).
    of_row = list(data[EXAMPLE]) if EXAMPLE in columns else None
    for index in position.tolist():
        example = of_row[order[index]] if of_row is not None else order[index]
        examples.setdefault(example, []).append(index)
    merged = [task.merge([predicted[index] for index in several]) for several in examples.values()]
    wanted = [expected[several[0]] for several in examples.values()]
    scores = task.score(merged, wanted, domain.labels)
    if domain.parts:
        part_of_row = list(data[PART])
        # The objective may be the score of a label.
        told = dict.fromkeys((*task.metrics, domain.metric))
        part_of = [part_of_row[order[several[0]]] for several in examples.values()]
        for number, name in enumerate(domain.parts):
            chosen = [index for index, part in enumerate(part_of) if part == number]
            if chosen:
                own = task.score([merged[i] for i in chosen], [wanted[i] for i in chosen], domain.labels)
                scores |= {f"{name}/{metric}": own[metric] for metric in told if metric in own}
    return Evaluation(
        # Summed in the split's own order and in double precision: the same number for any number of workers.
        loss=float(row_losses.astype(np.float64).mean()),
        scores=scores,
        examples=len(merged),
        predictions=merged,
        references=wanted,
    )


def _shares(batches: list[list[int]], group: WorkerGroup, decodes: bool) -> Iterator[tuple[list[int], bool]]:
    """The batches of a worker, and whether what it finds is kept."""
    if not group.sharded:
        yield from ((batch, True) for batch in batches[group.rank :: group.size])
    elif decodes:
        # How many forward passes a text takes depends on the text; each of them needs every worker.
        yield from ((batch, True) for batch in batches)
    else:
        for start in range(0, len(batches), group.size):
            mine = start + group.rank
            yield (batches[mine], True) if mine < len(batches) else (batches[start], False)
