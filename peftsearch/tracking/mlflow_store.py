"""Where MLflow's store is, what its client reads from the environment, and how its troubles are told."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from peftsearch.files import on_network
from peftsearch.spec import hide_secrets, without_passwords
from peftsearch.tracking.names import shorten

_PATHS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Where MLflow's database keeps absolute paths."""


def default_tracking_uri(storage: Path) -> str:
    """The MLflow store of a storage folder: one SQLite file for all its studies."""
    return f"sqlite:///{storage.expanduser().resolve() / 'mlflow.db'}"


def default_artifacts(storage: Path) -> str:
    """Where the default store keeps its artifacts."""
    return str(storage.expanduser().resolve() / "mlflow-artifacts")


def prepare_environment() -> None:
    """Settings that MLflow reads from the environment, where the user has not set them.

    - ``MLFLOW_HTTP_REQUEST_TIMEOUT`` = 10 (seconds; MLflow's 120 would hold up the end of a study),
    - ``MLFLOW_HTTP_REQUEST_MAX_RETRIES`` = 0 (we try again ourselves, after looking at what is there: a request that is
      blindly sent twice may create a run twice),
    - ``MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT`` and ``MLFLOW_DISABLE_TELEMETRY`` = true.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def prepare_sqlite(tracking_uri: str) -> None:
    """Create a SQLite store's folder, and have the file use a write-ahead log; not on a network's file system.

    It is remembered in the file. Writing a trial then takes a third of the time, and whoever looks at the UI neither
    waits for the study nor stops it. https://www.sqlite.org/wal.html
    """
    path = sqlite_file(tracking_uri)
    if path is None:
        return
    import sqlite3

    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=10)) as connection:
        # A write-ahead log needs shared memory, which several machines do not have.
        connection.execute(f"PRAGMA journal_mode={'DELETE' if on_network(path) else 'WAL'}")


def sqlite_file(tracking_uri: str) -> Path | None:
    """The file of a SQLite store; None for every other one."""
    prefix = "sqlite:///"
    if not tracking_uri.startswith(prefix):
        return None
    return Path(tracking_uri.removeprefix(prefix).partition("?")[0])


def relocate_artifacts(tracking_uri: str, artifacts: str) -> None:
    """Have a SQLite store that was moved, copied, or is mounted elsewhere find and keep its artifacts in their folder
    of today.

    MLflow writes the absolute path into every experiment and every run, and goes on writing there
    (https://github.com/mlflow/mlflow/issues/3144).

    Args:
        tracking_uri: The store; nothing happens to one that is not SQLite, or not there yet.
        artifacts: The folder. Former ones are known by its name: ``/before/mlflow-artifacts``, and what a server
            chooses below it for experiments of its own, ``/before/mlflow-artifacts/3``.

    Raises:
        sqlite3.Error: The store cannot be read, or written where that is needed.
    """
    path = sqlite_file(tracking_uri)
    if path is None or not path.is_file():
        return
    import sqlite3

    name = Path(artifacts).name
    with closing(sqlite3.connect(path, timeout=10)) as connection, connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
            return
        former = set()
        for (location,) in connection.execute("SELECT DISTINCT artifact_location FROM experiments"):
            place = Path(location or "")
            folder = place.parent if place.name.isdigit() else place
            if folder.name == name and str(folder) != artifacts:
                former.add(str(folder))
        for root in former:
            for table, column in _PATHS:
                if not connection.execute(
                    "SELECT 1 FROM pragma_table_info(?) WHERE name = ?", (table, column)
                ).fetchone():
                    continue
                connection.execute(
                    f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
                    f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'",
                    {"new": artifacts, "old": root},
                )


def public_uri(tracking_uri: str) -> str:
    """The address fit for people's eyes."""
    return without_passwords(tracking_uri)


def brief(error: Exception) -> str:
    """An error of MLflow's, or of what it uses, in one line."""
    # MLflow quotes the address that it asked, login included.
    lines = hide_secrets(str(error)).strip().splitlines()
    return shorten(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, 300)
