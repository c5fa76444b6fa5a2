"""Forgetting: how much worse a model writes general text once it is adapted.

Measured as the rise of the mean cross-entropy per token, in nats, from the frozen base to the adapted model: 0 where
nothing was forgotten, and exp(rise) is the factor by which perplexity grew. Adapters stay on, as they do in use; over a
quantised base, what quantisation costs is part of the rise.

Decoders continue each text from its first token; encoder-decoders read the first half of a text and write the second;
encoders fill in masked tokens (15 %, always the same). That needs the head that the base was pretrained with, so it is
measured in domains whose task uses that head (summarisation, instruction following, language modelling).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peftsearch.domains.sources import read_source
from peftsearch.domains.tasks import Head
from peftsearch.domains.tasks.base import LossOptions, text_batch
from peftsearch.domains.tasks.columns import find, is_text, kind_of
from peftsearch.domains.tasks.summarization import Summarization
from peftsearch.spec import ColumnsSpec, DataSpec, ForgettingSpec, StudyError

if TYPE_CHECKING:
    import torch

    from peftsearch.domains import PreparedDomain
    from peftsearch.training.base_model import FrozenBase

FORGETTING = "forgetting"
"""The name of the score."""
HEADS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")
# Characters of a text that are looked at: no model's input is longer than its first part.
LONGEST = 20_000
MASKED = 0.15


def measurable(head: Head) -> bool:
    """Whether a task's model has the head that its base was pretrained with."""
    return head.auto_model in HEADS


def general_texts(spec: ForgettingSpec, folder: Path) -> tuple[str, ...]:
    """The study's general texts: at most ``rows``, evenly over the source's split, blank ones left out.

    The split is test, else validation, else train: what the base is the least likely to have been pretrained on.

    Args:
        spec: The study file's ``forgetting`` section.
        folder: The study file's folder; relative paths start there.

    Raises:
        StudyError: The source or its column is missing, or it holds no texts.
    """
    loc = ("forgetting",)
    data = DataSpec(source=spec.source, config=spec.config, format=spec.format, columns=ColumnsSpec(text=spec.column))
    splits = read_source(data, folder, loc, (spec.column,))
    raw = next(splits[split] for split in ("test", "validation", "train") if split in splits)
    column = find(raw.table, spec.column, raw.where, (*loc, "column"))
    if not is_text(column.type):
        raise StudyError(
            f"column {spec.column!r} of {raw.where} holds no texts but {kind_of(column.type)}: name another column",
            (*loc, "column"),
        )
    texts = [text[:LONGEST] for text in column.to_pylist() if text is not None and text.strip()]
    if not texts:
        raise StudyError(f"column {spec.column!r} of {raw.where} holds no text", (*loc, "column"))
    return tuple(
        texts[row] for row in sorted({int(n) for n in np.linspace(0, len(texts) - 1, min(spec.rows, len(texts)))})
    )


class GeneralText:
    """General texts as one model reads them, and what its frozen base makes of them.

    Args:
        texts: The texts.
        base: The frozen base.
        domain: A domain whose model has the base's own head; texts are cut to its length.
        batch_size: Texts per forward pass.

    Raises:
        ValueError: No text has two tokens.
    """

    def __init__(self, texts: Sequence[str], base: FrozenBase, domain: PreparedDomain, batch_size: int) -> None:
        self._architecture = domain.architecture
        self._pad = domain.pad_token_id
        self._batch_size = batch_size
        self._device = base.device
        tokenizer = base.tokenizer()
        self._mask = tokenizer.mask_token_id
        self._special = set(tokenizer.all_special_ids)
        ids = tokenizer(list(texts), truncation=True, max_length=domain.max_length)["input_ids"]
        # By length, so that little is padded.
        self._ids = sorted((list(row) for row in ids if len(row) >= 4), key=len)
        if not self._ids:
            raise ValueError("no text of 'forgetting' has the four tokens that a prediction needs")
        model = base.common_model(domain)
        self._start = model.config.decoder_start_token_id if self._architecture == "encoder-decoder" else None
        self.base_loss = self.loss(model)
        """Mean cross-entropy per token of the frozen base."""

    def rise(self, model: Any) -> float:
        """How much higher an adapted model's loss is than the base's, in nats per token."""
        return self.loss(model) - self.base_loss

    def loss(self, model: Any) -> float:
        """Mean cross-entropy per predicted token, in the weights' own precision.

        Args:
            model: The base, or an adapted model around it; is put into evaluation mode and back.
        """
        import torch

        was_training = model.training
        model.eval()
        total, tokens = 0.0, 0
        try:
            with torch.no_grad():
                for start in range(0, len(self._ids), self._batch_size):
                    losses, counts = self._losses(model, self._ids[start : start + self._batch_size])
                    total += float((losses.double() * counts).sum().item())
                    tokens += int(counts.sum().item())
        finally:
            model.train(was_training)
        return total / tokens

    def _losses(self, model: Any, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss of each text, and over how many tokens."""
        import torch

        from peftsearch.training.batches import collated

        if self._architecture == "encoder":
            return self._masked_losses(model, ids)
        task = Summarization()
        # Each text summarises its own beginning: the task's batches and losses are what is wanted.
        cut = [1 if self._architecture == "decoder" else len(row) // 2 for row in ids]
        rows: dict[str, Any] = {
            "input_ids": [row[:at] for row, at in zip(ids, cut, strict=True)],
            "labels": [row[at:] for row, at in zip(ids, cut, strict=True)],
        }
        if self._architecture == "encoder-decoder":
            rows["decoder_start"] = [labels[-1] if self._start is None else self._start for labels in rows["labels"]]
        batch = collated(task, rows, self._pad, self._device)
        output = model(**{name: value for name, value in batch.items() if name not in task.hidden})
        counts = torch.tensor([len(labels) for labels in rows["labels"]], device=self._device)
        return task.losses(output, batch, LossOptions()), counts

    def _masked_losses(self, model: Any, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch
        from torch.nn import functional

        from peftsearch.training.batches import padded_to, to_device

        multiple = padded_to(self._device)
        batch = to_device(text_batch({"input_ids": ids}, self._pad, multiple_of=multiple), self._device)
        hidden = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for row, tokens in enumerate(ids):
            words = [place for place, token in enumerate(tokens) if token not in self._special]
            chosen = np.random.default_rng(len(words)).permutation(len(words))[: max(1, round(MASKED * len(words)))]
            hidden[row, [words[place] for place in chosen]] = True
        inputs = batch["input_ids"].masked_fill(hidden, self._mask)
        logits = model(input_ids=inputs, attention_mask=batch["attention_mask"]).logits[:, -inputs.shape[1] :]
        found = functional.cross_entropy(logits[hidden].float(), batch["input_ids"][hidden], reduction="none")
        of_token = torch.zeros(hidden.shape, device=self._device).masked_scatter(hidden, found)
        counts = hidden.sum(dim=1)
        return of_token.sum(dim=1) / counts.clamp(min=1), counts
