"""What a report is made of before it becomes Markdown or a page: headings, sentences, tables and pictures.

Texts are plain: whoever writes them out escapes them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftsearch.frontier.tables import csv_cell


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or 3."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list; each item has a lead in bold (or an empty one) and a sentence."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        caption: What it shows.
        head: Titles of the columns.
        rows: As texts.
        words: How many columns from the left hold words and not numbers.
        best: Cells (row, column) to stand out.
        notes: Footnotes.
        folded: Long enough to be opened only by who wants it; Markdown then names the CSV file instead.
        source: The CSV file with the same content, unrounded.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    best: frozenset[tuple[int, int]] = frozenset()
    notes: Sequence[str] = ()
    folded: bool = False
    source: str | None = None


@dataclass(frozen=True)
class Figure:
    """A picture with its table.

    Attributes:
        name: Of its PNG file, without the ending.
        title: One line that says what is to be seen.
        png: For Markdown and for slides, on white.
        svg: The same for the page, in the page's colours.
        table: The numbers behind it.
    """

    name: str
    title: str
    png: bytes
    svg: str
    table: Table


Block = Heading | Text | Points | Table | Figure


@dataclass
class Document:
    """A report.

    Attributes:
        title: Of the whole.
        blocks: From top to bottom.
        data: Rows of each CSV file by the file's name; all rows of a file have the same keys.
        files: Further files by name.
    """

    title: str
    blocks: list[Block] = field(default_factory=list)
    data: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def add(self, *blocks: Block) -> None:
        """Append blocks."""
        self.blocks += blocks

    def record(self, file: str, **row: Any) -> None:
        """Append a row to a CSV file."""
        self.data.setdefault(file, []).append(row)


def csv_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV (UTF-8, with a header); missing values and numbers that are none are empty."""
    out = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.writer(out)
    writer.writerow([csv_cell(name) for name in names])
    for row in rows:
        writer.writerow([csv_cell(row.get(name)) for name in names])
    return out.getvalue().encode("utf-8", "replace")
