"""Prepared data of a storage that is no folder: copied into it once, and from it by each machine that trains.

Data is mapped into memory from files, so every machine has a copy of its own (`peftsearch.files.local_cache`). A
machine that joins a study needs neither the data's source nor a tokenizer for it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

from peftsearch.domains import PreparedDomain
from peftsearch.files import Place, copy_tree, exists, local_cache, persist, write_bytes
from peftsearch.spec import StudyError
from peftsearch.training.segment import WorkerPlan

_COMPLETE = "complete"


def publish(plan: WorkerPlan, storage: Place) -> WorkerPlan:
    """Copy a plan's prepared data into an object store, what is not there yet; returns the plan with the new places.

    Raises:
        StorageError: The storage cannot be written.
    """
    places: dict[tuple[str, str], Place] = {}
    for key, folder in plan.domains.items():
        target = storage / "cache" / folder.name
        # Folders are named after all that went into them: one that is complete is the same.
        if not exists(target / _COMPLETE):
            persist(target, lambda folder=folder, target=target: _copy(folder, target))  # type: ignore[misc]
        places[key] = target
    return replace(plan, domains=places)


def _copy(folder: Place, target: Place) -> None:
    copy_tree(folder, target)
    write_bytes(target / _COMPLETE, b"")


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
