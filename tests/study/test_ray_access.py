"""Ray's token authentication is always said in so many words, and leaves the user's own settings as they were."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from peftsearch.ray_access import check_access, check_address, refused, token_of_our_own, token_of_the_user
from peftsearch.spec import StudyError

NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, and an environment that says nothing of tokens."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def settings() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def token_that_ray_shows() -> str | None:
    """What Ray itself, which keeps what it once read, would show."""
    from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

    if get_authentication_mode() != AuthenticationMode.TOKEN:
        return None
    return str(AuthenticationTokenLoader.instance().get_raw_token())


def test_a_cluster_of_our_own_gets_a_token_of_its_own_each_time(home: Path) -> None:
    tokens = []
    for _ in range(2):
        with token_of_our_own():
            tokens.append(token_that_ray_shows())
            assert settings() == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": tokens[-1]}
        assert settings() == {}
        assert token_that_ray_shows() is None
    assert tokens[0] != tokens[1]
    assert all(token is not None and len(token) == 64 for token in tokens)
    assert not list(home.rglob("*"))


def test_what_the_user_has_set_counts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for choose in (token_of_our_own, token_of_the_user):
        with choose():
            assert settings() == {"RAY_AUTH_MODE": "disabled"}
            assert token_that_ray_shows() is None
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
    (home / "token").write_text("f" * 64)
    for choose in (token_of_our_own, token_of_the_user):
        with choose():
            assert token_that_ray_shows() == "f" * 64
            assert "RAY_AUTH_TOKEN" not in settings()


def test_somebody_elses_cluster_is_shown_the_users_token_where_there_is_one(home: Path) -> None:
    with token_of_the_user():
        assert settings() == {"RAY_AUTH_MODE": "disabled"}
        assert "asks for a token and none was shown" in refused("it")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("e" * 64)
    with token_of_the_user():
        assert token_that_ray_shows() == "e" * 64
        assert "does not accept the token" in refused("it")
        assert "e" * 64 not in refused("it")
    # For a cluster of our own it is not used: its other users know it.
    with token_of_our_own():
        assert token_that_ray_shows() not in (None, "e" * 64)


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:6379", "head.example.org:1", "[::1]:6379", "my_head:65535"])
def test_what_has_the_form_of_an_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    check_address("auto")


def test_an_address_without_a_cluster_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(StudyError, match=f"cannot reach a Ray cluster at '127.0.0.1:{port}': Connection refused"):
        check_access(f"127.0.0.1:{port}")
    with pytest.raises(StudyError, match="cannot reach a Ray cluster at 'nonsense': write HOST:PORT"):
        check_access("nonsense")
