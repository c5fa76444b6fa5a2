"""IOB files and tags: one word and its tag per line, a blank line after each sentence, as in the CoNLL shared tasks.

Tags say which words make up an entity. Four ways of writing them are read, and all become IOB2 (each entity starts with
``B-TYPE``, its other words are ``I-TYPE``, everything else is ``O``):

- IOB2 itself;
- IOB1, where an entity starts with ``I-TYPE`` too, unless one of the same type ends right before it;
- BIOES (and BILOU, the same with other letters), where ``E`` ends an entity of several words and ``S`` is one of one;
- bare ``B``, ``I``, ``O`` without types, which get the type ``ENTITY``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from peftsearch.spec import StudyError

LINE = "iob_line"
"""The column of a table from `read_iob` that holds the number of each sentence's first line."""
DOCUMENT = "document"
"""The column that numbers the documents of a file with ``-DOCSTART-`` lines; good for ``split.group``."""
UNTYPED = "ENTITY"
"""The type of entities whose tags name none."""

_DOCUMENT_START = "-DOCSTART-"
# Words of a file without a blank line from which that is a mistake.
_LONGEST_FILE = 500
_TAG = re.compile(r"([BIESLU])(?:-(.+))?")
_SINGLE = frozenset("SU")
_LAST = frozenset("EL")


def read_iob(path: Path, tokens: str, tags: str) -> pa.Table:
    """The sentences of a file: the first column of each line is the word, the last its tag.

    Fields are separated by tabs where a line has any, by blanks otherwise. ``-DOCSTART-`` lines end a sentence and
    start a document.

    Args:
        path: The file, in UTF-8.
        tokens: Name of the column of words in the result.
        tags: Name of the column of tags.

    Returns:
        Those two columns (lists of texts), `LINE`, and `DOCUMENT` where the file marks documents.

    Raises:
        StudyError: A line without a tag or a word, or a long file without a blank line; the message continues the
            file's name.
    """
    sentences: list[tuple[list[str], list[str], int, str]] = []
    words: list[str] = []
    marks: list[str] = []
    first = documents = 0

    def finish() -> None:
        if words:
            sentences.append((words.copy(), marks.copy(), first, f"{path.name} {documents}"))
            words.clear()
            marks.clear()

    # Words may hold characters that other readers take for line breaks (U+0085, U+2028).
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, raw in enumerate(file, 1):
            line = raw.rstrip("\r\n")
            if not line.strip():
                finish()
                continue
            fields = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
            if fields[0] == _DOCUMENT_START:
                finish()
                documents += 1
                continue
            tag = fields[-1].strip()
            if len(fields) < 2 or not tag:
                raise StudyError(
                    f", line {number}: the word {fields[0][:60]!r} has no tag: expected a word, a tab and a tag"
                )
            if not fields[0]:
                raise StudyError(f", line {number}: the tag {tag[:60]!r} has no word in front of it")
            if not words:
                first = number
            words.append(fields[0])
            marks.append(tag)
    finish()
    if len(sentences) == 1 and len(sentences[0][0]) > _LONGEST_FILE:
        count = len(sentences[0][0])
        raise StudyError(f" is one sentence of {count:,} words: end each sentence with a blank line")
    lists = pa.list_(pa.string())
    columns = {
        tokens: pa.array([sentence[0] for sentence in sentences], lists),
        tags: pa.array([sentence[1] for sentence in sentences], lists),
        LINE: pa.array([sentence[2] for sentence in sentences], pa.int64()),
    }
    if documents:
        columns[DOCUMENT] = pa.array([sentence[3] for sentence in sentences], pa.string())
    return pa.table(columns)


class TagError(ValueError):
    """A tag that cannot be read as it stands.

    Attributes:
        sentence: Position of its sentence.
        word: Position of its word in the sentence.
        broken: Whether it is a good tag in a wrong place, which `to_iob2` can repair.
    """

    def __init__(self, message: str, sentence: int, word: int, broken: bool) -> None:
        super().__init__(message)
        self.sentence = sentence
        self.word = word
        self.broken = broken


@dataclass(frozen=True)
class Normalised:
    """Sentences in IOB2.

    Attributes:
        tags: Of each sentence.
        repaired: How many tags of each sentence were in a wrong place.
    """

    tags: list[list[str]]
    repaired: list[int]


