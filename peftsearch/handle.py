"""Which study it is and where it is: what all that is done with a study asks it for."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from typing import Self

from peftsearch.files import RemotePath
from peftsearch.saved import known_facts, specification
from peftsearch.spec import StudyFacts, StudyFile, StudySpec, note_secrets, without_passwords
from peftsearch.storage import StudyFolder, reaching, read_json, study_folder


class StudyHandle:
    """One study: its specification, its folder and its databases' addresses.

    Args:
        spec: The checked specification.
        folder: Where the study's files are.
        file: The study file, where there is one at hand.
    """

    def __init__(self, spec: StudySpec, folder: StudyFolder, file: StudyFile | None = None) -> None:
        self.spec = spec
        self.folder = folder
        self.file = file
        self._id: str | None = None
        note_secrets(spec.tracking.ledger, spec.tracking.mlflow)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        storage: str | os.PathLike[str] | RemotePath | None = None,
        overrides: Iterable[str] = (),
    ) -> Self:
        """A study from its file.

        Args:
            path: The YAML file.
            name: Another name than the file's.
            storage: Folder or URI (``s3://bucket/prefix``); ``PEFTSEARCH_STORAGE`` or ``~/peftsearch`` where absent.
            overrides: ``key=value`` settings, as with ``--set``.

        Raises:
            StudyError: Something in the file is wrong.
        """
        # As JSON, which is YAML too: a name that looks like a number stays a name.
        settings = [*overrides, *([f"name={json.dumps(name)}"] if name is not None else [])]
        file = StudyFile.load(path, settings)
        return cls(file.spec, study_folder(file.spec.name, storage), file)

    @classmethod
    def open(cls, name: str, storage: str | os.PathLike[str] | RemotePath | None = None) -> Self:
        """A study that was started before.

        Raises:
            StudyError: There is none of this name.
        """
        folder = study_folder(name, storage).require()
        with reaching(folder.storage):
            saved = read_json(folder.spec)
        return cls(specification(saved, folder), folder)

    @property
    def name(self) -> str:
        """The study's name."""
        return self.spec.name

    @property
    def id(self) -> str:
        """Tells this study from others of its name, in other storages; made when it is begun."""
        if self._id is None:
            self._id = (read_json(self.folder.spec) or {}).get("id") or str(uuid.uuid4())
        return self._id

    @property
    def ledger_url(self) -> str:
        """Where the ledger is."""
        return self.folder.ledger_url if self.spec.tracking.ledger == "auto" else self.spec.tracking.ledger

    @property
    def mlflow_tracking_uri(self) -> str | None:
        """Where MLflow is; None where tracking is off."""
        from peftsearch.tracking.mlflow_tracker import default_tracking_uri

        wanted = self.spec.tracking.mlflow
        if wanted == "off":
            return None
        return default_tracking_uri(self.folder.mlflow_folder) if wanted == "auto" else wanted

    @property
    def public_tracking_uri(self) -> str | None:
        """Where MLflow is, without a login."""
        uri = self.mlflow_tracking_uri
        return uri if uri is None else without_passwords(uri)

    def facts(self) -> StudyFacts:
        """What is known beside the trials."""
        facts = known_facts(read_json(self.folder.facts), self.folder)
        if facts.id is None:
            facts.id = (read_json(self.folder.spec) or {}).get("id")
        return facts
