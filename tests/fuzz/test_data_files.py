"""Data files with damaged bytes: the data is read, or one sentence says what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import damage, effort, no_hang, seeds
from hypothesis import given
from hypothesis import strategies as st

from peftsearch.domains import load_domain
from peftsearch.spec import StudyError, StudyFile

WORDS = ["the", "tenant", "pays", "rent", "a", "landlord", "dies", "über", '"quoted"', "x,y"]


def texts(count: int) -> list[str]:
    return [" ".join(WORDS[(3 * n + k) % len(WORDS)] for k in range(4)) + f" {n}" for n in range(count)]


RECORDS = [{"text": text, "label": ("yes", "no", "maybe")[n % 3], "n": n} for n, text in enumerate(texts(30))]


def csv_file(path: Path) -> None:
    lines = ["text,label,n"]
    lines += ['"{}",{},{}'.format(r["text"].replace('"', '""'), r["label"], r["n"]) for r in RECORDS]  # type: ignore[attr-defined]
    path.write_text("\n".join(lines) + "\n")


def tsv_file(path: Path) -> None:
    path.write_text("".join(f"{a}\t{b}\n" for a, b in [("text", "label"), *((r["text"], r["label"]) for r in RECORDS)]))


def jsonl_file(path: Path) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))


def json_file(path: Path) -> None:
    path.write_text(json.dumps(RECORDS))


def parquet_file(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), path)


def iob_file(path: Path) -> None:
    lines = []
    for text in texts(30):
        lines += [f"{word}\t{'B-WHO' if word in ('tenant', 'landlord') else 'O'}" for word in text.split()]
        lines.append("")
    path.write_text("\n".join(lines))


def squad_file(path: Path) -> None:
    paragraphs = [
        {
            "context": f"The tenant number {n} pays the rent.",
            "qas": [
                {"id": f"q{n}", "question": f"Who pays {n}?", "answers": [{"text": "The tenant", "answer_start": 0}]}
            ],
        }
        for n in range(12)
    ]
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))


FILES: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "csv": ("data.csv", "classification", csv_file),
    "tsv": ("data.tsv", "classification", tsv_file),
    "jsonl": ("data.jsonl", "classification", jsonl_file),
    "json": ("data.json", "classification", json_file),
    "parquet": ("data.parquet", "classification", parquet_file),
    "iob": ("data.conll", "token_classification", iob_file),
    "squad": ("squad.json", "question_answering", squad_file),
}


def read(path: Path, task: str, **data: Any) -> bool:
    """Whether it could be read; else it was refused as it should be."""
    document = {
        "name": "fuzz",
        "model": "m",
        "domains": {"d": {"task": task, "data": {"source": path.name, **data}}},
        "methods": {"lora": {}},
    }
    file = StudyFile(document, folder=path.parent)
    with no_hang():
        try:
            load_domain("d", file.spec, path.parent)
        except StudyError as error:
            message = file.explain(error)
            assert message.isprintable(), message
            assert len(message) < 2000, message[:500]
            return False
    return True


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind, (name, task, write) in FILES.items():
        found[kind] = tmp_path_factory.mktemp(kind) / name
        write(found[kind])
        assert read(found[kind], task), kind
    return found


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(kind: str, sound: dict[str, Path]) -> None:
    name, task, _ = FILES[kind]
    target = sound[kind].parent / "damaged" / name
    target.parent.mkdir(exist_ok=True)
    data = sound[kind].read_bytes()
    refused = 0

    @given(seeds)
    @effort(40)
    def damaged(seed: int) -> None:
        nonlocal refused
        target.write_bytes(damage(data, seed))
        refused += not read(target, task)

    damaged()
    assert refused > 0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TASKS = [
    ("classification", {}),
    ("multi_label", {}),
    ("similarity", {"columns": {"text_pair": "label"}}),
    ("token_classification", {"columns": {"tokens": "text", "tags": "label"}}),
    ("question_answering", {"columns": {"question": "text", "context": "label", "answers": "x"}}),
    ("multiple_choice", {"columns": {"question": "text", "choices": "label", "label": "x"}}),
    ("summarization", {"columns": {"target": "label"}}),
    ("language_modeling", {}),
]


@pytest.mark.parametrize(("task", "columns"), TASKS, ids=[task for task, _ in TASKS])
def test_values_of_any_kind(task: str, columns: dict[str, Any], tmp_path: Path) -> None:
    """Records of all shapes under the columns that a task reads."""
    path = tmp_path / "data.jsonl"
    record = st.fixed_dictionaries({}, optional={"text": values, "label": values, "x": values})

    @given(st.lists(record, max_size=8), st.sampled_from(["jsonl", "json"]))
    @effort(40)
    def any_values(records: list[dict[str, Any]], kind: str) -> None:
        text = json.dumps(records) if kind == "json" else "".join(json.dumps(item) + "\n" for item in records)
        path.write_text(text)
        read(path, task, format=kind, **columns)

    any_values()


CONTENTS = {
    "empty": b"",
    "nul": b"\0" * 100,
    "utf-16": "text,label\na,b\n".encode("utf-16"),
    "bytes": bytes(range(256)) * 4,
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "long line": b"x" * 1_000_000,
    "many columns": b",".join(b"c%d" % n for n in range(20_000)) + b"\n",
    "quotes": b'"' * 10_001,
    "carriage returns": b"text,label\ra,b\rc,d\r",
    "big numbers": b'{"text": "a", "label": 1' + b"0" * 5000 + b"}\n",
    "nan": b'{"text": NaN, "label": Infinity}\n',
    "surrogates": b'{"text": "\\ud800", "label": "\\udfff"}\n',
    "terminal": b"text,label\n\x1b]0;x\x07,\x1b[31m\n",
    "formulas": b'text,label\n=1+1,"<script>"\n',
    "parquet magic": b"PAR1" + bytes(100) + b"PAR1",
    "parquet length": b"PAR1" + bytes(10) + b"\xff\xff\xff\x7fPAR1",
    "duplicate": b'{"text": "a", "text": "b", "label": 1}\n',
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "iob"])
def test_other_contents(kind: str, content: str, tmp_path: Path) -> None:
    task = "token_classification" if kind == "iob" else "classification"
    path = tmp_path / "data"
    path.write_bytes(CONTENTS[content])
    read(path, task, format=kind)


@pytest.mark.parametrize(
    "source", ["~nobody-of-that-name/x.csv", "a\0b.csv", "x" * 300, "x" * 300 + "/a.csv", "/", "."]
)
def test_paths_that_lead_nowhere(source: str, tmp_path: Path) -> None:
    document = {"name": "n", "model": "m", "domains": {"d": {"data": {"source": source}}}, "methods": {"lora": {}}}
    file = StudyFile(document, folder=tmp_path)
    with pytest.raises(StudyError) as caught:
        load_domain("d", file.spec, tmp_path)
    assert str(caught.value).isprintable()
