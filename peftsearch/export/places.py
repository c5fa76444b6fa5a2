"""Where exports go: looked at first, worked beside, and filled when all is done."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from peftsearch.export.contents import is_earlier_export
from peftsearch.files import Place, check_bucket, check_writable, copy_tree, delete_tree, names, reason
from peftsearch.spec import StudyError, TrialRecord


def check_targets(to: Place, targets: Sequence[Place], chosen: Sequence[TrialRecord], study: str) -> None:
    """See that the folders can be written, and that whatever is there is an earlier export of the same trial.

    Raises:
        StudyError: They cannot, or something else is there.
    """
    if isinstance(to, Path):
        try:
            check_writable(to)
        except OSError as error:
            raise StudyError(
                f"cannot write to {str(to)!r} ({reason(error)}): choose another folder with --to"
            ) from None
    else:
        try:
            check_bucket(to)
        except OSError as error:
            raise StudyError(f"cannot write to {str(to)!r}: {reason(error)}") from None
    for target, record in zip(targets, chosen, strict=True):
        there = os.path.lexists(target) if isinstance(target, Path) else bool(names(target))
        if there and not is_earlier_export(target, study, record):
            raise StudyError(
                f"{str(target)!r} exists and is not an earlier export of trial {record.number} of the study "
                f"{study!r}: move it away, or choose another folder with --to"
            )


@contextmanager
def staging(to: Place | None) -> Iterator[tuple[Path, Path]]:
    """A folder to work in, and the folder of this machine that it is in.

    For a local ``to`` it is inside of that (renaming needs the same file system) and gone afterwards, and with it
    ``to`` and its parents where they were made for it and stayed empty.
    """
    if not isinstance(to, Path):
        with tempfile.TemporaryDirectory(prefix="peftsearch-export-") as folder:
            yield Path(folder) / "staging", Path(folder)
        return
    made = [place for place in (to, *to.parents) if not place.exists()]
    work = to / f".export-{uuid.uuid4().hex[:8]}"
    try:
        with writing(to):
            work.mkdir(parents=True)
        yield work, to
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for place in made:
            try:
                place.rmdir()
            except OSError:
                break


@contextmanager
def writing(to: Place) -> Iterator[None]:
    """Around what fails only where the folder cannot be written or the disk is full."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StudyError(f"cannot write to {str(to)!r}: {getattr(error, 'strerror', None) or error}") from None


def put(folder: Path, target: Place, replaced: Path) -> None:
    """Bring a finished folder into its place; an earlier one is kept until that is done."""
    if not isinstance(target, Path):
        try:
            copy_tree(folder, target)
        except OSError:
            # A part of a folder is no adapter. (What an earlier export left is no longer whole either.)
            with suppress(OSError):
                delete_tree(target)
            raise
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    earlier = replaced / target.parent.name / target.name
    if target.exists():
        earlier.parent.mkdir(parents=True, exist_ok=True)
        target.rename(earlier)
    try:
        folder.rename(target)
    except BaseException:
        if earlier.exists():
            earlier.rename(target)
        raise
