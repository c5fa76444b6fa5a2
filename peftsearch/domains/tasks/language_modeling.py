"""Language modelling: how well a model predicts plain text."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from peftsearch.domains.splits import normalise
from peftsearch.domains.tasks.base import (
    EXAMPLE,
    PART,
    Guess,
    Head,
    LossOptions,
    Metric,
    Prediction,
    Task,
    TaskOptions,
    Tokenization,
    check_counts,
    pad,
    predicted_at,
    text_batch,
)
from peftsearch.domains.tasks.columns import find, texts
from peftsearch.spec import DataSpec, StudyError
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets
    import torch
    from torch import nn

IGNORED = -100
"""The label of positions that are not predicted, as torch's cross-entropy has it."""
# Rows that are handed to the tokenizer at once.
TOKENIZE_BATCH = 1000
# Of the tokens chosen in training, as in BERT: this share is masked, and half of the rest replaced by any token.
MASKED, REPLACED = 0.8, 0.1
# exp of more is no double any more; a model whose loss is above it knows nothing anyway.
MAX_EXPONENT = 700.0


class LanguageModelingOptions(TaskOptions):
    """How texts become blocks, and what is masked for encoders."""

    pack: bool = Field(
        default=True,
        description="Fill each block of max_length tokens with the texts one after another; false begins a block with "
        "every text",
    )
    mask_probability: float = Field(
        default=0.15, gt=0, lt=1, description="Encoders: share of the tokens that are masked and predicted"
    )
    mask_copies: int = Field(
        default=1, ge=1, le=64, description="Encoders: differently masked copies of each training block in an epoch"
    )


