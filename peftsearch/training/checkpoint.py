"""Trial state on disk: safetensors with its metadata and a checksum, replaced atomically.

No pickle is ever loaded: whoever can write a study's folder must not thereby run code in a worker.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

STATE = "state.safetensors"
"""The running trial: trained weights, optimiser, random state, position."""
WEIGHTS = "weights.safetensors"
"""The finished trial: trained weights alone, for export."""

TEST_PREDICTIONS = "test.jsonl"
"""A confirmation's predictions on the test split, one JSON object per example."""
TEST_READING = "test.json"
"""What they scored, and when they were made."""

_META = "peftsearch"


class CorruptCheckpointError(RuntimeError):
    """A checkpoint's bytes are not those that were written."""


def trial_folder(study_folder: Path, key: str) -> Path:
    """Where a trial's files are; see `TrialPlan.key`."""
    return study_folder / "trials" / key


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to ``path``; readers see the old file or the new one, never a part.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    host = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    payload = json.dumps({"meta": meta, "checksum": _checksum(host)})
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        save_file(host, temporary, metadata={_META: payload})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_checkpoint` wrote, onto the CPU.

    Raises:
        FileNotFoundError: There is none.
        CorruptCheckpointError: It was cut short or altered.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_META])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CorruptCheckpointError(f"{path.name} of trial folder {path.parent.name} is damaged: {error}") from None
    if _checksum(tensors) != header["checksum"]:
        raise CorruptCheckpointError(f"{path.name} of trial folder {path.parent.name} is damaged: checksum mismatch")
    return tensors, header["meta"]


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    import torch

    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        flat = tensors[name].reshape(-1)
        if flat.numel():
            value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return value
