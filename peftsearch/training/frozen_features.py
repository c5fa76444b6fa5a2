"""Features of texts from the frozen base, for linear probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from peftsearch.domains import PreparedDomain
from peftsearch.domains.tasks.base import text_batch
from peftsearch.domains.tasks.token_classification import LOST
from peftsearch.training.base_model import FrozenBase
from peftsearch.training.batches import padded_to, to_device


class FrozenFeatures:
    """The frozen base's hidden states: float32 arrays on the CPU.

    Args:
        base: The frozen base.
        domain: Its texts are read.
        batch_size: Texts per forward pass.
        device: What computes.
        pause: Called before each forward pass.
    """

    def __init__(
        self,
        base: FrozenBase,
        domain: PreparedDomain,
        batch_size: int,
        device: torch.device,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        backbone: nn.Module = base.common_model(domain).base_model
        self.backbone = backbone.eval()
        self.pad_token_id = domain.pad_token_id
        self.batch_size = batch_size
        self.device = device
        self.pause = pause

    def texts(self, columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
        """Mean-pooled, L2-normalised hidden states of the last layer: one row for each text.

        Args:
            columns: ``input_ids`` and, where texts are told apart, ``token_type_ids``.
        """

        def pooled(hidden: torch.Tensor, mask: torch.Tensor, rows: list[int]) -> list[np.ndarray]:
            weights = mask.unsqueeze(-1).float()
            mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
            return list(nn.functional.normalize(mean, dim=1).cpu().numpy())

        return np.stack(self.each(columns, pooled))

    def words(self, columns: Mapping[str, Sequence[Any]]) -> list[np.ndarray]:
        """Hidden states of the last layer at the piece of each word that is not lost: an array for each sentence."""

        def at_positions(hidden: torch.Tensor, mask: torch.Tensor, rows: list[int]) -> list[np.ndarray]:
            states = hidden.cpu().numpy()
            return [
                states[number, [place for place in columns["positions"][row] if place != LOST]]
                for number, row in enumerate(rows)
            ]

        return self.each(columns, at_positions)

    @torch.no_grad()
    def each(
        self,
        columns: Mapping[str, Sequence[Any]],
        take: Callable[[torch.Tensor, torch.Tensor, list[int]], list[np.ndarray]],
    ) -> list[np.ndarray]:
        """What ``take`` makes of each text.

        Args:
            columns: ``input_ids`` and, where texts are told apart, ``token_type_ids``.
            take: Gets the last layer's hidden states of a batch, of shape (texts, length, features), its attention
                mask, and its texts' numbers; returns an array for each text.
        """
        inputs = {name: columns[name] for name in ("input_ids", "token_type_ids") if name in columns}
        # By length, so that little is padded.
        order = sorted(range(len(inputs["input_ids"])), key=lambda row: len(inputs["input_ids"][row]))
        found: list[np.ndarray] = [np.empty(0)] * len(order)
        for start in range(0, len(order), self.batch_size):
            self.pause()
            rows = order[start : start + self.batch_size]
            chosen = {name: [values[row] for row in rows] for name, values in inputs.items()}
            batch = to_device(text_batch(chosen, self.pad_token_id, multiple_of=padded_to(self.device)), self.device)
            hidden = self.backbone(**batch).last_hidden_state.float()
            for row, features in zip(rows, take(hidden, batch["attention_mask"], rows), strict=True):
                found[row] = features
        return found
