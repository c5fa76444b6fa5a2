"""Reading columns of labelled data: found, of the right kind, and without gaps; or one sentence says what is wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pyarrow as pa

from peftsearch.spec import StudyError, suggest
from peftsearch.spec.yaml_file import Loc


def find(table: pa.Table, name: str, where: str, loc: Loc) -> pa.ChunkedArray:
    """A column by name; dictionary-encoded ones are unfolded.

    Raises:
        StudyError: There is no such column.
    """
    if name not in table.column_names:
        close = suggest(name, table.column_names)
        listed = ", ".join(table.column_names)
        hint = f"{close} (its columns: {listed})" if close.startswith("; did you mean") else f"; its columns: {listed}"
        raise StudyError(f"{where} has no column {name!r}{hint}", loc)
    column = table.column(name)
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def texts(column: pa.ChunkedArray, name: str, where: str, loc: Loc) -> pa.ChunkedArray:
    """A column of texts, none of them blank.

    Raises:
        StudyError: It holds something else, or nothing in some rows.
    """
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if not is_text(column.type):
        raise StudyError(
            f"column {name!r} of {where} holds no texts but {kind_of(column.type)}: map another column", loc
        )
    column = column.cast(pa.large_string())
    blank = [value is None or not value.strip() for value in column.to_pylist()]
    refuse(blank, f"column {name!r} of {where} holds no text", loc)
    return column


def refuse(bad: Sequence[bool], message: str, loc: Loc, advice: str = "fill it in or drop the row") -> None:
    """Raise StudyError if any row is bad, naming how many and the first."""
    count = sum(bad)
    if count:
        first = bad.index(True) + 1
        rows = f"in row {first}" if count == 1 else f"in {count} of {len(bad)} rows, first in row {first}"
        raise StudyError(f"{message} {rows}: {advice}{'s' if count != 1 and advice.endswith('row') else ''}", loc)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of that type holds texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of that type holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def kind_of(kind: pa.DataType) -> str:
    """A column's type in a reader's words."""
    if pa.types.is_boolean(kind):
        return "true/false"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "numbers"
    if pa.types.is_nested(kind):
        return "objects" if pa.types.is_struct(kind) or pa.types.is_map(kind) else "lists"
    return f"values of type {kind}" if not is_text(kind) else "texts"


def listed(labels: Sequence[str]) -> str:
    """Some names for a sentence: five at most, and how many more."""
    shown = ", ".join(repr(label) for label in labels[:5])
    return shown if len(labels) <= 5 else f"{shown} and {len(labels) - 5} more labels"


def refuse_untrained(counts: Mapping[str, Mapping[str, int]], known: Collection[str], loc: Loc) -> None:
    """Raise StudyError if a split has a label that is not known from train.

    Args:
        counts: How often each label occurs, by split.
        known: The labels that a model can learn.
        loc: The place in the study file that maps the labels.
    """
    for split, found in counts.items():
        for label in sorted(set(found) - set(known)):
            rows = f"{found[label]} row{'s' if found[label] != 1 else ''}"
            raise StudyError(
                f"the label {label!r} stands in {rows} of {split} but never in train{suggest(label, known)}", loc
            )


def in_order(labels: set[str]) -> tuple[str, ...]:
    """Labels sorted as texts, or as numbers where all are whole numbers."""
    if all(label.lstrip("-").isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))
