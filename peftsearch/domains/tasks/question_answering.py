"""Extractive question answering: the stretch of a context that answers a question, or that there is none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
from pydantic import Field

from peftsearch.domains.metrics.squad import normalise_answer, squad_v2_scores
from peftsearch.domains.splits import hash_order, normalise
from peftsearch.domains.tasks.base import (
    EXAMPLE,
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
    text_batch,
)
from peftsearch.domains.tasks.classification import BETWEEN
from peftsearch.domains.tasks.columns import find, texts
from peftsearch.spec import DataSpec, StudyError
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets
    import torch
    from torch import nn

ANSWERS = pa.list_(pa.struct([("text", pa.large_string()), ("start", pa.int64())]))
# Share of max_length that a question may take; the context needs the rest.
QUESTION_SHARE = 0.5
# Rows that are handed to the tokenizer at once.
TOKENIZE_BATCH = 200
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")


class QuestionAnsweringOptions(TaskOptions):
    """How contexts are cut into windows, and how answers are chosen."""

    stride: int | None = Field(
        default=None,
        ge=0,
        description="Tokens that neighbouring windows of a long context share; a quarter of max_length where absent",
    )
    empty_windows: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the training windows without an answer that is kept; the others teach to say 'no answer' "
        "and outnumber those with one where contexts are long. What a model says of 'no answer' is corrected for those "
        "that were left out",
    )
    max_answer_length: int = Field(default=30, ge=1, description="Tokens that a predicted answer has at most")
    null_threshold: float = Field(
        default=0.0,
        description="'No answer' is predicted where its score exceeds the best answer's by more than this; raise it "
        "where every question has an answer",
    )


class QuestionAnswering(Task):
    """The stretch of a context that answers a question, or "no answer", as in SQuAD v2.0.

    A model scores every token of the context as the answer's first and last one, and one more token as both for "no
    answer" (Devlin et al. 2019, arXiv:1810.04805, section 4.3). That is the text's first token; of a decoder, which has
    seen nothing there, it is an end token after the context. Long contexts become several windows. A window that does
    not hold an answer as a whole is trained to say "no answer"; of several answers in a window the first is the target.
    """

    name: ClassVar[str] = "question_answering"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "f1": Metric("f1", "maximize"),
        "exact_match": Metric("exact_match", "maximize"),
        "has_answer_f1": Metric("has_answer_f1", "maximize"),
        "has_answer_exact_match": Metric("has_answer_exact_match", "maximize"),
        "no_answer_f1": Metric("no_answer_f1", "maximize"),
        "no_answer_exact_match": Metric("no_answer_exact_match", "maximize"),
    }
    Options = QuestionAnsweringOptions
    probe = "span"
    loss_options: ClassVar[frozenset[str]] = frozenset({"label_smoothing"})
    # PEFT's QUESTION_ANS swallows token_type_ids (and position_ids) on their way to the model: its forward names them
    # as arguments and does not pass them on (PEFT 0.21.2; see test_peft_question_answering_swallows_token_types). An
    # adapter without a task type passes everything on.
    # LlamaForQuestionAnswering and its kin call their backbone "transformer", and find none of the weights that causal
    # models save as "model" (transformers 5.23): a token classifier with the labels start and end is the same model.
    heads = {
        "encoder": Head("AutoModelForQuestionAnswering", None),
        "encoder-decoder": Head("AutoModelForQuestionAnswering", "QUESTION_ANS"),
        "decoder": Head("AutoModelForTokenClassification", "TOKEN_CLS"),
    }
    hidden: ClassVar[frozenset[str]] = frozenset({"labels", "candidates", "null", "passage", "first", "last"})

    def columns(self, data: DataSpec) -> tuple[str, ...]:
        """Question, context and answers."""
        return (data.columns.question, data.columns.context, data.columns.answers)

    def read(self, table: pa.Table, data: DataSpec, where: str, loc: Loc) -> pa.Table:
        """As `Task.read`; ``answers`` become lists of {text, start}."""
        if table.num_rows == 0:
            raise StudyError(f"{where} holds no rows", loc)
        found = {}
        for role in ("question", "context"):
            name, place = getattr(data.columns, role), (*loc, "columns", role)
            found[role] = texts(find(table, name, where, place), name, where, place)
        name, place = data.columns.answers, (*loc, "columns", "answers")
        column = find(table, name, where, place).to_pylist()
        answers = []
        for row, (value, context) in enumerate(zip(column, found["context"].to_pylist(), strict=True), 1):
            try:
                answers.append(_answers(value, context))
            except ValueError as error:
                raise StudyError(f"column {name!r} of {where}, row {row}: {error}", place) from None
        found["answers"] = pa.chunked_array([pa.array(answers, ANSWERS)])
        return pa.table(found)

    def keys(self, table: pa.Table) -> list[str]:
        """The normalised question and context."""
        return [f"{normalise(question)}\0{normalise(context)}" for question, context in _inputs(table)]

    def content(self, table: pa.Table) -> list[tuple[str, ...]]:
        """Question, context and answers."""
        answers = table.column("answers").to_pylist()
        return [(*pair, json.dumps(found)) for pair, found in zip(_inputs(table), answers, strict=True)]

    def strata(self, table: pa.Table) -> list[str]:
        """Whether a question has an answer."""
        return ["answer" if found else "none" for found in table.column("answers").to_pylist()]

    def check(
        self, splits: Mapping[str, pa.Table], data: DataSpec, loc: Loc, *, cut: Collection[str] = ()
    ) -> tuple[str, ...]:
        """As `Task.check`; there are no labels."""
        if not any(splits["train"].column("answers").to_pylist()):
            raise StudyError(
                f"no training question has an answer (column {data.columns.answers!r}): there is nothing to learn",
                (*loc, "columns", "answers"),
            )
        return ()

    def lacks(self, metric: Metric, table: pa.Table) -> str | None:
        """As `Task.lacks`: scores of answerable (unanswerable) questions need one."""
        for prefix, wanted, words in (
            ("has_answer_", "answer", "question with an answer"),
            ("no_answer_", "none", "question without an answer"),
        ):
            if metric.name.startswith(prefix) and wanted not in self.strata(table):
                return words
        return None

    def warnings(self, splits: Mapping[str, pa.Table], labels: Sequence[str]) -> list[str]:
        """Splits whose questions are all answerable, or none of them, where those of train are not."""
        kinds = {split: set(self.strata(table)) for split, table in splits.items()}
        found = []
        for split, kind in kinds.items():
            if "answer" not in kind:
                found.append(f"no question of {split} has an answer")
            elif "none" not in kind and "none" in kinds["train"]:
                found.append(f"{split} has no question without an answer, train has")
            elif "none" in kind and "none" not in kinds["train"]:
                found.append(f"{split} has questions without an answer, train has none")
        return found

    def tokenize(self, table: pa.Table, labels: Sequence[str], how: Tokenization) -> datasets.Dataset:
        """As `Task.tokenize`; one row per window, with the stretch of the context that it shows.

        Raises:
            ValueError: The tokenizer does not say where its tokens stand in the text, or stride leaves no room.
        """
        import datasets

        if not how.tokenizer.is_fast:
            raise ValueError(
                f"{type(how.tokenizer).__name__} does not say where its tokens stand in the text, which extractive "
                "question answering needs: use a model with a fast tokenizer (tokenizer.json)"
            )
        stride = how.max_length // 4 if self.options.stride is None else self.options.stride
        pairs, answers = _inputs(table), table.column("answers").to_pylist()
        most = int(how.max_length * QUESTION_SHARE)
        pairs, shortened = _short_questions(pairs, most, how)
        # Room for the end token of decoders, and for one token at least that a window does not share with the next.
        specials = how.tokenizer.num_special_tokens_to_add(pair=True) + (how.architecture == "decoder")
        if stride >= how.max_length - most - specials:
            raise ValueError(
                f"a stride of {stride} leaves no room for new text in windows of {how.max_length} tokens, half of them "
                "for the question: lower the option stride or raise max_length"
            )
        windows = list(_windows(pairs, how, stride))
        columns: dict[str, list[Any]] = {name: [] for name in ("start", "end", "null", "passage", "first", "last")}
        shown: list[_Window] = []
        whole: set[tuple[int, int]] = set()
        longer = 0
        for window in windows:
            target: tuple[int, int] | None = None
            for number, answer in enumerate(answers[window.example]):
                span = window.span(answer["start"], answer["start"] + len(answer["text"]))
                if span is None:
                    continue
                if (window.example, number) not in whole:
                    whole.add((window.example, number))
                    longer += span[1] - span[0] >= self.options.max_answer_length
                target = span if target is None else target
            if target is None and how.training and not self._keeps(window):
                continue
            shown.append(window)
            start, end = (window.null, window.null) if target is None else target
            passage, first, last = window.passage(pairs[window.example][1])
            for name, value in zip(columns, (start, end, window.null, passage, first, last), strict=True):
                columns[name].append(value)
        total = sum(map(len, answers))
        if longer:
            how.warnings.append(
                f"{longer} of {total} answers are longer than the {self.options.max_answer_length} tokens of "
                "max_answer_length: they cannot be predicted whole"
            )
        if len(whole) < total:
            how.warnings.append(
                f"{total - len(whole)} of {total} answers fit into no window of {how.max_length} tokens: they cannot "
                "be found"
            )
        if len(windows) > len(pairs):
            kept = f", of which {len(shown)} are kept" if len(shown) < len(windows) else ""
            how.warnings.append(f"{len(pairs)} questions make {len(windows)} windows of {how.max_length} tokens{kept}")
        if not shown:
            raise ValueError("no window holds an answer as a whole: raise max_length, or empty_windows above 0")
        if shortened:
            how.warnings.append(f"{shortened} questions are cut off after {most} tokens, half of max_length")
        integers = pa.list_(pa.int32())
        made = {
            "input_ids": pa.array([window.ids for window in shown], integers),
            EXAMPLE: pa.array([window.example for window in shown], pa.int64()),
            "question": pa.array([pairs[window.example][0] for window in shown], pa.large_string()),
            "passage": pa.array(columns["passage"], pa.large_string()),
            "first": pa.array(columns["first"], integers),
            "last": pa.array(columns["last"], integers),
            "start": pa.array(columns["start"], pa.int64()),
            "end": pa.array(columns["end"], pa.int64()),
            "null": pa.array(columns["null"], pa.int64()),
            "answers": pa.array(
                [[answer["text"] for answer in answers[window.example]] for window in shown],
                pa.list_(pa.large_string()),
            ),
        }
        if any(any(window.types) for window in shown):
            made["token_type_ids"] = pa.array([window.types for window in shown], integers)
        return datasets.Dataset(pa.table(made))

    def _keeps(self, window: _Window) -> bool:
        """Whether a training window without an answer is kept: drawn by its content."""
        draw = int.from_bytes(hash_order(str(window.ids), 0)[:8], "big") / 2**64
        return draw < float(self.options.empty_windows)

    def config_kwargs(self, labels: Sequence[str]) -> dict[str, Any]:
        """Two outputs per token: start and end."""
        return {"num_labels": 2, "id2label": {0: "start", 1: "end"}, "label2id": {"start": 0, "end": 1}}

    def collate(self, rows: Mapping[str, Sequence[Any]], pad_token_id: int, *, multiple_of: int = 8) -> dict[str, Any]:
        """As `Task.collate`.

        ``labels`` has shape (rows, 2): first and last token of the answer. ``candidates``, of shape (rows, length), are
        the tokens that may be either; ``null``, of shape (rows,), is the token for "no answer". ``first`` and ``last``
        say where in ``passage`` each token begins and ends.
        """
        import torch

        batch: dict[str, Any] = text_batch(rows, pad_token_id, multiple_of=multiple_of)
        batch["labels"] = torch.tensor([rows["start"], rows["end"]], dtype=torch.int64).T.contiguous()
        batch["null"] = torch.tensor(rows["null"], dtype=torch.int64)
        inside = torch.from_numpy(pad(rows["last"], 0, multiple_of=multiple_of) > 0)
        batch["candidates"] = inside.scatter(1, batch["null"][:, None], True)
        batch |= {name: rows[name] for name in ("passage", "first", "last")}
        return batch

    def losses(self, output: Any, batch: Mapping[str, Any], options: LossOptions | None = None) -> torch.Tensor:
        """Mean cross-entropy of first and last token, over the tokens of the context and that for "no answer".

        Smoothed labels give their share to these tokens alone.
        """
        import torch

        smoothing = options.label_smoothing if options else 0.0
        candidates = batch["candidates"]
        log_probabilities = torch.log_softmax(_logits(output, batch), dim=1)
        right = log_probabilities.gather(1, batch["labels"][:, None, :]).squeeze(1)
        everywhere = log_probabilities.masked_fill(~candidates[..., None], 0.0).sum(1) / candidates.sum(1, keepdim=True)
        losses: torch.Tensor = -((1 - smoothing) * right + smoothing * everywhere).mean(1)
        return losses

    def predict(self, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction) -> list[Any]:
        """For each window its best answer's ``text``, ``start`` (its first character in the passage) and ``score``, and
        the score of "no answer" as ``null``."""
        import torch
        from torch.nn import functional

        logits = _logits(output, batch).detach()
        null = logits.gather(1, batch["null"][:, None, None].expand(-1, 1, 2)).sum((1, 2))
        start, end = logits.scatter(1, batch["null"][:, None, None].expand(-1, 1, 2), -torch.inf).unbind(-1)
        # For each start the best end among itself and the tokens that follow it, as many as an answer may have.
        reach = min(self.options.max_answer_length, end.shape[1])
        best_end, offset = functional.pad(end, (0, reach - 1), value=-torch.inf).unfold(1, reach, 1).max(dim=-1)
        score, begin = (start + best_end).max(dim=1)
        finish = begin + offset.gather(1, begin[:, None]).squeeze(1)
        found = []
        # Numbers of a GPU are read all at once: each reading waits for it.
        spans = torch.stack([begin, finish]).tolist()
        scores = torch.stack([score, null]).tolist()
        for row, (first, last, best, none) in enumerate(zip(*spans, *scores, strict=True)):
            start_at = batch["first"][row][first]
            shown = batch["passage"][row][start_at : batch["last"][row][last]]
            at = start_at + len(shown) - len(shown.lstrip())
            found.append({"text": shown.strip(), "start": at, "score": best, "null": none})
        return found

    def references(self, rows: Mapping[str, Sequence[Any]]) -> list[Any]:
        """The right answers of each row's question; none where it has no answer."""
        return [list(answers) for answers in rows["answers"]]

    @property
    def threshold(self) -> float:
        """ "No answer" is predicted where its score exceeds the best answer's by more than this.

        With a share p of the windows without an answer, a model learns odds of "no answer" that are p times those of
        all windows. The log-odds of its two distributions, of first and last token, are each put right by ln(1 / p):
        prior correction (King and Zeng 2001, doi:10.1093/oxfordjournals.pan.a004868). With p = 0 nothing is known.
        """
        kept = self.options.empty_windows
        return float(self.options.null_threshold) + (2 * math.log(kept) if 0 < kept < 1 else 0.0)

    def merge(self, predictions: list[Any]) -> Any:
        """The best answer of all windows, or the empty text (`threshold`).

        As in BERT's script, "no answer" has the lowest of its scores in the windows.
        """
        best = max(predictions, key=lambda window: window["score"])
        null = min(window["null"] for window in predictions)
        return "" if null - best["score"] > self.threshold else best["text"]

    def score(self, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str]) -> dict[str, float]:
        """`squad_v2_scores`, as shares from 0 to 1.

        Those of answerable (unanswerable) questions are absent where there is no such question.
        """
        check_counts(predictions, references)
        return squad_v2_scores(predictions, references)

    def guesses(
        self, train: Mapping[str, Sequence[Any]], split: Mapping[str, Sequence[Any]], labels: Sequence[str]
    ) -> dict[str, Guess]:
        """ "No answer" always; and the sentence that shares most words with the question."""
        rows: dict[int, list[int]] = {}
        for row, example in enumerate(split[EXAMPLE]):
            rows.setdefault(example, []).append(row)
        nearest = [
            _nearest_sentence(split["question"][own[0]], [split["passage"][row] for row in own])
            for own in rows.values()
        ]
        return {
            "no_answer": Guess("no answer", "every question is called unanswerable", [""] * len(rows)),
            "sentence": Guess(
                "nearest sentence", "the sentence of the context that shares most words with the question", nearest
            ),
        }