class LanguageModeling(Task):
    """How well a model predicts plain text.

    A decoder predicts every token from those before it. An encoder predicts tokens that are masked (Devlin et al. 2019,
    arXiv:1810.04805): what is masked depends on the text alone, so that every trial is asked the same. In training 80 %
    of the chosen tokens are masked, 10 % replaced and 10 % kept; for scoring all of them are masked. Texts longer than
    ``max_length`` are cut into blocks and lose nothing.

    The perplexity of an encoder is exp of the mean loss over masked tokens, and not comparable with a decoder's; nor
    are those of models with different tokenizers. Bits per byte are comparable between tokenizers, for decoders alone.
    """

    name: ClassVar[str] = "language_modeling"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "perplexity": Metric("perplexity", "minimize"),
        "bits_per_byte": Metric("bits_per_byte", "minimize"),
    }
    Options = LanguageModelingOptions
    loss_options: ClassVar[frozenset[str]] = frozenset({"label_smoothing"})
    heads = {
        "encoder": Head("AutoModelForMaskedLM", None),
        "decoder": Head("AutoModelForCausalLM", "CAUSAL_LM"),
    }
    hidden: ClassVar[frozenset[str]] = frozenset({"labels", "predicted", "predictions", "bytes"})

    def columns(self, data: DataSpec) -> tuple[str, ...]:
        """The text."""
        return (data.columns.text,)

    def read(self, table: pa.Table, data: DataSpec, where: str, loc: Loc) -> pa.Table:
        """As `Task.read`; texts stay as they are."""
        if table.num_rows == 0:
            raise StudyError(f"{where} holds no rows", loc)
        name, place = data.columns.text, (*loc, "columns", "text")
        return pa.table({"text": texts(find(table, name, where, place), name, where, place)})

    def keys(self, table: pa.Table) -> list[str]:
        """The normalised text."""
        return [normalise(text) for text in table.column("text").to_pylist()]

    def content(self, table: pa.Table) -> list[tuple[str, ...]]:
        """The text."""
        return [(text,) for text in table.column("text").to_pylist()]

    def tokenize(self, table: pa.Table, labels: Sequence[str], how: Tokenization) -> datasets.Dataset:
        """As `Task.tokenize`; one row per block, which belongs to the example that its first token comes from.

        ``labels`` holds the token to predict at each position, or `IGNORED`; ``bytes`` is how many bytes of text, as
        UTF-8, the predicted tokens stand for.

        Raises:
            ValueError: No block has anything to predict, or an encoder's tokenizer has no mask token.
        """
        import datasets

        marks = _marks(how)
        parts = table.column(PART).to_pylist() if PART in table.column_names else [""] * table.num_rows
        encoded = _encode(table.column("text").to_pylist(), how)
        rows = [
            row
            for _, members in groupby(range(len(encoded)), key=parts.__getitem__)
            for row in _blocks([(number, *encoded[number]) for number in members], self.options.pack, marks, how)
        ]
        if how.architecture == "encoder":
            rows = list(self._masked(rows, marks, how))
        if not rows:
            raise ValueError("the texts are too short: a single token leaves nothing to predict")
        integers = pa.list_(pa.int32())
        return datasets.Dataset(
            pa.table(
                {
                    "input_ids": pa.array([row.ids for row in rows], integers),
                    "labels": pa.array([row.labels for row in rows], integers),
                    "bytes": pa.array([row.bytes for row in rows], pa.float64()),
                    EXAMPLE: pa.array([row.example for row in rows], pa.int64()),
                }
            )
        )

    def _masked(self, rows: Iterable[_Block], marks: _Marks, how: Tokenization) -> Iterator[_Block]:
        """Copies of an encoder's blocks with some of their tokens masked."""
        mask, special = how.tokenizer.mask_token_id, np.array(how.tokenizer.all_special_ids)
        if mask is None:
            raise ValueError(
                f"{type(how.tokenizer).__name__} has no mask token, which an encoder needs to model language"
            )
        ordinary = np.setdiff1d(np.arange(len(how.tokenizer)), special)
        for row in rows:
            ids = np.array(row.ids)
            inside = np.arange(len(marks.prefix), len(ids) - len(marks.suffix))
            # Marks between packed texts are no text.
            inside = inside[~np.isin(ids[inside], special)]
            for copy in range(self.options.mask_copies if how.training else 1) if len(inside) else ():
                digest = hashlib.sha256(f"mask:{copy}:{row.ids}".encode()).digest()
                generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
                draw = generator.random(len(inside))
                chosen = inside[draw < self.options.mask_probability]
                if not len(chosen):
                    chosen = inside[[int(draw.argmin())]]
                shown, wanted = ids.copy(), np.full(len(ids), IGNORED)
                wanted[chosen] = ids[chosen]
                fate = generator.random(len(chosen)) if how.training else np.zeros(len(chosen))
                shown[chosen[fate < MASKED]] = mask
                other = chosen[(fate >= MASKED) & (fate < MASKED + REPLACED)]
                shown[other] = generator.choice(ordinary, len(other))
                share = len(chosen) / len(inside)
                yield _Block(row.example, shown.tolist(), wanted.tolist(), row.bytes * share)

    def collate(self, rows: Mapping[str, Sequence[Any]], pad_token_id: int, *, multiple_of: int = 8) -> dict[str, Any]:
        """As `Task.collate`; ``labels`` has the shape of ``input_ids``, and `IGNORED` where nothing is predicted.

        ``predicted`` says where something is (`predicted_at`), ``predictions`` how often in each block.
        """
        import torch

        batch: dict[str, Any] = text_batch(rows, pad_token_id, multiple_of=multiple_of)
        batch["labels"] = torch.from_numpy(pad(rows["labels"], IGNORED, multiple_of=multiple_of))
        batch["predicted"] = predicted_at(batch["labels"], IGNORED)
        batch["predictions"] = (batch["labels"] != IGNORED).sum(1).tolist()
        batch["bytes"] = list(rows["bytes"])
        return batch

    def losses(self, output: Any, batch: Mapping[str, Any], options: LossOptions | None = None) -> torch.Tensor:
        """Mean cross-entropy of each block's predicted tokens."""
        import torch
        from torch.nn import functional

        labels = batch["labels"]
        logits = output.logits[:, -labels.shape[1] :]
        if "predicted" in batch:
            places, counts = batch["predicted"], batch["predictions"]
        else:
            places, counts = predicted_at(labels, IGNORED), (labels != IGNORED).sum(1).tolist()
        # One block after another: in float32 the scores of all would be by far the largest tensor of a step.
        return torch.stack(
            [
                functional.cross_entropy(
                    scores[columns].float(),
                    wanted[columns],
                    label_smoothing=options.label_smoothing if options else 0.0,
                )
                for scores, wanted, columns in zip(logits, labels, places[1].split(counts), strict=True)
            ]
        )

    def predict(self, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction) -> list[Any]:
        """For each block the sum of the negative log likelihoods (in nats), the tokens and the bytes it is over."""
        means = self.losses(output, batch).detach().double().tolist()
        tokens = (batch["labels"] != IGNORED).sum(1).tolist()
        return [[mean * count, count, size] for mean, count, size in zip(means, tokens, batch["bytes"], strict=True)]

    def references(self, rows: Mapping[str, Sequence[Any]]) -> list[Any]:
        """Nothing: a prediction holds all that its score needs."""
        return [None] * len(rows["input_ids"])

    def merge(self, predictions: list[Any]) -> Any:
        """The sums over an example's blocks."""
        return [sum(values) for values in zip(*predictions, strict=True)]

    def score(self, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str]) -> dict[str, float]:
        """Perplexity, exp of the mean over all tokens; and bits per byte, of the text as UTF-8."""
        check_counts(predictions, references)
        nats, tokens, size = self.merge(list(predictions))
        return {"perplexity": math.exp(min(nats / tokens, MAX_EXPONENT)), "bits_per_byte": nats / math.log(2) / size}

    def guesses(
        self, train: Mapping[str, Sequence[Any]], split: Mapping[str, Sequence[Any]], labels: Sequence[str]
    ) -> dict[str, Guess]:
        """Each token by its frequency in train."""
        seen = Counter(token for row in train["labels"] for token in row if token != IGNORED)
        wanted = [[token for token in row if token != IGNORED] for row in split["labels"]]
        known = len(set(seen).union(*map(set, wanted)))
        total = seen.total() + known
        found: dict[int, list[Any]] = {}
        for example, tokens, size in zip(split[EXAMPLE], wanted, split["bytes"], strict=True):
            nats = -sum(math.log((seen[token] + 1) / total) for token in tokens)
            found.setdefault(example, []).append([nats, len(tokens), size])
        return {
            "unigram": Guess(
                "unigram frequencies",
                "each token by its frequency in train, with add-one smoothing",
                [self.merge(rows) for rows in found.values()],
            )
        }


