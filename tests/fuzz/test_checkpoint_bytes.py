"""A checkpoint whose bytes are not those that were written is a `CorruptCheckpointError`, whatever became of them."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fuzzing import damage, effort, no_hang, seeds
from hypothesis import given

from peftsearch.training.checkpoint import WEIGHTS, CorruptCheckpointError, read_checkpoint, write_checkpoint

ROOM = 2 * 2**30
"""Bytes of address space that reading a small file may take at most."""


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    """Whoever allocates what a header claims fails here."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("trial") / "00001" / WEIGHTS
    tensors = {
        "weights/a": torch.randn(8, 4),
        "weights/b": torch.randn(4).to(torch.bfloat16),
        "rng": torch.get_rng_state()[:64],
        "empty": torch.empty(0, 3),
        "step": torch.tensor(7),
    }
    write_checkpoint(path, tensors, {"step": 7, "epoch": 1.5, "losses": [0.1, 0.2]})
    return path


def check(folder: Path, data: bytes, sound: Path) -> None:
    """It is as it was written, or it is refused."""
    path = folder / WEIGHTS
    path.write_bytes(data)
    with no_hang():
        try:
            tensors, meta = read_checkpoint(path)
        except CorruptCheckpointError as error:
            assert "is damaged" in str(error)  # noqa: PT017
        else:
            expected, known = read_checkpoint(sound)
            assert meta == known
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@given(seed=seeds)
@effort(300)
def test_damaged_checkpoints(seed: int, sound: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = sound.parents[1] / "00002"
    folder.mkdir(exist_ok=True)
    check(folder, damage(sound.read_bytes(), seed), sound)


def test_every_byte_counts(sound: Path, tmp_path: Path) -> None:
    """One flipped bit in each byte of the file, one after the other."""
    data = sound.read_bytes()
    for place in range(len(data)):
        check(tmp_path, data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :], sound)


def test_every_length(sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    for length in [*range(0, len(data), 7), len(data) - 1]:
        check(tmp_path, data[:length], sound)
    for more in (b"\0", b"x" * 8, data):
        check(tmp_path, data + more, sound)


def header_of(data: bytes) -> tuple[dict[str, object], bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@pytest.mark.parametrize("length", [0, 1, 7, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1])
def test_absurd_lengths_of_headers(length: int, sound: Path, tmp_path: Path) -> None:
    check(tmp_path, struct.pack("<Q", length) + sound.read_bytes()[8:], sound)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [2**40, 2**20]),
        ("shape", [-1, 4]),
        ("shape", []),
        ("shape", [2**62, 2**62]),
        ("shape", "x"),
        ("shape", [0] * 1000),
        ("dtype", "F64"),
        ("dtype", "PICKLE"),
        ("dtype", None),
        ("data_offsets", [0, 2**60]),
        ("data_offsets", [2**60, 0]),
        ("data_offsets", [-8, 8]),
        ("data_offsets", []),
    ],
)
def test_absurd_headers(key: str, value: object, sound: Path, tmp_path: Path) -> None:
    header, body = header_of(sound.read_bytes())
    entry = header["weights/a"]
    assert isinstance(entry, dict)
    entry[key] = value
    text = json.dumps(header).encode()
    check(tmp_path, struct.pack("<Q", len(text)) + text + body, sound)


@pytest.mark.parametrize(
    "meta",
    [
        None,
        {},
        {"peftsearch": 1},
        *({"peftsearch": text} for text in ("{", "null", "[]", '{"meta": {}}', '{"checksum": 1}', "[" * 100_000)),
    ],
)
def test_absurd_metadata(meta: object, sound: Path, tmp_path: Path) -> None:
    header, body = header_of(sound.read_bytes())
    header["__metadata__"] = meta
    if meta is None:
        del header["__metadata__"]
    text = json.dumps(header).encode()
    check(tmp_path, struct.pack("<Q", len(text)) + text + body, sound)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a" / WEIGHTS).mkdir(parents=True)
    with pytest.raises((CorruptCheckpointError, OSError)):
        read_checkpoint(tmp_path / "a" / WEIGHTS)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "b" / WEIGHTS)
