"""``peftsearch report``: a study's results as Markdown, as one page, as CSV files and as pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from peftsearch.files import Place
from peftsearch.spec import StudyError, StudyFacts, StudySpec, TrialRecord


def check_target(to: Path) -> None:
    """Make the folder for a report, before any work.

    Raises:
        StudyError: It is a file, or cannot be written.
    """
    if os.path.isfile(to):
        raise StudyError(f"cannot write the report to {str(to)!r}: it is a file; name a folder with --to")
    try:
        to.mkdir(parents=True, exist_ok=True)
        probe = to / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StudyError(f"cannot write the report to {str(to)!r}: {error.strerror or error}") from None


def write_report(
    to: Path,
    records: Iterable[TrialRecord],
    facts: StudyFacts,
    spec: StudySpec,
    folder: Place,
    state: str | None = None,
    planned: int | None = None,
) -> list[Path]:
    """Write a study's report into a folder: ``report.md``, ``report.html``, a CSV file per table, a PNG per plot.

    Args:
        to: The folder; made where it is missing. Files of an earlier report are replaced.
        records: All trials of the study.
        facts: What is known beside them.
        spec: The study file.
        folder: The study's folder, which holds the predictions of confirmations.
        state: ``running``, ``interrupted`` or ``finished``, where known.
        planned: How many trials the study is to have; trials per cell times cells where absent.

    Returns:
        The files, ``report.html`` and ``report.md`` first.

    Raises:
        StudyError: The folder cannot be written.
    """
    from peftsearch.frontier.report.document import Figure, csv_bytes
    from peftsearch.frontier.report.markdown import markdown
    from peftsearch.frontier.report.page import page
    from peftsearch.frontier.report.sections import build

    check_target(to)
    document = build(list(records), facts, spec, folder, state, planned)
    files = {"report.html": page(document), "report.md": markdown(document)}
    content = {name: text.encode("utf-8", "replace") for name, text in files.items()}
    content |= {name: csv_bytes(rows) for name, rows in document.data.items()}
    content |= document.files
    content |= {f"{block.name}.png": block.png for block in document.blocks if isinstance(block, Figure)}
    written = []
    for name, data in content.items():
        path = to / name
        try:
            path.write_bytes(data)
        except OSError as error:
            raise StudyError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
        written.append(path)
    return written


__all__ = ["check_target", "write_report"]
