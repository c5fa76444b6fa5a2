"""Token classification: a tag for each word, above all the names of things (entities) in a sentence."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from peftsearch.domains.iob import LINE, TagError, entities, to_iob2
from peftsearch.domains.splits import normalise
from peftsearch.domains.tasks.base import (
    Guess,
    Head,
    LabelOptions,
    LossOptions,
    Metric,
    Prediction,
    Task,
    Tokenization,
    check_counts,
    text_batch,
)
from peftsearch.domains.tasks.columns import find, is_list, is_text, kind_of, listed, refuse
from peftsearch.spec import DataSpec, StudyError, suggest
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets
    import torch
    from torch import nn

# Sentences that are handed to the tokenizer at once.
TOKENIZE_BATCH = 1000
IGNORED = -100
"""The label of positions that no loss looks at: torch's own convention."""
LOST = -1
"""The position of a word that no token stands for."""
OUTSIDE = 0
"""The number of the tag ``O``."""


class TokenClassificationOptions(LabelOptions):
    """Settings of token classification."""

    repair: bool = Field(
        default=False,
        description="Read a tag I-TYPE that continues nothing as the first word of an entity (with a warning that "
        "counts them), instead of refusing it",
    )
    piece: Literal["first", "last"] | None = Field(
        default=None,
        description="Which piece of a word carries its tag: the first, or the last; where absent the first, but for "
        "decoders the last, before which they have not read the word",
    )


