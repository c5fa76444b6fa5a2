"""Locates the files of an installed package without importing (that is, running) its code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from peftsearch.spec.errors import StudyError


def package_folder(module: str, recipe: str, package: str) -> Path:
    """The folder of the installed top-level `module`.

    Raises:
        StudyError: the package that brings `module` is not installed.
    """
    # For a top-level name find_spec only looks the module up; it would import the parents of a dotted one.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise StudyError(f"recipe {recipe} needs the package {package}: pip install 'peftsearch[quickstart]'")
    return Path(next(iter(spec.submodule_search_locations)))
