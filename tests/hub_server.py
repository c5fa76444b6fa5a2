"""A small server on loopback that speaks what `huggingface_hub` says to the Hub for model repositories.

It keeps repositories in memory, asks for a token to write, and checks cards as the Hub is known to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_not_a_real_token_of_anybody"
_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
# As quoted in https://github.com/embeddings-benchmark/mteb/issues/1111
_DATASET = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)
PIPELINE_TAGS = {
    "text-classification",
    "token-classification",
    "question-answering",
    "summarization",
    "text-generation",
    "fill-mask",
    "sentence-similarity",
    "feature-extraction",
    "multiple-choice",
}


def card_errors(content: str) -> list[str]:
    """What the Hub would refuse in a card's metadata, as far as its rules are known; [] for a good card."""
    match = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
    if match is None:
        return ["no metadata"]
    data = yaml.safe_load(match[1])
    found = []
    bases = data.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not _ID.fullmatch(base):
            found.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    if data.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
        found.append('"base_model_relation" is not valid')
    if data.get("pipeline_tag") not in {None, *PIPELINE_TAGS}:
        found.append(f'"pipeline_tag" must be a task, not {data["pipeline_tag"]}')
    for name in ("tags", "metrics", "datasets"):
        if not all(isinstance(value, str) and value for value in data.get(name, [])):
            found.append(f'"{name}" must be texts')
    for model in data.get("model-index", []):
        if not model.get("name"):
            found.append('"model-index[0].name" is required')
        for number, result in enumerate(model["results"]):
            place = f"model-index[0].results[{number}]"
            if not result["task"].get("type"):
                found.append(f'"{place}.task.type" is required')
            if not result["dataset"].get("name"):
                found.append(f'"{place}.dataset.name" is required')
            if not _DATASET.fullmatch(result["dataset"].get("type", "")):
                found.append(f'"{place}.dataset.type" fails to match the required pattern')
            for metric in result["metrics"]:
                value = metric.get("value")
                if not metric.get("type") or not isinstance(value, int | float) or value != value:
                    found.append(f'"{place}.metrics" needs a type and a number')
    return found


@dataclass
class Repository:
    """What was pushed: the files of the newest commit, and the messages of all."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.commits, sorted(self.files))).encode()).hexdigest()


@dataclass
class HubServer:
    """The server.

    Attributes:
        url: Its address, for ``HF_ENDPOINT``.
        repositories: By id.
        requests: Every request, as ``METHOD path``.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a server."""
    state = HubServer()

    class Handler(_Handler):
        hub = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        writes = self.command in ("POST", "PUT") and path != "/api/validate-yaml" and not path.startswith("/blobs/")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json(401, {"error": "Invalid username or password."})
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, path):
                return method(self, body, *match.groups())
        return self._json(404, {"error": "not here"})

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, status: int, value: Any, **headers: str) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None:
            self._json(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
        return found

    def whoami(self, _: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json(401, {"error": "Invalid username or password."})
        return self._json(200, {"type": "user", "name": "me", "orgs": []})

    def create(self, body: bytes) -> None:
        given = json.loads(body)
        name = f"{given['organization']}/{given['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            return self._json(409, {"error": "You already created this model repo", "url": url})
        self.hub.repositories[name] = Repository(given.get("visibility") == "private")
        return self._json(200, {"url": url, "name": name})

    def validate(self, body: bytes) -> None:
        errors = [{"message": text} for text in card_errors(json.loads(body)["content"])]
        self._json(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, _: bytes, name: str, *__: str) -> None:
        if found := self._repository(name):
            files = [{"rfilename": file} for file in found.files]
            self._json(200, {"id": name, "sha": found.sha, "siblings": files, "private": found.private, "tags": []})

    def tree(self, _: bytes, name: str, *__: str) -> None:
        if found := self._repository(name):
            self._json(
                200,
                [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in found.files.items()
                ],
            )

    def preupload(self, body: bytes, name: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/blobs/{item['oid']}", "header": {}}}}
            for item in json.loads(body)["objects"]
        ]
        self._json(200, {"transfer": "basic", "objects": objects})

    def blob(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._answer(200, b"", {})

    def commit(self, body: bytes, name: str) -> None:
        found = self._repository(name)
        if found is None:
            return
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                found.commits.append(value["summary"])
            elif item["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                found.files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                del found.files[value["path"]]
        url = f"{self.hub.url}/{name}/commit/{found.sha}"
        self._json(200, {"success": True, "commitOid": found.sha, "commitUrl": url})

    def resolve(self, _: bytes, name: str, revision: str, file: str) -> None:
        found = self._repository(name)
        if found is not None and file not in found.files:
            self._json(404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound"})
        elif found is not None:
            content = found.files[file]
            tag = hashlib.sha256(content).hexdigest()
            self._answer(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": found.sha})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (rf"/api/models/{_NAME}/preupload/main", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/main", _Handler.commit),
    (rf"/api/models/{_NAME}(?:/revision/([^/]+))?", _Handler.info),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/blobs/(\w+)", _Handler.blob),
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
