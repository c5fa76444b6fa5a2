"""What a study's folder says of the study: its specification and facts, as they are written and as they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftsearch.spec import StudyError, StudyFacts, StudySpec, hide_secrets, without_passwords
from peftsearch.storage import StudyFolder, damaged

SUBMITTED_FROM = "PEFTSEARCH_SUBMITTED_FROM"
"""Environment variable of a job: the study file's folder on the machine that has submitted it."""


def as_saved(spec: StudySpec) -> dict[str, Any]:
    """The specification as it is written: without passwords, which whoever opens the study brings along."""
    saved = spec.model_dump(mode="json")
    saved["tracking"] = {key: without_passwords(value) for key, value in saved["tracking"].items()}
    saved["description"] = saved["description"] and hide_secrets(saved["description"])
    return saved


def specification(saved: Mapping[str, Any] | None, folder: StudyFolder) -> StudySpec:
    """The specification in a study's folder.

    Raises:
        StudyError: The file is damaged.
    """
    try:
        return StudySpec.model_validate((saved or {})["study"])
    except (KeyError, ValidationError, RecursionError) as error:
        raise damaged(folder.spec, f"{type(error).__name__}: it holds no study") from None


def known_facts(saved: Mapping[str, Any] | None, folder: StudyFolder) -> StudyFacts:
    """The facts in a study's folder.

    Raises:
        StudyError: There are none yet, or the file is damaged.
    """
    if saved is None:
        raise StudyError(f"the study {folder.name!r} has no {folder.facts.name} yet: run it first")
    try:
        return StudyFacts.model_validate(saved)
    except (ValidationError, RecursionError) as error:
        raise damaged(folder.facts, f"{type(error).__name__}: it holds no facts of a study") from None


def data_folder(saved: Mapping[str, Any], folder: StudyFolder) -> Path:
    """Where relative paths of a study start; of one that ran as a job, the machine that has submitted it knows.

    Raises:
        StudyError: The file does not say.
    """
    places = [Path(saved[key]) for key in ("folder", "submitted_from") if isinstance(saved.get(key), str)]
    if not places:
        raise damaged(folder.spec, "it names no folder that its paths start in")
    return next((place for place in places if os.path.isdir(place)), places[0])


def now() -> str:
    """The time as a study's files say it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
