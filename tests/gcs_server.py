"""A server on loopback, in a process of its own, that speaks Google Cloud Storage's protocol over HTTP.

Every test can ask for it; storages in it are ``gcs_server.storage(name)``.
"""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from s3_server import free_port


@dataclass
class GcsServer:
    """Address of the server, on 127.0.0.1."""

    port: int

    def storage(self, prefix: str) -> str:
        """URI of a storage in the server's bucket."""
        return f"gs://anonymous@studies/{prefix}?scheme=http&endpoint_override=127.0.0.1:{self.port}"


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[GcsServer]:
    """The server, with a bucket ``studies``; it keeps everything in memory."""
    pytest.importorskip("gcp_storage_emulator")
    port = free_port()
    start = "import sys; from gcp_storage_emulator.__main__ import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", start, "start", "--host", "127.0.0.1", "--port", str(port)),
            *("--in-memory", "--default-bucket", "studies"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/storage/v1/b/studies", timeout=10).close()
                break
            except urllib.error.URLError:
                assert process.poll() is None, "the server ended at once"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.2)
        yield GcsServer(port)
    finally:
        process.terminate()
        process.wait(10)
