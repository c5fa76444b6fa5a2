"""From a study's domain to tokenised splits on disk, checked first and made once."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from peftsearch.domains.hub import hub_reachable, out_of_reach
from peftsearch.domains.models import (
    Architecture,
    architecture_of,
    has_relative_positions,
    model_config,
    positions_said,
)
from peftsearch.domains.raw import RawDomain, digest, load_domain
from peftsearch.domains.sources import quiet_datasets
from peftsearch.domains.tasks import Head, Task, Tokenization, get_task
from peftsearch.domains.tasks.base import EXAMPLE, PART
from peftsearch.spec import Direction, DomainFacts, StudyError, StudySpec, UnreachableError, first_line

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

# Part of every fingerprint of prepared data: raise it when what is written changes its form or meaning.
FORMAT_VERSION = 6
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
# A share of texts that reach max_length from which a reader should know.
TRUNCATED = 0.2


@dataclass(frozen=True)
class PreparedDomain:
    """A domain's tokenised splits on disk, and what is known about them. Cheap to pickle: the rows stay on disk.

    Attributes:
        name: The domain's name in the study.
        task_name: Its task.
        options: The task's settings, as the study file says.
        architecture: Kind of the model that the data was tokenised for.
        metric: The objective: a key of `Task.score`.
        direction: Whether more of the metric is better.
        labels: Label names; their positions are the label ids.
        parts: Names of the data sets that were joined; () for a domain of one.
        rows: Examples per split. ``train`` and ``validation`` are always there, ``test`` unless the study wants none.
        max_length: Tokens per text at most.
        fingerprint: Hash of texts, labels and splits, whatever the tokenizer.
        source: Where the data came from, as the study file says; with the commit of a data set of the Hub.
        warnings: What a careful reader should know about the data.
        pad_token_id: What batches are padded with (the end token where a tokenizer has no padding token).
        folder: Where the splits and the manifest are.
    """

    name: str
    task_name: str
    options: dict[str, Any]
    architecture: Architecture
    metric: str
    direction: Direction
    labels: tuple[str, ...]
    parts: tuple[str, ...]
    rows: dict[str, int]
    max_length: int
    fingerprint: str
    source: str
    warnings: tuple[str, ...]
    pad_token_id: int
    folder: Path

    @property
    def task(self) -> Task:
        """The domain's task."""
        return get_task(self.task_name, options=self.options)

    @property
    def head(self) -> Head:
        """How the model that the data was tokenised for does the task."""
        return self.task.heads[self.architecture]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that made the data; kept for tasks that write text (`Task.decodes`)."""
        return _open_tokenizer(self.folder / TOKENIZER)

    def split(self, name: str) -> datasets.Dataset:
        """The tokenised rows of a split, memory-mapped.

        Raises:
            KeyError: The domain has no such split.
        """
        if name not in self.rows:
            raise KeyError(f"domain {self.name!r} has no split {name!r}; its splits: {', '.join(self.rows)}")
        return _open_split(self.folder / name)

    def lengths(self, name: str) -> tuple[int, ...]:
        """Tokens of each row of a tokenised split (of which an example may have several).

        Raises:
            KeyError: The domain has no such split.
        """
        if name not in self.rows:
            raise KeyError(f"domain {self.name!r} has no split {name!r}; its splits: {', '.join(self.rows)}")
        return _lengths(self.folder / name)

    def facts(self) -> DomainFacts:
        """What the study records about the domain."""
        return DomainFacts(
            task=self.task_name,
            metric=self.metric,
            direction=self.direction,
            labels=self.labels,
            rows=dict(self.rows),
            max_length=self.max_length,
            fingerprint=self.fingerprint,
            source=self.source,
            warnings=self.warnings,
        )

    @classmethod
    def load(cls, folder: Path) -> PreparedDomain:
        """What an earlier `prepare_domain` left in a folder.

        Raises:
            StudyError: The folder is not complete.
        """
        prepared = _load(folder)
        if prepared is None:
            raise StudyError(f"the prepared data in {str(folder)!r} is incomplete: delete that folder and run again")
        return prepared


@functools.lru_cache(maxsize=64)
def _open_split(folder: Path) -> datasets.Dataset:
    """Opening a split reads its description and maps its files anew: once per process is enough."""
    import datasets

    return datasets.load_from_disk(str(folder))


@functools.lru_cache(maxsize=64)
def _lengths(folder: Path) -> tuple[int, ...]:
    import pyarrow.compute

    data = _open_split(folder).data
    if "length" in data.column_names:
        return tuple(data.column("length").to_pylist())
    return tuple(pyarrow.compute.list_value_length(data.column("input_ids")).to_pylist())


@functools.lru_cache(maxsize=16)
def _open_tokenizer(folder: Path) -> Any:
    return _load_tokenizer(str(folder), None)


@dataclass(frozen=True)
class CheckedDomain:
    """A domain that is known to be sound; nothing of it has been written yet.

    Attributes:
        name: The domain's name in the study.
        raw: Its text.
        options: The task's settings, as the study file says.
        tokenizer: The model's tokenizer.
        model_location: Folder or Hub id of the tokenizer.
        max_length: Tokens per text at most.
        architecture: Kind of the model.
        decoder_start_token_id: What an encoder-decoder's decoder begins with; None where its configuration names none.
    """

    name: str
    raw: RawDomain
    options: dict[str, Any]
    tokenizer: Any
    model_location: str
    max_length: int
    architecture: Architecture
    decoder_start_token_id: int | None = None

    @property
    def task(self) -> Task:
        """The domain's task."""
        return self.raw.task

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names; their positions are the label ids."""
        return self.raw.labels

    @property
    def head(self) -> Head:
        """How the model does the task."""
        return self.task.heads[self.architecture]

    def prepare(self, cache: Path) -> PreparedDomain:
        """Tokenise the domain, unless the same was tokenised before. Several processes may do so at once.

        Args:
            cache: Where prepared domains are kept, each in a folder named after a hash of all that went into it.

        Raises:
            StudyError: A text cannot be tokenised, or the cache cannot be written.
        """
        raw = self.raw
        facts = {
            "name": self.name,
            "task_name": raw.task.name,
            "options": self.options,
            "architecture": self.architecture,
            "metric": raw.metric.name,
            "direction": raw.metric.direction,
            "labels": list(raw.labels),
            "parts": list(raw.parts),
            "rows": {split: table.num_rows for split, table in raw.splits.items()},
            "max_length": self.max_length,
            "fingerprint": raw.fingerprint,
            "source": raw.source,
            "pad_token_id": _pad_token_id(self.tokenizer, self.model_location),
        }
        key = digest(
            [
                [
                    str(FORMAT_VERSION),
                    json.dumps([facts, raw.warnings, self.decoder_start_token_id], sort_keys=True),
                    _tokenizer_content(self.tokenizer),
                ]
            ]
        )
        target = cache.resolve() / key[:32]
        prepared = _load(target)
        if prepared is not None:
            return prepared
        if target.exists():
            log.warning("the prepared data of domain %r in %s is damaged, and made anew", self.name, target)

        tokenised = {}
        warnings = list(raw.warnings)
        for split, table in raw.splits.items():
            how = Tokenization(
                self.tokenizer,
                self.max_length,
                self.architecture,
                training=split == "train",
                decoder_start_token_id=self.decoder_start_token_id,
            )
            try:
                tokenised[split] = _with_parts(raw.task.tokenize(table, raw.labels, how), table, raw.parts)
            except ValueError as error:
                raise StudyError(f"{split}: {error}", ("domains", self.name, "data")) from None
            warnings += [f"{split}: {warning}" for warning in how.warnings]
        inputs = tokenised["train"].data.column("input_ids").to_pylist()
        share = sum(len(tokens) >= self.max_length for tokens in inputs) / len(inputs)
        # Windows are as long as they may be, and lose nothing.
        if share >= TRUNCATED and EXAMPLE not in tokenised["train"].column_names:
            warnings.append(f"{share:.0%} of train fills all {self.max_length} tokens of max_length: texts are cut off")
        try:
            tokenizer = self.tokenizer if raw.task.decodes else None
            _write(target, tokenised, {**facts, "warnings": warnings}, tokenizer)
        except OSError as error:
            raise StudyError(f"cannot write prepared data to {str(cache)!r}: {error}") from None
        return PreparedDomain.load(target)


def _with_parts(tokenised: datasets.Dataset, table: pa.Table, parts: tuple[str, ...]) -> datasets.Dataset:
    """Carry the part of each example over to its rows, as a number."""
    import datasets

    if not parts:
        return tokenised
    index = {name: number for number, name in enumerate(parts)}
    of_example = [index[name] for name in table.column(PART).to_pylist()]
    if EXAMPLE in tokenised.column_names:
        of_example = [of_example[example] for example in tokenised.data.column(EXAMPLE).to_pylist()]
    return datasets.Dataset(tokenised.data.table.append_column(PART, pa.array(of_example, pa.int64())))


def check_domain(
    name: str,
    spec: StudySpec,
    *,
    folder: Path,
    model_location: str,
    revision: str | None,
    architecture: Architecture | None = None,
    config: Any = None,
) -> CheckedDomain:
    """Check all that can be wrong with a domain, and write nothing.

    Args:
        name: The domain's name in the study.
        spec: The study.
        folder: The study file's folder; relative paths start there.
        model_location: Folder or Hub id whose tokenizer is used.
        revision: Hub revision of the tokenizer.
        architecture: Kind of the model; read from its configuration where absent.
        config: The model's configuration, where it does not stand beside the tokenizer.

    Raises:
        StudyError: Anything is wrong with the domain, the model has no usable tokenizer, or cannot do the task.
    """
    raw = load_domain(name, spec, folder)
    tokenizer = _load_tokenizer(model_location, revision)
    _pad_token_id(tokenizer, model_location)
    if config is None and architecture in (None, "encoder-decoder"):
        config = model_config(model_location, revision)
    max_length = spec.domain_max_length(name)
    kind = architecture or architecture_of(config)
    check_architecture(raw.task, kind, model_location, name)
    _check_length(max_length, raw.task, kind, tokenizer, config, spec, name)
    start = getattr(config, "decoder_start_token_id", None) if kind == "encoder-decoder" else None
    return CheckedDomain(name, raw, spec.domains[name].options, tokenizer, model_location, max_length, kind, start)


def check_architecture(task: Task, architecture: Architecture, model: str, domain: str) -> None:
    """Refuse models of a kind that cannot do a task.

    Raises:
        StudyError: Names the kinds that can.
    """
    if architecture not in task.heads:
        able = " and ".join(f"{known}s" for known in task.heads)
        article = "a" if architecture == "decoder" else "an"
        raise StudyError(
            f"the model {model!r} is {article} {architecture}, and {task.name} is for {able}",
            ("domains", domain, "task"),
        )


def prepare_domain(
    name: str,
    spec: StudySpec,
    *,
    folder: Path,
    model_location: str,
    revision: str | None,
    cache: Path,
    architecture: Architecture | None = None,
    config: Any = None,
) -> PreparedDomain:
    """Check a domain's data, and tokenise it unless the same was tokenised before.

    As `check_domain` and `CheckedDomain.prepare`: everything is checked before anything is written.
    """
    checked = check_domain(
        name,
        spec,
        folder=folder,
        model_location=model_location,
        revision=revision,
        architecture=architecture,
        config=config,
    )
    return checked.prepare(cache)


def _load_tokenizer(location: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    on_hub = not Path(location).is_dir()
    if on_hub:
        hub_reachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
    except Exception as error:
        # Missing files, unknown ids and missing networks all raise differently, by version.
        why = out_of_reach(error) if on_hub else None
        reason = why or first_line(error).rstrip(" .:")
        message = f"cannot load the tokenizer of {location!r}: {reason} (save it beside the model with save_pretrained)"
        place = ("model",)
        raise (UnreachableError(message, place, why) if why else StudyError(message, place)) from None
    # Where the files are missing, transformers makes an empty tokenizer, to which every word is unknown.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise StudyError(
            f"the model {location!r} brings no vocabulary: save its tokenizer beside it with save_pretrained",
            ("model",),
        )
    return tokenizer


def _check_length(
    max_length: int, task: Task, architecture: Architecture, tokenizer: Any, config: Any, spec: StudySpec, name: str
) -> None:
    reads, writes = (None, None) if config is None else positions_said(config)
    # Tokenizers without a limit say 1e30, whatever their model has positions for.
    said = None if has_relative_positions(config) else tokenizer.model_max_length
    try:
        task.check_length(
            max_length, architecture, min((limit for limit in (reads, said) if limit is not None), default=None), writes
        )
    except ValueError as error:
        own = spec.domains[name].max_length is not None
        loc = ("domains", name, "max_length") if own else ("training", "max_length")
        raise StudyError(str(error), loc) from None


def _pad_token_id(tokenizer: Any, location: str) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise StudyError(f"the tokenizer of {location!r} has neither a padding token nor an end token", ("model",))


def _tokenizer_content(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Set anew by every call, so they say what was tokenised last.
        del content["truncation"], content["padding"]
    else:
        content = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map}
    kind = [
        type(tokenizer).__name__,
        tokenizer.truncation_side,
        tokenizer.model_input_names,
        tokenizer.eos_token_id,
        getattr(tokenizer, "chat_template", None),
    ]
    return json.dumps([kind, content], sort_keys=True, default=str)


def _write(target: Path, splits: Mapping[str, datasets.Dataset], facts: Mapping[str, Any], tokenizer: Any) -> None:
    """Write a cache entry under another name and move it into place, whoever else does the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        with quiet_datasets():
            for split, dataset in splits.items():
                dataset.save_to_disk(str(temporary / split))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary / TOKENIZER))
        files = {
            path.relative_to(temporary).as_posix(): [path.stat().st_size, _checksum(path)]
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
        # As it will be read: JSON has no tuples, and its keys are texts.
        manifest["checksum"] = _described(json.loads(json.dumps(manifest)))
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
        while True:
            try:
                temporary.rename(target)
                return
            except OSError:
                if not target.exists():
                    raise
            if _load(target) is not None:
                # Another process was faster; the content is the same by construction.
                return
            discarded = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
            with contextlib.suppress(FileNotFoundError):
                target.rename(discarded)
            # This process may have opened what is discarded.
            for opened in (_open_split, _lengths, _open_tokenizer):
                opened.cache_clear()
            shutil.rmtree(discarded, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(folder: Path) -> PreparedDomain | None:
    """The cache entry in a folder, or None where it is absent or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksum = manifest.pop("checksum")
        if manifest["format_version"] != FORMAT_VERSION or checksum != _described(manifest):
            return None
        del manifest["format_version"]
        for file, (size, content) in manifest.pop("files").items():
            if os.stat(folder / file).st_size != size or _checksum(folder / file) != content:
                return None
        for field in ("labels", "parts", "warnings"):
            manifest[field] = tuple(manifest[field])
        return PreparedDomain(**manifest, folder=folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _checksum(file: Path) -> int:
    """CRC-32 of a file, read in pieces; about a second for a GB, once for each process that trains on it."""
    value = 0
    with file.open("rb") as opened:
        while piece := opened.read(2**20):
            value = zlib.crc32(piece, value)
    return value


def _described(manifest: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))
