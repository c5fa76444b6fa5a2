"""Where a study's files are: one folder per study inside a storage, which is a folder or in an object store."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peftsearch import files
from peftsearch.files import (
    Place,
    RemotePath,
    StorageError,
    check_bucket,
    check_writable,
    delete,
    exists,
    local_cache,
    names,
    place,
    reason,
    write_bytes,
    write_json,
)
from peftsearch.spec import StudyError, check_name

__all__ = [
    "StudyFolder",
    "cache_folder",
    "check_storage",
    "damaged",
    "list_studies",
    "mendable",
    "mlflow_folder",
    "reaching",
    "read_json",
    "storage_folder",
    "study_folder",
    "write_json",
]

ENVIRONMENT_VARIABLE = "PEFTSEARCH_STORAGE"


def storage_folder(given: str | os.PathLike[str] | RemotePath | None = None) -> Place:
    """The storage: as given, or ``PEFTSEARCH_STORAGE``, or ``~/peftsearch``; a folder, or a URI (`peftsearch.files`).

    Raises:
        StudyError: The URI is none of a storage.
    """
    if isinstance(given, RemotePath):
        return given
    return place(given or os.environ.get(ENVIRONMENT_VARIABLE) or Path.home() / "peftsearch")


@contextmanager
def reaching(storage: Place) -> Iterator[None]:
    """Around what reads a storage.

    Raises:
        StudyError: An object store cannot be reached, or a folder cannot be read, or it is a file. A folder that is not
            there is an empty storage.
    """
    try:
        if isinstance(storage, Path) and _is_no_folder(storage):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        yield
    except OSError as error:
        raise StudyError(
            f"cannot read the storage {storage}: {reason(error)} (choose another with --storage or "
            f"{ENVIRONMENT_VARIABLE})"
        ) from None


def _is_no_folder(path: Path) -> bool:
    """Whether a path is that of a file, or leads through one."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except NotADirectoryError:
        return True
    except OSError:
        return False  # not there, or not for us: what reads it says so


def check_storage(storage: Place) -> None:
    """The storage can be written, or made; nothing is created in it yet.

    Raises:
        StudyError: It cannot.
    """
    if not isinstance(storage, Path):
        try:
            check_bucket(storage)
        except OSError as error:
            raise StudyError(
                f"cannot use the storage {storage}: {reason(error)} (choose another with --storage or "
                f"{ENVIRONMENT_VARIABLE})"
            ) from None
        return
    try:
        check_writable(storage)
    except OSError as error:
        raise StudyError(
            f"cannot write to the storage {storage} ({reason(error)}): choose another with --storage or "
            f"{ENVIRONMENT_VARIABLE}"
        ) from None


