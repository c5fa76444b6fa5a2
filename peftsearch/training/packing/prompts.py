"""Soft tokens in front of the texts of a stack, each member's own number of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftsearch.methods.soft_prompt.layer import check_length, pooled_again
from peftsearch.training.batches import moved
from peftsearch.training.packing.layout import Layout


class PackedPrompts:
    """What `SoftPromptLayer` does to one stack, for each slice of the batch.

    A slice's rows are its soft tokens, its texts, and then padding up to what the longest slice needs: every token has
    the position that it has when its trial is alone. On the way out soft tokens are cut off likewise.

    Args:
        layout: The pack's.
        tokens: By member, of shape (tokens, width), or None for one without; views of one leaf.
        source: Which input of the model gives the texts' widths: ``input_ids`` or ``decoder_input_ids``.
        keep: Whether the soft tokens' outputs stay in.
        positions: How many positions the stack has embeddings for; None where they are computed.
    """

    def __init__(
        self,
        layout: Layout,
        tokens: Sequence[Tensor | None],
        source: str,
        keep: bool,
        positions: int | None,
    ) -> None:
        self.layout, self.tokens, self.source, self.keep = layout, list(tokens), source, keep
        self.positions = positions
        self.counts = [0 if own is None else len(own) for own in self.tokens]
        device = next(own.device for own in self.tokens if own is not None)
        # Made once: numbers from the host make it wait for the device.
        self._shifts = moved(torch.tensor(self.counts), device)

    def check(self, member: int, width: int) -> None:
        """Refuse a member's text that its own soft tokens leave no room for.

        Raises:
            ValueError: There are too few positions.
        """
        if self.counts[member]:
            check_length(self.counts[member], width, self.positions)

    def insert(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A pre-hook of the stack."""
        kwargs = dict(zip(inspect.signature(stack.forward).parameters, args, strict=False)) | kwargs
        if kwargs.get("encoder_hidden_states") is not None and self.layout.encoder_mask is not None:
            kwargs["encoder_attention_mask"] = self.layout.encoder_mask
        text = kwargs.get("inputs_embeds")
        if text is None:
            table: Any = stack
            text = table.get_input_embeddings()(kwargs["input_ids"])
        kwargs["input_ids"] = None
        prompts = [None if own is None else own.to(text.dtype).expand(self.layout.rows, -1, -1) for own in self.tokens]
        kwargs["inputs_embeds"] = self._in_front(text, prompts)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = self._in_front_of(kwargs["token_type_ids"], 0)
        if kwargs.get("position_ids") is not None:
            given = kwargs["position_ids"].expand(len(text), -1)
            shifts = self._shifts.to(given.dtype)[:, None].expand(-1, self.layout.rows).reshape(-1, 1)
            first = torch.arange(max(self.counts), device=given.device, dtype=given.dtype)
            counted = [None if not count else first[:count].expand(self.layout.rows, -1) for count in self.counts]
            kwargs["position_ids"] = self._in_front(given + shifts, counted)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise ValueError("soft prompts need attention masks of shape (batch, tokens)")
            kwargs["attention_mask"] = self._in_front_of(mask, 1)
        if self.keep:
            self.layout.encoder_mask = kwargs.get("attention_mask")
        return (), kwargs

    def remove(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A hook of the stack."""
        if self.keep:
            return output
        hidden = output[0]
        widths = self.layout.widths_of(self.source)
        whole = max(widths)
        cut = [
            own[:, count : count + width]
            for own, count, width in zip(self.layout.shares(hidden), self.counts, widths, strict=True)
        ]
        hidden = torch.cat([F.pad(own, (0, 0, 0, whole - own.shape[1])) for own in cut])
        if isinstance(output, tuple):
            pooled = pooled_again(stack, hidden, output[1] if len(output) > 1 else None)
            return (hidden, *output[1:]) if pooled is None else (hidden, pooled, *output[2:])
        output.last_hidden_state = hidden
        pooled = pooled_again(stack, hidden, output.get("pooler_output"))
        if pooled is not None:
            output.pooler_output = pooled
        return output

    def _in_front_of(self, tensor: Tensor, value: int) -> Tensor:
        """A tensor (rows, length) with a number in the soft tokens' columns."""
        return self._in_front(
            tensor,
            [tensor.new_full((self.layout.rows, count), value) if count else None for count in self.counts],
        )

    def _in_front(self, tensor: Tensor, front: Sequence[Tensor | None]) -> Tensor:
        """A tensor (rows, length, ...) with something in front of each slice, filled up with zeros behind."""
        widths = self.layout.widths_of(self.source)
        longest = max(count + width for count, width in zip(self.counts, widths, strict=True))
        rows = []
        for own, before, width in zip(self.layout.shares(tensor), front, widths, strict=True):
            text = own[:, :width]
            row = text if before is None else torch.cat([before, text], dim=1)
            behind = longest - row.shape[1]
            rows.append(F.pad(row, (0, 0) * (row.ndim - 2) + (0, behind)) if behind else row)
        return torch.cat(rows)
