"""The ledger's database: opened with the settings that suit it, waited for while it is away, and written by one driver.

A database that is restarted, or locked by another process, costs a study some time and nothing else: every call is
made again with back-off until it succeeds or the patience ends. Calls that may have succeeded although their answer was
lost (the connection broke in between) are recognised when they are made again; that rests on there being one writer.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, func
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    InterfaceError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from peftsearch.files import FULL, on_network
from peftsearch.spec import StudyError, first_line
from peftsearch.tracking.ledger import hide_password

log = logging.getLogger(__name__)

OPENING = 10.0
"""Seconds that opening waits for a database that is locked, or starting up."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0
_POSTGRES_DRIVERS = ("psycopg", "psycopg2")
_STARTING_OR_FULL = ("database is locked", "the database system is ", "too many clients", "remaining connection slots")
"""What SQLite and PostgreSQL say while they are busy, starting up, or have no connection to spare. Words, as neither
driver hands on the code of an error that it met while connecting (psycopg 3.3, psycopg2 2.9)."""

_HOPELESS = ("readonly database", "no such table", "no such column")
"""What no patience mends."""

_NO_ROOM = ("disk is full", "No space left on device")
"""What SQLite and PostgreSQL say of a full disk."""

_NO_TRIAL = 2**31 - 1
"""No trial's id in a database is higher: the column is an integer of 32 bits."""


class PatientStorage(RDBStorage):
    """Optuna's storage in a database, with patience.

    Args:
        url: SQLAlchemy URL.
        patience: Seconds that a call waits for a database that is away.
        guard: Called before every write; raises where this process may not write any more.
    """

    def __init__(self, url: str, patience: float, guard: Callable[[], None] | None = None) -> None:
        self.patience = patience
        self.guard = guard
        self.failure: Exception | None = None
        self._changed: set[int] = set()
        """Trials that were made, or have changed their state or their hyperparameters, since they were last read into
        Optuna's cache."""
        try:
            super().__init__(url, engine_kwargs=_engine_options(make_url(url)))
        except BaseException:
            # What another attempt opens comes on top of what this one left in its pool.
            if hasattr(self, "engine"):
                self.engine.dispose()
            raise
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _sqlite_settings(make_url(url)))
            self.engine.dispose()

    def patiently(self, call: Callable[[bool], Any], *, writes: bool) -> Any:
        """Make a call until the database answers it.

        Args:
            call: Is told whether an earlier attempt failed, which may have had its effect all the same.
            writes: Whether it changes the database.

        Raises:
            RuntimeError: The database stayed away for longer than the patience, or does so already.
            Exception: What the guard raises.
        """
        began, pause, again = time.monotonic(), _FIRST_PAUSE, False
        while True:
            if writes and self.failure is not None:
                raise self.failure
            if writes and self.guard is not None:
                try:
                    self.guard()
                except Exception as error:
                    self.failure = error
                    raise
            try:
                result = call(again)
            except Exception as error:
                if not is_away(error):
                    raise
                waited = time.monotonic() - began
                no_room = any(text in _complaint(error) for text in _NO_ROOM)
                patience = min(self.patience, FULL) if no_room else self.patience
                if waited >= patience or any(text in _complaint(error) for text in _HOPELESS):
                    what = f"has not answered for {waited:.0f} s" if waited >= patience else "cannot be used"
                    failure = RuntimeError(
                        f"the ledger {hide_password(self.url)} {what} ({_complaint(error)}): nothing that it holds is "
                        "lost, run the study again when that is mended"
                    )
                    if writes:
                        self.failure = failure
                    raise failure from error
                if not again:
                    log.warning(
                        "the ledger %s does not answer, waiting: %s", hide_password(self.url), _complaint(error)
                    )
                again = True
                time.sleep(min(pause, max(0.0, patience - waited)))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if again:
                    log.warning("the ledger answers again, after %.1f s", time.monotonic() - began)
                return result

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        # Optuna's own method makes up to five attempts, each of which may leave a trial behind (5.0.0,
        # RDBStorage._create_new_trial): the same two statements, once.
        def create(again: bool) -> int:
            if again and (newest := self._newest_trial(study_id)) > before:
                return newest
            with _create_scoped_session(self.scoped_session) as session:
                models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
                return int(self._get_prepared_new_trial(study_id, template_trial, session).trial_id)

        before = self._newest_trial(study_id)
        trial_id: int = self.patiently(create, writes=True)
        self._changed.add(trial_id)
        return self.get_trial(trial_id)

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """What Optuna's cache asks for twice per proposal: every running trial anew, and what came after them.

        Of these, only those are read whose state or hyperparameters have changed: there is no other writer, and
        samplers look at nothing else of a trial that runs (TPE takes it for a bad one, so as not to propose its like
        again). With 64 trials at a time it would be 128 trials per proposal, each with all of its attributes.
        """

        def read(_: bool) -> list[FrozenTrial]:
            return RDBStorage._get_trials(self, study_id, states, included, greater_than)

        # The cache is empty, or it is not the cache that asks.
        whole = states is not None or (trial_id_greater_than < 0 and not included_trial_ids)
        if not whole and not self._changed:
            return []
        included = included_trial_ids if whole else set(self._changed)
        greater_than = trial_id_greater_than if whole else _NO_TRIAL
        trials: list[FrozenTrial] = self.patiently(read, writes=False)
        if not whole:
            self._changed -= {trial._trial_id for trial in trials}
        return trials

    def _newest_trial(self, study_id: int) -> int:
        def newest(_: bool) -> int:
            with _create_scoped_session(self.scoped_session) as session:
                column = models.TrialModel.trial_id
                return session.query(func.max(column)).filter(models.TrialModel.study_id == study_id).scalar() or 0

        return self.patiently(newest, writes=False)  # type: ignore[no-any-return]

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        def change(again: bool) -> bool:
            if again and self.get_trial(trial_id).state is state:
                return True
            return RDBStorage.set_trial_state_values(self, trial_id, state, values)

        self._changed.add(trial_id)
        return self.patiently(change, writes=True)  # type: ignore[no-any-return]

    def _set_trial_param(self, trial_id: int, *arguments: Any) -> None:
        self._changed.add(trial_id)
        self.patiently(lambda _: RDBStorage._set_trial_param(self, trial_id, *arguments), writes=True)


