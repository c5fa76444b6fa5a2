"""Commands that need no study."""

from __future__ import annotations

import typer

from peftsearch.cli.options import JsonOption, StorageOption
from peftsearch.cli.output import out, print_json


def schema() -> None:
    """Print the study file's JSON Schema, for editors.

    An editor with a YAML language server then completes, explains and checks study files that begin with
    "# yaml-language-server: $schema=study.schema.json".

    Example: `peftsearch schema > study.schema.json`
    """
    from peftsearch.schema import study_schema

    print_json(study_schema())


def doctor(storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """Say what works on this machine, and how to mend what does not.

    Looks at the processors, the libraries, the storage, the quickstart's packages, and access to the Hub.

    Example: `peftsearch doctor`
    """
    from peftsearch.cli.doctor import examine
    from peftsearch.storage import storage_folder

    findings = examine(storage_folder(storage))
    works = all(item.ok or item.optional for item in findings)
    if as_json:
        print_json({"ok": works, "findings": [item.__dict__ for item in findings]})
    else:
        for item in findings:
            mark = "ok" if item.ok else ("no" if item.optional else "FAIL")
            out.print(f"{mark:<4}  {item.what:<18} {item.detail}", markup=False)
    if not works:
        raise typer.Exit(1)
