"""Zero-shot and few-shot prompting of the frozen base: what a generative model does without any training.

Labels and choices are compared by likelihood, as the evaluation harnesses of language models do (Brown et al. 2020,
arXiv:2005.14165, section 2.4): a prompt ends where the answer would begin, and the answer of the highest mean
log-probability per token wins. Texts are written as `Generating.predict` writes them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peftsearch.domains import PreparedDomain
from peftsearch.domains.models import Architecture
from peftsearch.domains.tasks.base import Prediction, Tokenization
from peftsearch.domains.tasks.generation import Generating, answer_tokens
from peftsearch.training.base_model import FrozenBase
from peftsearch.training.evaluate import to_device
from peftsearch.training.segment import ProbeResult

EXAMPLES = 200
"""Validation examples that are prompted at most."""
SHOTS = 4
"""Training examples shown in a few-shot prompt, where so many fit."""
# Label names that a prompt lists; more would fill it.
LISTED = 30
# Tokens that prompts must share before it pays to compute them once.
SHARED = 16


@dataclass(frozen=True)
class Question:
    """A prompt and the answers to choose from (none of them empty), as token ids; answers have no end token."""

    prompt: list[int]
    answers: list[list[int]]


def add_prompting(
    result: ProbeResult,
    base: FrozenBase,
    domain: PreparedDomain,
    batch_size: int,
    device: torch.device,
    split: str = "validation",
) -> None:
    """Add the baselines ``zero_shot`` and ``few_shot`` where the model is generative and the task can be prompted.

    Classification, relations and multiple choice are answered by likelihood, summaries and responses by generation; on
    at most `EXAMPLES` examples of the split, spread evenly over it.

    Args:
        result: Gets them. (Models without a pretrained language-modelling head have none; and there is no few-shot
            prompt where not even one training example fits beside the text.)
        base: The frozen base.
        domain: Shots come from its training split.
        batch_size: Prompts per batch of generation.
        device: Where the base is.
        split: What is answered.
    """
    task = domain.task
    if domain.architecture == "encoder":
        return
    count = domain.rows[split]
    rows = _spread(count)
    asked_about = domain.split(split)[rows]
    of_all = f"on {len(rows)} of {count} {split} examples" if len(rows) < count else f"on all {split} examples"
    if isinstance(task, Generating):
        model = base.trial_model(domain, seed=0, copy_weights=False).eval()
        limit = context_length(model, domain.tokenizer)
        for shots in (0, SHOTS):
            shown = _shots(domain, asked_about, limit, shots)
            if shots and not shown:
                continue
            before = _joined(shown, domain)
            prompts = [
                [*before, *_without_start(ids, domain.tokenizer, bool(shown))] for ids in asked_about["input_ids"]
            ]
            predictions = _written(model, domain, {**asked_about, "input_ids": prompts}, batch_size, device)
            _add(result, domain, asked_about, predictions, len(shown), f"the frozen model writes, {of_all}")
        return
    if task.name not in ("classification", "relation", "multiple_choice"):
        return
    model = base.language_model(domain.architecture)
    if model is None:
        return
    tokenizer = base.tokenizer()
    limit = context_length(model, tokenizer)
    ask = _ask_choice if task.name == "multiple_choice" else _ask_label
    for shots in (0, SHOTS):
        asked = ask(domain, tokenizer, asked_about, limit, shots)
        if asked is None:
            continue
        questions, shown_count = asked
        found = answer_scores(model, domain.architecture, questions, device)
        predictions = [int(np.argmax(scores)) for scores in found]
        what = "choice" if task.name == "multiple_choice" else "label"
        _add(
            result,
            domain,
            asked_about,
            predictions,
            shown_count,
            f"the {what} of the highest mean log-probability per token after a prompt, {of_all}",
        )


@torch.no_grad()
def answer_scores(
    model: Any,
    architecture: Architecture,
    questions: Sequence[Question],
    device: torch.device,
) -> list[np.ndarray]:
    """Mean log-probability per token of each answer behind its prompt.

    What the prompts of a decoder have in common (instructions, shots) is computed once.

    Args:
        model: With a language-modelling head, in evaluation mode.
        architecture: Its kind. Encoder-decoders read the prompt and write the answer.
        device: Where the model is.
    """
    if architecture == "encoder-decoder":
        return [_encoded_scores(model, question, device) for question in questions]
    prompts = [question.prompt for question in questions]
    shared = min(_common(prompts), min(map(len, prompts)) - 1)
    cache = None
    if shared >= SHARED and len(questions) > 1:
        cache = model(input_ids=_ids([prompts[0][:shared]], device), use_cache=True).past_key_values
    else:
        shared = 0
    return [_continued_scores(model, question, shared, copy.deepcopy(cache), device) for question in questions]


def context_length(model: Any, tokenizer: Any) -> int:
    """Tokens that a prompt and its answer may have: the positions that the model was trained on."""
    known = [tokenizer.model_max_length]
    for name in ("max_position_embeddings", "n_positions"):
        known.append(getattr(model.config, name, None) or known[0])
    # Tokenizers without a limit say 1e30.
    return int(min(*known, 1_000_000))


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


def _common(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)
    return next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


# Prompts of labels.


def _ask_label(
    domain: PreparedDomain, tokenizer: Any, validation: Mapping[str, Any], limit: int, shots: int
) -> tuple[list[Question], int] | None:
    """A question for each text, its answers the labels; None where no shot fits."""
    labels = domain.labels
    listed = f"Classify the text as one of: {', '.join(labels)}.\n\n" if len(labels) <= LISTED else ""
    train = domain.split("train")
    longest = max(len(tokenizer(f" {label}", add_special_tokens=False)["input_ids"]) for label in labels)
    fixed = len(tokenizer(f"{listed}Text: \nLabel:")["input_ids"]) + longest
    room = limit - fixed - max(len(ids) for ids in validation["input_ids"])
    chosen, used = [], 0
    for row in _balanced(train["labels"], shots):
        cost = len(train[row]["input_ids"]) + longest + 8
        if used + cost <= room:
            chosen.append(row)
            used += cost
    if shots and not chosen:
        return None
    shown = "".join(
        f"Text: {_text(train[row]['input_ids'], tokenizer)}\nLabel: {labels[train[row]['labels']]}\n\n"
        for row in chosen
    )
    how = Tokenization(tokenizer, limit, domain.architecture)
    questions = []
    for ids in validation["input_ids"]:
        prompt = f"{listed}{shown}Text: {_text(ids, tokenizer)}\nLabel:"
        tokens = _without_end(list(tokenizer(prompt)["input_ids"]), tokenizer, domain.architecture)
        answers = [answer_tokens(label, prompt, tokens, chat=False, how=how)[:-1] for label in labels]
        questions.append(Question(tokens, answers))
    return questions, len(chosen)


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    """A tokenised text, or the texts of a pair on lines of their own."""
    special = set(tokenizer.all_special_ids)
    parts: list[list[int]] = [[]]
    for token in ids:
        if token in special:
            parts.append([])
        else:
            parts[-1].append(token)
    return "\n".join(tokenizer.decode(part).strip() for part in parts if part)


def _without_end(ids: list[int], tokenizer: Any, architecture: Architecture) -> list[int]:
    if architecture == "decoder" and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


# Prompts of choices.


def _ask_choice(
    domain: PreparedDomain, tokenizer: Any, validation: Mapping[str, Any], limit: int, shots: int
) -> tuple[list[Question], int] | None:
    """A question for each row: what its choices begin with in common, and how each goes on."""
    end = [tokenizer.eos_token_id]
    gap = _gap(tokenizer)
    train = domain.split("train")

    def bare(ids: Sequence[int]) -> list[int]:
        return list(ids[:-1] if ids and ids[-1] == end[0] else ids)

    longest = max(len(ids) for choices in validation["input_ids"] for ids in choices)
    room = limit - longest - 1
    shown: list[int] = []
    count = 0
    for row in _balanced(train["labels"], shots):
        right = bare(train[row]["input_ids"][train[row]["labels"]])
        if len(shown) + len(right) + len(gap) <= room:
            shown += _without_start(right, tokenizer, bool(shown)) + gap
            count += 1
    if shots and not count:
        return None
    questions = []
    for choices in validation["input_ids"]:
        whole = [bare(ids) for ids in choices]
        # Every choice keeps a token to be judged by.
        cut = min(_common(whole), min(len(ids) for ids in whole) - 1)
        prompt = [*shown, *_without_start(whole[0][:cut], tokenizer, bool(shown))]
        questions.append(
            Question(prompt + (end if domain.architecture == "encoder-decoder" else []), [ids[cut:] for ids in whole])
        )
    return questions, count


# Prompts of texts.


def _shots(domain: PreparedDomain, validation: Mapping[str, Any], limit: int, shots: int) -> list[dict[str, Any]]:
    """Training examples that fit into every prompt together."""
    if not shots:
        return []
    train = domain.split("train")
    lengths = domain.lengths("train")
    room = limit - max(len(ids) for ids in validation["input_ids"])
    if domain.architecture == "decoder":
        room -= domain.task.options.target_length
    gap = len(_gap(domain.tokenizer))
    found: list[dict[str, Any]] = []
    for row in _balanced(train["reference"], len(train)):
        # An even share, so that one long text does not take all the room.
        if lengths[row] + gap <= room // shots:
            found.append(train[row])
        if len(found) == shots:
            break
    return found


def _joined(shown: Sequence[Mapping[str, Any]], domain: PreparedDomain) -> list[int]:
    """Prompts with their targets one after another, as token ids; in a chat the end tokens stay, as turns end so."""
    tokenizer, chat = domain.tokenizer, domain.task.options.chat
    gap = [] if chat else _gap(tokenizer)
    found: list[int] = []
    for row in shown:
        prompt, answer = list(row["input_ids"]), list(row["labels"])
        if domain.architecture == "encoder-decoder":
            prompt = prompt[:-1] if prompt[-1] == tokenizer.eos_token_id else prompt
        found += [*_without_start(prompt, tokenizer, bool(found)), *(answer if chat else answer[:-1]), *gap]
    return found


def _written(
    model: Any, domain: PreparedDomain, rows: Mapping[str, Sequence[Any]], batch_size: int, device: torch.device
) -> list[Any]:
    how = Prediction(domain.architecture, True, domain.tokenizer)
    order = sorted(range(len(rows["input_ids"])), key=lambda row: len(rows["input_ids"][row]))
    found: list[Any] = [None] * len(order)
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            part = {name: [values[row] for row in chosen] for name, values in rows.items()}
            batch = to_device(domain.task.collate(part, domain.pad_token_id), device)
            for row, text in zip(chosen, domain.task.predict(model, None, batch, how), strict=True):
                found[row] = text
    return found


# What all have in common.


def _spread(count: int) -> list[int]:
    """At most `EXAMPLES` rows, evenly over all: data is often sorted by label."""
    return sorted({int(row) for row in np.linspace(0, count - 1, min(count, EXAMPLES))})


def _balanced(labels: Sequence[Any], count: int) -> list[int]:
    """So many rows, the same ones every time, taken from each label in turn."""
    waiting: dict[Any, list[int]] = {}
    for row in np.random.default_rng(0).permutation(len(labels)).tolist():
        waiting.setdefault(labels[row], []).append(row)
    found: list[int] = []
    depth = 0
    while len(found) < min(count, len(labels)):
        found += [rows[depth] for rows in waiting.values() if depth < len(rows)]
        depth += 1
    return found[:count]


def _gap(tokenizer: Any) -> list[int]:
    """A blank line; empty for tokenizers that drop white space."""
    return list(tokenizer("\n\n", add_special_tokens=False)["input_ids"])


def _without_start(ids: list[int], tokenizer: Any, drop: bool) -> list[int]:
    """A text begins with the start token only where a prompt does."""
    start = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    return ids[1:] if drop and ids and ids[0] in start else ids


def _add(
    result: ProbeResult,
    domain: PreparedDomain,
    validation: Mapping[str, Any],
    predictions: list[Any],
    shots: int,
    detail: str,
) -> None:
    scores = domain.task.score(predictions, domain.task.references(validation), domain.labels)
    if shots:
        examples = f"{shots} training example{'s' if shots > 1 else ''} in the prompt"
        result.add("few_shot", f"few-shot prompting ({shots})", f"{examples}; {detail}", scores)
    else:
        result.add("zero_shot", "zero-shot prompting", detail, scores)
