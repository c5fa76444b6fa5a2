"""Where a study's files are: one folder per study inside a storage folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from peftsearch.files import read_json, write_json
from peftsearch.spec import StudyError, check_name

__all__ = ["StudyFolder", "list_studies", "read_json", "storage_folder", "study_folder", "write_json"]

ENVIRONMENT_VARIABLE = "PEFTSEARCH_STORAGE"


def storage_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """The storage: as given, or ``PEFTSEARCH_STORAGE``, or ``~/peftsearch``."""
    chosen = given or os.environ.get(ENVIRONMENT_VARIABLE) or Path.home() / "peftsearch"
    return Path(chosen).expanduser().absolute()


@dataclass(frozen=True)
class StudyFolder:
    """The files of one study.

    Attributes:
        storage: The storage folder.
        name: The study's name.
    """

    storage: Path
    name: str

    @property
    def path(self) -> Path:
        """The study's own folder."""
        return self.storage / "studies" / self.name

    @property
    def spec(self) -> Path:
        """The checked specification, as JSON."""
        return self.path / "study.json"

    @property
    def study_file(self) -> Path:
        """The study file as it was given."""
        return self.path / "study.yaml"

    @property
    def facts(self) -> Path:
        """`peftsearch.spec.StudyFacts` as JSON."""
        return self.path / "facts.json"

    @property
    def driver(self) -> Path:
        """Who runs or last ran the study."""
        return self.path / "driver.json"

    @property
    def cache(self) -> Path:
        """Tokenised data, shared by all studies of the storage."""
        return self.storage / "cache"

    @property
    def ledger_url(self) -> str:
        """Default ledger: SQLite in the study's folder."""
        return f"sqlite:///{self.path / 'ledger.db'}"

    def exists(self) -> bool:
        """Whether a study of this name was ever started."""
        return self.spec.exists()

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
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StudyError(
                f"cannot write to the storage {self.storage}: {error.strerror or error} "
                f"(choose another with --storage or {ENVIRONMENT_VARIABLE})"
            ) from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the study as its only driver.

        Raises:
            StudyError: Another process holds it; says which.
        """
        with (self.path / "driver.lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = read_json(self.driver) or {}
                raise StudyError(
                    f"the study {self.name!r} is being run by process {holder.get('pid', '?')} on "
                    f"{holder.get('host', 'another machine')} since {holder.get('since', '?')}: "
                    "wait for it, stop it, or give this run another --name"
                ) from None
            yield
            _release(file)

    def is_held(self) -> bool:
        """Whether a driver is running the study at this moment."""
        try:
            with (self.path / "driver.lock").open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _release(file)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def note_driver(self, **fields: Any) -> None:
        """Update what is known of the driver."""
        known = read_json(self.driver) or {}
        write_json(self.driver, {**known, "pid": os.getpid(), "host": socket.gethostname(), **fields})


def _release(file: IO[str]) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)


def study_folder(name: str, storage: str | os.PathLike[str] | None = None) -> StudyFolder:
    """The folder of a study by name.

    Raises:
        StudyError: The name could leave the storage.
    """
    try:
        return StudyFolder(storage_folder(storage), check_name(name))
    except ValueError as error:
        raise StudyError(str(error)) from None


def list_studies(storage: Path) -> list[str]:
    """Names of the studies in a storage."""
    folder = storage / "studies"
    if not folder.is_dir():
        return []
    return sorted(item.name for item in folder.iterdir() if (item / "study.json").exists())
