"""Where labelled text comes from: every kind of source becomes one Arrow table per split that it brings.

Local files are read here rather than by `datasets`, which would copy them into a cache folder and guess types: a label
``007`` of a CSV file stays ``007``.
"""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from peftsearch.domains.hub import cached_commit, hub_reachable, out_of_reach
from peftsearch.domains.iob import read_iob
from peftsearch.domains.models import is_commit
from peftsearch.domains.squad_file import is_squad, squad_records
from peftsearch.spec import DataSpec, StudyError, UnreachableError, first_line, hide_secrets, package_path, suggest
from peftsearch.spec.locations import PACKAGE_PREFIX, local_path
from peftsearch.spec.yaml_file import Loc

if TYPE_CHECKING:
    import datasets

HUB_PREFIX = "hub:"
RECIPE_PREFIX = "recipe:"
SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".iob": "iob",
    ".iob2": "iob",
    ".bio": "iob",
    ".conll": "iob",
}
# What data sets call their splits, in the order of preference.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel"),
    "test": ("test",),
}


@dataclass(frozen=True)
class RawSplit:
    """The rows of one split as its source holds them.

    Attributes:
        table: All columns under their own names.
        where: What to call it in errors, for example ``train.csv``.
        loc: The place in the study file that names it.
        commit: Of a data set of the Hub, the commit that its revision was.
    """

    table: pa.Table
    where: str
    loc: Loc
    commit: str | None = None


def describe_source(data: DataSpec, commits: Mapping[str, str | None] | None = None) -> str:
    """The source as the study file says, in one line for provenance; without passwords.

    Args:
        data: The domain's ``data`` section.
        commits: Commits of data sets of the Hub, by part of joined data; that of a single one is called ``""``.
    """
    return hide_secrets(_described(data, "", commits or {}))


def _described(data: DataSpec, name: str, commits: Mapping[str, str | None]) -> str:
    if data.join is not None:
        return "; ".join(f"{part}: {_described(data.join[part], part, commits)}" for part in data.join)
    if data.source is None:
        return ", ".join(
            f"{split}: {path}"
            for split, path in (("train", data.train), ("validation", data.validation), ("test", data.test))
            if path
        )
    described = data.source + (f" ({data.config})" if data.config else "")
    described += f" @ {data.revision}" if data.revision else ""
    commit = commits.get(name)
    return described + (f", commit {commit}" if commit not in (None, data.revision) else "")


def read_source(
    data: DataSpec, folder: Path, loc: Loc, needed: Collection[str], formats: Mapping[str, str] | None = None
) -> dict[str, RawSplit]:
    """Read the splits that a source brings.

    Args:
        data: The domain's ``data`` section.
        folder: The study file's folder; relative paths start there.
        loc: Where the ``data`` section stands in the study file.
        needed: Names of the columns that the task reads.
        formats: What the task takes files of some suffix for, where the study file names no format.

    Returns:
        ``train``, and ``validation`` and ``test`` where the source has them.

    Raises:
        UnreachableError: It is on the Hub, which cannot be read here; or a local file is missing, of which the study
            file says what to expect.
        StudyError: The source does not exist, cannot be read, or brings no training split.
    """
    if data.source is None:
        named = {"train": data.train, "validation": data.validation, "test": data.test}
        return {
            split: _read_named_file(path, data, folder, (*loc, split), needed, formats or {})
            for split, path in named.items()
            if path is not None
        }
    place = (*loc, "source")
    if data.source.startswith(HUB_PREFIX):
        return _read_hub(data.source.removeprefix(HUB_PREFIX), data, place)
    if data.source.startswith(RECIPE_PREFIX):
        return {"train": _read_recipe(data.source.removeprefix(RECIPE_PREFIX), place)}
    path = _locate(data.source, data, folder, place)
    if path.is_dir():
        return _read_datasets_folder(path, place)
    return {"train": _read_file(path, data, place, needed, formats or {})}


def _locate(reference: str, data: DataSpec, folder: Path, loc: Loc) -> Path:
    if reference.startswith(PACKAGE_PREFIX):
        try:
            return package_path(reference)
        except StudyError as error:
            raise StudyError(error.message, loc) from None
    path = local_path(reference, folder)
    if path is None:
        raise StudyError(f"no file or folder {reference!r}: check the path", loc)
    try:
        there = path.exists()
    except OSError:
        # A name that is too long, a folder that nobody may read.
        there = False
    if not there:
        if data.expected is not None:
            # A study file that says what the data holds knows that not everybody has it.
            message = f"no file or folder {reference!r} (looked for {str(path)!r})"
            raise UnreachableError(message, loc, f"{reference!r} is not here")
        raise StudyError(_missing_file(reference, path), loc)
    return path


