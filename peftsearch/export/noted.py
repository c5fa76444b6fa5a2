"""Where exports went, as tags of their trials' runs in MLflow: best effort, as nothing of an export rests on it."""

from __future__ import annotations

from collections.abc import Mapping

from peftsearch.spec import hide_secrets
from peftsearch.tracking.mlflow_runs import TAG_LENGTH
from peftsearch.tracking.mlflow_store import brief, prepare_environment, public_uri, sqlite_file
from peftsearch.tracking.names import shorten

EXPORTED = "exported"
"""Tag: the folder, or the URI, of a trial's latest export; of other forms ``exported-merged``, ``exported-as-lora``."""
PUSHED = "pushed"
"""The same of its repository on the Hub."""


def note_exports(tracking_uri: str, places: Mapping[str, Mapping[str, str]]) -> str | None:
    """Set tags of runs.

    Args:
        tracking_uri: MLflow's server or store.
        places: By run, its tags.

    Returns:
        Why MLflow could not be told, in one sentence; None where it was.
    """
    file = sqlite_file(tracking_uri)
    if not places or (file is not None and not file.is_file()):
        return None
    prepare_environment()
    try:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri)
        for run, tags in places.items():
            for key, value in tags.items():
                client.set_tag(run, key, shorten(hide_secrets(value), TAG_LENGTH))
    except Exception as error:  # MLflow, requests and SQLAlchemy have no common base; the exports are there anyway
        return f"MLflow at {public_uri(tracking_uri)} does not know of the exports: {brief(error)}"
    return None
