"""Zero-shot and few-shot prompting of the frozen base: what a generative model does without any training.

Labels and choices are compared by likelihood: the answer of the highest mean log-probability per token wins. Texts are
written as `Generating.predict` writes them. Answers in a text are scored as they are written; entities that are
listed are sought in the text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from peftsearch.domains import PreparedDomain
from peftsearch.domains.models import has_relative_positions
from peftsearch.domains.tasks.base import EXAMPLE, Prediction, first_rows, pad
from peftsearch.domains.tasks.generation import Generating, GenerationOptions, generate
from peftsearch.training.asking import ASKED, balanced, blank_line, without_end, without_start
from peftsearch.training.base_model import FrozenBase
from peftsearch.training.batches import collated, padded_to
from peftsearch.training.extracting import EXTRACTED, line_ends
from peftsearch.training.likelihood import Question, answer_scores
from peftsearch.training.segment import ProbeResult

SHOTS = 4
"""Training examples shown in a few-shot prompt, where so many fit."""
PROMPTS = 10
"""So many prompts about one example cost as much as an example may."""
_WRITTEN = 5
"""So many prompts that are judged cost as much as one behind which entities are written."""
_PROMPT_TOKENS = 1024
"""Tokens of a prompt and what is written behind it at most, or four of the domain's longest texts."""
ZERO_SHOT, FEW_SHOT = "zero-shot prompting", "few-shot prompting"