class TokenClassification(Task):
    """A tag for each word.

    Labels are the tags in IOB2: ``O``, then ``B-TYPE`` and ``I-TYPE`` for each type in order. References and
    predictions are their numbers, one for each word of the sentence as the data has it.
    """

    name: ClassVar[str] = "token_classification"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "entity_f1": Metric("entity_f1", "maximize"),
        "precision": Metric("precision", "maximize"),
        "recall": Metric("recall", "maximize"),
        "entity_macro_f1": Metric("entity_macro_f1", "maximize"),
        "strict_f1": Metric("strict_f1", "maximize"),
        "word_macro_f1": Metric("word_macro_f1", "maximize"),
        "token_accuracy": Metric("token_accuracy", "maximize"),
    }
    label_metrics: ClassVar[Mapping[str, Metric]] = {
        "f1": Metric("f1", "maximize"),
        "precision": Metric("precision", "maximize"),
        "recall": Metric("recall", "maximize"),
    }
    Options = TokenClassificationOptions
    loss_options: ClassVar[frozenset[str]] = frozenset({"label_smoothing", "class_weights"})
    heads = dict.fromkeys(
        ("encoder", "encoder-decoder", "decoder"), Head("AutoModelForTokenClassification", "TOKEN_CLS")
    )
    hidden = frozenset({"labels", "positions"})
    probe = "token"
    formats: ClassVar[Mapping[str, str]] = {".tsv": "iob", ".txt": "iob"}

    def columns(self, data: DataSpec) -> tuple[str, ...]:
        """Words and tags."""
        return (data.columns.tokens, data.columns.tags)

    def read(self, table: pa.Table, data: DataSpec, where: str, loc: Loc) -> pa.Table:
        """As `Task.read`: words stay as they are, tags become IOB2; ``repaired`` counts the tags that were broken."""
        if table.num_rows == 0:
            raise StudyError(f"{where} holds no sentences", loc)
        words_name, tags_name = self.columns(data)
        words_loc, tags_loc = (*loc, "columns", "tokens"), (*loc, "columns", "tags")
        if words_name == tags_name:
            raise StudyError(f"the column {words_name!r} cannot be both words and tags", tags_loc)
        words = _lists(find(table, words_name, where, words_loc), words_name, where, words_loc, "words")
        tags = _lists(find(table, tags_name, where, tags_loc), tags_name, where, tags_loc, "tags")
        refuse([not sentence for sentence in words], f"column {words_name!r} of {where} holds no words", words_loc)
        lines = table.column(LINE).to_pylist() if LINE in table.column_names else None

        def spot(row: int, word: int) -> str:
            return f"{where}, line {lines[row] + word}" if lines else f"{where}, row {row + 1}, word {word + 1}"

        for row, (sentence, its_tags) in enumerate(zip(words, tags, strict=True)):
            if len(sentence) != len(its_tags):
                raise StudyError(
                    f"{where}, row {row + 1}: {len(sentence)} words in {words_name!r} but {len(its_tags)} tags in "
                    f"{tags_name!r}: each word needs one tag",
                    tags_loc,
                )
        try:
            found = to_iob2(tags, repair=self.options.repair)
        except TagError as error:
            advice = ""
            if error.broken:
                advice = ": correct it, or set 'repair: true' under the domain's options to read it as conlleval does"
            word = words[error.sentence][error.word]
            raise StudyError(
                f"{spot(error.sentence, error.word)}: {error} at the word {word!r}{advice}", loc if lines else tags_loc
            ) from None
        lists = pa.list_(pa.large_string())
        return pa.table(
            {
                "tokens": pa.array(words, lists),
                "tags": pa.array(found.tags, lists),
                "repaired": pa.array(found.repaired, pa.int64()),
            }
        )

    def keys(self, table: pa.Table) -> list[str]:
        """The normalised sentence."""
        return [normalise(" ".join(words)) for words in table.column("tokens").to_pylist()]

    def content(self, table: pa.Table) -> list[tuple[str, ...]]:
        """The words, then the tags."""
        return [
            (*words, *tags)
            for words, tags in zip(table.column("tokens").to_pylist(), table.column("tags").to_pylist(), strict=True)
        ]

    def strata(self, table: pa.Table) -> list[str] | None:
        """The rarest type of each sentence, so that every split sees every type."""
        counts = Counter(kind for tags in table.column("tags").to_pylist() for kind, _, _ in entities(tags))
        return [
            min((kind for kind, _, _ in entities(tags)), key=lambda kind: (counts[kind], kind), default="")
            for tags in table.column("tags").to_pylist()
        ]

    def check(
        self, splits: Mapping[str, pa.Table], data: DataSpec, loc: Loc, *, cut: Collection[str] = ()
    ) -> tuple[str, ...]:
        """As `Task.check`; the labels are the tags of the types that occur."""
        counts = {split: _type_counts(table) for split, table in splits.items()}
        place = (*loc, "columns", "tags")
        known = set(counts["train"]).union(*(counts[split] for split in cut if split in counts))
        if not known:
            raise StudyError(
                "no word of train is tagged as part of an entity (all tags are O): there is nothing to learn", place
            )
        for split, found in counts.items():
            for kind in sorted(set(found) - known):
                number = f"{found[kind]} entit{'ies' if found[kind] != 1 else 'y'}"
                raise StudyError(
                    f"the type {kind!r} has {number} in {split} but none in train{suggest(kind, known)}", place
                )
        return ("O", *(f"{prefix}-{kind}" for kind in sorted(known) for prefix in "BI"))

    def warnings(self, splits: Mapping[str, pa.Table], labels: Sequence[str]) -> list[str]:
        """Types that a split lacks, and tags that were repaired."""
        found = []
        for split, table in splits.items():
            counts = _type_counts(table)
            missing = [kind for kind in _types(labels) if kind not in counts]
            if missing:
                found.append(f"{split} has no entity of {listed(missing)}")
            repaired = table.column("repaired").to_pylist()
            if any(repaired):
                sentences = sum(count > 0 for count in repaired)
                found.append(
                    f"{sum(repaired)} tags in {sentences} sentences of {split} stood in a wrong place and were read as "
                    "conlleval does (options.repair)"
                )
        return found

    def tokenize(self, table: pa.Table, labels: Sequence[str], how: Tokenization) -> datasets.Dataset:
        """As `Task.tokenize`.

        The words are joined by blanks and tokenised as a text, so that pieces are what the model knows from its own
        training, whatever its tokenizer makes of blanks; offsets say which piece belongs to which word. Columns:
        ``positions``, for each word the index of the piece that carries its tag, or `LOST`; ``tags``, the number of
        each word's tag, of lost ones too; ``words``.
        """
        import datasets

        if not how.tokenizer.is_fast:
            raise ValueError(
                f"{type(how.tokenizer).__name__} does not say which piece belongs to which word: token classification "
                "needs a fast tokenizer (one with a tokenizer.json)"
            )
        piece = self.options.piece or ("last" if how.architecture == "decoder" else "first")
        words = table.column("tokens").to_pylist()
        tags = table.column("tags").to_pylist()
        ids: list[list[int]] = []
        positions: list[list[int]] = []
        for start in range(0, len(words), TOKENIZE_BATCH):
            for sentence in _pieces(words[start : start + TOKENIZE_BATCH], how, piece):
                ids.append(sentence[0])
                positions.append(sentence[1])
        _warn_of_losses(tags, positions, how)
        number = {tag: index for index, tag in enumerate(labels)}
        numbers = pa.list_(pa.int32())
        return datasets.Dataset(
            pa.table(
                {
                    "input_ids": pa.array(ids, numbers),
                    "positions": pa.array(positions, numbers),
                    "tags": pa.array([[number[tag] for tag in sentence] for sentence in tags], numbers),
                    "words": pa.array(words, pa.list_(pa.large_string())),
                }
            )
        )

    def config_kwargs(self, labels: Sequence[str]) -> dict[str, Any]:
        """``num_labels``, ``id2label`` and ``label2id``."""
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
        }

    def collate(self, rows: Mapping[str, Sequence[Any]], pad_token_id: int, *, multiple_of: int = 8) -> dict[str, Any]:
        """As `Task.collate`; ``labels`` has the shape of ``input_ids``, with `IGNORED` where no word's tag is carried.

        ``positions`` are the rows' own, as lists.
        """
        import torch

        batch: dict[str, Any] = text_batch(rows, pad_token_id, multiple_of=multiple_of)
        labels = np.full(tuple(batch["input_ids"].shape), IGNORED, dtype=np.int64)
        for row, (positions, tags) in enumerate(zip(rows["positions"], rows["tags"], strict=True)):
            places, numbers = np.asarray(positions), np.asarray(tags)
            kept = places != LOST
            labels[row, places[kept]] = numbers[kept]
        batch["labels"] = torch.from_numpy(labels)
        batch["positions"] = [list(positions) for positions in rows["positions"]]
        return batch

    def losses(self, output: Any, batch: Mapping[str, Any], options: LossOptions | None = None) -> torch.Tensor:
        """Cross-entropy of each sentence: the mean over its words; 0 for a sentence whose words are all lost."""
        from torch.nn import functional

        options = options or LossOptions()
        labels = batch["labels"]
        logits = output.logits[:, -labels.shape[1] :].float()
        each = functional.cross_entropy(
            logits.transpose(1, 2),
            labels,
            reduction="none",
            ignore_index=IGNORED,
            weight=options.class_weights,
            label_smoothing=options.label_smoothing,
        )
        found: torch.Tensor = each.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)
        return found

    def predict(self, model: nn.Module, output: Any, batch: Mapping[str, Any], how: Prediction) -> list[Any]:
        """The number of the most likely tag of each word; ``O`` for words that the model did not see."""
        width = batch["input_ids"].shape[1]
        best = output.logits[:, -width:].detach().argmax(dim=-1).tolist()
        return [
            [OUTSIDE if place == LOST else row[place] for place in positions]
            for row, positions in zip(best, batch["positions"], strict=True)
        ]

    def references(self, rows: Mapping[str, Sequence[Any]]) -> list[Any]:
        """The number of the true tag of each word, whether the model sees it or not."""
        return [list(map(int, tags)) for tags in rows["tags"]]

    def score(self, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str]) -> dict[str, float]:
        """Scores of entities (exact words and type) and of words.

        ``entity_f1``, ``precision`` and ``recall`` are micro averages by seqeval in its default mode, which is
        conlleval's: a predicted ``I-TYPE`` that continues nothing starts an entity. ``strict_f1`` is that of seqeval's
        strict mode with IOB2, to which it is none. ``entity_macro_f1`` is the mean over the types that occur.
        ``word_macro_f1`` takes each word by its type, B and I alike, and is the mean of the F1 of the types that occur,
        O not among them (EBM PICO in BLURB). ``token_accuracy`` counts words, O among them.
        """
        check_counts(predictions, references)
        predicted = [[labels[number] for number in row] for row in predictions]
        actual = [[labels[number] for number in row] for row in references]
        kinds = _types(labels)
        ours, theirs = _conlleval_entities(predicted), _conlleval_entities(actual)
        counts = {
            kind: (len(ours[kind] & theirs[kind]), len(ours[kind]), len(theirs[kind]))
            for kind in kinds
            if ours[kind] or theirs[kind]
        }
        right, guessed, wanted = (sum(count[place] for count in counts.values()) for place in range(3))
        f1 = {kind: _ratio(2 * count[0], count[1] + count[2]) for kind, count in counts.items()}
        scores = {
            "entity_f1": _ratio(2 * right, guessed + wanted),
            "precision": _ratio(right, guessed),
            "recall": _ratio(right, wanted),
            "entity_macro_f1": float(np.mean(list(f1.values()))) if f1 else 0.0,
            "strict_f1": _strict_f1(predicted, actual),
            **_word_scores(predictions, references, labels),
        }
        for kind in kinds:
            its_right, its_guessed, its_wanted = counts.get(kind, (0, 0, 0))
            scores[f"f1/{kind}"] = f1.get(kind, 0.0)
            scores[f"precision/{kind}"] = _ratio(its_right, its_guessed)
            scores[f"recall/{kind}"] = _ratio(its_right, its_wanted)
        return scores

    def class_counts(self, rows: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> list[int] | None:
        """Words with each tag."""
        numbers = [number for tags in rows["tags"] for number in tags]
        return list(np.bincount(numbers, minlength=len(labels)).tolist())

    def metric_labels(self, labels: Sequence[str]) -> Sequence[str]:
        """The types of entities."""
        return _types(labels)

    def guesses(
        self, train: Mapping[str, Sequence[Any]], split: Mapping[str, Sequence[Any]], labels: Sequence[str]
    ) -> dict[str, Guess]:
        """No entity at all; and each word's most frequent tag in train, where it never stands as O else."""
        seen: dict[str, Counter[int]] = {}
        for words, tags in zip(train["words"], train["tags"], strict=True):
            for word, tag in zip(words, tags, strict=True):
                seen.setdefault(word, Counter())[int(tag)] += 1
        lexicon = {word: min(counts, key=lambda tag: (-counts[tag], tag)) for word, counts in seen.items()}
        starts = {number: labels.index("B-" + tag[2:]) for number, tag in enumerate(labels) if tag != "O"}
        recalled = []
        for words in split["words"]:
            tags = [lexicon.get(word, OUTSIDE) for word in words]
            before = [OUTSIDE, *tags]
            # An I- that continues nothing starts an entity.
            recalled.append(
                [
                    tag if tag == OUTSIDE or starts.get(last) == starts[tag] else starts[tag]
                    for last, tag in zip(before, tags, strict=False)
                ]
            )
        nothing = [[OUTSIDE] * len(words) for words in split["words"]]
        return {
            "majority": Guess("no entities", "every word is O", nothing),
            "lexicon": Guess("lexicon", "each word gets its most frequent tag in train", recalled),
        }

    def probes(self) -> list[tuple[str, Any]]:
        """Logistic regressions on standardised features."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        return [
            (f"C = {c:g}", make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=100, random_state=0)))
            for c in (0.01, 1.0)
        ]


def _lists(column: pa.ChunkedArray, name: str, where: str, loc: Loc, what: str) -> list[list[str]]:
    """A column of lists of texts."""
    kind = column.type
    if not is_list(kind):
        found = "texts" if is_text(kind) else "nothing" if pa.types.is_null(kind) else kind_of(kind)
        raise StudyError(
            f"column {name!r} of {where} holds {found}: token classification needs a list of {what} in each row, or "
            "files with 'format: iob'",
            loc,
        )
    values = column.to_pylist()
    refuse([value is None for value in values], f"column {name!r} of {where} holds no list", loc)
    inner = kind.value_type
    if pa.types.is_integer(inner) and what == "tags":
        raise StudyError(
            f"column {name!r} of {where} holds lists of numbers without names: write the tags as texts (B-TYPE, "
            "I-TYPE, O), or as class labels of the datasets library",
            loc,
        )
    if not is_text(inner) and any(values):
        raise StudyError(f"column {name!r} of {where} holds lists of {kind_of(inner)}, not of {what}", loc)
    for row, value in enumerate(values, 1):
        for position, item in enumerate(value, 1):
            if not item:
                raise StudyError(
                    f"column {name!r} of {where} holds an empty {what[:-1]} in row {row}, position {position}", loc
                )
    return list(values)


def _type_counts(table: pa.Table) -> Counter[str]:
    return Counter(kind for tags in table.column("tags").to_pylist() for kind, _, _ in entities(tags))


def _types(labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(label[2:] for label in labels if label.startswith("B-"))


def _pieces(sentences: Sequence[Sequence[str]], how: Tokenization, piece: str) -> list[tuple[list[int], list[int]]]:
    """Token ids and the position of each word, for some sentences."""
    found = _aligned(sentences, how, piece)
    unknown = how.tokenizer.unk_token
    for row, (words, (_, positions, seen)) in enumerate(zip(sentences, found, strict=True)):
        # Words of nothing but control characters or rare blanks leave no piece in some tokenizers; the model should see
        # that there is a word.
        vanished = [index for index, place in enumerate(positions[:seen]) if place == LOST]
        if vanished and unknown is not None:
            replaced = [unknown if index in vanished else word for index, word in enumerate(words)]
            found[row] = _aligned([replaced], how, piece)[0]
    for words, (ids, _, _) in zip(sentences, found, strict=True):
        if not ids:
            raise ValueError(f"the tokenizer makes no token of the sentence {' '.join(words)!r}")
    return [(ids, positions) for ids, positions, _ in found]


def _aligned(
    sentences: Sequence[Sequence[str]], how: Tokenization, piece: str
) -> list[tuple[list[int], list[int], int]]:
    """Token ids, the position of each word (or `LOST`), and how many words were not cut off."""
    texts = [" ".join(words) for words in sentences]
    encoded = how.tokenizer(
        texts, truncation=True, max_length=how.max_length, padding=False, return_offsets_mapping=True
    )
    found = []
    for text, words, ids, offsets in zip(
        texts, sentences, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        word_of: list[int] = [index for index, word in enumerate(words) for _ in range(len(word) + 1)]
        pieces: list[list[int]] = [[] for _ in words]
        for position, (start, end) in enumerate(offsets):
            # Some tokenizers count the blank in front as part of a piece; tokens that mark a text's end span nothing.
            while start < end and text[start] == " ":
                start += 1
            if start < end:
                pieces[word_of[start]].append(position)
        pick = 0 if piece == "first" else -1
        positions = [places[pick] if places else LOST for places in pieces]
        last = max((index for index, places in enumerate(pieces) if places), default=-1)
        found.append((list(ids), positions, last + 1 if len(ids) >= how.max_length else len(words)))
    return found


def _warn_of_losses(tags: Sequence[Sequence[str]], positions: Sequence[Sequence[int]], how: Tokenization) -> None:
    cut = lost = total = 0
    for sentence, places in zip(tags, positions, strict=True):
        its_entities = entities(sentence)
        total += len(its_entities)
        if LOST not in places:
            continue
        cut += 1
        lost += sum(LOST in places[start:end] for _, start, end in its_entities)
    if cut:
        how.warnings.append(
            f"{cut} of {len(tags)} sentences do not fit into the {how.max_length} tokens of max_length: {lost} of "
            f"{total} "
            + ("entities are lost or cut" + (" and not learned" if how.training else " and count as missed"))
        )


def _conlleval_entities(sentences: list[list[str]]) -> dict[str, set[tuple[int, int]]]:
    """First and last word of the entities of each type, by seqeval; words are counted through all sentences."""
    from seqeval.metrics.sequence_labeling import get_entities

    found: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for kind, start, end in get_entities(sentences):
        found[kind].add((start, end))
    return found


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def _strict_f1(predicted: Sequence[Sequence[str]], actual: Sequence[Sequence[str]]) -> float:
    correct = guessed = wanted = 0
    for ours, theirs in zip(predicted, actual, strict=True):
        found, expected = set(entities(ours)), set(entities(theirs))
        correct += len(found & expected)
        guessed += len(found)
        wanted += len(expected)
    return _ratio(2 * correct, guessed + wanted)


def _word_scores(
    predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]], labels: Sequence[str]
) -> dict[str, float]:
    kinds = {kind: number for number, kind in enumerate(_types(labels), 1)}
    kind_of_tag = np.array([kinds.get(label[2:], 0) for label in labels])
    ours = np.array([number for row in predictions for number in row], dtype=np.int64)
    theirs = np.array([number for row in references for number in row], dtype=np.int64)
    predicted, actual = kind_of_tag[ours], kind_of_tag[theirs]
    f1 = []
    for kind in sorted(set(kinds.values())):
        guessed, wanted = predicted == kind, actual == kind
        if guessed.any() or wanted.any():
            f1.append(2 * float((guessed & wanted).sum()) / float(guessed.sum() + wanted.sum()))
    return {
        "word_macro_f1": float(np.mean(f1)) if f1 else 0.0,
        "token_accuracy": float((ours == theirs).mean()) if len(ours) else 0.0,
    }