def to_iob2(sentences: Sequence[Sequence[str]], *, repair: bool = False) -> Normalised:
    """Tags of a corpus in any of the schemes above, in IOB2.

    The scheme is told from the tags: any of E, S, L, U makes it BIOES. Of the others it is IOB1 if entities start with
    ``I-`` and none starts with ``B-`` except right after another of its type; with both kinds of starts it is IOB2
    with mistakes.

    Args:
        sentences: The tags of each sentence.
        repair: Read an ``I-`` that continues nothing as the first word of an entity, as conlleval does, rather than
            refuse it.

    Raises:
        TagError: A tag that is none, or one in a wrong place.
    """
    parsed = [
        [_parse(tag, number, word) for word, tag in enumerate(sentence)] for number, sentence in enumerate(sentences)
    ]
    bioes = any(letter in "ESLU" for sentence in parsed for letter, _ in sentence)
    if not bioes and _is_iob1(parsed):
        return Normalised([_from_iob1(sentence) for sentence in parsed], [0] * len(parsed))
    tags, repaired = [], []
    for number, sentence in enumerate(parsed):
        found, wrong = _checked(sentence, sentences[number], number, bioes, repair)
        tags.append(found)
        repaired.append(wrong)
    return Normalised(tags, repaired)


def _parse(tag: str, sentence: int, word: int) -> tuple[str, str]:
    if tag == "O":
        return "O", ""
    match = _TAG.fullmatch(tag)
    if match is None:
        raise TagError(
            f"the tag {tag!r} is none of O, B-TYPE and I-TYPE (or E-TYPE, S-TYPE)", sentence, word, broken=False
        )
    return match[1], match[2] or UNTYPED


def _is_iob1(sentences: Sequence[Sequence[tuple[str, str]]]) -> bool:
    starts = False
    for sentence in sentences:
        before = ""
        for letter, kind in sentence:
            if letter == "B" and before != kind:
                return False
            starts |= letter == "I" and before != kind
            before = kind
    return starts


def _from_iob1(sentence: Sequence[tuple[str, str]]) -> list[str]:
    tags, before = [], ""
    for letter, kind in sentence:
        if letter == "O":
            tags.append("O")
        else:
            tags.append(f"{'I' if letter == 'I' and before == kind else 'B'}-{kind}")
        before = kind
    return tags


def _checked(
    sentence: Sequence[tuple[str, str]], written: Sequence[str], number: int, bioes: bool, repair: bool
) -> tuple[list[str], int]:
    """A sentence in IOB2, and how many of its tags were in a wrong place."""
    tags: list[str] = []
    repaired = 0
    # The type of the entity that the next word may continue; and whether it must, as BIOES says where entities end.
    entity, unfinished = "", False
    for word, (letter, kind) in enumerate(sentence):
        inside = letter == "I" or letter in _LAST
        if inside and entity != kind:
            if not repair:
                before = f"the tag before is {written[word - 1]!r}" if word else "it is the first of its sentence"
                raise TagError(f"the tag {written[word]!r} continues no entity ({before})", number, word, broken=True)
            repaired += 1
        elif unfinished and not inside:
            if not repair:
                raise TagError(
                    f"the tag {written[word - 1]!r} is not followed by the rest of its entity but by {written[word]!r}",
                    number,
                    word - 1,
                    broken=True,
                )
            repaired += 1
        tags.append("O" if letter == "O" else f"{'I' if inside and entity == kind else 'B'}-{kind}")
        entity = "" if letter in _LAST or letter in _SINGLE else kind
        unfinished = bioes and bool(entity)
    if unfinished:
        if not repair:
            raise TagError(
                f"the tag {written[-1]!r} is not followed by the rest of its entity (the sentence ends)",
                number,
                len(sentence) - 1,
                broken=True,
            )
        repaired += 1
    return tags, repaired


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Type, first word, and word after the last, of each entity of a sentence in IOB2.

    An ``I-TYPE`` that continues nothing belongs to no entity.
    """
    found: list[tuple[str, int, int]] = []
    kind, start = "", 0
    for position, tag in enumerate([*tags, "O"]):
        if kind and tag != f"I-{kind}":
            found.append((kind, start, position))
            kind = ""
        if tag.startswith("B-"):
            kind, start = tag[2:], position
    return found
