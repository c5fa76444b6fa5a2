"""Likelihoods of answers: how a language model chooses without writing.

As the evaluation harnesses of language models do it (Brown et al. 2020, arXiv:2005.14165, section 2.4): a prompt ends
where the answer would begin, and each answer is judged by its mean log-probability per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peftsearch.domains.models import Architecture

# Tokens that prompts must share before it pays to compute them once.
SHARED = 16


@dataclass(frozen=True)
class Question:
    """A prompt and the answers to choose from (none of them empty), as token ids; answers have no end token."""

    prompt: list[int]
    answers: list[list[int]]


@torch.no_grad()
def answer_scores(
    model: Any,
    architecture: Architecture,
    questions: Sequence[Question],
    device: torch.device,
    pause: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """Mean log-probability per token of each answer behind its prompt.

    What the prompts of a decoder have in common (instructions, shots) is computed once.

    Args:
        model: With a language-modelling head, in evaluation mode.
        architecture: Its kind. Encoder-decoders read the prompt and write the answer.
        device: Where the model is.
        pause: Called before each question.
    """
    if architecture == "encoder-decoder":
        return [_encoded_scores(model, question, device) for question in _each(questions, pause)]
    prompts = [question.prompt for question in questions]
    shared = min(common(prompts), min(map(len, prompts)) - 1)
    cache = None
    if shared >= SHARED and len(questions) > 1:
        cache = model(input_ids=_ids([prompts[0][:shared]], device), use_cache=True).past_key_values
    else:
        shared = 0
    return [
        _continued_scores(model, question, shared, copy.deepcopy(cache), device) for question in _each(questions, pause)
    ]


def _each(questions: Sequence[Question], pause: Callable[[], None]) -> Iterator[Question]:
    for question in questions:
        pause()
        yield question


def common(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)
    return next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _continued_scores(model: Any, question: Question, shared: int, cache: Any, device: torch.device) -> np.ndarray:
    out = model(input_ids=_ids([question.prompt[shared:]], device), past_key_values=cache, use_cache=True)
    tokens, lengths = _answers(question.answers, device)
    first = out.logits[:, -1:].float().expand(len(tokens), -1, -1)
    logits = first
    if tokens.shape[1] > 1:
        past = out.past_key_values
        past.batch_repeat_interleave(len(tokens))
        rest = model(input_ids=tokens[:, :-1], past_key_values=past, use_cache=True).logits.float()
        logits = torch.cat([first, rest], dim=1)
    return _mean(logits, tokens, lengths)


def _encoded_scores(model: Any, question: Question, device: torch.device) -> np.ndarray:
    from transformers.modeling_outputs import BaseModelOutput

    ids = _ids([question.prompt], device)
    mask = torch.ones_like(ids)
    states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    tokens, lengths = _answers(question.answers, device)
    start = model.config.decoder_start_token_id
    # Architectures without a start token of their own (mBART) begin with what the answer ends with.
    begin = tokens[torch.arange(len(tokens)), lengths - 1] if start is None else torch.full_like(tokens[:, 0], start)
    logits = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states.expand(len(tokens), -1, -1)),
        attention_mask=mask.expand(len(tokens), -1),
        decoder_input_ids=torch.cat([begin[:, None], tokens[:, :-1]], dim=1),
        use_cache=False,
    ).logits.float()
    return _mean(logits, tokens, lengths)


def _answers(answers: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Filled up on the right with zeros, which no earlier position sees; and their lengths."""
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    width = max(len(answer) for answer in answers)
    return _ids([[*answer, *[0] * (width - len(answer))] for answer in answers], device), lengths


def _mean(logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> np.ndarray:
    chosen = logits.log_softmax(dim=-1).gather(2, tokens[..., None]).squeeze(-1)
    there = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    mean: np.ndarray = ((chosen * there).sum(dim=1) / lengths).cpu().numpy()
    return mean


def _ids(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)
