"""From a study's domain to checked text in splits: sources are read and joined, and their splits cut and limited."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from peftsearch.domains.sources import RawSplit, describe_source, read_source
from peftsearch.domains.splits import cut_by_stratum, limit, shared, take
from peftsearch.domains.tasks import Metric, Task, get_metric, get_task
from peftsearch.domains.tasks.base import GROUP, PART, LabelOptions
from peftsearch.spec import DataSpec, StudyError, StudySpec, suggest
from peftsearch.spec.yaml_file import Loc

# The order in which splits are shown.
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class RawDomain:
    """A domain's text before tokenisation: checked, split and limited.

    Attributes:
        task: What is to be done with the text.
        metric: The objective.
        labels: Label names; their positions are the label ids.
        splits: The rows of each split.
        fingerprint: Hash of texts, labels and splits.
        source: Where the data came from.
        warnings: What a careful reader should know about the data.
        parts: Names of the data sets that were joined; () for a domain of one.
    """

    task: Task
    metric: Metric
    labels: tuple[str, ...]
    splits: dict[str, pa.Table]
    fingerprint: str
    source: str
    warnings: tuple[str, ...]
    parts: tuple[str, ...] = ()


def load_raw(name: str, spec: StudySpec, folder: Path) -> dict[str, pa.Table]:
    """The text and labels of a domain's splits; as `load_domain`."""
    return load_domain(name, spec, folder).splits


def load_domain(name: str, spec: StudySpec, folder: Path) -> RawDomain:
    """Read a domain's data, check it, and cut and limit its splits.

    Args:
        name: The domain's name in the study.
        spec: The study.
        folder: The study file's folder; relative paths start there.

    Raises:
        StudyError: Anything is wrong with the domain's task, metric or data.
    """
    if name not in spec.domains:
        raise StudyError(f"the study has no domain {name!r}{suggest(name, spec.domains)}", ("domains",))
    domain = spec.domains[name]
    data, place = domain.data, ("domains", name)
    loc = (*place, "data")
    task = get_task(domain.task, place, domain.options)
    get_metric(task, domain.metric, (*place, "metric"))
    joined = data.join
    read = _read_splits(task, data, folder, loc) if joined is None else _join(task, joined, folder, (*loc, "join"))
    # Before limits: a study on a few rows of each split keeps the labels of the whole.
    labels = task.check(read.tables, data, loc, cut=read.cuts)
    if isinstance(task.options, LabelOptions):
        _check_names(task.options.names, task.metric_labels(labels), (*place, "options", "names"))
    metric = get_metric(task, domain.metric, (*place, "metric"), labels)
    splits = _limit(task, read.tables, data)
    _check_metric(task, metric, splits, (*place, "metric"))
    warnings = [*read.warnings, *_overlap_warnings({split: task.keys(table) for split, table in splits.items()})]
    warnings += task.warnings(splits, labels)
    fingerprint = digest([split, *row] for split, table in splits.items() for row in ((), *task.content(table)))
    source = describe_source(data, read.commits)
    return RawDomain(task, metric, labels, splits, fingerprint, source, tuple(warnings), tuple(joined or ()))


def _check_names(names: Mapping[str, str], labels: Sequence[str], loc: Loc) -> None:
    """Refuse names of labels that the data lacks, and two labels of one name, between which no answer decides."""
    for label in names:
        if label not in labels:
            raise StudyError(f"the data has no label {label!r} to name{suggest(label, labels)}", (*loc, label))
        if not names[label].strip():
            raise StudyError(f"the label {label!r} is given no name", (*loc, label))
    for said, count in Counter(names.get(label, label) for label in labels).items():
        if count > 1:
            raise StudyError(f"{count} labels are called {said!r}: give each a name of its own", loc)


def _check_metric(task: Task, metric: Metric, splits: Mapping[str, pa.Table], loc: Loc) -> None:
    """Refuse an objective that is undefined on a split that is scored."""
    for split in ("validation", "test"):
        if split in splits and (lacking := task.lacks(metric, splits[split])) is not None:
            raise StudyError(
                f"the metric {metric.name!r} is undefined on {split}, which has no {lacking}: name another metric, or "
                "data that has some there",
                loc,
            )


def digest(rows: Iterable[Iterable[str]]) -> str:
    """SHA-256 of rows of texts, each with its length in front so that no two lists look alike."""
    found = hashlib.sha256()
    for row in rows:
        values = [value.encode("utf-8", "surrogatepass") for value in row]
        found.update(b"%d;" % len(values))
        for value in values:
            found.update(b"%d:" % len(value) + value)
    return found.hexdigest()


@dataclass(frozen=True)
class _Splits:
    """The splits of one data set, or of several that were joined, in the task's form.

    Attributes:
        tables: The rows of each split.
        cuts: The splits that were cut from train.
        warnings: What a careful reader should know of how the splits came about.
        commits: Commits of data sets of the Hub, by part of joined data; that of a single one is called ``""``.
    """

    tables: dict[str, pa.Table]
    cuts: tuple[str, ...]
    warnings: tuple[str, ...]
    commits: dict[str, str | None]