@dataclass(frozen=True)
class _Window:
    """A question with a stretch of its context, as tokens.

    Attributes:
        example: Number of the question.
        ids: Tokens.
        types: Which of the texts each token belongs to, for models that are told; or ().
        spans: Where each token of the context stands in it, as (start, end); None for the other tokens.
        null: Position of the token that stands for "no answer".
    """

    example: int
    ids: list[int]
    types: list[int]
    spans: list[tuple[int, int] | None]
    null: int

    def span(self, start: int, end: int) -> tuple[int, int] | None:
        """First and last token of a stretch of the context; None where the window does not show it all."""
        inside = [(position, span) for position, span in enumerate(self.spans) if span is not None]
        if not inside or start < inside[0][1][0] or end > inside[-1][1][1]:
            return None
        touched = [position for position, span in inside if span[1] > start and span[0] < end]
        return (touched[0], touched[-1]) if touched else None

    def passage(self, context: str) -> tuple[str, list[int], list[int]]:
        """The stretch of the context that the window shows, and where in it each token begins and ends; 0 and 0 for
        tokens that are not the context's."""
        inside = [span for span in self.spans if span is not None]
        if not inside:
            return "", [0] * len(self.spans), [0] * len(self.spans)
        begin, end = inside[0][0], inside[-1][1]
        first = [span[0] - begin if span is not None else 0 for span in self.spans]
        last = [span[1] - begin if span is not None else 0 for span in self.spans]
        return context[begin:end], first, last