class Prompting:
    """The frozen base as it is prompted for a domain.

    Labels, scores and choices are answered by likelihood; summaries, responses, answers in a text and entities by
    generation.

    Args:
        base: The frozen base.
        domain: Shots come from its training split.
        batch_size: Prompts per batch of generation.
        device: Where the base is.
        split: What is answered.
        limit: Examples of the split that are prompted at most, spread evenly over it; all where None. Where an example
            takes several prompts (one for each label, or type of entity), it counts once for every `PROMPTS` of them;
            one behind which entities are written counts as `_WRITTEN`.
        pause: Called between prompts.
    """

    def __init__(
        self,
        base: FrozenBase,
        domain: PreparedDomain,
        batch_size: int,
        device: torch.device,
        split: str,
        limit: int | None,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self.base = base
        self.domain = domain
        self.batch_size = batch_size
        self.device = device
        self.pause = pause
        count, data = domain.rows[split], domain.split(split)
        several = {
            "multi_label": len(domain.labels),
            "token_classification": _WRITTEN * len(domain.task.metric_labels(domain.labels)),
        }
        if limit is not None and domain.task.name in several:
            limit = max(1, limit * PROMPTS // max(PROMPTS, several[domain.task.name]))
        rows = _spread(count, limit)
        self.examples = len(rows)
        self.of_all = f"on {len(rows)} of {count} {split} examples" if len(rows) < count else f"on all {split} examples"
        if EXAMPLE in data.column_names:
            example_of = list(data[EXAMPLE])
            examples = list(dict.fromkeys(example_of))
            chosen = {examples[number] for number in rows}
            rows = [row for row, example in enumerate(example_of) if example in chosen]
        self.asked_about = data[rows]

    @staticmethod
    def possible(domain: PreparedDomain) -> bool:
        """Whether the model is generative and the task can be prompted."""
        task = domain.task
        prompted = isinstance(task, Generating) or task.name in ASKED or task.name in EXTRACTED
        return domain.architecture != "encoder" and prompted

    def add(self, result: ProbeResult, shots: int) -> None:
        """Add the baseline ``zero_shot``, or with shots ``few_shot``.

        Args:
            result: Gets it. (A model without a pretrained language-modelling head has none; and there is no few-shot
                prompt where not even one training example fits beside the text.)
            shots: Training examples in the prompt.
        """
        if isinstance(self.domain.task, Generating):
            self._add_written(result, shots)
        elif self._model is not None and self.domain.task.name in EXTRACTED:
            self._add_extracted(result, self._model, shots)
        elif self._model is not None:
            self._add_chosen(result, self._model, shots)

    def _add_written(self, result: ProbeResult, shots: int) -> None:
        domain, asked_about = self.domain, self.asked_about
        model = self.base.common_model(domain).eval()
        limit = context_length(model, domain.tokenizer, domain.max_length)
        shown = _shots(domain, asked_about, limit, shots)
        if shots and not shown:
            return
        before = _joined(shown, domain)
        prompts = [[*before, *without_start(ids, domain.tokenizer, bool(shown))] for ids in asked_about["input_ids"]]
        rows = {**asked_about, "input_ids": prompts}
        predictions = _written(model, domain, rows, self.batch_size, self.device, self.pause)
        self._add(result, predictions, len(shown), "the frozen model writes")

    def _add_chosen(self, result: ProbeResult, model: Any, shots: int) -> None:
        domain, tokenizer = self.domain, self.base.tokenizer()
        limit = context_length(model, tokenizer, domain.max_length)
        asked = ASKED[domain.task.name](domain, tokenizer, self.asked_about, limit, shots)
        if asked is not None:
            _check_length(model, max(_length(question) for question in asked.questions))
            found = answer_scores(model, domain.architecture, asked.questions, self.device, self.pause)
            self._add(result, asked.decide(found), asked.shots, asked.how)

    def _add_extracted(self, result: ProbeResult, model: Any, shots: int) -> None:
        domain, tokenizer = self.domain, self.base.tokenizer()
        # Whole contexts may be documents, of which trials see a window at a time.
        limit = min(context_length(model, tokenizer, domain.max_length), max(_PROMPT_TOKENS, 4 * domain.max_length))
        asked = EXTRACTED[domain.task.name](domain, tokenizer, self.asked_about, limit, shots)
        if asked is None:
            return
        prompts = [
            without_end(list(tokenizer(prompt)["input_ids"]), tokenizer, domain.architecture)
            for prompt in asked.prompts
        ]
        longest = max(map(len, prompts))
        _check_length(model, longest + asked.most)
        # As many tokens as a batch of the domain's texts has.
        size = max(1, self.batch_size * domain.max_length // longest)
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        written = [""] * len(prompts)
        fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        continues = domain.architecture == "decoder"
        with torch.no_grad():
            for start in range(0, len(order), size):
                self.pause()
                chosen = order[start : start + size]
                padded, mask = (
                    torch.from_numpy(pad(rows, value, multiple_of=padded_to(self.device), left=continues))
                    for rows, value in (
                        ([prompts[number] for number in chosen], fill),
                        ([[1] * len(prompts[number]) for number in chosen], 0),
                    )
                )
                texts = generate(
                    model,
                    padded.to(self.device),
                    mask.to(self.device),
                    tokenizer,
                    GenerationOptions(),
                    max_tokens=asked.most,
                    continues=continues,
                    ends=line_ends(tokenizer),
                )
                for number, text in zip(chosen, texts, strict=True):
                    written[number] = text.split("\n")[0].strip()
        self._add(result, asked.decide(written), asked.shots, asked.how)

    @functools.cached_property
    def _model(self) -> Any | None:
        return self.base.language_model(self.domain.architecture)

    def _add(self, result: ProbeResult, predictions: list[Any], shots: int, how: str) -> None:
        domain = self.domain
        references = domain.task.references(self.asked_about)
        expected = [references[row] for row in first_rows(self.asked_about)]
        scores = domain.task.score(predictions, expected, domain.labels)
        detail = f"{how}, {self.of_all}"
        if shots:
            examples = f"{shots} training example{'s' if shots > 1 else ''} in the prompt"
            title = f"{FEW_SHOT} ({shots})"
            result.add("few_shot", title, f"{examples}; {detail}", scores, self.examples)
        else:
            result.add("zero_shot", ZERO_SHOT, detail, scores, self.examples)


def _length(question: Question) -> int:
    return len(question.prompt) + max(map(len, question.answers))


def _check_length(model: Any, longest: int) -> None:
    """Say that a prompt is too long before the model does: on a GPU, what it says ends the process."""
    if has_relative_positions(model.config):
        return
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(f"the longest prompt and answer have {longest} tokens, the model has {positions} positions")


def context_length(model: Any, tokenizer: Any, max_length: int) -> int:
    """Tokens that a prompt and its answer may have.

    The positions that the model was trained on; or, where positions are relative, two of the domain's longest texts at
    least (``max_length``: their tokens).
    """
    known = [tokenizer.model_max_length]
    for name in ("max_position_embeddings", "n_positions"):
        known.append(getattr(model.config, name, None) or known[0])
    # Tokenizers without a limit say 1e30.
    found = int(min(*known, 1_000_000))
    return max(found, 2 * max_length) if has_relative_positions(model.config) else found


def _shots(domain: PreparedDomain, validation: Mapping[str, Any], limit: int, shots: int) -> list[dict[str, Any]]:
    """Training examples that fit into every prompt together."""
    if not shots:
        return []
    train = domain.split("train")
    lengths = domain.lengths("train")
    room = limit - max(len(ids) for ids in validation["input_ids"])
    if domain.architecture == "decoder":
        room -= domain.task.options.target_length
    gap = len(blank_line(domain.tokenizer))
    found: list[dict[str, Any]] = []
    for row in balanced(train["reference"], len(train)):
        # An even share, so that one long text does not take all the room.
        if lengths[row] + gap <= room // shots:
            found.append(train[row])
        if len(found) == shots:
            break
    return found


def _joined(shown: Sequence[Mapping[str, Any]], domain: PreparedDomain) -> list[int]:
    """Prompts with their targets one after another, as token ids; in a chat the end tokens stay, as turns end so."""
    tokenizer, chat = domain.tokenizer, domain.task.options.chat
    gap = [] if chat else blank_line(tokenizer)
    found: list[int] = []
    for row in shown:
        prompt, answer = list(row["input_ids"]), list(row["labels"])
        if domain.architecture == "encoder-decoder":
            prompt = prompt[:-1] if prompt[-1] == tokenizer.eos_token_id else prompt
        found += [*without_start(prompt, tokenizer, bool(found)), *(answer if chat else answer[:-1]), *gap]
    return found


def _written(
    model: Any,
    domain: PreparedDomain,
    rows: Mapping[str, Sequence[Any]],
    batch_size: int,
    device: torch.device,
    pause: Callable[[], None],
) -> list[Any]:
    how = Prediction(domain.architecture, True, domain.tokenizer)
    order = sorted(range(len(rows["input_ids"])), key=lambda row: len(rows["input_ids"][row]))
    found: list[Any] = [None] * len(order)
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            pause()
            chosen = order[start : start + batch_size]
            part = {name: [values[row] for row in chosen] for name, values in rows.items()}
            batch = collated(domain.task, part, domain.pad_token_id, device)
            for row, text in zip(chosen, domain.task.predict(model, None, batch, how), strict=True):
                found[row] = text
    return found


def _spread(count: int, limit: int | None) -> list[int]:
    """At most so many rows, evenly over all: data is often sorted by label."""
    return sorted({int(row) for row in np.linspace(0, count - 1, count if limit is None else min(count, limit))})