def _missing_file(reference: str, path: Path) -> str:
    message = f"no file or folder {reference!r} (looked for {str(path)!r})"
    with contextlib.suppress(OSError):
        siblings = [item.name for item in path.parent.iterdir() if item.is_dir() or item.suffix.lower() in SUFFIXES]
        hint = suggest(path.name, siblings)
        if hint.startswith("; did you mean"):
            return message + hint
    return f"{message}: check the path; relative ones start at the study file's folder"


def _read_named_file(
    reference: str, data: DataSpec, folder: Path, loc: Loc, needed: Collection[str], formats: Mapping[str, str]
) -> RawSplit:
    path = _locate(reference, data, folder, loc)
    if path.is_dir():
        raise StudyError(f"{reference!r} is a folder: name a file here, or the folder as 'source'", loc)
    return _read_file(path, data, loc, needed, formats)


def _read_file(path: Path, data: DataSpec, loc: Loc, needed: Collection[str], formats: Mapping[str, str]) -> RawSplit:
    kind = data.format if data.format != "auto" else {**SUFFIXES, **formats}.get(path.suffix.lower())
    if kind is None:
        raise StudyError(
            f"cannot tell the format of {path.name!r} by its suffix: write 'format: csv' (or tsv, json, jsonl, "
            "parquet, iob) beside it",
            loc,
        )
    if data.header is not None and kind not in ("csv", "tsv"):
        raise StudyError(
            f"{path.name} is {kind}: 'header' names the columns of CSV and TSV files", (*loc[:-1], "header")
        )
    reader: Callable[[Path, DataSpec, Collection[str]], pa.Table] = {
        "csv": _read_csv,
        "tsv": _read_tsv,
        "json": _read_json,
        "jsonl": _read_json_lines,
        "parquet": _read_parquet,
        "iob": _read_iob,
    }[kind]
    try:
        return RawSplit(reader(path, data, needed), path.name, loc)
    except StudyError as error:
        raise StudyError(f"{path.name}{error.message}", loc) from None
    except UnicodeDecodeError as error:
        raise StudyError(
            f"{path.name} is not UTF-8 text (byte {error.start} of a block is {error.object[error.start]:#04x}): "
            "save it as UTF-8",
            loc,
        ) from None
    except RecursionError:
        raise StudyError(f"{path.name} is nested too deeply to be a list of records", loc) from None
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise StudyError(f"cannot read {path.name} as {kind}: {first_line(error)}", loc) from None


# Readers raise StudyError with a message that continues the file's name: ", line 3: ...".


def _read_csv(path: Path, data: DataSpec, needed: Collection[str]) -> pa.Table:
    # Fields may be whole documents; the default limit is 128 KiB.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)

        def lines() -> Iterator[tuple[int, list[str]]]:
            # A quoted field may contain line breaks: a row begins one line after the row before ended.
            begin = 1
            try:
                for fields in reader:
                    yield begin, fields
                    begin = reader.line_num + 1
            except csv.Error as error:
                raise StudyError(f", line {begin}: not valid CSV: {error}") from None

        return _rows_to_table(lines(), data, needed)


def _read_tsv(path: Path, data: DataSpec, needed: Collection[str]) -> pa.Table:
    # Not the csv module: in the corpora that come as TSV a quote is a character like any other.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        return _rows_to_table(
            ((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(file, 1) if line.strip()),
            data,
            needed,
        )


def _rows_to_table(rows: Iterator[tuple[int, list[str]]], data: DataSpec, needed: Collection[str]) -> pa.Table:
    first = next(((number, fields) for number, fields in rows if fields), None)
    if first is None:
        return pa.table({})
    header, body = data.header, []
    if header is None or set(needed) <= set(first[1]):
        header = [name.strip() for name in first[1]]
        if len(header) == 1 and ";" in header[0] and not set(needed) <= set(header):
            raise StudyError(": fields stand between semicolons: save the file with commas, or with tabs as TSV")
    else:
        body.append(_fitting(first, header))
    seen: set[str] = set()
    for name in header:
        if name in seen:
            raise StudyError(f": the header names the column {name[:60]!r} twice")
        seen.add(name)
    body.extend(_fitting(row, header) for row in rows if row[1])
    columns = zip(*body, strict=True) if body else [()] * len(header)
    return pa.table({name: pa.array(values, pa.string()) for name, values in zip(header, columns, strict=True)})


