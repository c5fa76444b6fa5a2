"""Who may use a Ray cluster: token authentication, on unless somebody has switched it off.

Ray runs whatever code a process that reaches its ports asks for (CVE-2023-48022, CVE-2025-62593). With token
authentication it answers only those who show the cluster's token. Ray 2.60 itself leaves it off where ``RAY_AUTH_MODE``
is not set, or, in a local ``ray.init``, switches it on and writes a token into the user's home, where it changes what
the user's other clusters do. So it is always said in so many words here.
See https://docs.ray.io/en/latest/ray-security/token-auth.html
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from peftsearch.spec import StudyError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
HOW_TO_SWITCH_ON = (
    "start it with RAY_AUTH_MODE=token and one token on all its nodes (ray get-auth-token --generate makes one)"
)
_REACH_SECONDS = 10.0
_KNOCK_SECONDS = 90.0


@contextlib.contextmanager
def token_of_our_own() -> Iterator[None]:
    """Token authentication for a cluster that this process starts, within the block; afterwards all is as before.

    The token is drawn anew each time and stands in the environment of this process and of those that it starts, which
    other users cannot read; no file holds it. What the user has set counts: ``RAY_AUTH_MODE=disabled``, or a token in
    ``RAY_AUTH_TOKEN`` or ``RAY_AUTH_TOKEN_PATH``.
    """
    settings = {MODE: os.environ.get(MODE, "token")}
    if settings[MODE].lower() == "token" and not (os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH)):
        settings[TOKEN] = secrets.token_hex(32)
    with _environment(settings):
        yield


@contextlib.contextmanager
def token_of_the_user() -> Iterator[None]:
    """Show the user's token, where there is one, to a cluster that somebody else has started, within the block.

    ``RAY_AUTH_MODE`` counts where it is set. Otherwise a token in ``RAY_AUTH_TOKEN``, in ``RAY_AUTH_TOKEN_PATH`` or in
    ``~/.ray/auth_token`` is shown; Ray by itself would ignore it for an explicit address.
    """
    with _environment({MODE: os.environ.get(MODE) or ("token" if _has_token() else "disabled")}):
        yield


def check_address(address: str) -> None:
    """See that an address has the form of a cluster's.

    Args:
        address: ``auto``, or ``HOST:PORT`` of its head; with ``auto``, ``RAY_ADDRESS`` counts where it is set.

    Raises:
        StudyError: It is something else: a dashboard's URL, or that of Ray Client (``ray://``), or it lacks a port.
    """
    given = (os.environ.get("RAY_ADDRESS") or address) if address == "auto" else address
    host, _, port = given.rpartition(":")
    right = host and not re.search(r"[\s/@]", host) and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536
    if given == "auto" or right:
        return
    name = f"{given!r}" if given == address else f"{given!r} (RAY_ADDRESS)"
    why = ""
    if given.startswith(("http://", "https://")):
        why = "a URL of a dashboard is for 'peftsearch submit'; "
    elif given.startswith("ray://"):
        why = "Ray Client (ray://) is not used; "
    raise StudyError(
        f"cannot reach a Ray cluster at {name}: {why}write HOST:PORT of its head, such as 10.0.0.5:6379, or auto on "
        "one of its machines"
    )


def check_access(address: str) -> bool:
    """Knock at a cluster, with our token and without.

    Args:
        address: ``auto`` or ``HOST:PORT`` of its head, as for ``ray.init``; the environment says what token to show.

    Returns:
        Whether it also answers those who show no token.

    Raises:
        StudyError: It has another form, cannot be reached, or refuses us.
    """
    check_address(address)
    # In a process of its own: Ray writes its complaints past Python to standard error, and waits for half a minute
    # where it could answer at once.
    code = f"from peftsearch.ray_access import knock; knock({address!r})"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_KNOCK_SECONDS)
        answer = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        raise StudyError(f"the Ray cluster at {address!r} does not answer: see that it runs") from None
    if error := answer.get("error"):
        raise StudyError(f"cannot reach a Ray cluster at {address!r}: {error}")
    if not answer["admitted"]:
        raise StudyError(refused(f"the Ray cluster at {address!r}"))
    return bool(answer["open"])


def refused(who: str) -> str:
    """The sentence about a cluster that does not take our token."""
    if os.environ.get(MODE, "").lower() == "token" and _has_token():
        return f"{who} does not accept the token that was shown: {_where_tokens_are()}"
    return f"{who} asks for a token and none was shown: {_where_tokens_are()}"


def _where_tokens_are() -> str:
    return f"put the cluster's into {TOKEN}, a file named by {TOKEN_PATH}, or ~/.ray/auth_token, and set {MODE}=token"


def knock(address: str) -> None:
    """Print, as JSON, whether a cluster admits us and whether it admits everybody; for `check_access`."""
    from ray._private import services

    try:
        place = services.canonicalize_bootstrap_address(address)
        if place is None:
            raise ConnectionError("none runs on this machine")
        host, _, port = place.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        print(json.dumps({"error": getattr(error, "strerror", None) or str(error)}))
        return
    admitted = _admitted(place)
    os.environ[MODE] = "disabled"
    _reread()
    print(json.dumps({"admitted": admitted, "open": _admitted(place)}))


def _admitted(place: str) -> bool:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=place).get_all_node_info(timeout=_REACH_SECONDS)
    except AuthenticationError:
        return False
    return True


def _has_token() -> bool:
    file = os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token"
    try:
        return bool(os.environ.get(TOKEN) or Path(file).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return False


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    _reread()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _reread()


def _reread() -> None:
    """Have Ray, which keeps what it once read, look at mode and token again."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