def _windows(pairs: Sequence[tuple[str, str]], how: Tokenization, stride: int) -> Iterator[_Window]:
    decoder = how.architecture == "decoder"
    closing = how.tokenizer.eos_token_id if how.tokenizer.eos_token_id is not None else how.tokenizer.pad_token_id
    for begin in range(0, len(pairs), TOKENIZE_BATCH):
        batch = pairs[begin : begin + TOKENIZE_BATCH]
        # As `classification.apart`, but the context is cut into windows, and its characters are counted.
        encoded = how.tokenizer(
            [f"{question}{BETWEEN}" if decoder else question for question, _ in batch],
            [context for _, context in batch],
            truncation="only_second",
            max_length=how.max_length - decoder,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=False,
        )
        for number, ids in enumerate(encoded["input_ids"]):
            example = begin + encoded["overflow_to_sample_mapping"][number]
            spans: list[tuple[int, int] | None] = [
                span if sequence == 1 and span[1] > span[0] else None
                for sequence, span in zip(
                    encoded.sequence_ids(number), map(tuple, encoded["offset_mapping"][number]), strict=True
                )
            ]
            types = list(encoded["token_type_ids"][number]) if "token_type_ids" in encoded else []
            if not any(span is not None for span in spans):
                raise ValueError(f"the tokenizer makes no token of the context {pairs[example][1][:40]!r}")
            if decoder:
                yield _Window(example, [*ids, closing], [], [*spans, None], len(ids))
            else:
                # Should the first token be the question's or the context's own, it cannot also be an answer's.
                yield _Window(example, list(ids), types, [None, *spans[1:]], 0)