def _fitting(row: tuple[int, list[str]], header: Sequence[str]) -> list[str]:
    number, fields = row
    if len(fields) != len(header):
        raise StudyError(
            f", line {number}: {len(fields)} field{'s' if len(fields) != 1 else ''} where the header names "
            f"{len(header)} ({', '.join(header)})"
        )
    return fields


def _read_json(path: Path, data: DataSpec, needed: Collection[str]) -> pa.Table:
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        # Several documents in one file: JSON Lines under the other suffix.
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _read_json_lines(path, data, needed)
        raise StudyError(f", line {error.lineno}: not valid JSON: {error.msg}") from None
    if is_squad(value):
        value = squad_records(value)
    elif isinstance(value, dict):
        if value and all(isinstance(record, dict) for record in value.values()):
            value = [{"id": key, **record} for key, record in value.items()]
        else:
            value = [value] if value else []
    if not isinstance(value, list):
        raise StudyError(" is not a list of records: expected [{...}, ...], one record per line, or {id: {...}, ...}")
    for number, record in enumerate(value, 1):
        if not isinstance(record, dict):
            raise StudyError(f": record {number} is not an object with columns but {_brief(record)}")
    return _records_to_table(value, {*needed, data.split.group})


def _read_json_lines(path: Path, data: DataSpec, needed: Collection[str]) -> pa.Table:
    records = []
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise StudyError(f", line {number}: not valid JSON: {error.msg}") from None
            if not isinstance(record, dict):
                raise StudyError(f", line {number}: not an object with columns but {_brief(record)}")
            records.append(record)
    return _records_to_table(records, {*needed, data.split.group})


def _records_to_table(records: Sequence[dict[str, Any]], needed: Collection[str | None]) -> pa.Table:
    names = list(dict.fromkeys(name for record in records for name in record))
    return pa.table({name: _column([record.get(name) for record in records], name, name in needed) for name in names})


def _column(values: list[Any], name: str, needed: bool) -> pa.Array:
    try:
        # Arrow takes true beside numbers for 1.
        if needed and bool in (types := set(map(type, values))) and types & {int, float}:
            raise TypeError
        return pa.array(values)
    except UnicodeEncodeError:
        if needed:
            raise StudyError(f": column {name!r} holds broken Unicode (half of a surrogate pair)") from None
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        if needed:
            kinds: dict[str, int] = {}
            for row, value in enumerate(values, 1):
                if value is not None:
                    kinds.setdefault(_kind(value), row)
            found = ", ".join(f"{kind} in row {row}" for kind, row in kinds.items())
            if len(kinds) == 1:
                raise StudyError(f": column {name!r} holds values that do not fit a table ({found})") from None
            raise StudyError(
                f": column {name!r} mixes kinds of values ({found}): write all of them as one kind"
            ) from None
    # A column that nobody asked for only has to be listed when another is looked for.
    return pa.array([json.dumps(value) for value in values])


def _kind(value: Any) -> str:
    names = {bool: "true/false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _read_iob(path: Path, data: DataSpec, needed: Collection[str]) -> pa.Table:
    return read_iob(path, data.columns.tokens, data.columns.tags)


def _read_parquet(path: Path, data: DataSpec, needed: Collection[str]) -> pa.Table:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path).read()
    return _with_class_names(table, _class_names(table))


def _class_names(table: pa.Table) -> dict[str, list[str]]:
    """Names of the labels that `datasets` stored as numbers, by column."""
    written = (table.schema.metadata or {}).get(b"huggingface")
    if written is None:
        return {}
    features: Any = json.loads(written)
    for key in ("info", "features"):
        features = features.get(key) if isinstance(features, dict) else None
    if not isinstance(features, dict):
        # Not what `datasets` writes: the columns are taken as they are.
        return {}
    found = {}
    for name, feature in features.items():
        # A list of labels is written as {"feature": {...}, "_type": "List"}, or "Sequence" by older versions.
        inner = feature.get("feature", feature) if isinstance(feature, dict) else None
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            names = inner.get("names")
            if isinstance(names, list) and names and all(isinstance(label, str) for label in names):
                found[name] = names
    return found


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _with_class_names(table: pa.Table, class_names: dict[str, list[str]]) -> pa.Table:
    for name, names in class_names.items():
        if name not in table.column_names:
            continue

        def text(value: int | None, names: list[str] = names) -> str | None:
            # -1 is how `datasets` writes "no label".
            return names[value] if value is not None and 0 <= value < len(names) else None

        kind, values = table.schema.field(name).type, table.column(name).to_pylist()
        if pa.types.is_integer(kind):
            named = pa.array([text(value) for value in values], pa.string())
        elif _is_list(kind) and pa.types.is_integer(kind.value_type):
            lists = [None if value is None else [text(item) for item in value] for value in values]
            named = pa.array(lists, pa.list_(pa.string()))
        else:
            continue
        table = table.set_column(table.column_names.index(name), name, named)
    return table


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep `datasets` from drawing progress bars: several domains are prepared under one progress display."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _read_datasets_folder(path: Path, loc: Loc) -> dict[str, RawSplit]:
    import datasets

    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        raise StudyError(
            f"the folder {path.name!r} was not written by datasets.save_to_disk: name a file, or one file per split "
            "as train, validation and test",
            loc,
        )
    try:
        with quiet_datasets():
            loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise StudyError(f"cannot read the datasets folder {path.name!r}: {first_line(error)}", loc) from None
    return _from_datasets(loaded, path.name, loc)


