"""Files of a storage: a folder of this machine (or of a network file system), or an object store named by a URI.

A place is a `pathlib.Path` in the first case and a `RemotePath` in the second. Both are joined with ``/`` and have
``name`` and ``parent``; what is in them is read and written with the functions of this module alone, which do the same
for both. Object stores are `pyarrow.fs`'s; their credentials are those of the environment (``AWS_ACCESS_KEY_ID``,
``GOOGLE_APPLICATION_CREDENTIALS``, roles of the machine, ...) and never part of a URI.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import random
import shutil
import stat
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from peftsearch.spec import StudyError, first_line

log = logging.getLogger(__name__)

_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse.", "9p", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "afs")

SCHEMES = ("s3", "gs")
"""Object stores that storages may be in."""

_CLAIM_SECONDS = 60.0
"""A contender for a file of an object store that has not gone on for so long has died."""


PAUSES = (1.0, 3.0, 10.0)
"""Seconds before something is tried again: room may be made on a full disk, a file server or object store come back."""

FULL = 30.0
"""Seconds that a full disk is waited for by those who wait longer for a server: room may be made, but unlike a server
it does not come back by itself."""

T = TypeVar("T")


class StorageError(OSError):
    """A storage takes nothing, or gives nothing: what was to be done is not to blame. One sentence."""


@dataclass(frozen=True)
class RemotePath:
    """A place in an object store. Small and picklable: the connection is made where it is used.

    Attributes:
        root: The storage's URI as it was given, without a trailing slash: ``s3://bucket/prefix?region=eu-west-1``.
        parts: Names of the place below it.
    """

    root: str
    parts: tuple[str, ...] = ()

    def __truediv__(self, below: str) -> RemotePath:
        return RemotePath(self.root, (*self.parts, *(name for name in below.split("/") if name)))

    @property
    def name(self) -> str:
        """The last name."""
        return self.parts[-1] if self.parts else self.root

    @property
    def parent(self) -> RemotePath:
        """The place that this one is in; of the storage itself, the storage."""
        return RemotePath(self.root, self.parts[:-1])

    def __str__(self) -> str:
        address, mark, options = self.root.partition("?")
        return "/".join((address, *self.parts)) + mark + options


Place = Path | RemotePath


def place(text: str | os.PathLike[str], what: str = "storage") -> Place:
    """A folder's path, a ``file://`` URI, or the URI of an object store, as a place.

    Nothing is connected to.

    Args:
        text: The path or URI.
        what: What it is, for the sentences.

    Raises:
        StudyError: It is neither, or it holds credentials.
    """
    given = os.fspath(text)
    scheme, separator, rest = given.partition("://")
    if not separator:
        return Path(given).expanduser().absolute()
    scheme = {"gcs": "gs"}.get(scheme.lower(), scheme.lower())
    address, _, options = rest.partition("?")
    host, _, path = address.partition("/")
    user, at, host = host.rpartition("@")
    shown = f"{scheme}://{host}/{path}".rstrip("/")
    if scheme == "file":
        if host not in ("", "localhost") or not path or at or options:
            raise StudyError(f"the {what} {shown!r} is no folder of this machine: write file:///path/to/folder")
        return Path(urllib.parse.unquote(f"/{path}"))
    if scheme not in SCHEMES:
        raise StudyError(
            f"storages in {scheme!r} are not supported: name a folder, or a URI that begins with "
            f"{' or '.join(f'{name}://' for name in SCHEMES)}"
        )
    # The bucket of a public test server is reached as gs://anonymous@bucket: that is no secret.
    if at and (scheme, user) != ("gs", "anonymous"):
        raise StudyError(
            f"the {what} {shown!r} is given with credentials, which would end up in logs: leave them out of the URI "
            "and set them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "GOOGLE_APPLICATION_CREDENTIALS)"
        )
    if not host:
        raise StudyError(f"the {what} {given!r} names no bucket: write {scheme}://BUCKET/PREFIX")
    names = [urllib.parse.unquote(name) for name in path.split("/") if name]
    if any(name in (".", "..") for name in names):
        raise StudyError(f"the {what} {shown!r} holds '.' or '..': write the prefix without them")
    if any(key.lower() in _SECRETS for key, _ in urllib.parse.parse_qsl(options, keep_blank_values=True)):
        raise StudyError(
            f"the {what} {shown!r} is given with credentials, which would end up in logs: set them in the environment"
        )
    if scheme == "gs" and "retry_limit_seconds" not in options:
        # Google's client goes on trying for a quarter of an hour; a study is to say what is wrong before that.
        options = "&".join(filter(None, (options, "retry_limit_seconds=10")))
    prefix = "".join(f"/{name}" for name in names)
    return RemotePath(f"{scheme}://{user}{at}{host}{prefix}" + (f"?{options}" if options else ""))


_SECRETS = ("access_key", "secret_key", "session_token", "access_token", "token", "password", "key", "secret")


def writable_place(text: str | os.PathLike[str]) -> Place:
    """A place to put files into: as `place`, or any other URI that `pyarrow.fs` knows (``abfs://``, ``hdfs://``, ...).

    Such a URI stays as it is, and storages cannot be there: nothing is known of what its writes promise.

    Raises:
        StudyError: As `place`.
    """
    given = os.fspath(text)
    scheme, separator, rest = given.partition("://")
    if not separator or scheme.lower() in ("file", "gcs", *SCHEMES):
        return place(given, "target")
    address, mark, options = rest.partition("?")
    host, _, path = address.partition("/")
    user, _, machine = host.rpartition("@")
    # Azure's user is the container, and Hadoop's the name of one; a password is neither's business here.
    keys = [key.lower() for key, _ in urllib.parse.parse_qsl(options, keep_blank_values=True)]
    if ":" in user or any(secret in key for key in keys for secret in _SECRETS):
        raise StudyError(
            f"the target {scheme}://{machine}/{path} is given with credentials, which would end up in logs: leave them "
            "out of the URI and set them in the environment"
        )
    return RemotePath(f"{scheme}://{address.rstrip('/')}{mark}{options}")


def is_local(where: Place) -> bool:
    """Whether a place is a path of this machine."""
    return isinstance(where, Path)


def filesystem(where: Place) -> tuple[Any, str]:
    """The `pyarrow.fs.FileSystem` of a place, and the place's path in it.

    Raises:
        OSError: The URI says something that the object store does not know.
    """
    if isinstance(where, Path):
        from pyarrow.fs import LocalFileSystem

        return LocalFileSystem(), str(where)
    connection, base = _connect(where.root, os.getpid())
    return connection, "/".join((base, *where.parts))


@functools.lru_cache(maxsize=8)
def _connect(root: str, _process: int) -> tuple[Any, str]:
    """Once per process: clients of object stores have threads, which a forked process would lack."""
    from pyarrow.fs import FileSystem

    try:
        connection, base = FileSystem.from_uri(root)
    except (ValueError, NotImplementedError, ImportError) as error:  # what is no URI, not built in, or not installed
        raise OSError(reason(error)) from None
    return connection, base.rstrip("/")


def reason(error: BaseException) -> str:
    """What went wrong with a file, in a few words on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def local_cache() -> Path:
    """Where this machine keeps copies of what is in object stores: ``PEFTSEARCH_CACHE``, or the user's cache folder."""
    chosen = os.environ.get("PEFTSEARCH_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftsearch"


def check_bucket(where: RemotePath) -> None:
    """See that an object store answers, and has the bucket; of other file systems, that they answer.

    Raises:
        OSError: It does not.
    """
    from pyarrow.fs import FileType

    connection, path = filesystem(where)
    if where.root.partition("://")[0] not in SCHEMES:
        connection.get_file_info(path)
        return
    bucket = path.partition("/")[0]
    if connection.get_file_info(bucket).type is FileType.NotFound:
        raise FileNotFoundError(f"there is no bucket {bucket!r}")


def check_writable(folder: Path) -> None:
    """See that a folder can be written into, or made; nothing is made.

    Raises:
        OSError: It cannot.
    """
    place = folder
    while True:
        try:
            mode = place.stat().st_mode
            break
        except FileNotFoundError:
            if place == place.parent:
                raise
            place = place.parent
    if not stat.S_ISDIR(mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


# --- whole files ---


def read_bytes(where: Place) -> bytes:
    """A file's content.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be read, or the object store cannot be reached.
    """
    if isinstance(where, Path):
        return where.read_bytes()
    connection, path = filesystem(where)
    with connection.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read())


def write_bytes(where: Place, content: bytes) -> None:
    """Write a file, and the folders that it is in; readers see the old file or the new one, never a part.

    Raises:
        OSError: It cannot be written. The old file is as it was, and nothing else is left behind.
    """
    if isinstance(where, Path):
        with _beside(where) as temporary:
            temporary.write_bytes(content)
        return
    connection, path = filesystem(where)
    # An object appears when its stream is closed.
    with connection.open_output_stream(path, compression=None) as stream:
        stream.write(content)


def persist(where: Place, write: Callable[[], None]) -> None:
    """Have something written, `patiently`."""
    patiently(where, write, "write")


def patiently(where: Place, call: Callable[[], T], what: Literal["read", "write"]) -> T:
    """Have something read or written; where that fails, have it tried again after pauses (`PAUSES`).

    Args:
        where: What is read or written, for the sentence.
        call: May be called several times.
        what: Which of both.

    Raises:
        StorageError: The disk is full, the folder cannot be read or written, or the object store cannot be reached.
        FileNotFoundError: What is to be read is not there.
    """
    for pause in PAUSES:
        try:
            return call()
        except OSError as error:
            if what == "read" and isinstance(error, FileNotFoundError):
                raise
            log.warning("cannot %s %s: %s; trying again in %g s", what, where, reason(error), pause)
            time.sleep(pause)
    try:
        return call()
    except OSError as error:
        if what == "read" and isinstance(error, FileNotFoundError):
            raise
        raise StorageError(f"cannot {what} {where}: {reason(error)}") from error


def create_bytes(where: Place, content: bytes, contender: str | None = None) -> bool:
    """Write a file unless there is one already; returns whether it was written.

    Of several processes that try at the same time at most one succeeds. On a file system that is the promise of a hard
    link, network file systems included, and the file appears whole; where there are no hard links the promise is weaker
    (`_create_in_place`). Object stores are asked through pyarrow, which knows no conditional write: there every
    contender puts down a claim first and goes on only where it then sees no other claim; whoever wrote later sees the
    earlier one, as listings of S3 and Google Cloud are strongly consistent. A contender that stops for a minute between
    its claim and its write is taken for dead.

    Args:
        where: The file.
        content: All of it.
        contender: Unique name of who wants it. One that asks again, after an answer that was lost, then meets its own
            claim, and not that of another.

    Raises:
        OSError: It cannot be written.
    """
    if isinstance(where, Path):
        where.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(where)
        try:
            temporary.write_bytes(content)
            try:
                os.link(temporary, where)
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                _create_in_place(where, content)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True
    claims = where.parent / f".claims-{where.name}"
    for attempt in range(8):
        if exists(where):
            return False
        mine = claims / (contender or uuid.uuid4().hex)
        write_bytes(mine, b"claim")
        try:
            if not _other_claims(claims, mine.name):
                if exists(where):
                    return False
                write_bytes(where, content)
                return True
        finally:
            delete(mine)
        # All contenders withdraw, and try again after different pauses.
        time.sleep(random.uniform(0.1, 0.5) * (attempt + 1))
    return False


_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without hard links answer (link(2)): exFAT, some SMB shares, buckets mounted with gcsfuse."""


def _create_in_place(where: Path, content: bytes) -> None:
    # The file is there before its content is: whoever reads at that moment finds it empty or cut short, and so does
    # everybody where this process dies in between. That at most one process creates it is the file system's word
    # (O_EXCL of open(2)); a bucket that is mounted as a folder need not keep it between machines, where gs:// would.
    descriptor = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        # Network file systems say at the end that there was no room.
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except BaseException:
        where.unlink(missing_ok=True)
        raise


def _other_claims(claims: RemotePath, mine: str) -> list[str]:
    """Living claims beside one's own, by the store's own clock; claims of the dead are removed."""
    from pyarrow.fs import FileSelector, FileType

    connection, path = filesystem(claims)
    found = {info.base_name: info for info in connection.get_file_info(FileSelector(path, allow_not_found=True))}
    now = found[mine].mtime if mine in found else None
    others = []
    for name, info in found.items():
        if name == mine or info.type is not FileType.File:
            continue
        if now is not None and (now - info.mtime).total_seconds() > _CLAIM_SECONDS:
            delete(claims / name)
        else:
            others.append(name)
    return others


def write_json(where: Place, value: Any) -> None:
    """Write JSON so that readers see the old file or the new one; errors as `write_bytes`."""
    write_bytes(where, _json(value))


def create_json(where: Place, value: Any, contender: str | None = None) -> bool:
    """Write JSON unless there is a file already; see `create_bytes`."""
    return create_bytes(where, _json(value), contender)


def read_json(where: Place) -> Any:
    """The value of a JSON file; None where there is none.

    Raises:
        ValueError: It is no JSON.
        OSError: It cannot be read, or the object store cannot be reached.
    """
    try:
        return json.loads(read_bytes(where))
    except FileNotFoundError:
        return None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# --- what is there ---


def exists(where: Place) -> bool:
    """Whether there is a file.

    Raises:
        OSError: The object store cannot be reached.
    """
    if isinstance(where, Path):
        return where.is_file()
    from pyarrow.fs import FileType

    connection, path = filesystem(where)
    return bool(connection.get_file_info(path).type is FileType.File)


def names(where: Place) -> list[str]:
    """Names of what is directly in a folder, sorted; none where there is no folder.

    Raises:
        OSError: It cannot be read, or the object store cannot be reached.
    """
    if isinstance(where, Path):
        return sorted(os.listdir(where)) if where.is_dir() else []
    from pyarrow.fs import FileSelector

    connection, path = filesystem(where)
    # Of Google Cloud, pyarrow lists no folder that nobody has made an object for; S3's folders are listed anyway.
    everything = where.root.startswith("gs://")
    found = connection.get_file_info(FileSelector(path, allow_not_found=True, recursive=everything))
    below = (info.path[len(path) :].strip("/").partition("/")[0] for info in found)
    return sorted({name for name in below if name})


def delete(where: Place) -> None:
    """Delete a file, where there is one.

    Raises:
        OSError: It cannot be deleted.
    """
    if isinstance(where, Path):
        where.unlink(missing_ok=True)
        return
    connection, path = filesystem(where)
    # S3 answers that all is well where there was nothing to delete; others do not.
    with contextlib.suppress(FileNotFoundError):
        connection.delete_file(path)


def delete_tree(where: Place) -> None:
    """Delete a folder and all that is in it, where there is one.

    Raises:
        OSError: Something of it cannot be deleted; of a folder of this machine, all else is.
    """
    if isinstance(where, Path):
        try:
            shutil.rmtree(where)
        except OSError as error:
            shutil.rmtree(where, ignore_errors=True)
            if not isinstance(error, FileNotFoundError):
                raise
        return
    connection, path = filesystem(where)
    try:
        connection.delete_dir(path)
    except OSError:
        # Some say so where there is none.
        if names(where):
            raise


# --- files that other libraries read and write ---


@contextlib.contextmanager
def reading(where: Place) -> Iterator[Path]:
    """A file as one of this machine: itself, or a copy that is gone afterwards.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be read, or the object store cannot be reached.
    """
    if isinstance(where, Path):
        if not where.exists():
            raise FileNotFoundError(str(where))
        yield where
        return
    with tempfile.TemporaryDirectory(prefix="peftsearch-") as folder:
        copy = Path(folder) / where.name
        _copy(where, copy)
        yield copy


@contextlib.contextmanager
def writing(where: Place) -> Iterator[Path]:
    """A path of this machine to write a file to; what was written is in its place afterwards, whole.

    Where writing fails, the old file is as it was, and nothing else is left behind.

    Raises:
        OSError: It cannot be put into its place.
    """
    if isinstance(where, Path):
        with _beside(where) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="peftsearch-") as folder:
        made = Path(folder) / where.name
        yield made
        _copy(made, where)


def copy_tree(source: Place, target: Place) -> None:
    """Copy a folder with all that is in it; what is there already is replaced.

    Raises:
        OSError: Something cannot be read or written.
    """
    from pyarrow.fs import copy_files

    from_system, from_path = filesystem(source)
    to_system, to_path = filesystem(target)
    if isinstance(target, Path):
        target.mkdir(parents=True, exist_ok=True)
    elif target.root.partition("://")[0] not in SCHEMES:
        to_system.create_dir(to_path, recursive=True)
    copy_files(from_path, to_path, source_filesystem=from_system, destination_filesystem=to_system, use_threads=False)


def _copy(source: Place, target: Place) -> None:
    from_system, from_path = filesystem(source)
    to_system, to_path = filesystem(target)
    with (
        from_system.open_input_stream(from_path, compression=None) as stream,
        to_system.open_output_stream(to_path, compression=None) as sink,
    ):
        while block := stream.read(8 * 2**20):
            sink.write(block)


@contextlib.contextmanager
def _beside(where: Path) -> Iterator[Path]:
    """A new name in the same folder, which takes the file's place at the end and is gone where that fails."""
    where.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(where)
    try:
        yield temporary
        os.replace(temporary, where)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(where: Path) -> Path:
    return where.with_name(f".{where.name}.{uuid.uuid4().hex[:12]}")


def on_network(path: Path) -> bool:
    """Whether a path is on a file system that other machines may write, too."""
    import psutil

    place = os.path.realpath(path)
    mounts = {item.mountpoint: item.fstype for item in psutil.disk_partitions(all=True)}
    while place not in mounts and place != "/":
        place = os.path.dirname(place)
    return mounts.get(place, "").startswith(_NETWORK_FILE_SYSTEMS)
