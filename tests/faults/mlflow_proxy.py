"""A real HTTP proxy in front of a real MLflow server, which fails when it is told to."""

from __future__ import annotations

import http.client
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Mode = Literal["pass", "error", "lost", "hang"]
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length"}


class Proxy:
    """Listens on loopback and hands requests on to a server.

    ``mode`` may be changed at any time: ``pass`` hands on; ``error`` answers 500 and hands nothing on; ``lost`` hands
    on and answers 500 all the same; ``hang`` accepts and never answers, until the mode changes. `refuse` and `listen`
    make it refuse connections, as a machine does on which no server runs.
    """

    def __init__(self, target_port: int) -> None:
        self.mode: Mode = "pass"
        self.requests = 0
        self.target_port = target_port
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._server: _Server | None = None
        self.listen()

    def listen(self) -> None:
        """Accept connections."""
        if self._server is None:
            self._server = _Server(("127.0.0.1", self.port), _Handler, self)
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def refuse(self) -> None:
        """Break the connections that there are, and refuse new ones."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.break_connections()
            self._server = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], proxy: Proxy) -> None:
        self.proxy = proxy
        self.connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        assert isinstance(request, socket.socket)
        self.connections.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        self.connections.discard(request)  # type: ignore[arg-type]
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that breaks is what this is for."""

    def break_connections(self) -> None:
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _handle(self) -> None:
        proxy = self.server.proxy
        proxy.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while proxy.mode == "hang" and proxy._server is self.server:
            threading.Event().wait(0.05)
        if proxy.mode == "error":
            self._answer(500, [("Content-Type", "text/plain")], b"made to fail")
            return
        onward = http.client.HTTPConnection("127.0.0.1", proxy.target_port, timeout=120)
        try:
            headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOP_BY_HOP}
            onward.request(self.command, self.path, body or None, headers)
            answer = onward.getresponse()
            content = answer.read()
        except OSError:
            self.close_connection = True
            return
        finally:
            onward.close()
        if proxy.mode == "lost":
            self._answer(500, [("Content-Type", "text/plain")], b"done, but you shall not know")
            return
        self._answer(answer.status, [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP], content)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for key, value in headers:
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _handle
