"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from peftsearch.spec import StudyError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_fronts(chosen: Any, fronts: Any) -> None:
    """The fronts as tables."""
    from peftsearch.frontier import front_renderables

    for renderable in front_renderables(chosen.trials(), chosen.facts(), list(fronts)):
        show(renderable)


def show(renderable: Any) -> None:
    """A table or text on standard output, as wide as it fits there."""
    from peftsearch.cli.fitting import Fitted

    out.print(Fitted(renderable))


def print_json(value: Any) -> None:
    """JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write(path: Path, data: bytes) -> None:
    """Write a file that a command was asked for, and say so.

    Raises:
        StudyError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise StudyError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
    err.print(f"Wrote {path}", markup=False)
