"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftsearch.spec import StudyError

StorageOption = Annotated[
    str | None,
    typer.Option(help="Folder, or s3://BUCKET/PREFIX, gs://... (default: $PEFTSEARCH_STORAGE or ~/peftsearch)"),
]
StudyFileArgument = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file")]


def _studies(context: typer.Context, incomplete: str) -> list[str]:
    """For the shell's completion: the studies of the storage. Nothing where it cannot be read: no place for errors."""
    from peftsearch.storage import list_studies, storage_folder

    try:
        return [
            name for name in list_studies(storage_folder(context.params.get("storage"))) if name.startswith(incomplete)
        ]
    except (StudyError, OSError):
        return []


NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a study in the storage", autocompletion=_studies)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the study file; repeatable")
]
NameOption = Annotated[str | None, typer.Option("--name", help="Another name than the file's")]
DomainOption = Annotated[str | None, typer.Option(help="Only this domain")]
