"""Who drives a study: at most one process at a time, on whichever machine.

A driver holds a lease: a numbered file in the study's folder that it writes again every few seconds (its heart beats).
The file with the highest number is the lease that counts, and a number is given once, so of several processes that
want to be next one succeeds; that holds on a local disk, on a network's file system and in an object store.

- A holder on this machine whose process has ended is followed at once.
- A holder on another machine is watched. Its heart beats: it lives. It is silent for `SILENCE` seconds: it is followed.
  What is compared is whether the file changes, never two machines' clocks.
- A holder that cannot be sure to hold the lease any more (its machine was suspended, the storage did not answer) looks
  before it writes (`Lease.check`), and stops where somebody followed it.

On a local disk a lock of the kernel (``flock``) stands beside the lease; network file systems do not always mean it.
What remains possible: a driver that is suspended between that look and the database's answer, for longer than
`SILENCE`, and then completes that one write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peftsearch.files import FULL, Place, create_json, delete, names, patiently, read_json, write_json
from peftsearch.spec import StudyError

log = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds between two heartbeats."""

SILENCE = 30.0
"""Seconds without a heartbeat after which a driver on another machine is taken for dead."""

_LEASES = "drivers"
_NOTES = "driver.json"
_LOCK = "driver.lock"
_KEPT = 3


class TakenOver(StudyError):
    """Another driver has taken the study over; this one must not write any more."""


@dataclass(frozen=True)
class Holder:
    """A driver, as its lease describes it.

    Attributes:
        token: Unique.
        host: Name of its machine, for people.
        machine: Its machine's boot and space of process numbers: only where they agree, ``pid`` means something.
        pid: Its process.
        started: When that process started, by the machine's own count: numbers of processes come again.
        since: When it took the lease.
        beats: Heartbeats so far.
        heard: The last one, by its own clock.
        released: Whether it gave the lease back.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str
    since: str
    beats: int = 0
    heard: str = ""
    released: bool = False

    @property
    def here(self) -> bool:
        """Whether its process, if it lives, is one of this machine."""
        return self.machine == _machine()

    def lives(self) -> bool:
        """Whether its process is there; to be asked only of one that is `here`."""
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class Lease:
    """A study held by this process; made by `hold`."""

    def __init__(self, folder: Place, name: str, number: int, holder: Holder, lost: Callable[[], None]) -> None:
        self._folder = folder
        self._name = name
        self._number = number
        self._holder = holder
        self._tell = lost
        self._verified = clock()
        self._mutex = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._heart, name="lease", daemon=True)
        self.lost: TakenOver | None = None

    def check(self) -> None:
        """Make sure that this process may still write; costs nothing while its heart beats.

        Raises:
            TakenOver: It may not.
            RuntimeError: The storage cannot be asked.
        """
        if self.lost is None and clock() - self._verified > SILENCE / 2:
            self._look_until_answered()
        if self.lost is not None:
            raise self.lost

    def note(self, **fields: Any) -> None:
        """Update what ``status`` says of the last driver; nothing where it is another one by now."""
        if self.lost is None:
            known = last_driver(self._folder)
            holder = {"pid": self._holder.pid, "host": self._holder.host}
            write_json(self._folder / _NOTES, {**known, **holder, **fields})

    def start(self) -> None:
        """Let the heart beat."""
        self._thread.start()

    def release(self) -> None:
        """Give the study back."""
        self._over.set()
        self._thread.join(timeout=2 * BEAT)
        with self._mutex:
            if self.lost is None:
                with contextlib.suppress(OSError):
                    write_json(_file(self._folder, self._number), asdict(replace(self._holder, released=True)))

    def _heart(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._beat()
            except (OSError, StudyError) as error:
                log.warning("the lease of %s could not be renewed: %s", self._name, error)
            if self.lost is not None:
                self._tell()
                return

    def _beat(self) -> None:
        with self._mutex:
            began = clock()
            if self.lost is not None or self._over.is_set():
                return
            self._holder = replace(self._holder, beats=self._holder.beats + 1, heard=_now())
            # Written before it is looked at: on NFS a change to a folder makes the client ask the server what else has
            # changed in it. One's own file is nobody's lease once there is a higher number.
            write_json(_file(self._folder, self._number), asdict(self._holder))
            number, holder = latest(self._folder)
            if number > self._number:
                self.lost = TakenOver(
                    f"the study {self._name!r} was taken over by {holder or 'another driver'}, as this one was not "
                    f"heard of for {SILENCE:.0f} s: this one has stopped, and nothing that was recorded is lost"
                )
            else:
                self._verified = began

    def _look_until_answered(self) -> None:
        began = clock()
        while True:
            try:
                return self._beat()
            except (OSError, StudyError) as error:
                no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                if clock() - began > (FULL if no_room else 20 * SILENCE):
                    raise RuntimeError(
                        f"the storage of the study {self._name!r} does not answer ({error}): run the study again when "
                        "it is back"
                    ) from error
                time.sleep(1.0)


@contextlib.contextmanager
def hold(
    folder: Place,
    name: str,
    *,
    lost: Callable[[], None] = lambda: None,
    waiting: Callable[[str], None] = lambda sentence: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Lease]:
    """Hold a study as its only driver.

    Args:
        folder: The study's folder; it must exist.
        name: The study's name, for sentences.
        lost: Called once, from another thread, when somebody else has taken the study over.
        waiting: Told what is waited for, where that takes a while.
        stopped: Whether somebody asked to stop while it is waited.

    Raises:
        StudyError: Another process holds it; says which.
        StorageError: The storage stays away.
        KeyboardInterrupt: Somebody asked to stop.
    """
    with _kernel_lock(folder) as locked:
        number, found = _latest(folder)
        if found is not None and not found.released:
            if found.here:
                if found.lives():
                    raise _held(name, found)
            else:
                _watch(folder, name, number, found, waiting, stopped)
                number, _ = _latest(folder)
        elif not locked:
            raise _held(name, found)
        holder = Holder(uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()), _now())
        holder = replace(holder, heard=holder.since)
        lease = Lease(folder, name, number + 1, holder, lost)
        lease_file = _file(folder, number + 1)
        if not patiently(lease_file, lambda: create_json(lease_file, asdict(holder), holder.token), "write"):
            given, first = _latest(folder)
            if given <= number:
                raise StudyError(f"several processes want to run the study {name!r}, and hinder one another: try again")
            # Of an attempt whose answer was lost, the file may be there all the same.
            if first is None or first.token != holder.token:
                raise _held(name, first)
        with contextlib.suppress(OSError):
            for old in _numbers(folder):
                if old <= number - _KEPT:
                    delete(_file(folder, old))
        lease.start()
        try:
            yield lease
        finally:
            lease.release()


def is_held(folder: Place) -> bool:
    """Whether a driver is running a study at this moment.

    A driver on another machine is believed where it was heard of lately by its own clock, which may be some seconds off
    ours; to take a study over, `hold` compares no clocks.
    """
    _, found = latest(folder)
    if found is None or found.released:
        return False
    if found.here:
        return found.lives()
    silent = datetime.now(UTC) - datetime.fromisoformat(found.heard)
    return silent.total_seconds() < 2 * SILENCE


def last_heard(folder: Place, driver: dict[str, Any]) -> str | None:
    """When a driver that is gone without a word was heard of last; None where the lease is somebody else's by now.

    Args:
        folder: The study's folder.
        driver: What is known of the driver (`last_driver`).
    """
    _, found = latest(folder)
    same = found is not None and (found.pid, found.host) == (driver.get("pid"), driver.get("host"))
    return found.heard if found is not None and same else None


def last_driver(folder: Place) -> dict[str, Any]:
    """What is known of the driver that runs or last ran a study (`Lease.note`)."""
    try:
        notes = read_json(folder / _NOTES)
    except (ValueError, RecursionError, IsADirectoryError):
        # For people only: damaged ones are none.
        return {}
    return notes if isinstance(notes, dict) else {}


def latest(folder: Place) -> tuple[int, Holder | None]:
    """The lease that counts, and its number; 0 where the study was never held.

    Raises:
        OSError: The storage cannot be read.
        StudyError: The lease is damaged.
    """
    number = max(_numbers(folder), default=0)
    if not number:
        return 0, None
    where = _file(folder, number)
    try:
        found = Holder(**read_json(where))
        types = {item.name: item.type for item in fields(Holder)}
        if any(type(getattr(found, name)).__name__ != kind for name, kind in types.items()):
            raise TypeError(where)
        if datetime.fromisoformat(found.heard).tzinfo is None:
            raise ValueError(where)
        return number, found
    except (ValueError, TypeError, RecursionError):
        raise StudyError(f"the lease {where} cannot be read: delete it where no driver runs that study") from None


def _latest(folder: Place) -> tuple[int, Holder | None]:
    """As `latest`, with patience for a storage that does not answer at once.

    Raises:
        StorageError: It stayed away.
    """
    return patiently(folder, lambda: latest(folder), "read")


def clock() -> float:
    """Seconds that have passed, those in which this machine was suspended included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _watch(
    folder: Place,
    name: str,
    number: int,
    found: Holder,
    waiting: Callable[[str], None],
    stopped: Callable[[], bool],
) -> None:
    """Return when a holder on another machine has been silent for long enough, or has released the study."""
    waiting(f"watching {found} for {SILENCE:.0f} s, to see whether it is alive")
    began = clock()
    while clock() - began < SILENCE:
        if stopped():
            raise KeyboardInterrupt
        time.sleep(min(1.0, SILENCE / 10))
        try:
            now_number, now = latest(folder)
        except OSError:
            now_number, now = _latest(folder)
            # The storage was away, for the other one's heart, too: silence counts only where it could be heard.
            began = clock()
        if now is not None and now.released:
            return
        if now is None or now_number != number or now.beats != found.beats:
            raise _held(name, now)