def _patient(name: str, *, writes: bool) -> None:
    """Have a method of the storage called with patience; calling it twice must be the same as calling it once."""
    method = getattr(RDBStorage, name)

    @functools.wraps(method)
    def call(self: PatientStorage, *arguments: Any, **options: Any) -> Any:
        return self.patiently(lambda _: method(self, *arguments, **options), writes=writes)

    setattr(PatientStorage, name, call)


for _name in (
    # Made again, it raises DuplicatedStudyError, which `optuna.create_study(load_if_exists=True)` understands.
    "create_new_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "set_trial_user_attr",
    "set_trial_system_attr",
):
    _patient(_name, writes=True)
for _name in (
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "get_trial",
):
    _patient(_name, writes=False)


def open_database(url: str, patience: float, guard: Callable[[], None] | None = None) -> PatientStorage:
    """Open a ledger's database.

    Args:
        url: SQLAlchemy URL; a PostgreSQL URL without a driver takes whichever is installed.
        patience: Seconds that each call waits for a database that is away; opening waits for `OPENING` at most.
        guard: Called before every write.

    Raises:
        StudyError: It cannot be opened.
    """
    loc = ("tracking", "ledger")
    began, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        try:
            return PatientStorage(_with_driver(url), patience, guard)
        except StudyError:
            raise
        except Exception as error:  # SQLAlchemy's and the drivers' errors have no common base
            sentence = f"cannot open the ledger {hide_password(url)}: {_complaint(error)}"
            if isinstance(error, ImportError):
                raise StudyError(
                    f"{sentence}: the Python driver of that kind of database is not installed", loc
                ) from None
            if "password" in sentence.lower():
                sentence += " (a password is not kept with the study: PGPASSWORD or ~/.pgpass brings PostgreSQL's)"
            if not _opens_soon(error) or time.monotonic() - began > min(patience, OPENING):
                raise StudyError(sentence, loc) from None
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def is_away(error: BaseException) -> bool:
    """Whether an error means that the database may answer the same call later."""
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    away = (OperationalError, InterfaceError, InternalError, PoolTimeoutError, PendingRollbackError)
    return isinstance(error, away)


def _complaint(error: BaseException) -> str:
    """What a database's error says, without its statement and its links."""
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    return first_line(getattr(error, "orig", None) or error)


def _opens_soon(error: BaseException) -> bool:
    if isinstance(error, (IntegrityError, ProgrammingError, OperationalError)) and any(
        text in str(error.orig).lower() for text in ("unique", "already exists")
    ):
        # Another process makes the same tables at the same moment, between Optuna's look and its own attempt.
        return True
    return is_away(error) and any(text in str(getattr(error, "orig", None)) for text in _STARTING_OR_FULL)


def _with_driver(url: str) -> str:
    """The URL with a PostgreSQL driver that is installed; SQLAlchemy's choice depends on its version."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return url
    if parsed.drivername not in ("postgresql", "postgres"):
        return url
    for driver in _POSTGRES_DRIVERS:
        if importlib.util.find_spec(driver) is not None:
            return parsed.set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    raise StudyError(
        f"the ledger {hide_password(url)} needs a PostgreSQL driver: pip install 'peftsearch[postgres]'",
        ("tracking", "ledger"),
    )


def _engine_options(url: URL) -> dict[str, Any]:
    try:
        dialect = url.get_dialect()
    except (NoSuchModuleError, ImportError):
        return {}
    if dialect.name == "sqlite":
        # The rest of the patience is ours: one that says that it waits, and can be interrupted.
        return {"connect_args": {"timeout": 2.0}}
    if dialect.driver in _POSTGRES_DRIVERS:
        # A server that vanished without a word would otherwise be waited for as long as the kernel likes.
        # https://www.postgresql.org/docs/current/libpq-connect.html
        wanted = {
            "connect_timeout": 10,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 60_000,
        }
        return {"connect_args": {name: value for name, value in wanted.items() if name not in url.query}}
    return {}


def _sqlite_settings(url: URL) -> Callable[[Any, Any], None]:
    # With the rollback journal every attribute costs two fsyncs (15 to 20 ms here); with a write-ahead log 0.5 ms.
    # A process that dies loses nothing either way. https://www.sqlite.org/wal.html
    # A write-ahead log needs shared memory, which a network's file system cannot give (same page, section 1).
    local = url.database in (None, "", ":memory:") or not on_network(Path(str(url.database).removeprefix("file:")))

    def settings(connection: Any, _: Any) -> None:
        if local:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
        else:
            connection.execute("PRAGMA journal_mode=DELETE")
            connection.execute("PRAGMA synchronous=FULL")

    return settings