_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def mendable() -> Iterator[None]:
    """Around what fails where the storage takes nothing.

    Raises:
        RuntimeError: It is full, read-only, somebody else's or away; the study continues when that is mended.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error, StorageError) and error.errno not in _REFUSED:
            raise
        what = str(error) if isinstance(error, StorageError) else f"cannot write {error.filename}: {error.strerror}"
        raise RuntimeError(f"{what}: mend that and run the study again, it continues") from error


@dataclass(frozen=True)
class StudyFolder:
    """The files of one study.

    Attributes:
        storage: The storage.
        name: The study's name.
    """

    storage: Place
    name: str

    @property
    def option(self) -> str | None:
        """What commands need as ``--storage``, in whoever's shell; None where they find the storage without."""
        return None if self.storage == Path.home() / "peftsearch" else str(self.storage)

    @property
    def path(self) -> Place:
        """The study's own folder."""
        return self.storage / "studies" / self.name

    @property
    def spec(self) -> Place:
        """The checked specification, as JSON."""
        return self.path / "study.json"

    @property
    def study_file(self) -> Place:
        """The study file as it was given."""
        return self.path / "study.yaml"

    @property
    def facts(self) -> Place:
        """`peftsearch.spec.StudyFacts` as JSON."""
        return self.path / "facts.json"

    @property
    def cache(self) -> Path:
        """Tokenised data, shared by all studies of the storage; libraries read it from this machine's disk."""
        return cache_folder(self.storage)

    @property
    def ledger_url(self) -> str:
        """Default ledger: SQLite in the study's folder.

        Raises:
            StudyError: The storage is an object store, which holds no database.
        """
        if not isinstance(self.path, Path):
            raise StudyError(
                f"SQLite cannot write to an object store such as {self.storage}: set tracking.ledger to a database, "
                "postgresql://...",
                ("tracking", "ledger"),
            )
        return f"sqlite:///{self.path / 'ledger.db'}"

    @property
    def mlflow_folder(self) -> Path:
        """Where the default MLflow store is; errors as `mlflow_folder`."""
        return mlflow_folder(self.storage)

    def exists(self) -> bool:
        """Whether a study of this name was ever started.

        Raises:
            StudyError: The storage cannot be reached.
        """
        with reaching(self.storage):
            return exists(self.spec)

    def require(self) -> StudyFolder:
        """This folder, if the study exists.

        Raises:
            StudyError: There is no such study; names those that there are.
        """
        if not self.exists():
            known = list_studies(self.storage)
            there = f"there are: {', '.join(known)}" if known else "it holds no study yet"
            raise StudyError(f"no study {self.name!r} in the storage {self.storage}: {there}")
        return self

    def create(self) -> None:
        """Make the folder.

        Raises:
            StudyError: The storage cannot be written.
        """
        try:
            probe = self.path / ".writable"
            # Of some size: on a full disk an empty file can still be made.
            write_bytes(probe, bytes(64 * 1024))
            delete(probe)
        except OSError as error:
            raise StudyError(
                f"cannot write to the storage {self.storage}: {reason(error)} "
                f"(choose another with --storage or {ENVIRONMENT_VARIABLE})"
            ) from None


def mlflow_folder(storage: Place) -> Path:
    """Where the default MLflow store of a storage is.

    Raises:
        StudyError: The storage is an object store, which holds no database.
    """
    if not isinstance(storage, Path):
        raise StudyError(
            f"MLflow's SQLite store cannot be in an object store such as {storage}: set tracking.mlflow to the "
            "address of an MLflow server, or to off",
            ("tracking", "mlflow"),
        )
    return storage


def cache_folder(storage: Place) -> Path:
    """Where this machine keeps a storage's tokenised data."""
    return storage / "cache" if isinstance(storage, Path) else local_cache()


def study_folder(name: str, storage: str | os.PathLike[str] | RemotePath | None = None) -> StudyFolder:
    """The folder of a study by name.

    Raises:
        StudyError: The name could leave the storage.
    """
    try:
        return StudyFolder(storage_folder(storage), check_name(name))
    except ValueError as error:
        raise StudyError(str(error)) from None


def read_json(where: Place) -> dict[str, Any] | None:
    """What one of a study's files holds; None where there is none.

    Raises:
        StudyError: The file is damaged, or cannot be read, or the object store stayed away.
    """
    try:
        if isinstance(where, Path):
            found = files.read_json(where)
        else:
            # Whoever gets here has heard of the store a moment ago: it will come back.
            found = files.patiently(where, partial(files.read_json, where), "read")
    except (ValueError, RecursionError) as error:
        raise damaged(where, reason(error)) from None
    except StorageError as error:
        raise StudyError(str(error)) from None
    except OSError as error:
        raise StudyError(f"cannot read {str(where)!r}: {reason(error)}") from None
    if found is not None and not isinstance(found, dict):
        raise damaged(where, "it holds no JSON object")
    return found


def damaged(where: Place, why: str) -> StudyError:
    """The sentence about a file of a study that is not as it was written."""
    return StudyError(
        f"{str(where)!r} is damaged ({why}): restore it from a copy, or start the study anew under another --name"
    )


def list_studies(storage: Place) -> list[str]:
    """Names of the studies in a storage.

    Raises:
        StudyError: The storage cannot be reached.
    """
    folder = storage / "studies"
    with reaching(storage):
        return [name for name in names(folder) if _holds_study(folder / name)]


def _holds_study(folder: Place) -> bool:
    try:
        return exists(folder / "study.json")
    except PermissionError:
        # Somebody else's, perhaps; whoever opens it is told.
        return True