def _read_splits(task: Task, data: DataSpec, folder: Path, loc: Loc) -> _Splits:
    """The splits of one data set; missing ones are cut from train."""
    sources = read_source(data, folder, loc, task.columns(data), task.formats)
    _check_group(data, sources["train"], (*loc, "split", "group"))
    splits = {}
    for split, raw in sources.items():
        table = task.read(raw.table, data, raw.where, loc)
        group = data.split.group
        if group is not None and group in raw.table.column_names:
            table = table.append_column(GROUP, raw.table.column(group))
        splits[split] = table
    splits, cuts = _cut_missing(task, splits, data, loc)
    splits = {split: splits[split] for split in SPLITS if split in splits}
    return _Splits(splits, cuts, tuple(_group_warnings(splits, data)), {"": sources["train"].commit})


def _join(task: Task, parts: Mapping[str, DataSpec], folder: Path, loc: Loc) -> _Splits:
    """The splits of several data sets one after another, each row with the name of its part."""
    joined: dict[str, list[pa.Table]] = {}
    cuts: set[str] = set()
    warnings: list[str] = []
    commits: dict[str, str | None] = {}
    for name, data in parts.items():
        part = _read_splits(task, data, folder, (*loc, name))
        warnings += [f"{name}: {warning}" for warning in part.warnings]
        cuts |= set(part.cuts)
        commits[name] = part.commits[""]
        for split, table in _limit(task, part.tables, data).items():
            # A group of one data set is none of another's.
            known = table.drop_columns([GROUP]) if GROUP in table.column_names else table
            joined.setdefault(split, []).append(known.append_column(PART, pa.array([name] * len(table), pa.string())))
    for split, tables in joined.items():
        if len(tables) < len(parts):
            raise StudyError(f"a part of the joined data has no {split} split while another has one", loc)
    splits = {split: pa.concat_tables(tables) for split, tables in joined.items()}
    return _Splits(splits, tuple(cuts), tuple(warnings), commits)


def _limit(task: Task, splits: Mapping[str, pa.Table], data: DataSpec) -> dict[str, pa.Table]:
    found = {}
    for split, table in splits.items():
        most = getattr(data.limit, split)
        # A list of sizes has become one domain for each before.
        assert most is None or isinstance(most, int)
        found[split] = take(table, limit(task.keys(table), most, data.split.seed))
    return found


def _check_group(data: DataSpec, train: RawSplit, loc: Loc) -> None:
    group, known = data.split.group, train.table.column_names
    if group is not None and group not in known:
        raise StudyError(f"{train.where} has no column {group!r} to group by{suggest(group, known)}", loc)


def _cut_missing(
    task: Task, splits: dict[str, pa.Table], data: DataSpec, loc: Loc
) -> tuple[dict[str, pa.Table], tuple[str, ...]]:
    if "validation" not in splits and data.split.validation == 0:
        raise StudyError(
            "the data has no validation split and split.validation is 0: give it a share, trials are compared on it",
            (*loc, "split", "validation"),
        )
    wanted = {"test": data.split.test, "validation": data.split.validation}
    shares = {split: share for split, share in wanted.items() if split not in splits and share > 0}
    train, group = splits["train"], data.split.group
    if not shares:
        return splits, ()
    if group is None:
        groups = task.keys(train)
    else:
        values = train.column(GROUP).to_pylist()
        missing = [value is None or value == "" for value in values]
        if any(missing):
            raise StudyError(
                f"the column {group!r} is empty in {sum(missing)} of {len(values)} training rows, first in row "
                f"{missing.index(True) + 1}: rows without a group cannot be kept together",
                (*loc, "split", "group"),
            )
        groups = [str(value) for value in values]
    try:
        rows = cut_by_stratum(groups, task.strata(train) or [""] * len(groups), shares, data.split.seed)
    except ValueError:
        count = len(set(groups))
        several = "s" if count > 1 else ""
        what = f"distinct text{several}" if group is None else f"distinct value{several} in the column {group!r}"
        advice = "add rows, or name a file for each split" if group is None else "group by another column, or by none"
        raise StudyError(
            f"{count} {what} cannot be cut into train, {' and '.join(sorted(shares, reverse=True))}: "
            f"each needs at least one: {advice}",
            (*loc, "split"),
        ) from None
    return {**splits, **{split: take(train, chosen) for split, chosen in rows.items()}}, tuple(shares)


def _group_warnings(splits: Mapping[str, pa.Table], data: DataSpec) -> list[str]:
    known = {
        split: [str(value) for value in table.column(GROUP).to_pylist() if value is not None]
        for split, table in splits.items()
        if GROUP in table.column_names
    }
    return [
        f"{count} of {splits[later].num_rows} rows of {later} belong to a {data.split.group!r} that {earlier} shows too"
        for (earlier, later), count in shared(known).items()
    ]


def _overlap_warnings(keys: Mapping[str, list[str]]) -> list[str]:
    return [
        f"{count} of {len(keys[later])} texts of {later} stand in {earlier} too, up to case and white space: scores on "
        f"{later} flatter"
        for (earlier, later), count in shared(keys).items()
    ]
