"""Fixtures of the security tests: a model, data, a storage, and the command line in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The made-up studies of other folders are used here too.
sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("cli", "frontier", "export", "study")]

from security_files import Outcome, run_here, write_project  # noqa: E402 (the path above must be there first)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base model; not to be written to."""
    from cli_study import save_base

    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the data of `cli_study.small_study`."""
    return write_project(tmp_path / "project")


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Where studies go."""
    return tmp_path / "storage"


@pytest.fixture
def peftsearch(capfd: pytest.CaptureFixture[str]) -> object:
    """The command line, in this process: returns its status, standard output and standard error."""

    def call(*arguments: object) -> Outcome:
        return run_here(capfd, *arguments)

    return call
