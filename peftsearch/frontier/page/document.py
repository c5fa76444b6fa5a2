"""The page's file: a template, a style sheet and scripts, with the study's data between them."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

from peftsearch.frontier.front import domain_fronts
from peftsearch.frontier.page.data import page_data
from peftsearch.frontier.tables import front_columns, front_rows
from peftsearch.spec import StudyFacts, TrialRecord

SCRIPTS = ("base", "data", "plot", "table", "front", "trial", "parallel", "overview", "page")
"""Files of ``js/``, in the order in which they need one another."""


def front_html(
    records: Iterable[TrialRecord],
    facts: StudyFacts,
    domain: str | None = None,
    *,
    state: str | None = None,
    planned: int | None = None,
    storage: str | None = None,
) -> str:
    """One self-contained page of a study: its fronts, its trials, and the commands that take them home.

    It opens offline and requests nothing. Equal trials give an equal page, to the byte. Arguments and errors as
    `page_data`.
    """
    records = list(records)
    data = page_data(records, facts, domain, state=state, planned=planned, storage=storage)
    return document(data, _tables(records, facts, domain))


def document(data: Mapping[str, Any], tables: str = "", *, live: Mapping[str, str] | None = None) -> str:
    """The page around its data.

    Args:
        data: As `page_data` gives it.
        tables: HTML for readers whose browser runs no scripts.
        live: Makes the page one that is served and asks for its data again: ``data`` (where), ``studies`` (a link), and
            ``mlflow`` (a link, where there is one) with ``trials`` (a link to the trials there, where that is known).
    """
    return _template().substitute(
        policy=policy(live=live is not None),
        title=html.escape(f"{data['study']}: Pareto fronts"),
        study=html.escape(str(data["study"])),
        style=style(),
        data=script_json(data),
        live=script_json(live),
        tables=tables,
        script=_script(),
    )


def policy(*, live: bool = False) -> str:
    """The page's Content-Security-Policy: our one style sheet and our one script, and no request to anywhere; a page
    that is served may ask its own server."""
    connect = "; connect-src 'self'" if live else ""
    return (
        f"default-src 'none'; script-src '{digest(_script())}'; style-src '{digest(style())}'; img-src data:; "
        f"base-uri 'none'; form-action 'none'{connect}"
    )


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it ends the element or opens a comment.

    ASCII, so that a text with half a surrogate pair can be written to a file too.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _tables(records: list[TrialRecord], facts: StudyFacts, domain: str | None) -> str:
    """The fronts as plain tables."""
    sections = []
    for name, front in domain_fronts(records, facts).items():
        if domain not in (None, name):
            continue
        rows = front_rows(front, facts)
        columns = front_columns(front, rows)
        head = "".join(f'<th scope="col">{_text(title)}</th>' for title in columns.values())
        body = "".join(
            "<tr>" + "".join(f"<td>{_text(getattr(row, field))}</td>" for field in columns) + "</tr>" for row in rows
        )
        if not rows:
            body = f'<tr><td colspan="{len(columns)}">No trial has reached the full budget yet.</td></tr>'
        sections.append(f"<h2>{_text(name)}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    return "".join(sections)


def _text(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())


def digest(text: str) -> str:
    """A script or style as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _template() -> Template:
    return Template(resource("template.html"))


@cache
def style() -> str:
    """The style sheet of all pages."""
    return resource("page.css")


@cache
def _script() -> str:
    return "(() => {\n'use strict';\n" + "\n".join(resource(f"js/{name}.js") for name in SCRIPTS) + "})();\n"


def resource(name: str) -> str:
    """One of the files beside this one."""
    return files("peftsearch.frontier.page").joinpath(name).read_text(encoding="utf-8")
