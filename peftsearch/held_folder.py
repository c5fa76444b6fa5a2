"""Temporary folders that outlive no driver for long: whoever is killed cannot remove its own, and the next one does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_REMOVE_SECONDS = 20.0
"""Workers write their last words while they end, and on a busy machine that takes them some time."""


@contextlib.contextmanager
def held_folder(parent: Path, prefix: str, *, sweep: Iterable[Path] = ()) -> Iterator[Path]:
    """A new folder that only we may enter, removed at the block's end.

    Before, those of the same prefix are removed whose drivers were killed. A driver holds a lock of the kernel on its
    folder, which ends with it whatever happens, and which means the same in all containers that share the place.

    Args:
        parent: Where it is made.
        prefix: Its name begins so. One that no folder without such a lock has: it would be removed.
        sweep: Further places to look for those that were left.
    """
    for place in {parent, *sweep}:
        _sweep(place, prefix)
    folder, held = _make(parent, prefix)
    try:
        yield folder
    finally:
        _remove(folder)
        _release(held)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and the lock on it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            held = _open(folder)
            # Network file systems lock no folders; there nothing is swept either.
            with contextlib.suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX)
            # Another driver may have swept it before it was locked.
            if folder.exists():
                return folder, held
            os.close(held)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove the folders of this user that no driver holds any more."""
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.getuid():
                continue
            held = _open(folder)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(held)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _release(held: int) -> None:
    with contextlib.suppress(OSError):
        # Processes that were forked meanwhile share this lock, and would hold it for as long as they live.
        fcntl.flock(held, fcntl.LOCK_UN)
    os.close(held)


def _remove(folder: Path) -> None:
    """Remove a folder in which processes may still be writing; what they leave, the next driver sweeps."""
    deadline = time.monotonic() + _REMOVE_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            time.sleep(0.1)
