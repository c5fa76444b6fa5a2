"""What tasks share whose answer is a text: prompts, targets, their loss, and generation.

An encoder-decoder reads the prompt and writes the target. A decoder is trained on prompt and target in one sequence,
filled up on the right, with the loss on the target alone; it writes after the prompt, filled up on the left.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from peftsearch.domains.models import Architecture
from peftsearch.domains.splits import normalise
from peftsearch.domains.tasks.base import (
    Head,
    LossOptions,
    Prediction,
    Task,
    TaskOptions,
    Tokenization,
    pad,
    predicted_at,
    text_batch,
)
from peftsearch.domains.tasks.classification import read_texts, text_columns
from peftsearch.domains.tasks.columns import find, texts
from peftsearch.spec import DataSpec, StudyError
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets
    import torch
    from torch import nn

IGNORED = -100
"""The label of positions that are not predicted."""

_FIELD = re.compile(r"\{(text|text_pair)\}")


class GenerationOptions(BaseModel):
    """How answers are written at the full budget. Rungs on the way are written greedily: one beam, no sampling."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    beams: int = Field(default=1, ge=1, le=64, description="Beams of the search; 1 is greedy")
    min_tokens: int = Field(default=0, ge=0, description="New tokens before the answer may end")
    max_tokens: int | None = Field(default=None, ge=1, description="New tokens at most; target_length where absent")
    length_penalty: float = Field(default=1.0, description="Exponent of a beam's length: above 0 favours long answers")
    no_repeat_ngram: int = Field(default=0, ge=0, description="Runs of so many tokens occur once in an answer; 0: any")
    sample: bool = Field(default=False, description="Draw tokens (from a fixed seed) rather than take the likeliest")
    temperature: float = Field(default=1.0, gt=0, description="Of sampling: below 1 favours likely tokens")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.temperature != 1.0 and not self.sample:
            raise ValueError("temperature is for sampling: set sample: true, or leave it out")
        if self.length_penalty != 1.0 and self.beams == 1:
            raise ValueError("length_penalty compares beams: set beams to 2 or more, or leave it out")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens})")
        return self


class GeneratingOptions(TaskOptions):
    """Settings of tasks whose answer is a text."""

    template: str | None = Field(
        default=None,
        description="The prompt, with {text} (and {text_pair}) where the text goes; a default where absent",
    )
    chat: bool = Field(
        default=False, description="Send the prompt as a user's message, through the tokenizer's chat template"
    )
    target_length: int = Field(
        default=128, ge=2, description="Tokens of a target that are trained on, its end included"
    )
    generation: GenerationOptions = GenerationOptions()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.template is not None and "{text}" not in self.template:
            raise ValueError(f"the template {self.template!r} has no {{text}}: nothing of the text would be seen")
        most = self.generation.max_tokens or self.target_length
        if self.generation.min_tokens > most:
            raise ValueError(f"generation.min_tokens is more than the {most} tokens that an answer may have")
        return self


