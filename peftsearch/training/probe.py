"""What one gets without tuning the model: guesses from the data alone, and linear models on frozen features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from peftsearch.domains import PreparedDomain
from peftsearch.domains.tasks.base import EXAMPLE, text_batch
from peftsearch.domains.tasks.token_classification import LOST, OUTSIDE
from peftsearch.training.base_model import FrozenBase
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.evaluate import to_device
from peftsearch.training.prompting import add_prompting
from peftsearch.training.segment import ProbeResult

# Words that a probe of words is trained on at most: more do not help a linear model much, and cost memory.
WORDS = 50_000


def probe(
    base: FrozenBase, domain: PreparedDomain, batch_size: int, group: WorkerGroup, split: str = "validation"
) -> ProbeResult:
    """Score the domain's baselines.

    Args:
        base: The frozen base.
        domain: Its task says which baselines there are.
        batch_size: Texts per forward pass.
        group: Only rank 0 computes, and the others wait at the next collective; where each holds a part of the base,
            all compute the same.
        split: What is scored. What a baseline has to choose is chosen on validation, whatever is scored.
    """
    task, labels = domain.task, domain.labels
    result = ProbeResult()
    if group.rank != 0 and not group.sharded:
        return result
    train, scored = domain.split("train")[:], domain.split(split)[:]
    references = task.references(scored)
    if EXAMPLE in scored:
        # One for each example, as guesses are, where an example makes several rows.
        first = {example: row for row, example in reversed(list(enumerate(scored[EXAMPLE])))}
        references = [references[first[example]] for example in dict.fromkeys(scored[EXAMPLE])]
    for name, guess in task.guesses(train, scored, labels).items():
        result.add(name, guess.title, guess.detail, task.score(guess.predictions, references, labels))
    add_prompting(result, base, domain, batch_size, group.device, split)
    if task.probe is None or domain.architecture != "encoder":
        return result
    encoder = _Encoder(base, domain, batch_size, group.device)
    if task.probe == "token":
        _word_probe(result, encoder, domain, split)
    elif task.probe == "pair" and "first" in train:
        _pair_probe(result, encoder, domain, split)
    else:
        _text_probe(result, encoder, domain, split)
    return result


class _Encoder:
    """The frozen base as a source of features: float32 arrays on the CPU."""

    def __init__(self, base: FrozenBase, domain: PreparedDomain, batch_size: int, device: torch.device) -> None:
        backbone: nn.Module = base.trial_model(domain, seed=0, copy_weights=False).base_model
        self.backbone = backbone.eval()
        self.pad_token_id = domain.pad_token_id
        self.batch_size = batch_size
        self.device = device

    def texts(self, columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
        """Mean-pooled, L2-normalised hidden states of the last layer: one row for each text.

        Args:
            columns: ``input_ids`` and, where texts are told apart, ``token_type_ids``.
        """

        def pooled(hidden: torch.Tensor, mask: torch.Tensor, rows: list[int]) -> list[np.ndarray]:
            weights = mask.unsqueeze(-1).float()
            mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
            return list(nn.functional.normalize(mean, dim=1).cpu().numpy())

        return np.stack(self._each(columns, pooled))

    def words(self, columns: Mapping[str, Sequence[Any]]) -> list[np.ndarray]:
        """Hidden states of the last layer at the piece of each word that is not lost: an array for each sentence."""

        def at_positions(hidden: torch.Tensor, mask: torch.Tensor, rows: list[int]) -> list[np.ndarray]:
            states = hidden.cpu().numpy()
            return [
                states[number, [place for place in columns["positions"][row] if place != LOST]]
                for number, row in enumerate(rows)
            ]

        return self._each(columns, at_positions)

    @torch.no_grad()
    def _each(
        self,
        columns: Mapping[str, Sequence[Any]],
        take: Callable[[torch.Tensor, torch.Tensor, list[int]], list[np.ndarray]],
    ) -> list[np.ndarray]:
        inputs = {name: columns[name] for name in ("input_ids", "token_type_ids") if name in columns}
        # By length, so that little is padded.
        order = sorted(range(len(inputs["input_ids"])), key=lambda row: len(inputs["input_ids"][row]))
        found: list[np.ndarray] = [np.empty(0)] * len(order)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            chosen = {name: [values[row] for row in rows] for name, values in inputs.items()}
            batch = to_device(text_batch(chosen, self.pad_token_id), self.device)
            hidden = self.backbone(**batch).last_hidden_state.float()
            for row, features in zip(rows, take(hidden, batch["attention_mask"], rows), strict=True):
                found[row] = features
        return found


def _text_probe(result: ProbeResult, encoder: _Encoder, domain: PreparedDomain, split: str) -> None:
    """A linear model on mean-pooled, L2-normalised hidden states of the last layer."""
    train = domain.split("train")[:]
    features = {name: encoder.texts(domain.split(name)[:]) for name in {"validation", split}}
    targets = np.asarray(domain.task.references(train))

    def predict(model: Any, name: str) -> list[Any]:
        # Of a single column scikit-learn makes none.
        found: list[Any] = model.predict(features[name]).reshape(len(features[name]), *targets.shape[1:]).tolist()
        return found

    _add_best(result, domain, split, encoder.texts(train), targets, predict, "mean-pooled frozen features")


def _pair_probe(result: ProbeResult, encoder: _Encoder, domain: PreparedDomain, split: str) -> None:
    """Of pairs whose texts are embedded each by itself: their cosine, untrained; and a linear model.

    The features u, v, |u - v| and u * v are those of Conneau et al. 2017 (InferSent, arXiv:1705.02364).
    """
    task, labels = domain.task, domain.labels
    pairs, cosines = {}, {}
    for name in {"train", "validation", split}:
        rows = domain.split(name)[:]
        u, v = (encoder.texts({"input_ids": rows[column]}) for column in ("first", "second"))
        pairs[name] = np.concatenate([u, v, np.abs(u - v), u * v], axis=1)
        cosines[name] = (u * v).sum(axis=1)
    train, scored = domain.split("train")[:], domain.split(split)[:]
    low, high = task.options.range or (min(train["labels"]), max(train["labels"]))
    result.add(
        "cosine",
        "cosine of frozen embeddings",
        f"cosine of the two mean-pooled texts, 0 and 1 taken for {low:g} and {high:g}; nothing is trained",
        task.score((low + cosines[split] * (high - low)).tolist(), task.references(scored), labels),
    )
    _add_best(
        result,
        domain,
        split,
        pairs["train"],
        np.asarray(task.references(train)),
        lambda model, name: model.predict(pairs[name]).tolist(),
        "the frozen embeddings u, v of the two texts, |u - v| and u * v",
    )


def _word_probe(result: ProbeResult, encoder: _Encoder, domain: PreparedDomain, split: str) -> None:
    """A linear model on the hidden states of words, trained on at most about `WORDS` words of train."""
    data = domain.split("train")
    held_out = {name: domain.split(name)[:] for name in {"validation", split}}
    order = np.random.default_rng(0).permutation(len(data)).tolist()
    lengths = domain.lengths("train")
    reached = int(np.searchsorted(np.cumsum([lengths[row] for row in order]), WORDS)) + 1
    train = data[sorted(order[:reached])]

    def seen(columns: Mapping[str, Sequence[Any]]) -> list[int]:
        return [
            int(tag)
            for places, tags in zip(columns["positions"], columns["tags"], strict=True)
            for place, tag in zip(places, tags, strict=True)
            if place != LOST
        ]

    features = {name: np.concatenate(encoder.words(columns)) for name, columns in held_out.items()}

    def predict(model: Any, name: str) -> list[list[int]]:
        tags = iter(model.predict(features[name]).tolist())
        return [
            [OUTSIDE if place == LOST else next(tags) for place in places] for places in held_out[name]["positions"]
        ]

    _add_best(
        result,
        domain,
        split,
        np.concatenate(encoder.words(train)),
        np.asarray(seen(train)),
        predict,
        f"frozen features of {len(seen(train))} words",
    )


def _add_best(
    result: ProbeResult,
    domain: PreparedDomain,
    split: str,
    features: np.ndarray,
    targets: np.ndarray,
    predict: Callable[[Any, str], list[Any]],
    what: str,
) -> None:
    """Fit the task's linear models and add the best of them on the validation split, where the trials' are picked too.

    Args:
        result: Gets the baseline ``linear_probe``.
        domain: Its objective decides.
        split: What is scored.
        features: Of the training examples, shape (examples, features).
        targets: What they should give.
        predict: Predictions of a fitted model for the validation split, and for the one that is scored.
        what: The features, in words.
    """
    task = domain.task
    sign = 1.0 if domain.direction == "maximize" else -1.0
    references = task.references(domain.split("validation")[:])
    best: tuple[float, str, dict[str, float], Any] | None = None
    for setting, model in task.probes():
        with warnings.catch_warnings():
            # A probe that has not quite converged is a probe with a little more regularisation; and a label that few
            # examples left out of train has nothing to learn.
            warnings.simplefilter("ignore")
            try:
                model.fit(features, targets)
            except ValueError:
                # A limit on the examples may leave a single class.
                continue
        scores = task.score(predict(model, "validation"), references, domain.labels)
        if best is None or sign * scores[domain.metric] > sign * best[0]:
            best = (scores[domain.metric], setting, scores, model)
    if best is not None:
        _, setting, scores, model = best
        if split != "validation":
            scored = task.references(domain.split(split)[:])
            scores = task.score(predict(model, split), scored, domain.labels)
        kind = type(model[-1] if hasattr(model, "steps") else model).__name__
        outputs = targets.shape[1] if targets.ndim > 1 else max(len(domain.labels), 1)
        result.add(
            "linear_probe",
            "linear model on frozen features",
            f"{kind} on {what}, {setting} picked on validation",
            scores,
            (features.shape[1] + 1) * outputs,
        )
