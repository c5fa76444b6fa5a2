"""Tables of people, read in parts and written with further columns: CSV, JSON Lines and Parquet, by their suffix.

A file is read twice, first to check and count its rows: what is wrong with the last one is said before a model works
for an hour. Neither pass holds more than some rows in memory.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from peftsearch.spec import StudyError, first_line

SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}


def format_of(path: Path, what: str) -> str:
    """``csv``, ``jsonl`` or ``parquet``.

    Args:
        path: The file.
        what: What to call it in the error, for example ``--input``.

    Raises:
        StudyError: Its suffix is none of theirs.
    """
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise StudyError(f"{what} {path.name!r} must end in .csv, .jsonl or .parquet, which says what it is")
    return kind


class TableFile(ABC):
    """A table on disk whose rows are read in order.

    Args:
        path: The file.

    Raises:
        StudyError: There is no such file, or it is damaged.

    Attributes:
        names: Its columns, in order.
        rows: How many rows it has.
    """

    def __init__(self, path: Path) -> None:
        if not os.path.isfile(path):
            raise StudyError(f"no file {str(path)!r}: check --input")
        self.path = path
        self.names: list[str] = []
        self.rows = 0
        with self._readable():
            self._scan()

    def parts(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """The rows, so many at a time.

        Raises:
            StudyError: The file has changed meanwhile, or cannot be read.
        """
        with self._readable():
            yield from self._parts(size)

    @abstractmethod
    def schema(self) -> pa.Schema:
        """The columns as Parquet would hold them.

        Raises:
            StudyError: A column mixes kinds of values, or holds broken Unicode.
        """

    @abstractmethod
    def _scan(self) -> None: ...

    @abstractmethod
    def _parts(self, size: int) -> Iterator[list[dict[str, Any]]]: ...

    def _check_names(self) -> None:
        """See that no column is there twice: a row, by column, would lose one of them."""
        for name in self.names:
            if self.names.count(name) > 1:
                raise StudyError(f"the header of {self.path.name} names the column {name[:60]!r} twice")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            raise StudyError(f"{self.path.name} is not UTF-8 text (byte {error.object[error.start]:#04x})") from None
        except (OSError, pa.ArrowException, csv.Error, RecursionError) as error:
            raise StudyError(f"cannot read {self.path.name}: {first_line(error)}") from None


def open_table(path: Path) -> TableFile:
    """A table by its suffix; errors as `TableFile` and `format_of`."""
    readers: dict[str, type[TableFile]] = {"csv": _Csv, "jsonl": _JsonLines, "parquet": _Parquet}
    return readers[format_of(path, "--input")](path)


class _Csv(TableFile):
    """Every value is a text; an empty field is a row without one."""

    def _scan(self) -> None:
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            lines = self._lines(file)
            self.names = next(lines, (1, []))[1]
            if not self.names:
                raise StudyError(f"{self.path.name} is empty: it needs a line with the names of its columns")
            self._check_names()
            for line, fields in lines:
                if len(fields) != len(self.names):
                    raise StudyError(
                        f"{self.path.name}, line {line}: {len(fields)} fields where the header names "
                        f"{len(self.names)} ({', '.join(self.names)})"
                    )
                self.rows += 1

    def _lines(self, file: TextIO) -> Iterator[tuple[int, list[str]]]:
        # Fields may be whole documents; the default limit is 128 KiB.
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        reader = csv.reader(file, strict=True)
        begin, columns = 1, 0
        try:
            for fields in reader:
                # A blank line is no row, except below the header of one column, whose value it is.
                if fields or columns == 1:
                    columns = columns or len(fields)
                    yield begin, fields or [""]
                begin = reader.line_num + 1
        except csv.Error as error:
            raise StudyError(f"{self.path.name}, line {begin}: not valid CSV: {error}") from None

    def _parts(self, size: int) -> Iterator[list[dict[str, Any]]]:
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            lines = self._lines(file)
            next(lines, None)
            yield from _grouped((dict(zip(self.names, fields, strict=True)) for _, fields in lines), size)

    def schema(self) -> pa.Schema:
        return pa.schema([(name, pa.string()) for name in self.names])


class _JsonLines(TableFile):
    def _scan(self) -> None:
        known: dict[str, None] = {}
        for record in self._records():
            known.update(dict.fromkeys(record))
            self.rows += 1
        self.names = list(known)

    def _records(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise StudyError(f"{self.path.name}, line {number}: not valid JSON: {error.msg}") from None
                except ValueError:
                    # Python's own limit, whose error is no JSONDecodeError.
                    raise StudyError(
                        f"{self.path.name}, line {number}: an integer of more than {sys.get_int_max_str_digits()} "
                        "digits: write it as a text"
                    ) from None
                if not isinstance(record, dict):
                    raise StudyError(f"{self.path.name}, line {number}: not an object with columns")
                yield record

    def _parts(self, size: int) -> Iterator[list[dict[str, Any]]]:
        yield from _grouped(self._records(), size)

    def schema(self) -> pa.Schema:
        kinds: dict[str, pa.DataType] = dict.fromkeys(self.names, pa.null())
        for part in self.parts(4096):
            for name in self.names:
                kinds[name] = self._unified(name, kinds[name], [row.get(name) for row in part])
        # What is nowhere filled in has no type.
        return pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in kinds.items()])

    def _unified(self, name: str, known: pa.DataType, values: list[Any]) -> pa.DataType:
        try:
            found = pa.array(values).type
            fields = [pa.schema([(name, kind)]) for kind in (known, found)]
            return pa.unify_schemas(fields, promote_options="permissive").field(name).type
        except UnicodeEncodeError:
            raise StudyError(
                f"the column {name!r} of {self.path.name} holds broken Unicode (half of a surrogate pair), which "
                "Parquet cannot hold: write --output as .jsonl"
            ) from None
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            raise StudyError(
                f"the column {name!r} of {self.path.name} mixes kinds of values, which Parquet cannot hold: write "
                "--output as .jsonl"
            ) from None


class _Parquet(TableFile):
    def _scan(self) -> None:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            self._schema: pa.Schema = file.schema_arrow
            self.names, self.rows = list(self._schema.names), file.metadata.num_rows
        self._check_names()

    def _parts(self, size: int) -> Iterator[list[dict[str, Any]]]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=size):
                yield batch.to_pylist()

    def schema(self) -> pa.Schema:
        return self._schema


def _grouped(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


Write = Callable[[list[dict[str, Any]]], None]


@contextmanager
def writing_rows(path: Path, kind: str, table: TableFile, added: Mapping[str, pa.DataType]) -> Iterator[Write]:
    """A function that appends rows to a new file.

    Args:
        path: The file; replaced where it exists.
        kind: ``csv``, ``jsonl`` or ``parquet``.
        table: The table whose columns it has, in their order.
        added: What comes after them. CSV has lists and objects as JSON, and a question mark for half of a surrogate
            pair.

    Raises:
        StudyError: As `TableFile.schema`.
        OSError: It cannot be written.
        pyarrow.ArrowException: Parquet does not hold such values.
        UnicodeEncodeError: It does not hold such a name.
    """
    if kind == "parquet":
        import pyarrow.parquet as pq

        schema = table.schema()
        for name, type_ in added.items():
            schema = schema.append(pa.field(name, type_))
        with pq.ParquetWriter(path, schema) as writer:
            yield lambda rows: writer.write_table(pa.Table.from_pylist(rows, schema))
        return
    names = [*table.names, *added]
    with path.open("w", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            yield lambda rows: file.writelines(f"{_json(row)}\n" for row in rows)
            return
        lines = csv.writer(_Lines(file), lineterminator=_Lines.END)
        lines.writerow(map(_encodable, names))
        yield lambda rows: lines.writerows(_fields(row, names) for row in rows)


class _Lines:
    """Takes the lines of a `csv.writer`, and ends them as Unix does.

    Before CPython 3.11.9 the writer puts a lone carriage return into quotes only if lines end with one, and every
    reader takes it for the end of a row (https://github.com/python/cpython/issues/67044).
    """

    END = "\r\n"

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, line: str) -> None:
        self.file.write(f"{line.removesuffix(self.END)}\n")


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair, which UTF-8 does not have and JSON does.
        return json.dumps(value, default=str)
    return text


def _fields(row: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    values = [row.get(name) for name in names]
    return [_json(value) if isinstance(value, list | dict) else _encodable(value) for value in values]


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
