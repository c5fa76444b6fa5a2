"""Every primitive of `peftsearch.files`, on a folder and on servers that speak S3's protocol and Google's: the same
behaviour."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import resource
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import S3Server, free_port

from peftsearch import files
from peftsearch.files import Place, RemotePath
from peftsearch.spec import StudyError
from peftsearch.storage import check_storage, list_studies, mendable


@pytest.fixture(params=["folder", "s3", "gs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return files.place(tmp_path)
    if request.param == "gs":
        return files.place(request.getfixturevalue("gcs_server").storage(f"team/{uuid.uuid4().hex}"))
    server: S3Server = request.getfixturevalue("s3_server")
    return files.place(server.storage(f"team/{uuid.uuid4().hex}"))


def test_what_is_written_is_read(root: Place) -> None:
    where = root / "studies" / "one" / "facts.json"
    assert files.read_json(where) is None
    assert not files.exists(where)
    assert files.names(root / "studies") == []
    files.write_json(where, {"name": "café", "values": [1, 0.1, None]})
    assert files.read_json(where) == {"name": "café", "values": [1, 0.1, None]}
    assert files.exists(where)
    assert not files.exists(where.parent)
    assert files.names(where.parent) == ["facts.json"]
    assert files.names(root / "studies") == ["one"]
    files.write_bytes(where, b"[2]")
    assert files.read_bytes(where) == b"[2]"
    assert files.names(where.parent) == ["facts.json"]


def test_a_file_that_is_not_there_says_so(root: Place) -> None:
    with pytest.raises(FileNotFoundError):
        files.read_bytes(root / "none")
    with pytest.raises(FileNotFoundError), files.reading(root / "none"):
        pass
    files.delete(root / "none")
    files.delete_tree(root / "none")


def test_deleting(root: Place) -> None:
    for name in ("a/1", "a/2", "b/1"):
        files.write_bytes(root / name, b"x")
    files.delete(root / "a" / "1")
    assert files.names(root / "a") == ["2"]
    files.delete_tree(root / "a")
    assert files.names(root / "a") == []
    assert files.read_bytes(root / "b" / "1") == b"x"


def test_files_of_other_libraries_appear_whole_or_not_at_all(root: Place) -> None:
    where = root / "trials" / "weights"
    with files.writing(where) as path:
        path.write_bytes(b"old")
    with files.reading(where) as path:
        assert path.read_bytes() == b"old"
    with contextlib.suppress(InterruptedError), files.writing(where) as path:
        path.write_bytes(b"new, but only a p")
        raise InterruptedError
    assert files.read_bytes(where) == b"old"
    assert files.names(where.parent) == ["weights"]


def test_large_files_go_in_parts(root: Place) -> None:
    content = bytes(range(256)) * (24 * 4096)
    with files.writing(root / "large") as path:
        path.write_bytes(content)
    assert files.read_bytes(root / "large") == content


def test_of_many_that_create_a_file_one_succeeds(root: Place) -> None:
    where = root / "studies" / "one" / "holder.json"
    start = threading.Barrier(4)
    made: list[int] = []

    def contend(number: int) -> None:
        start.wait()
        if files.create_json(where, {"number": number}):
            made.append(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # None, where all of them withdrew to the end: then nobody believes to have it.
    assert [files.read_json(where)] == [{"number": number} for number in made] or (made, files.exists(where)) == (
        [],
        False,
    )
    assert files.create_json(where, {}) is not bool(made)
    assert not files.create_json(where, {"another": 1})


@pytest.fixture(params=["EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"])
def without_hard_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has none; this machine's have."""
    number = getattr(errno, request.param)

    def link(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("without_hard_links")
def test_without_hard_links_one_creates_a_file_all_the_same(tmp_path: Path) -> None:
    where = tmp_path / "studies" / "holder.json"
    start = threading.Barrier(8)
    made: list[int] = []

    def contend(number: int) -> None:
        start.wait()
        if files.create_json(where, {"number": number}):
            made.append(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [files.read_json(where)] == [{"number": number} for number in made]
    assert files.names(where.parent) == ["holder.json"]


def test_without_hard_links_a_file_that_cannot_be_filled_is_no_file(tmp_path: Path) -> None:
    where = tmp_path / "holder.json"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            files._create_in_place(where, bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not where.exists()
    files._create_in_place(where, bytes(1000))
    with pytest.raises(FileExistsError):
        files._create_in_place(where, b"another")
    assert where.read_bytes() == bytes(1000)


def test_another_error_of_a_link_is_not_taken_for_their_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="Input/output error"):
        files.create_bytes(tmp_path / "holder.json", b"x")
    assert files.names(tmp_path) == []


def test_folders_are_copied_between_storages(root: Place, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "train").mkdir(parents=True)
    (source / "train" / "data.arrow").write_bytes(b"rows")
    (source / "manifest.json").write_bytes(b"{}")
    files.copy_tree(source, root / "cache" / "key")
    assert files.names(root / "cache" / "key") == ["manifest.json", "train"]
    files.copy_tree(root / "cache" / "key", tmp_path / "copy")
    assert (tmp_path / "copy" / "train" / "data.arrow").read_bytes() == b"rows"


def test_places_are_joined_and_pickled(root: Place) -> None:
    where = pickle.loads(pickle.dumps(root / "a/b"))
    assert where == root / "a" / "b"
    assert (where.name, where.parent) == ("b", root / "a")


def test_paths_and_file_uris_are_folders() -> None:
    assert files.place("/data/x") == files.place("file:///data/x") == Path("/data/x")
    assert files.place("x") == Path.cwd() / "x"
    assert files.place("~/x") == Path.home() / "x"


def test_a_uri_keeps_its_options() -> None:
    where = files.place("s3://bucket/a/b/?region=eu-west-1")
    assert isinstance(where, RemotePath)
    assert str(where / "c") == "s3://bucket/a/b/c?region=eu-west-1"
    assert files.place("gcs://bucket") == files.place("gs://bucket")


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("s3://key:hunter2@bucket/a", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket/a?secret_key=hunter2", "credentials"),
        ("ftp://host/hunter2", "not supported"),
        ("s3:///a", "names no bucket"),
        ("s3://bucket/../a", "'..'"),
        ("file://elsewhere/a", "no folder of this machine"),
    ],
)
def test_what_is_no_storage_is_refused_without_showing_secrets(uri: str, sentence: str) -> None:
    with pytest.raises(StudyError, match=sentence) as caught:
        files.place(uri)
    assert "hunter2" not in str(caught.value) or "ftp" in uri


def test_a_server_that_is_not_there_is_an_error_soon(s3_server: S3Server) -> None:
    where = files.place(f"s3://bucket/a?scheme=http&endpoint_override=127.0.0.1:{free_port()}&region=us-east-1")
    with pytest.raises(OSError) as caught:
        files.read_json(where / "b")
    assert "\n" not in files.reason(caught.value)
    unknown = files.place("s3://bucket/a?colour=blue")
    with pytest.raises(OSError, match="colour"):
        files.read_json(unknown)


def test_what_cannot_be_read_or_written_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSES", (0.01, 0.01))
    path = tmp_path / "file"
    path.mkdir()
    attempts: list[int] = []

    def write() -> None:
        attempts.append(1)
        if len(attempts) == 3:
            path.rmdir()
        path.write_bytes(b"x")

    files.persist(path, write)
    assert (len(attempts), path.read_bytes()) == (3, b"x")
    path.unlink()
    path.mkdir()
    with pytest.raises(files.StorageError, match=f"^cannot read {path}: Is a directory$"):
        files.patiently(path, path.read_bytes, "read")
    # What is not there will not be there later.
    monkeypatch.setattr(files, "PAUSES", (3600.0,))
    with pytest.raises(FileNotFoundError):
        files.patiently(path, (tmp_path / "none").read_bytes, "read")


@pytest.mark.parametrize(
    "uri", ["abfs://container@account.dfs.core.windows.net/a", "hdfs://me@host:8020/a?replication=2", "s3://bucket/a"]
)
def test_files_can_be_put_wherever_pyarrow_writes(uri: str) -> None:
    target = files.writable_place(uri)
    address, mark, options = uri.partition("?")
    assert str(target / "b") == f"{address}/b{mark}{options}"


@pytest.mark.parametrize(
    "uri",
    [
        "abfs://container:hunter2@account.dfs.core.windows.net/a",
        "hdfs://host/a?kerb_ticket=1&token=hunter2",
        "s3://key:hunter2@bucket/a",
    ],
)
def test_no_credentials_in_a_target(uri: str) -> None:
    with pytest.raises(StudyError, match=r"the target .* is given with credentials") as error:
        files.writable_place(uri)
    assert "hunter2" not in str(error.value)


def test_what_keeps_a_folder_from_being_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    files.check_writable(tmp_path)
    files.check_writable(tmp_path / "to" / "be" / "made")
    for folder, code in (("file", errno.ENOTDIR), ("file/below", errno.ENOTDIR), ("x" * 300, errno.ENAMETOOLONG)):
        with pytest.raises(OSError) as raised:
            files.check_writable(tmp_path / folder)
        assert raised.value.errno == code
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_belongs_to_somebody_else_is_said() -> None:
    with as_nobody() as folder:
        assert list_studies(folder) == ["hidden", "seen"]
        with pytest.raises(PermissionError):
            files.check_writable(folder / "studies" / "new")
        with pytest.raises(StudyError, match=r"cannot write to the storage .*Permission denied"):
            check_storage(folder / "studies")
        with pytest.raises(RuntimeError, match="mend that and run the study again"), mendable():
            (folder / "studies" / "seen" / "note").touch()


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """A storage of root's with two studies, one of which only root may look into."""
    # Below a folder that everybody may enter, which pytest's are not.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for study in ("hidden", "seen"):
            files.write_bytes(folder / "studies" / study / "study.json", b"{}")
        (folder / "studies" / "hidden").chmod(0o700)
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)