def _short_questions(
    pairs: Sequence[tuple[str, str]], most: int, how: Tokenization
) -> tuple[list[tuple[str, str]], int]:
    """The pairs with questions of so many tokens at most, and how many were cut."""
    encoded = how.tokenizer(
        [question for question, _ in pairs], add_special_tokens=False, return_offsets_mapping=True, padding=False
    )
    short, cut = [], 0
    # One less than allowed: the line break that decoders need after the question may be a token.
    most -= 1
    for (question, context), offsets in zip(pairs, encoded["offset_mapping"], strict=True):
        if len(offsets) > most:
            cut += 1
            question = question[: offsets[most - 1][1]]
        short.append((question, context))
    return short, cut


def _logits(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Scores of each token as first and last one, of shape (rows, length, 2); -inf where it is no candidate."""
    import torch

    both = output.logits if "logits" in output else torch.stack((output.start_logits, output.end_logits), dim=-1)
    logits: torch.Tensor = both[:, -batch["input_ids"].shape[1] :].float()
    return logits.masked_fill(~batch["candidates"][..., None], -torch.inf)


def _answers(value: Any, context: str) -> list[dict[str, Any]]:
    """One row's answers, checked against its context.

    Raises:
        ValueError: They are of another form, or do not stand where they say.
    """
    form = "expected {text: [...], answer_start: [...]}, with empty lists where there is no answer"
    if isinstance(value, dict):
        found, starts = value.get("text") or [], value.get("answer_start") or []
        if not isinstance(found, list) or not isinstance(starts, list):
            raise ValueError(form)
        if len(found) != len(starts):
            raise ValueError(f"{len(found)} answers and {len(starts)} values of answer_start: each answer needs one")
        pairs = list(zip(found, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(answer, dict) for answer in value):
        pairs = [(answer.get("text"), answer.get("answer_start")) for answer in value]
    elif value is None:
        raise ValueError(f"no answers: {form}")
    else:
        raise ValueError(form)
    answers = []
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"an answer without text: {form}")
        if not isinstance(start, int) or isinstance(start, bool):
            raise ValueError(f"the answer {_brief(text)} begins at {start!r}: answer_start must be a whole number")
        if start < 0 or context[start : start + len(text)] != text:
            elsewhere = context.find(text)
            hint = f"; it stands at {elsewhere}" if elsewhere >= 0 else " or anywhere else in it"
            raise ValueError(f"the answer {_brief(text)} does not stand at character {start} of the context{hint}")
        answers.append({"text": text, "start": start})
    return answers


def _inputs(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table.column("question").to_pylist(), table.column("context").to_pylist(), strict=True))


def _brief(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _nearest_sentence(question: str, passages: Sequence[str]) -> str:
    asked = set(normalise_answer(question).split())
    sentences = [sentence.strip() for passage in passages for sentence in _SENTENCE_END.split(passage)]
    return max(sentences, key=lambda sentence: len(asked & set(normalise_answer(sentence).split())), default="")
