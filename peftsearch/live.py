"""A storage's studies as live Pareto pages, inside MLflow's own server: one port, and MLflow's check of who asks.

`app` is a plugin of MLflow (entry point ``mlflow.app``), with which ``peftsearch ui`` starts ``mlflow server``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from peftsearch.holder import last_driver
from peftsearch.spec import StudyError, first_line, hide_secrets
from peftsearch.storage import storage_folder, study_folder
from peftsearch.study import Study, read_statuses

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

PREFIX = "/peftsearch"
"""Where the pages are; MLflow has all other paths."""
FRESH = 2.0
"""Seconds for which what was read of a ledger is shown to everybody who asks."""


def app() -> FastAPI:
    """MLflow's application with the pages of the studies in the storage (``PEFTSEARCH_STORAGE``)."""
    from mlflow.server.fastapi_app import app as mlflow
    from starlette.routing import Mount, Route

    pages = Pages()
    routes = [
        Route("/", pages.studies),
        Route("/studies/{name}", pages.page),
        Route("/studies/{name}/data.json", pages.data),
    ]
    # Before MLflow's own route, which takes every path; its middlewares (hosts, headers) are around all routes.
    server: FastAPI = mlflow
    server.router.routes.insert(0, Mount(PREFIX, routes=routes))
    return server


@dataclass(frozen=True)
class _Shown:
    """A study's data as it is sent, its name in HTTP's caches, where MLflow is, and where it shows the trials."""

    body: bytes
    tag: str
    mlflow: str | None
    trials: str | None = None


@dataclass(frozen=True)
class _Refused:
    """Why there is nothing to show: as long as it is known, nobody is made to find out again."""

    status: int
    sentence: str

    def answer(self) -> Response:
        from starlette.responses import PlainTextResponse

        return PlainTextResponse(f"{self.sentence}\n", status_code=self.status, headers=_HEADERS)


@dataclass(frozen=True)
class _Known:
    value: Any
    until: float


class Pages:
    """Answers requests. A ledger is read at most once at a time, and no more often than it takes to read it."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._locks: dict[str, threading.Lock] = {}
        # Of the two above; held for moments only.
        self._lock = threading.Lock()

    def studies(self, request: Request) -> Response:
        """The list of studies."""
        from starlette.responses import HTMLResponse

        from peftsearch.frontier.page import studies_html

        listed = self._once("", lambda: read_statuses(storage_folder()))
        if isinstance(listed, _Refused):
            return listed.answer()
        studies, unreadable = listed
        page = studies_html(studies, unreadable, str(storage_folder()), pages=f"{PREFIX}/studies/", mlflow="/")
        return HTMLResponse(page, headers=_HEADERS)

    def page(self, request: Request) -> Response:
        """A study's page."""
        from starlette.responses import HTMLResponse

        from peftsearch.frontier.page import document, policy

        name = request.path_params["name"]
        found = self._study(name)
        if isinstance(found, _Refused):
            return found.answer()
        live = {
            "data": f"{PREFIX}/studies/{quote(name, safe='')}/data.json",
            "studies": f"{PREFIX}/",
            **({"mlflow": found.mlflow} if found.mlflow else {}),
            **({"trials": found.trials} if found.trials else {}),
        }
        rule = f"{policy(live=True)}; frame-ancestors 'self'"
        page = document(json.loads(found.body), live=live)
        return HTMLResponse(page, headers={**_HEADERS, "Content-Security-Policy": rule})

    def data(self, request: Request) -> Response:
        """A study's data as JSON; 304 where the asker has it already."""
        from starlette.responses import Response

        found = self._study(request.path_params["name"])
        if isinstance(found, _Refused):
            return found.answer()
        headers = {**_HEADERS, "ETag": found.tag}
        if request.headers.get("if-none-match") == found.tag:
            return Response(status_code=304, headers=headers)
        return Response(found.body, media_type="application/json", headers=headers)

    def _study(self, name: str) -> _Shown | _Refused:
        try:
            # Whoever asks for what is not there leaves nothing behind.
            study_folder(name).require()
        except StudyError as error:
            return _Refused(404, str(error))
        found: _Shown | _Refused = self._once(f"study {name}", lambda: _read(name))
        return found

    def _once(self, key: str, read: Callable[[], Any]) -> Any:
        with self._lock:
            now = time.monotonic()
            self._known = {other: known for other, known in self._known.items() if now <= known.until}
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            known = self._known.get(key)
            if known is None or time.monotonic() > known.until:
                began = time.monotonic()
                value = _attempt(read)
                taken = time.monotonic() - began
                known = _Known(value, time.monotonic() + max(FRESH, 4 * taken))
                with self._lock:
                    self._known[key] = known
            return known.value


_HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}


def _attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except StudyError as error:
        return _Refused(404, str(error))
    except Exception as error:  # a database that is away, a file in the middle of being written: the next one may do
        log.warning("a page's data could not be read", exc_info=True)
        return _Refused(503, hide_secrets(f"this cannot be read now: {type(error).__name__}: {first_line(error)}"))


def _read(name: str) -> _Shown:
    from peftsearch.frontier.page import page_data
    from peftsearch.tracking.mlflow_views import trials_address

    study = Study.open(name)
    status = study.status()
    data = page_data(
        study.trials(),
        study.facts(),
        state=status["state"],
        planned=status["planned"],
        storage=study.folder.option,
    )
    wanted = study.spec.tracking.mlflow
    # A study that writes to another server has no runs in this one.
    uri = study.public_tracking_uri or ""
    mlflow = "/" if wanted == "auto" else f"{uri.rstrip('/')}/" if uri.startswith(("http://", "https://")) else None
    # As bytes: one study's trials as Python objects take many times that, and each that asks gets these very bytes.
    body = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    experiment = last_driver(study.folder.path).get("mlflow_experiment_id")
    trials = f"{mlflow}{trials_address(experiment)}" if mlflow and isinstance(experiment, str) else None
    return _Shown(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"', mlflow, trials)
