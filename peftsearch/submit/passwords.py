"""No password travels with a job: Ray keeps a job's command and files, and shows them to whoever may see its jobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peftsearch.spec import StudyError, StudyFile, without_passwords


def refuse_passwords(file: StudyFile, overrides: Sequence[str]) -> None:
    """See that a job would hold no secret.

    Raises:
        StudyError: A setting or the study file, be it in a comment, holds a password or token.
    """
    message = (
        "holds a password or token, which everybody who may see the cluster's jobs could read: leave it out, and have "
        "the environment of the cluster's head bring it (PGPASSWORD or ~/.pgpass for PostgreSQL, "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for MLflow, HF_TOKEN for the Hub)"
    )
    for setting in overrides:
        key, _, value = setting.partition("=")
        if without_passwords(value) != value:
            raise StudyError(f"--set {key.strip()}: {message}")
    for text, loc in _texts(file.spec.model_dump(mode="json")):
        if without_passwords(text) != text:
            raise StudyError(file.explain(StudyError(message, loc)))
    for number, line in enumerate((file.text or "").splitlines(), 1):
        if without_passwords(line) != line:
            raise StudyError(f"{file.where}, line {number}: {message}")


def _texts(value: Any, loc: tuple[str | int, ...] = ()) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """Every text in a specification, keys included, with its place."""
    if isinstance(value, str):
        yield value, loc
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key), loc
            yield from _texts(item, (*loc, key))
    elif isinstance(value, Sequence):
        for number, item in enumerate(value):
            yield from _texts(item, (*loc, number))
