"""The list of a storage's studies, each with a link to its page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import cache
from string import Template
from typing import Any
from urllib.parse import quote

from peftsearch.frontier.page.document import digest, resource, style

_COUNTS = ("complete", "pruned", "failed", "running")


def studies_html(
    studies: Sequence[Mapping[str, Any]], unreadable: Mapping[str, str], storage: str, *, pages: str, mlflow: str
) -> str:
    """The list.

    Args:
        studies: In the shape of ``status --json``.
        unreadable: Studies that cannot be read, with the reason.
        storage: Where they are.
        pages: The studies' pages are below this address, by name.
        mlflow: Address of MLflow.
    """
    rows = []
    for found in studies:
        name = html.escape(str(found["study"]))
        address = f"{html.escape(pages)}{quote(str(found['study']), safe='')}"
        cells = "".join(f"<td>{found['counts'][key]:,}</td>" for key in _COUNTS)
        rows.append(
            f'<tr><th scope="row" class="l"><a href="{address}">{name}</a>'
            f'</th><td class="l">{html.escape(found["state"])}</td>{cells}<td>{found["planned"]:,}</td></tr>'
        )
    for study, reason in unreadable.items():
        rows.append(
            f'<tr><th scope="row" class="l">{html.escape(study)}</th><td class="l wrap" colspan="6">unreadable: '
            f"{html.escape(reason)}</td></tr>"
        )
    if not rows:
        rows.append('<tr><td class="l" colspan="7">No study yet: start one with peftsearch run STUDY.yaml</td></tr>')
    return _template().substitute(
        style=style(),
        style_hash=digest(style()),
        storage=html.escape(storage),
        mlflow=html.escape(mlflow),
        rows="".join(rows),
    )


@cache
def _template() -> Template:
    return Template(resource("studies.html"))
