"""A Hub on loopback with data sets of CSV files: as much of its API as `datasets` asks for.

The API is huggingface_hub's (`HfApi.hf_hub_download`, `dataset_info`, `list_repo_tree`, `get_paths_info`).
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class SmallHub:
    """Data sets by id: their commits (files by path, in the order of time), and what branches and tags point at."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def log_message(self, *_: object) -> None:
                pass

            def _answer(self, body: bytes = b"") -> None:
                status, headers, content = hub.answer(self.path, body, self.headers.get("Content-Type", ""))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def push(self, name: str, files: dict[str, str], *refs: str) -> str:
        """A new commit of a data set; returns its hash. ``main`` and other refs point at it."""
        content = {path: text.encode() for path, text in files.items()}
        commit = hashlib.sha1(repr([name, len(self.commits.get(name, {})), files]).encode()).hexdigest()
        self.commits.setdefault(name, {})[commit] = content
        self.refs.setdefault(name, {}).update(dict.fromkeys(("main", *refs), commit))
        return commit

    def close(self) -> None:
        """As if the network were gone."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes, kind: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts == [""]:
            return 200, {}, b"a small hub"
        asked, parts = (parts[1], parts[2:]) if parts[0] == "api" else (parts[0], parts[1:])
        name = "/".join(parts[:2])
        if asked != "datasets" or name not in self.commits:
            return _error(404, "RepoNotFound")
        what, revision, *below = [*parts[2:], "main", "main"][:2] + parts[4:]
        commit = self.refs[name].get(revision, revision)
        if commit not in self.commits[name]:
            return _error(404, "RevisionNotFound")
        files = self.commits[name][commit]
        if what == "resolve":
            content = files.get("/".join(below))
            headers = {"X-Repo-Commit": commit}
            if content is None:
                return _error(404, "EntryNotFound", headers)
            return 200, {**headers, "ETag": f'"{_digest(content)}"', "Accept-Ranges": "none"}, content
        if what in ("main", "revision"):
            siblings = [{"rfilename": path} for path in files]
            return _json({"_id": name, "id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})
        wanted = list(files)
        if what == "paths-info":
            wanted = (
                json.loads(body)["paths"] if kind.startswith("application/json") else parse_qs(body.decode())["paths"]
            )
        if what in ("tree", "paths-info"):
            return _json(
                [
                    {"type": "file", "path": path, "size": len(files[path]), "oid": _digest(files[path])}
                    for path in wanted
                    if path in files
                ]
            )
        return _error(404, "EntryNotFound")


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status: int, code: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}, b""
