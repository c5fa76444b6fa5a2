"""Trial state on disk: safetensors with its metadata and checksums, written whole or not at all.

No pickle is ever loaded: whoever can write a study's folder must not thereby run code in a worker.

A running trial keeps its two latest states, each in a file that is named after its step: whatever damages one of them,
the trial goes on from the other, and trains the lost steps again with the same result.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftsearch.files import Place, delete, is_local, names, persist, reading, reason, writing

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
"""The finished trial: trained weights alone, for export."""

TEST_PREDICTIONS = "test.jsonl"
"""A confirmation's predictions on the test split, one JSON object per example."""
TEST_READING = "test.json"
"""What they scored, and when they were made."""

STATES_KEPT = 2
"""States of a running trial: the latest one, and the one before it."""

_META = "peftsearch"
_STATE = re.compile(r"state-(\d+)\.safetensors")


class CorruptCheckpointError(RuntimeError):
    """A checkpoint's bytes are not those that were written."""


def trial_folder(study_folder: Place, key: str) -> Place:
    """Where a trial's files are; see `TrialPlan.key`."""
    return study_folder / "trials" / key


def state_name(step: int) -> str:
    """Name of the file with the running trial's state after a step: weights, optimiser, random state, position."""
    return f"state-{step:08d}.safetensors"


def saved_steps(folder: Place) -> list[int]:
    """Steps whose states are in a trial's folder, the latest first; they may be damaged.

    Raises:
        OSError: The storage cannot be read.
    """
    return sorted((int(found[1]) for name in names(folder) if (found := _STATE.fullmatch(name))), reverse=True)


def write_state(folder: Place, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write a running trial's state, and forget those that nobody would go back to.

    Raises:
        StorageError: As `write_checkpoint`; the earlier states are as they were.
    """

    def forget() -> None:
        # Later ones are of an attempt that this one takes the place of.
        earlier = [other for other in saved_steps(folder) if other < step][: STATES_KEPT - 1]
        delete_states(folder, keep=(step, *earlier))

    write_checkpoint(folder / state_name(step), tensors, meta)
    persist(folder, forget)


def delete_states(folder: Place, keep: Sequence[int] = ()) -> None:
    """Delete a trial's states, but for some steps'.

    Raises:
        OSError: The storage cannot be written.
    """
    for step in saved_steps(folder):
        if step not in keep:
            delete(folder / state_name(step))


def discard_weights(folder: Place) -> None:
    """Delete a trial's weights and states; its readings of the test split stay.

    Raises:
        OSError: The storage cannot be written.
    """
    for name in names(folder):
        if name.endswith(".safetensors"):
            delete(folder / name)


def belongs(meta: Mapping[str, Any], digest: str) -> bool:
    """Whether what carries this metadata is of the trial with this `TrialPlan.digest`; earlier versions wrote none."""
    return bool(meta.get("trial", digest) == digest)


def sound_states(
    folder: Place, latest: int, digest: str, tell: Callable[[str], None] = log.warning
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """The states of a trial up to a step, the latest one first, as `read_checkpoint` reads them.

    A damaged one is left out, and so is one of another trial (`TrialPlan.digest`); ``tell`` is told so in a sentence.

    Raises:
        OSError: The storage cannot be read.
    """
    for step in saved_steps(folder):
        if step > latest:
            continue
        try:
            tensors, meta = read_checkpoint(folder / state_name(step))
            if meta.get("step") != step:
                raise CorruptCheckpointError(f"{state_name(step)} of trial folder {folder.name} is of another step")
            if not belongs(meta, digest):
                raise CorruptCheckpointError(f"{state_name(step)} of trial folder {folder.name} is of another trial")
        except FileNotFoundError:
            continue
        except CorruptCheckpointError as error:
            tell(f"{error}; the trial goes on from an earlier state")
            continue
        yield tensors, meta


def write_checkpoint(
    path: Place, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], *, lasting: bool = False
) -> None:
    """Write tensors and JSON metadata to ``path``; readers see the old file or the new one, never a part.

    Args:
        path: The file.
        tensors: By name.
        meta: Anything that JSON holds.
        lasting: Return only when it is on the disk, for files that others are deleted after.

    Raises:
        StorageError: As `peftsearch.files.persist`; the file is as it was before.
    """
    host = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    described = _described(host, json.loads(json.dumps(meta)))
    payload = json.dumps({"meta": meta, "checksum": _checksum(host), "described": described})
    persist(path, lambda: _write(path, host, payload, lasting))


def _write(path: Place, tensors: dict[str, torch.Tensor], payload: str, lasting: bool) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with writing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={_META: payload})
        except SafetensorError as error:
            # It wraps what the system says: "I/O error: No space left on device (os error 28)".
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, _without_number(str(error))) from None
        if lasting and is_local(path):
            with temporary.open("rb") as file:
                os.fsync(file.fileno())


def _without_number(text: str) -> str:
    return re.sub(r"\s*\(os error \d+\)", "", text).rpartition("I/O error: ")[2]


def read_checkpoint(path: Place) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_checkpoint` wrote, onto the CPU.

    Raises:
        FileNotFoundError: There is none.
        CorruptCheckpointError: It was cut short or altered.
        OSError: The storage cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    damaged = f"{path.name} of trial folder {path.parent.name} is damaged"
    with reading(path) as file:
        try:
            with safe_open(file, framework="pt") as opened:
                header = json.loads((opened.metadata() or {})[_META])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            meta = header["meta"]
            # Checkpoints of earlier versions know no "described".
            sound = header["checksum"] == _checksum(tensors) and (
                "described" not in header or header["described"] == _described(tensors, meta)
            )
        except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise CorruptCheckpointError(f"{damaged}: {reason(error)}") from None
        except OSError as error:
            # An empty file cannot be mapped.
            if is_local(path) and file.stat().st_size > 0:
                raise
            raise CorruptCheckpointError(f"{damaged}: {reason(error)}") from None
    if not sound:
        raise CorruptCheckpointError(f"{damaged}: checksum mismatch")
    return tensors, meta


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    import torch

    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        flat = tensors[name].reshape(-1)
        if flat.numel():
            value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return value


def _described(tensors: Mapping[str, torch.Tensor], meta: Any) -> int:
    """Checksum of what is not in the tensors' bytes: their types and shapes, and the metadata."""
    kinds = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    return zlib.crc32(json.dumps([kinds, meta], sort_keys=True).encode())