@dataclass(frozen=True)
class _Block:
    """Tokens that a model sees together.

    Attributes:
        example: Number of the text that the first of them comes from.
        ids: The tokens.
        labels: What is to be predicted at each position.
        bytes: How many bytes of text what is predicted stands for.
    """

    example: int
    ids: list[int]
    labels: list[int]
    bytes: float


@dataclass(frozen=True)
class _Marks:
    """What a tokenizer puts around a text.

    Attributes:
        prefix: Tokens before it.
        suffix: Tokens after it; for decoders the end token, whether the tokenizer adds it or not.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def _marks(how: Tokenization) -> _Marks:
    whole = list(how.tokenizer("a")["input_ids"])
    bare = list(how.tokenizer("a", add_special_tokens=False)["input_ids"])
    begin = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    prefix, suffix = tuple(whole[:begin]), tuple(whole[begin + len(bare) :])
    end = how.tokenizer.eos_token_id
    if how.architecture == "decoder" and not suffix and end is not None:
        suffix = (int(end),)
    return _Marks(prefix, suffix)


def _encode(found: Sequence[str], how: Tokenization) -> list[tuple[list[int], float]]:
    """The bare tokens of each text, and the bytes of text that each of them stands for on average."""
    encoded = []
    for start in range(0, len(found), TOKENIZE_BATCH):
        batch = list(found[start : start + TOKENIZE_BATCH])
        # verbose: texts longer than the model takes are cut into blocks, which needs no warning.
        ids = how.tokenizer(batch, add_special_tokens=False, truncation=False, padding=False, verbose=False)[
            "input_ids"
        ]
        for text, tokens in zip(batch, ids, strict=True):
            if not tokens:
                raise ValueError(f"the tokenizer makes no token of the text {text[:40]!r}")
            encoded.append((list(tokens), len(text.encode("utf-8", "surrogatepass")) / len(tokens)))
    return encoded


def _blocks(
    encoded: Sequence[tuple[int, list[int], float]], pack: bool, marks: _Marks, how: Tokenization
) -> Iterator[_Block]:
    """Cut texts (number, tokens, bytes per token) into blocks.

    A decoder's block begins with the last token of the block before, so that every token but the first is predicted
    once. An encoder's blocks each have the tokenizer's marks around them.
    """
    decoder = how.architecture == "decoder"
    for texts_together in [list(encoded)] if pack else [[text] for text in encoded]:
        ids: list[int] = []
        owner: list[int] = []
        size: list[float] = []
        for number, tokens, each in texts_together:
            before = marks.prefix if decoder else ()
            after = marks.suffix
            ids += [*before, *tokens, *after]
            owner += [number] * (len(before) + len(tokens) + len(after))
            size += [0.0] * len(before) + [each] * len(tokens) + [0.0] * len(after)
        if decoder:
            for start in range(0, len(ids) - 1, how.max_length - 1):
                stop = min(start + how.max_length, len(ids))
                # The logits at a position are about the token after it.
                yield _Block(
                    owner[start], ids[start:stop], [*ids[start + 1 : stop], IGNORED], sum(size[start + 1 : stop])
                )
        else:
            # The last text's mark is the block's own.
            ids = ids[: len(ids) - len(marks.suffix)]
            width = how.max_length - len(marks.prefix) - len(marks.suffix)
            for start in range(0, len(ids), width):
                body = ids[start : start + width]
                yield _Block(
                    owner[start],
                    [*marks.prefix, *body, *marks.suffix],
                    [IGNORED] * (len(marks.prefix) + len(body) + len(marks.suffix)),
                    sum(size[start : start + width]),
                )