def _read_hub(identifier: str, data: DataSpec, loc: Loc) -> dict[str, RawSplit]:
    import datasets

    hub_reachable()
    try:
        with quiet_datasets():
            # As `datasets.load_dataset` does, which does not say what it has loaded.
            builder = _at_revision(
                datasets.load_dataset_builder(identifier, data.config, revision=data.revision),
                identifier,
                data.revision,
            )
            builder.download_and_prepare()
            loaded = builder.as_dataset()
    except Exception as error:
        # Wrong names, wrong configurations, missing networks and broken files all raise differently, by version.
        why = out_of_reach(error)
        reason = why or first_line(error).rstrip(".")
        if why and isinstance(error, _OtherRevisions):
            reason = f"{why}, and {error}"
        message = (
            f"cannot load {identifier!r} from the Hub: {reason}. Check the id, 'config', 'revision' and the network, "
            "or use a local file"
        )
        raise (UnreachableError(message, loc, why) if why else StudyError(message, loc)) from None
    commit = builder.hash if is_commit(builder.hash) else None
    return _from_datasets(loaded, f"{HUB_PREFIX}{identifier}", loc, commit)


class _OtherRevisions(FileNotFoundError):
    pass


def _at_revision(builder: datasets.DatasetBuilder, identifier: str, revision: str | None) -> datasets.DatasetBuilder:
    """What reads the wanted revision.

    Where the Hub does not answer, `datasets` takes what this machine has loaded last, of whatever revision (seen:
    5.2.0, https://github.com/huggingface/datasets/issues/7928).

    Raises:
        _OtherRevisions: This machine holds other revisions only, or cannot know which it holds.
    """
    from datasets.packaged_modules.cache.cache import Cache

    if revision is None or not isinstance(builder, Cache):
        return builder
    commit = revision if is_commit(revision) else cached_commit(identifier, revision)
    if commit == builder.hash:
        return builder
    if is_commit(commit):
        other = Cache(
            repo_id=identifier,
            dataset_name=builder.dataset_name,
            config_name=builder.config.name,
            version=str(builder.config.version),
            hash=commit,
        )
        if Path(other.cache_dir).is_dir():
            return other
    raise _OtherRevisions(f"what this machine has downloaded of it is not known to be its revision {revision!r}")


def _from_datasets(loaded: Any, where: str, loc: Loc, commit: str | None = None) -> dict[str, RawSplit]:
    import datasets

    if isinstance(loaded, datasets.Dataset):
        return {"train": RawSplit(_dataset_table(loaded), where, loc, commit)}
    found = {}
    for split, aliases in SPLIT_NAMES.items():
        alias = next((alias for alias in aliases if alias in loaded), None)
        if alias is not None:
            found[split] = RawSplit(_dataset_table(loaded[alias]), f"split {alias!r} of {where}", loc, commit)
    if "train" not in found:
        raise StudyError(f"{where} has no split 'train'; its splits: {', '.join(map(str, loaded))}", loc)
    return found


def _dataset_table(dataset: Any) -> pa.Table:
    import datasets

    names = {}
    for column, feature in dataset.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel) and inner.names:
            names[column] = inner.names
    table = dataset.with_format("arrow")[:] if len(dataset) else dataset.data.table.slice(0, 0)
    return _with_class_names(table, names)


def _read_recipe(name: str, loc: Loc) -> RawSplit:
    from peftsearch.domains.recipes import RECIPES

    recipe = RECIPES.get(name)
    if recipe is None:
        raise StudyError(f"unknown recipe {name!r}{suggest(name, RECIPES)}", loc)
    try:
        return RawSplit(recipe(), f"{RECIPE_PREFIX}{name}", loc)
    except StudyError as error:
        raise StudyError(error.message, error.loc or loc) from None
