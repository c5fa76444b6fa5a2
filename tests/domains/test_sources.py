"""Every kind of source, and every way in which one can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peftsearch.domains import load_raw
from peftsearch.domains.sources import read_source
from peftsearch.spec import DataSpec, StudyError, StudyFile, UnreachableError

Make = Callable[..., StudyFile]
ROWS = [
    {"text": 'He said "no", twice\nand left.', "label": "007"},
    {"text": "naïve — 東京", "label": "0"},
    {"text": "NA", "label": "null"},
]


def read(data: dict[str, Any], folder: Path) -> dict[str, list[dict[str, Any]]]:
    spec = DataSpec.model_validate(data)
    return {
        split: raw.table.to_pylist()
        for split, raw in read_source(spec, folder, ("data",), (spec.columns.text, spec.columns.label)).items()
    }


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_csv_keeps_every_cell_as_it_is_written(tmp_path: Path) -> None:
    write(
        tmp_path / "a.csv",
        '\ufefftext,label\r\n"He said ""no"", twice\nand left.",007\r\nnaïve — 東京,0\r\n\r\nNA,null\r\n',
    )
    assert read({"source": "a.csv"}, tmp_path) == {"train": ROWS}


def test_csv_field_may_be_a_long_document(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", f'text,label\n"{"word " * 100_000}",x\n')
    assert len(read({"source": "a.csv"}, tmp_path)["train"][0]["text"]) == 500_000


def test_tsv_does_not_interpret_quotes(tmp_path: Path) -> None:
    write(tmp_path / "a.tsv", 'text\tlabel\n"open quote\t1\nnext\u2028line \x0b here\t0\r\n\n')
    assert read({"source": "a.tsv"}, tmp_path)["train"] == [
        {"text": '"open quote', "label": "1"},
        {"text": "next\u2028line \x0b here", "label": "0"},
    ]


def test_header_names_the_columns_of_files_without_one_only(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "first\t1\nsecond\t0\n")
    write(tmp_path / "test.tsv", "index\tsentence\tlabel\n0\tthird\t1\n")
    data = {"train": "train.tsv", "test": "test.tsv", "header": ["sentence", "label"], "columns": {"text": "sentence"}}
    assert read(data, tmp_path) == {
        "train": [{"sentence": "first", "label": "1"}, {"sentence": "second", "label": "0"}],
        "test": [{"index": "0", "sentence": "third", "label": "1"}],
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", json.dumps(ROWS)),
        ("lines.json", "\n".join(map(json.dumps, ROWS))),
        ("lines.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"),
    ],
)
def test_json_forms(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path / name, text)
    assert read({"source": name}, tmp_path) == {"train": ROWS}


def test_json_object_of_records_keeps_its_keys_as_id(tmp_path: Path) -> None:
    write(tmp_path / "a.json", json.dumps({"21645374": {"text": "a", "label": "yes"}, "2": {"text": "b", "id": "own"}}))
    assert read({"source": "a.json"}, tmp_path)["train"] == [
        {"id": "21645374", "text": "a", "label": "yes"},
        {"id": "own", "text": "b", "label": None},
    ]


def test_json_column_that_nobody_needs_may_mix_kinds(tmp_path: Path) -> None:
    write(tmp_path / "a.json", json.dumps([{"text": "a", "label": "x", "extra": 1}, {"text": "b", "extra": ["y"]}]))
    assert [row["text"] for row in read({"source": "a.json"}, tmp_path)["train"]] == ["a", "b"]


def test_parquet_and_its_class_names(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features).to_parquet(
        tmp_path / "a.parquet"
    )
    assert [row["label"] for row in read({"source": "a.parquet"}, tmp_path)["train"]] == ["pos", "neg", None]


@pytest.mark.parametrize("validation", ["validation", "dev"])
def test_folder_of_save_to_disk(tmp_path: Path, validation: str) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})

    def dataset(*labels: int) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [f"t{n}" for n in labels], "label": list(labels)}, features)

    train = dataset(1, 0, 1).select([2, 1])
    datasets.DatasetDict({"train": train, validation: dataset(0), "unlabelled": dataset(1)}).save_to_disk(
        tmp_path / "all"
    )
    train.save_to_disk(tmp_path / "one")
    rows = [{"text": "t1", "label": "pos"}, {"text": "t0", "label": "neg"}]
    assert read({"source": "all"}, tmp_path) == {"train": rows, "validation": [{"text": "t0", "label": "neg"}]}
    assert read({"source": str(tmp_path / "one")}, tmp_path) == {"train": rows}


def test_file_inside_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_text_package"
    package.mkdir()
    write(package / "__init__.py", "raise RuntimeError('its code must not run')")
    write(package / "a.csv", "text,label\nx,y\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert read({"source": "package:some_text_package/a.csv"}, tmp_path) == {"train": [{"text": "x", "label": "y"}]}
    with pytest.raises(StudyError, match=r"'some_text_package' holds no 'b\.csv'") as caught:
        read({"source": "package:some_text_package/b.csv"}, tmp_path)
    assert caught.value.loc == ("data", "source")


def test_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftsearch.domains import recipes

    table = pa.table({"text": ["a"], "label": ["b"], "group": ["c"]})
    monkeypatch.setitem(recipes.RECIPES, "made_up", lambda: table)
    assert read({"source": "recipe:made_up"}, tmp_path) == {"train": [{"text": "a", "label": "b", "group": "c"}]}
    with pytest.raises(StudyError, match="unknown recipe 'made_upp'; did you mean 'made_up'"):
        read({"source": "recipe:made_upp"}, tmp_path)


@pytest.mark.parametrize(
    ("reachable", "reason"),
    [(False, "the Hub cannot be reached from here"), (True, "Couldn't reach 'org/name' on the Hub")],
)
def test_hub_data_that_cannot_be_loaded_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool, reason: str
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\nand a long tail")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    for module in ("hub", "sources"):
        monkeypatch.setattr(f"peftsearch.domains.{module}.hub_reachable", lambda: reachable)
    with pytest.raises(StudyError) as caught:
        read({"source": "hub:org/name"}, tmp_path)
    assert caught.value.message == (
        f"cannot load 'org/name' from the Hub: {reason}. Check the id, 'config', 'revision' and the network, or use a "
        "local file"
    )
    # What cannot be reached may be there: a plan may do without it. What is wrong is wrong.
    assert isinstance(caught.value, UnreachableError) is not reachable


def test_no_progress_bar_and_the_setting_is_restored(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "one")
    datasets.enable_progress_bars()
    capfd.readouterr()
    read({"source": "one"}, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


BAD_FILES: list[tuple[str, str | bytes, str]] = [
    ("a.csv", "text,label\na,x\nb\n", "a.csv, line 3: 1 field where the header names 2 (text, label)"),
    ("a.csv", 'text,label\n"a\nb",x\n"c,y\n', "a.csv, line 4: not valid CSV: unexpected end of data"),
    ("a.csv", "text,text\na,x\n", "a.csv: the header names the column 'text' twice"),
    ("a.csv", "text;label\na;x\n", "a.csv: fields stand between semicolons: save the file with commas, or with tabs"),
    ("a.csv", "", "a.csv holds no rows"),
    ("a.csv", "text,label\n", "a.csv holds no rows"),
    ("a.csv", b"text,label\n\xe9t\xe9,x\n", "a.csv is not UTF-8 text"),
    ("a.tsv", "text\tlabel\na\tx\ty\n", "a.tsv, line 2: 3 fields where the header names 2"),
    ("a.json", "[{]", "a.json, line 1: not valid JSON"),
    ("a.json", "3", "a.json is not a list of records"),
    ("a.json", "[1]", "a.json: record 1 is not an object with columns but 1"),
    ("a.json", "[]", "a.json holds no rows"),
    ("a.json", "[" * 100_000, "a.json is nested too deeply"),
    ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
    ("a.jsonl", '{"text": "a", "label": "x"}\n["b"]\n', "a.jsonl, line 2: not an object with columns but ['b']"),
    (
        "a.jsonl",
        '{"text": "a", "label": "x"}\n{"text": "b", "label": 1}\n',
        "a.jsonl: column 'label' mixes kinds of values (a text in row 1, a number in row 2): write all of them as one",
    ),
    (
        "a.jsonl",
        '{"text": "a", "label": 0.5}\n{"text": "b", "label": true}\n',
        "a.jsonl: column 'label' mixes kinds of values (a number in row 1, true/false in row 2)",
    ),
    ("a.jsonl", '{"text": "\\ud800", "label": "x"}\n', "a.jsonl: column 'text' holds broken Unicode"),
    ("a.jsonl", f'{{"text": "a", "label": {2**70}}}\n', "a.jsonl: column 'label' holds values that do not fit a table"),
    ("a.parquet", "PAR1 but not really", "cannot read a.parquet as parquet"),
    ("a.txt", "text", "cannot tell the format of 'a.txt' by its suffix: write 'format: csv'"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_unreadable_file(tmp_path: Path, study: Make, name: str, content: str | bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    file = study({"source": name})
    with pytest.raises(StudyError) as caught:
        load_raw("d", file.spec, file.folder)
    explained = file.explain(caught.value)
    assert sentence in explained
    assert explained.startswith("study.yaml, line ")
    assert "domains.d.data" in explained
    assert "\n" not in explained


def test_a_header_is_for_files_that_may_lack_one(tmp_path: Path, study: Make) -> None:
    write(tmp_path / "a.json", '[{"text": "a", "label": "x"}]')
    file = study({"source": "a.json", "header": ["text", "label"]})
    with pytest.raises(StudyError, match=r"a\.json is json: 'header' names the columns of CSV and TSV files") as caught:
        load_raw("d", file.spec, file.folder)
    assert caught.value.loc == ("domains", "d", "data", "header")


def test_missing_file_names_a_similar_one(tmp_path: Path, study: Make) -> None:
    write(tmp_path / "train.csv", "text,label\na,x\n")
    file = study({"train": "trian.csv"})
    with pytest.raises(StudyError, match=r"no file or folder 'trian\.csv' .*; did you mean 'train\.csv'\?") as caught:
        load_raw("d", file.spec, file.folder)
    assert caught.value.loc == ("domains", "d", "data", "train")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"source": "nowhere/a.csv"}, "no file or folder 'nowhere/a.csv'"),
        ({"source": "folder"}, "the folder 'folder' was not written by datasets.save_to_disk"),
        ({"train": "folder"}, "'folder' is a folder: name a file here, or the folder as 'source'"),
        ({"source": "broken"}, "cannot read the datasets folder 'broken'"),
        ({"source": "testonly"}, "testonly has no split 'train'; its splits: test"),
        ({"source": "package:surely_not_installed/a.csv"}, "package 'surely_not_installed' is not installed"),
    ],
)
def test_unusable_location(tmp_path: Path, study: Make, data: dict[str, Any], sentence: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").mkdir()
    write(tmp_path / "broken" / "state.json", "{}")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "testonly")
    file = study(data)
    with pytest.raises(StudyError) as caught:
        load_raw("d", file.spec, file.folder)
    assert sentence in caught.value.message
    assert caught.value.loc[:3] == ("domains", "d", "data")


def test_format_overrides_the_suffix(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text\tlabel\na\tx\n")
    assert read({"source": "a.txt", "format": "tsv"}, tmp_path) == {"train": [{"text": "a", "label": "x"}]}


def test_parquet_of_dictionaries(tmp_path: Path, study: Make) -> None:
    texts = [f"text {number}" for number in range(20)]
    labels = pa.array(["x", "y"] * 10).dictionary_encode()
    pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode(), "label": labels}), tmp_path / "a.parquet")
    file = study({"source": "a.parquet"})
    assert set(load_raw("d", file.spec, file.folder)["train"].column("label").to_pylist()) == {"x", "y"}


@pytest.mark.parametrize(
    "written", ['{"info": null}', "[]", '{"info": {"features": []}}', '{"info": {"features": {"label": {"names": 1}}}}']
)
def test_what_others_write_about_a_parquet_file_is_left_alone(written: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "label": ["x", "y"]}).replace_schema_metadata({"huggingface": written})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row["label"] for row in read({"source": "a.parquet"}, tmp_path)["train"]] == ["x", "y"]
