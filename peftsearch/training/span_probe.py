"""A linear probe for extractive question answering: which token of a window is the answer's first, which its last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from peftsearch.domains import PreparedDomain
from peftsearch.domains.tasks.base import EXAMPLE, Prediction
from peftsearch.training.frozen_features import FrozenFeatures

STRENGTHS = (1e-3, 1e-2, 1e-1)
"""Of the L2 penalty, relative to the mean loss of a window."""
_STEPS = 100
_WINDOWS = 64


class SpanProbe:
    """Two linear scores of every token, fitted as the task's own head is: by cross-entropy over a window's tokens, on
    standardised features of the frozen base. Biases would change nothing, as tokens are compared with one another.

    Args:
        domain: Of extractive question answering.
        train: Columns of the training windows.
        encoder: Gives the features.

    Attributes:
        weights: L2 strength -> weights, of shape (features, 2).
        tokens: How many the features of were seen.
        parameters: Of each model.
    """

    def __init__(self, domain: PreparedDomain, train: Mapping[str, Sequence[Any]], encoder: FrozenFeatures) -> None:
        self._domain = domain
        states = encoder.each(train, _states)
        lengths = [len(own) for own in states]
        inputs = np.concatenate(states)
        del states
        self._mean, self._deviation = inputs.mean(axis=0), inputs.std(axis=0) + 1e-6
        inputs -= self._mean
        inputs /= self._deviation
        self.tokens, features = inputs.shape
        self.parameters = 2 * features
        batch = domain.task.collate(train, domain.pad_token_id, multiple_of=1)
        self.weights = {
            strength: self._fit(torch.from_numpy(inputs), lengths, batch, strength) for strength in STRENGTHS
        }

    def _fit(self, inputs: torch.Tensor, lengths: list[int], batch: Mapping[str, Any], strength: float) -> torch.Tensor:
        """L-BFGS: the loss is convex.

        Args:
            inputs: Of all windows' tokens, shape (tokens, features): padded to the longest window they would be many
                times as many.
            lengths: Tokens of each window.
            batch: All windows.
            strength: Of the penalty.
        """
        weights = torch.zeros(inputs.shape[-1], 2, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            scores = nn.utils.rnn.pad_sequence(list(torch.split(inputs @ weights, lengths)), batch_first=True)
            found = self._domain.task.losses(_output(scores), batch).mean()
            found = found + strength / 2 * weights.square().sum()
            found.backward()  # type: ignore[no-untyped-call]
            return found

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        return weights.detach()

    def answers(self, columns: Mapping[str, Sequence[Any]], encoder: FrozenFeatures) -> dict[float, list[Any]]:
        """L2 strength -> an answer for each question of a split, given by its columns."""
        task, domain = self._domain.task, self._domain
        weights = torch.cat(list(self.weights.values()), dim=1).numpy()

        def take(hidden: torch.Tensor, mask: torch.Tensor, rows: list[int]) -> list[np.ndarray]:
            # Scores are kept, features are not: those of a whole split may not fit in memory.
            return [((own - self._mean) / self._deviation) @ weights for own in _states(hidden, mask, rows)]

        scores = encoder.each(columns, take)
        how = Prediction(domain.architecture)
        found = {}
        for number, strength in enumerate(self.weights):
            windows: list[Any] = []
            for start in range(0, len(scores), _WINDOWS):
                stretch = slice(start, start + _WINDOWS)
                batch = task.collate(
                    {name: values[stretch] for name, values in columns.items()}, domain.pad_token_id, multiple_of=1
                )
                own = _padded([row[:, 2 * number : 2 * number + 2] for row in scores[stretch]])
                windows += task.predict(nn.Identity(), _output(own), batch, how)
            of_example: dict[int, list[Any]] = {}
            for example, window in zip(columns[EXAMPLE], windows, strict=True):
                of_example.setdefault(example, []).append(window)
            found[strength] = [task.merge(several) for several in of_example.values()]
        return found


def _states(hidden: torch.Tensor, mask: torch.Tensor, rows: list[int]) -> list[np.ndarray]:
    """Of each text the features of its tokens, shape (tokens, features)."""
    lengths = mask.sum(dim=1).tolist()
    return [own[:length].copy() for own, length in zip(hidden.cpu().numpy(), lengths, strict=True)]


def _padded(rows: Sequence[np.ndarray]) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence([torch.from_numpy(row.astype(np.float32)) for row in rows], batch_first=True)


def _output(logits: torch.Tensor) -> Any:
    from transformers.modeling_outputs import TokenClassifierOutput

    return TokenClassifierOutput(logits=logits)
