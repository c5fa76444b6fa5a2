"""An object store that is away for a moment costs a study that moment, and one that stays away is one sentence."""

from __future__ import annotations

import select
import socket
import socketserver
from collections.abc import Iterator
from threading import Thread, Timer

import pytest
from s3_server import S3Server, free_port

from peftsearch import files, storage
from peftsearch.spec import StudyError


class Relay:
    """Hands a port's bytes on to another, while it listens."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self._server: socketserver.ThreadingTCPServer | None = None

    def listen(self) -> None:
        """Accept connections."""
        target = self.target

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", target)) as there:
                    ends = {self.request: there, there: self.request}
                    while True:
                        for end in select.select(list(ends), [], [])[0]:
                            content = end.recv(65536)
                            if not content:
                                return
                            ends[end].sendall(content)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._server = Server(("127.0.0.1", self.port), Connection)
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def refuse(self) -> None:
        """Refuse new connections, as a machine does on which no server runs."""
        if self._server is not None:
            self._server.shutdown()
            self._server.socket.close()
            self._server = None


@pytest.fixture
def relay(s3_server: S3Server) -> Iterator[Relay]:
    relay = Relay(s3_server.port)
    yield relay
    relay.refuse()


@pytest.fixture
def kept(relay: Relay, s3_server: S3Server) -> files.Place:
    """A file of a study in an object store that is reached through the relay."""
    there = s3_server.storage("away")
    storage.write_json(files.place(there) / "study.json", {"a": 1})
    return files.place(there.replace(f":{s3_server.port}", f":{relay.port}")) / "study.json"


def test_a_studys_file_is_read_when_its_store_is_back(
    relay: Relay, kept: files.Place, caplog: pytest.LogCaptureFixture
) -> None:
    # S3's own client tries for some six seconds.
    Timer(12, relay.listen).start()
    assert storage.read_json(kept) == {"a": 1}
    assert "trying again" in caplog.text


def test_a_store_that_stays_away_is_one_sentence(
    relay: Relay, kept: files.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PAUSES", (0.01,))
    with pytest.raises(StudyError, match=r"^cannot read s3://studies/away/study\.json") as caught:
        storage.read_json(kept)
    assert "\n" not in str(caught.value)
