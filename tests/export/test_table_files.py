"""Files of people, read and written with further columns: what is written reads back the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peftsearch.export.tables import open_table, writing_rows
from peftsearch.spec import StudyError


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for part in open_table(path).parts(2) for row in part]


def written_jsonl(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def copied(source: Path, output: Path) -> list[dict[str, Any]]:
    """The rows of a file, written into another with a column ``seen`` and read again."""
    table = open_table(source)
    with writing_rows(output, output.suffix[1:], table, {"seen": pa.string()}) as write:
        for part in table.parts(2):
            write([{**row, "seen": "yes"} for row in part])
    return rows_of(output)


def test_half_of_a_surrogate_pair_in_any_column_loses_no_row_of_a_csv(tmp_path: Path) -> None:
    rows = [{"a\ud83d": "x\ud83dy", "tree": {"b": ["\ud83d"]}}, {"a\ud83d": "z", "tree": {}}]
    assert copied(written_jsonl(tmp_path, rows), tmp_path / "out.csv") == [
        {"a?": "x?y", "tree": '{"b": ["\\ud83d"]}', "seen": "yes"},
        {"a?": "z", "tree": "{}", "seen": "yes"},
    ]


def test_half_of_a_surrogate_pair_is_named_where_parquet_cannot_hold_it(tmp_path: Path) -> None:
    for row in ({"who": "\ud83d"}, {"who": {"b": ["\ud83d"]}}, {"who": {"\ud83d": 1}}):
        with pytest.raises(StudyError, match=r"the column 'who' of in\.jsonl holds broken Unicode \(half"):
            copied(written_jsonl(tmp_path, [row]), tmp_path / "out.parquet")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text,text\na,b\n")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "in.parquet")
    for name in ("in.csv", "in.parquet"):
        with pytest.raises(StudyError, match=f"the header of {name} names the column 'text' twice"):
            open_table(tmp_path / name)


def test_a_number_that_python_does_not_read_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"n": 1}}\n\n{{"n": {"1" * 4301}}}\n')
    with pytest.raises(StudyError, match=r"^in\.jsonl, line 3: an integer of more than 4300 digits"):
        open_table(path)


@pytest.mark.parametrize("text", ["a\rb", "\r", "a\nb", "a\r\n", 'a "b", c', "", " a ", "\x00", "\x85\u2028"])
def test_a_text_reads_back_from_csv_as_it_was(text: str, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    rows = [{"id": "1", f"name{text}": text}, {"id": "2", f"name{text}": "x"}]
    assert copied(written_jsonl(tmp_path, rows), output) == [{**row, "seen": "yes"} for row in rows]
    # Lines end as they do everywhere else here.
    assert output.read_bytes().endswith(b",x,yes\n")


@pytest.mark.parametrize("before", ["", "\n", "\r\n\n"])
def test_blank_lines_before_the_header_of_one_column_are_no_header(before: str, tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(f"{before}text\na\n\nb\n".encode())
    assert rows_of(path) == [{"text": "a"}, {"text": ""}, {"text": "b"}]
    assert open_table(path).rows == 3