class Generating(Task):
    """A text in answer to a text."""

    Options = GeneratingOptions
    loss_options: ClassVar[frozenset[str]] = frozenset({"label_smoothing"})
    options: GeneratingOptions
    heads: ClassVar = {
        "encoder-decoder": Head("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
        "decoder": Head("AutoModelForCausalLM", "CAUSAL_LM"),
    }
    hidden: ClassVar[frozenset[str]] = frozenset({"labels", "predicted", "prompt_ids", "prompt_mask"})
    decodes = True

    @abstractmethod
    def template(self, how: Tokenization, pair: bool) -> str:
        """The prompt for a kind of model, with ``{text}`` and, for pairs, ``{text_pair}``."""

    def columns(self, data: DataSpec) -> tuple[str, ...]:
        """Text, the second text where there is one, and target."""
        pair = (data.columns.text_pair,) if data.columns.text_pair is not None else ()
        return (data.columns.text, *pair, data.columns.target)

    def read(self, table: pa.Table, data: DataSpec, where: str, loc: Loc) -> pa.Table:
        """As `Task.read`: texts and targets stay as they are."""
        columns = read_texts(table, data, where, loc)
        name, place = data.columns.target, (*loc, "columns", "target")
        if name in self.columns(data)[:-1]:
            raise StudyError(f"the column {name!r} cannot be both text and target", place)
        columns["target"] = texts(find(table, name, where, place), name, where, place)
        return pa.table(columns)

    def keys(self, table: pa.Table) -> list[str]:
        """The normalised text, or both texts of a pair."""
        return ["\0".join(map(normalise, row)) for row in zip(*text_columns(table), strict=True)]

    def content(self, table: pa.Table) -> list[tuple[str, ...]]:
        """The text or texts, then the target."""
        return list(zip(*text_columns(table), table.column("target").to_pylist(), strict=True))

    def check(
        self, splits: Mapping[str, pa.Table], data: DataSpec, loc: Loc, *, cut: Collection[str] = ()
    ) -> tuple[str, ...]:
        """As `Task.check`: the template uses what the data brings. There are no labels."""
        template, pair = self.options.template, "text_pair" in splits["train"].column_names
        place = (*loc[:-1], "options", "template")
        if template is not None and pair and "{text_pair}" not in template:
            raise StudyError(
                f"the template {template!r} has no {{text_pair}}, which columns.text_pair maps: add it, or map none",
                place,
            )
        if template is not None and not pair and "{text_pair}" in template:
            raise StudyError(f"the template {template!r} has {{text_pair}}: map columns.text_pair", place)
        return ()

    def warnings(self, splits: Mapping[str, pa.Table], labels: Sequence[str]) -> list[str]:
        """Targets that ROUGE cannot see."""
        found = []
        for split, table in splits.items():
            blind = sum(not re.search(r"[a-z0-9]", target.lower()) for target in table.column("target").to_pylist())
            if blind:
                found.append(
                    f"{blind} of {table.num_rows} targets of {split} have no letter a-z and no digit: ROUGE sees no "
                    "words in them, and scores 0"
                )
        return found

    def check_length(self, max_length: int, architecture: Architecture, reads: int | None, writes: int | None) -> None:
        """As `Task.check_length`; a decoder has the answer behind the text, an encoder-decoder by itself."""
        super().check_length(max_length, architecture, reads, None)
        answers = {
            "target_length": self.options.target_length,
            "generation.max_tokens": self.options.generation.max_tokens or 0,
        }
        name, longest = max(answers.items(), key=lambda item: item[1])
        if architecture == "decoder" and reads is not None and max_length + longest > reads:
            raise ValueError(
                f"max_length ({max_length}) and {name} ({longest}) are together more than the {reads} tokens that the "
                "model takes: lower one of them"
            )
        if writes is not None and longest > writes:
            raise ValueError(f"{name} ({longest}) is more than the {writes} tokens that the model writes: lower it")

    def tokenize(self, table: pa.Table, labels: Sequence[str], how: Tokenization) -> datasets.Dataset:
        """As `Task.tokenize`: ``input_ids`` are the prompt's, in which the text is truncated and the template is not;
        ``labels`` the target's, its end token last, truncated to ``target_length``; ``reference`` is the whole target.

        Encoder-decoders have a column ``decoder_start`` besides: what their decoder begins with.

        Raises:
            ValueError: The template leaves no room for text, the tokenizer has no end token or no chat template,
                or every target is longer than ``target_length``.
        """
        import datasets

        most = self.options.target_length
        if how.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token: the model could not learn where an answer ends")
        fields = {name: table.column(name).to_pylist() for name in ("text", "text_pair") if name in table.column_names}
        render = _Renderer(self.template(how, "text_pair" in fields), self.options.chat, how.tokenizer)
        targets = table.column("target").to_pylist()
        prompts: list[list[int]] = []
        answers: list[list[int]] = []
        for row, target in enumerate(targets):
            prompt, ids = render.fit({name: column[row] for name, column in fields.items()}, how)
            prompts.append(ids)
            answers.append(answer_tokens(target, prompt, ids, chat=self.options.chat, how=how))
        lengths = [len(answer) for answer in answers]
        too_long = sum(length > most for length in lengths)
        if too_long == len(lengths):
            raise ValueError(
                f"every target is longer than target_length ({most} tokens; the shortest has {min(lengths)}): raise "
                "the option target_length"
            )
        if too_long and how.training:
            how.warnings.append(
                f"{too_long} of {len(lengths)} targets are longer than target_length ({most} tokens) and cut off in "
                "training"
            )
        end = how.tokenizer.eos_token_id
        answers = [answer if len(answer) <= most else [*answer[: most - 1], end] for answer in answers]
        ids_of = pa.list_(pa.int32())
        columns = {
            "input_ids": pa.array(prompts, ids_of),
            "labels": pa.array(answers, ids_of),
            "length": pa.array([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], pa.int32()),
            "reference": pa.array(targets, pa.large_string()),
        }
        if how.architecture == "encoder-decoder":
            # Architectures without a start token of their own (mBART) begin with what the target ends with.
            start = how.decoder_start_token_id
            columns["decoder_start"] = pa.array([a[-1] if start is None else start for a in answers], pa.int32())
        return datasets.Dataset(pa.table(columns | self.extra_columns(table)))

    def extra_columns(self, table: pa.Table) -> dict[str, pa.Array]:
        """What `guesses` needs beside the tokens."""
        return {}

    def collate(self, rows: Mapping[str, Sequence[Any]], pad_token_id: int, *, multiple_of: int = 8) -> dict[str, Any]:
        """As `Task.collate`.

        For encoder-decoders the prompt, ``decoder_input_ids``, and ``labels`` of the same shape. For decoders prompt
        and target in one sequence, ``labels`` of the same shape (`IGNORED` outside of the target), and for generation
        ``prompt_ids`` and ``prompt_mask``, filled up on the left. For both ``predicted``, see `predicted_at`.
        """
        import torch

        if "decoder_start" in rows:
            batch: dict[str, Any] = text_batch(rows, pad_token_id, multiple_of=multiple_of)
            labels = pad(rows["labels"], IGNORED, multiple_of=multiple_of)
            shifted = pad(rows["labels"], pad_token_id, multiple_of=multiple_of)[:, :-1]
            start = np.asarray(rows["decoder_start"], dtype=np.int64)[:, None]
            batch["decoder_input_ids"] = torch.from_numpy(np.concatenate([start, shifted], axis=1))
            batch["labels"] = torch.from_numpy(labels)
            batch["predicted"] = predicted_at(batch["labels"], IGNORED)
            return batch
        prompts, answers = rows["input_ids"], rows["labels"]
        whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        batch = dict(text_batch({"input_ids": whole}, pad_token_id, multiple_of=multiple_of))
        labels = np.full(tuple(batch["input_ids"].shape), IGNORED, dtype=np.int64)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            labels[row, len(prompt) : len(prompt) + len(answer)] = answer
        batch["labels"] = torch.from_numpy(labels)
        batch["predicted"] = predicted_at(batch["labels"], IGNORED)
        batch["prompt_ids"] = torch.from_numpy(pad(prompts, pad_token_id, multiple_of=multiple_of, left=True))
        ones = [[1] * len(prompt) for prompt in prompts]
        batch["prompt_mask"] = torch.from_numpy(pad(ones, 0, multiple_of=multiple_of, left=True))
        return batch

    def losses(self, output: Any, batch: Mapping[str, Any], options: LossOptions | None = None) -> torch.Tensor:
        """Mean cross-entropy of each target's tokens, its end included."""
        import torch
        from torch.nn import functional

        labels, logits = batch["labels"], output.logits
        rows, columns = batch["predicted"] if "predicted" in batch else predicted_at(labels, IGNORED)
        # Soft tokens stand in front, and a decoder predicts each token at the position before it.
        shift = logits.shape[1] - labels.shape[1] - ("prompt_ids" in batch)
        # Only where something is predicted: all positions times the vocabulary, in float32, would be the largest
        # tensor of the training by far.
        found = functional.cross_entropy(
            logits[rows, columns + shift].float(),
            labels[rows, columns],
            reduction="none",
            label_smoothing=options.label_smoothing if options is not None else 0.0,
        )
        of_token = torch.zeros(labels.shape, dtype=torch.float32, device=found.device)
        of_token = of_token.index_put((rows, columns), found)
        losses: torch.Tensor = of_token.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)
        return losses

    def predict(self, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction) -> list[Any]:
        """The text that the model writes, without special tokens."""
        settings = self.options.generation
        prompts = batch.get("prompt_ids")
        ids, mask = (
            (batch["input_ids"], batch["attention_mask"]) if prompts is None else (prompts, batch["prompt_mask"])
        )
        return generate(
            model,
            ids,
            mask,
            how.tokenizer,
            settings if how.final else settings.model_copy(update={"beams": 1, "sample": False}),
            max_tokens=settings.max_tokens or self.options.target_length,
            continues=prompts is not None,
        )

    def references(self, rows: Mapping[str, Sequence[Any]]) -> list[Any]:
        """The whole targets."""
        return [str(text) for text in rows["reference"]]


