"""A real S3-compatible server on loopback, in a process of its own: moto's, which speaks S3's protocol over HTTP.

Every test can ask for it; storages in it are ``s3_server.storage(name)``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

SECRET = "not-a-real-secret"


@dataclass
class S3Server:
    """Address of the server.

    Attributes:
        port: On 127.0.0.1.
        process: The server.
    """

    port: int
    process: subprocess.Popen[bytes]

    def storage(self, prefix: str, bucket: str = "studies") -> str:
        """URI of a storage in a bucket of the server."""
        return f"s3://{bucket}/{prefix}?scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"

    def make_bucket(self, bucket: str) -> None:
        """Create a bucket; nothing where it is there already."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{bucket}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """The server, with a bucket ``studies``; its credentials are in the environment while it runs."""
    pytest.importorskip("moto.server")
    port = free_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = S3Server(port, process)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                server.make_bucket("studies")
                break
            except urllib.error.URLError:
                assert process.poll() is None, "the S3 server ended at once"
                assert time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(10)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
