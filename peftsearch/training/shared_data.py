"""Prepared data of a storage that is no folder: copied into it once, and from it by each machine that trains.

Data is mapped into memory from files, so every machine has a copy of its own (`peftsearch.files.local_cache`). A
machine that joins a study needs neither the data's source nor a tokenizer for it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path

from peftsearch.domains import PreparedDomain
from peftsearch.files import Place, copy_tree, filesystem, local_cache, patiently, persist
from peftsearch.spec import StudyError
from peftsearch.training.segment import WorkerPlan


def publish(plan: WorkerPlan, storage: Place) -> WorkerPlan:
    """Copy a plan's prepared data into an object store, what is not there yet or damaged; returns the plan with the new
    places.

    Folders are named after all that went into them: whoever else has written one has written the same.

    Raises:
        StorageError: The storage cannot be written.
    """
    places: dict[tuple[str, str], Place] = {}
    for key, folder in plan.domains.items():
        target = storage / "cache" / folder.name
        if not patiently(target, partial(_same, folder, target), "read"):
            persist(target, partial(copy_tree, folder, target))
        places[key] = target
    return replace(plan, domains=places)


def _same(folder: Place, target: Place) -> bool:
    """Whether every file of a folder is in another one, byte by byte."""
    assert isinstance(folder, Path)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    there = [filesystem(target / file.relative_to(folder).as_posix()) for file in files]
    # Of all files first what costs no reading.
    sizes = [system.get_file_info(path).size for system, path in there]
    if sizes != [file.stat().st_size for file in files]:
        return False
    for file, (system, path) in zip(files, there, strict=True):
        with file.open("rb") as here, system.open_input_stream(path, compression=None) as stream:
            while block := here.read(_BLOCK):
                if stream.read(len(block)) != block:
                    return False
    return True


_BLOCK = 8 * 2**20


def fetch(where: Place) -> PreparedDomain:
    """A domain's prepared data, from this machine's copy.

    Raises:
        StudyError: It is not complete.
        OSError: The storage cannot be read.
    """
    if isinstance(where, Path):
        return PreparedDomain.load(where)
    target = local_cache() / where.name
    try:
        return PreparedDomain.load(target)
    except StudyError:
        pass
    target.parent.mkdir(parents=True, exist_ok=True)
    copy = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        copy_tree(where, copy)
        try:
            os.rename(copy, target)
        except OSError:
            # Another worker of this machine was faster, or left it half done.
            try:
                return PreparedDomain.load(target)
            except StudyError:
                shutil.rmtree(target, ignore_errors=True)
                os.rename(copy, target)
        return PreparedDomain.load(target)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
