"""Where a Ray cluster of our own keeps its sockets, logs and spilled objects: out of other users' reach.

Pickles pass through Ray's sockets. Ray makes every folder of its own writable by everybody
(``ray._common.utils.try_to_create_directory``: mode 0777, without a sticky bit), by default below ``/tmp/ray``, so that
another user of the machine could put sockets of theirs in the place of Ray's. Below a folder that only its owner may
enter, nobody comes that far.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from peftsearch.held_folder import held_folder
from peftsearch.spec import StudyError

PREFIX = "ps-ray-"
_NAMED = PREFIX + 8 * "x" + "/r"
"""What `private_ray_folder` yields, below one of `_parents`."""
_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest path of a socket below Ray's folder."""
_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
"""Bytes of a socket's path (unix(7))."""


@contextlib.contextmanager
def private_ray_folder() -> Iterator[Path]:
    """A folder for the ``_temp_dir`` of ``ray.init``, below one that only we may enter; removed at the block's end.

    Before, those are removed whose drivers were killed (`held_folder`).

    Raises:
        StudyError: No temporary folder is safe and has a path that is short enough.
    """
    parents = _parents()
    if not parents:
        raise StudyError(
            "there is no place for Ray's sockets: other users may rename what is in the temporary folder, or its path "
            f"is longer than {_longest_parent()} bytes; set TMPDIR to a folder of your own with a short path"
        )
    with held_folder(parents[0], PREFIX, sweep=parents) as folder:
        yield folder / "r"


def _parents() -> list[Path]:
    """Where a private folder may be, the best place first.

    The temporary folder of Ray's users, or that of the system, where they are; else ``/tmp``: batch systems and tests
    set ``TMPDIR`` to paths that are too long for sockets, or to a place where everybody may rename what others made.
    """
    wanted = [os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp"]
    places = dict.fromkeys(Path(place).resolve() for place in wanted if place)
    return [place for place in places if len(os.fsencode(place)) <= _longest_parent() and _safe(place)]


def _longest_parent() -> int:
    return _LONGEST_SOCKET - len(f"/{_NAMED}/{_SOCKET}")


def _safe(place: Path) -> bool:
    """Whether we can write there, and what we make stays ours: nobody else may rename it, or a folder above it."""
    try:
        shared = [
            folder
            for folder in (place, *place.parents)
            if (mode := folder.stat().st_mode) & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX
        ]
    except OSError:
        return False
    return not shared and os.access(place, os.W_OK | os.X_OK)
