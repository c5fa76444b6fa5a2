"""Ray's files are below a folder that nobody else may enter; what killed drivers leave is removed, and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from peftsearch.held_folder import held_folder
from peftsearch.ray_folder import private_ray_folder
from peftsearch.spec import StudyError

HOLD = """
from peftsearch.ray_folder import private_ray_folder
with private_ray_folder() as folder:
    (folder / "session").mkdir(parents=True)
    print(folder, flush=True)
    input()
"""


def driver() -> tuple[subprocess.Popen[str], Path]:
    """A process with a private folder, and that folder's child, which Ray would get."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder with a short path."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    folder = Path(tempfile.mkdtemp(prefix="ps-", dir="/tmp"))
    use(folder, monkeypatch)
    yield folder
    shutil.rmtree(folder)


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(folder))
    # Python keeps what it once found.
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_the_folder_is_ours_alone_and_ends_with_the_block(temporary: Path) -> None:
    with suppress(KeyError), private_ray_folder() as folder:
        assert folder.parent.parent == temporary
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        folder.mkdir()
        (folder / "log").write_text("a line")
        raise KeyError
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("why", ["too long", "open to all", "below what is open to all"])
def test_an_unfit_temporary_folder_is_passed_over(why: str, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = temporary / (60 * "d" if why == "too long" else "d")
    place.mkdir()
    if why == "open to all":
        place.chmod(0o777)
    elif why == "below what is open to all":
        temporary.chmod(0o777)
    use(place, monkeypatch)
    with private_ray_folder() as folder:
        assert folder.parent.parent == Path("/tmp").resolve()
        longest = folder / "session_2026-01-01_00-00-00_000000_4194304" / "sockets" / "plasma_store"
        assert len(os.fsencode(longest)) <= 107


def test_a_sticky_folder_of_all_is_fit(temporary: Path) -> None:
    temporary.chmod(0o1777)
    with private_ray_folder() as folder:
        assert folder.parent.parent == temporary


def test_without_a_fit_folder_the_user_hears_what_to_do(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftsearch.ray_folder._safe", lambda place: False)
    with pytest.raises(StudyError, match="set TMPDIR to a folder of your own with a short path"), private_ray_folder():
        raise AssertionError("found one")


def test_what_a_killed_driver_leaves_is_swept_and_what_is_in_use_is_not(temporary: Path) -> None:
    living, used = driver()
    killed, left = driver()
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    others = temporary / "ps-ray-not-a-folder"
    others.write_text("a file")
    assert left.exists()
    with private_ray_folder():
        assert not left.parent.exists()
        assert used.exists()
    assert others.exists()
    living.communicate("\n", timeout=60)
    assert list(temporary.iterdir()) == [others]


def test_folders_of_another_purpose_are_not_swept(temporary: Path) -> None:
    killed, left = driver()
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    with held_folder(temporary, "ps-tune-") as folder:
        assert folder.name.startswith("ps-tune-")
        assert left.exists()
    assert list(temporary.iterdir()) == [left.parent]
