"""The tests' PostgreSQL server is a real one, survives a restart, and leaves nothing behind."""

from __future__ import annotations

import psutil
import pytest
from postgres_server import PostgresServer, remove, start_server
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError


def test_databases_are_separate_and_survive_a_restart(postgres_server: PostgresServer) -> None:
    first, second = postgres_server.create_database(), postgres_server.create_database()
    for url, value in ((first, 1), (second, 2)):
        with create_engine(url).begin() as connection:
            connection.execute(text(f"CREATE TABLE t AS SELECT {value} AS x"))
    postgres_server.stop()
    with pytest.raises(OperationalError), create_engine(first).connect():
        pass
    postgres_server.start()
    for url, value in ((first, 1), (second, 2)):
        with create_engine(url).connect() as connection:
            assert connection.execute(text("SELECT x FROM t")).scalar() == value


def test_nothing_is_left_behind() -> None:
    server = start_server()
    processes = psutil.Process(server._process.pid).children(recursive=True)
    assert processes
    remove(server)
    assert not any(process.is_running() for process in processes)
    assert not server._folder.exists()


def test_it_asks_for_the_password(postgres_server: PostgresServer) -> None:
    url = postgres_server.create_database().replace(postgres_server.password, "guess")
    with pytest.raises(OperationalError, match="password"), create_engine(url).connect():
        pass
