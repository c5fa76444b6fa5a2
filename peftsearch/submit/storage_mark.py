"""Whether a job sees the storage that was meant: a folder of the same name may be another one on the cluster."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from peftsearch.spec import StudyError
from peftsearch.storage import ENVIRONMENT_VARIABLE
from peftsearch.study import Study

STORAGE_MARK = "PEFTSEARCH_STORAGE_MARK"
"""Environment variable of a job: a file in the storage that the machine that has submitted it left there."""

_MARK_SECONDS = 24 * 3600.0
"""A mark that a job has not found in so long is not looked for any more."""


def mark_storage(study: Study, told: Callable[[str], None]) -> Path | None:
    """Leave a file in the storage that the job looks for: a folder of the same name may be another one there.

    None where there is nothing to look for: an object store, or a folder that this machine does not have.
    """
    storage = study.folder.storage
    if not isinstance(storage, Path):
        return None
    if not storage.is_dir() and not storage.parent.is_dir():
        told(
            f"this machine does not have the folder {storage}: 'status', 'frontier' and 'export' of {study.name} work "
            "where it is mounted"
        )
        return None
    mark = storage / f".submitted-{uuid.uuid4().hex}"
    try:
        storage.mkdir(exist_ok=True)
        for old in storage.glob(".submitted-*"):
            if time.time() - old.stat().st_mtime > _MARK_SECONDS:
                old.unlink(missing_ok=True)
        mark.touch()
    except OSError as error:
        raise StudyError(
            f"cannot write to the storage {storage}: {error.strerror or error} (choose another with --storage)"
        ) from None
    return mark


def check_arrival(study: Study) -> None:
    """In a job, before its study runs: see that the storage is the one that the submitting machine means.

    Raises:
        StudyError: It is another folder of the same name.
    """
    if not (mark := os.environ.get(STORAGE_MARK)):
        return
    if not Path(mark).exists():
        storage = os.environ.get(ENVIRONMENT_VARIABLE)
        own = f" (the cluster's own is {storage})" if storage else ""
        raise StudyError(
            f"the cluster does not see the folder {study.folder.storage} of the machine that has submitted the study: "
            f"name a storage that both see with --storage, a shared folder or a URI such as s3://bucket/folder{own}"
        )
    with contextlib.suppress(OSError):
        Path(mark).unlink()