def _held(name: str, found: Holder | None) -> StudyError:
    return StudyError(
        f"the study {name!r} is being run by {found or 'another process'}: "
        "wait for it, stop it, or give this run another --name"
    )


@contextlib.contextmanager
def _kernel_lock(folder: Place) -> Iterator[bool]:
    """Whether the kernel gave us the study's lock; an object store has none to refuse."""
    if not isinstance(folder, Path):
        yield True
        return
    with patiently(folder, lambda: (folder / _LOCK).open("a+"), "write") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks (Lustre without -o flock, NFS without lockd): the leases do.
            yield error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
            return
        try:
            yield True
        finally:
            # Processes that were forked meanwhile share this lock, and would hold it for as long as they live.
            fcntl.flock(file, fcntl.LOCK_UN)


def _numbers(folder: Place) -> list[int]:
    return [int(item[:6]) for item in names(folder / _LEASES) if len(item) == 11 and item[:6].isdecimal()]


def _file(folder: Place, number: int) -> Place:
    return folder / _LEASES / f"{number:06d}.json"


def _machine() -> str:
    """The boot of this machine, and the space in which its process numbers count: containers have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        import psutil

        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _started(pid: int) -> str:
    """When a process of this machine started, in the machine's own count; empty where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
    except OSError:
        return ""
    else:
        # One that was killed, and that its parent has not asked about yet, is dead. Fields: man 5 proc, from the 3rd.
        return "" if fields[0] in "ZXx" else fields[19]
    import psutil

    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