def generate(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    tokenizer: Any,
    settings: GenerationOptions,
    *,
    max_tokens: int,
    continues: bool,
    ends: Collection[int] = (),
) -> list[str]:
    """Let a model write.

    Only ``settings`` decide how: what a checkpoint's ``generation_config.json`` says of sampling, beams, lengths and
    repetitions is overruled, so that models are compared on equal terms.

    Args:
        model: A model of `transformers` or PEFT with a language-modelling head, in evaluation mode.
        ids: Prompts, shape (rows, length); filled up on the left for decoders.
        mask: 0 where they are filled up.
        tokenizer: The model's.
        settings: How.
        max_tokens: New tokens at most.
        continues: Whether the model continues the prompt (decoders), so that its output begins with it.
        ends: Tokens that end the text, besides the model's own.
    """
    from transformers import LogitsProcessorList

    end = model.generation_config.eos_token_id
    ends = {*ends, tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}
    arguments: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        **({"min_new_tokens": settings.min_tokens} if settings.min_tokens else {"min_length": 0}),
        "num_beams": settings.beams,
        "do_sample": settings.sample,
        "temperature": settings.temperature if settings.sample else 1.0,
        "top_k": 0 if settings.sample else 50,
        "top_p": 1.0,
        "length_penalty": settings.length_penalty,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "early_stopping": False,
        "num_return_sequences": 1,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "eos_token_id": sorted(ends),
        "use_cache": True,
    }
    written: list[str] = [""] * len(ids)
    for rows, start in _groups(model, mask, continues):
        own, own_mask = ids[rows, start:], mask[rows, start:]
        prompt = own.shape[1] if continues else 0
        extra = {}
        if settings.no_repeat_ngram:
            extra["logits_processor"] = LogitsProcessorList([_no_repeat(settings.no_repeat_ngram, prompt)])
        with _seeded(ids.device) if settings.sample else nullcontext():
            found = model.generate(input_ids=own, attention_mask=own_mask, **arguments, **extra)
        for row, text in zip(rows, tokenizer.batch_decode(found[:, prompt:], skip_special_tokens=True), strict=True):
            written[row] = text.strip()
    return written


def _groups(model: Any, mask: torch.Tensor, continues: bool) -> list[tuple[list[int], int]]:
    """Rows that are generated together, and where their prompts begin.

    PEFT puts a decoder's soft tokens before the padding on the left and drops the position ids, so that the distance
    from soft tokens to text would depend on the other rows: prompts of one length only have no padding.
    """
    config = getattr(model, "active_peft_config", None)
    if not (continues and config is not None and config.is_prompt_learning):
        return [(list(range(len(mask))), 0)]
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        groups.setdefault(mask.shape[1] - int(length), []).append(row)
    return [(rows, start) for start, rows in groups.items()]


def _no_repeat(size: int, prompt: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """transformers' rule, on the answer alone: its own would also forbid a decoder to quote the prompt."""
    from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor

    rule = NoRepeatNGramLogitsProcessor(size)

    class AnswerOnly(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return rule(input_ids[:, prompt:], scores)  # type: ignore[no-any-return]

    return AnswerOnly()


def _seeded(device: torch.device) -> AbstractContextManager[None]:
    """Draw the same every time, and leave the training's random numbers as they were."""
    from contextlib import contextmanager

    import torch

    @contextmanager
    def context() -> Any:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            yield

    return context()


class _Renderer:
    """Makes prompts that fit: the texts in them are cut, the template is not."""

    def __init__(self, template: str, chat: bool, tokenizer: Any) -> None:
        self.template, self.chat, self.tokenizer = template, chat, tokenizer
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template: leave the option chat out")

    def text(self, fields: Mapping[str, str]) -> str:
        filled = _FIELD.sub(lambda match: fields[match[1]], self.template)
        if not self.chat:
            return filled
        message = [{"role": "user", "content": filled}]
        return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def ids(self, prompt: str, architecture: str) -> list[int]:
        # A chat template writes the special tokens itself.
        found = list(self.tokenizer(prompt, add_special_tokens=not self.chat)["input_ids"])
        if architecture == "decoder" and found and found[-1] == self.tokenizer.eos_token_id and not self.chat:
            # Tokenizers that end every text: the answer is still to come.
            found.pop()
        return found

    def fit(self, fields: dict[str, str], how: Tokenization) -> tuple[str, list[int]]:
        """The prompt of at most ``how.max_length`` tokens, the longer text cut first.

        Raises:
            ValueError: The template alone leaves no room.
        """
        fields = {name: self._beginning(text, how.max_length) for name, text in fields.items()}
        prompt = self.text(fields)
        ids = self.ids(prompt, how.architecture)
        while len(ids) > how.max_length:
            tokens = {name: self._pieces(text) for name, text in fields.items()}
            longest = max(tokens, key=lambda name: len(tokens[name]))
            keep = len(tokens[longest]) - (len(ids) - how.max_length)
            others = [len(found) for name, found in tokens.items() if name != longest]
            if others:
                # Down to the other's length; what is then still too long comes off both, a round each.
                keep = max(keep, others[0] - 1)
            if len(tokens[longest]) <= 1:
                raise ValueError(
                    f"the prompt's template fills all {how.max_length} tokens of max_length: no text would be seen"
                )
            fields = {**fields, longest: self._cut(fields[longest], max(keep, 1), tokens[longest])}
            prompt = self.text(fields)
            ids = self.ids(prompt, how.architecture)
        return prompt, ids

    def _beginning(self, text: str, tokens: int) -> str:
        """No less of a text than its first tokens: of articles and books most would be tokenised for nothing."""
        size = 8 * tokens
        while size < len(text):
            pieces = self._pieces(text[:size])
            if len(pieces) > tokens:
                return self._cut(text, tokens, pieces)
            size *= 2
        return text

    def _pieces(self, text: str) -> list[Any]:
        """The text's tokens: where each ends, or its number for tokenizers that do not know."""
        if self.tokenizer.is_fast:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return [end for _, end in found["offset_mapping"]]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _cut(self, text: str, keep: int, pieces: list[Any]) -> str:
        if self.tokenizer.is_fast:
            return text[: pieces[keep - 1]]
        return str(self.tokenizer.decode(pieces[:keep], skip_special_tokens=True))


def answer_tokens(target: str, prompt: str, prompt_ids: list[int], *, chat: bool, how: Tokenization) -> list[int]:
    """The target's tokens as the model meets them behind the prompt, the end token last."""
    tokenizer = how.tokenizer
    if how.architecture == "encoder-decoder":
        found = list(tokenizer(text_target=target)["input_ids"])
        return found if found and found[-1] == tokenizer.eos_token_id else [*found, tokenizer.eos_token_id]
    # Joined as text first: tokenizers write a word's leading space into its first token.
    gap = "" if chat or prompt[-1:].isspace() else " "
    whole = list(tokenizer(f"{prompt}{gap}{target}", add_special_tokens=not chat)["input_ids"])
    if whole and whole[-1] == tokenizer.eos_token_id:
        whole.pop()
    if whole[: len(prompt_ids)] == prompt_ids and len(whole) > len(prompt_ids):
        found = whole[len(prompt_ids) :]
    else:
        # The border's characters would merge into one token, which a prompt by itself does not have.
        found = list(tokenizer(target, add_special_tokens=False)["input_ids"])
    return [*found, tokenizer.eos_token_id]
