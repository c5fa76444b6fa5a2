"""Keeping passwords and tokens out of everything that is written or shown.

A study needs passwords (of its ledger's database, of an MLflow server) only to connect. They are used where they were
given, and taken out of everything that outlives that: files, MLflow, messages.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

HIDDEN = "***"

_WORDS = r"(?:password|passwd|passphrase|pwd|token|secret|credential|signature|api_?key|access_?key|private_?key)"
_SCHEME = r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)"
# In running text. A password may contain "/" and ":", as SQLAlchemy reads it.
_LOGIN = re.compile(_SCHEME + r"(?P<user>[^\s:/@'\"]*):(?P<password>[^\s@'\"]*)@")
# A token alone, as in https://TOKEN@host: names of users are shorter.
_TOKEN = re.compile(_SCHEME + r"(?P<user>[^\s:/@'\"]{20,})@")
_SETTING = re.compile(rf"(?P<key>\b[\w.-]*{_WORDS}\s*=\s*)(?P<value>[^\s&;,:'\"]+)", re.IGNORECASE)
_QUERY = re.compile(rf"(?P<before>[?&])[\w.-]*{_WORDS}=(?P<value>[^&\s'\"]*)(?P<more>&?)", re.IGNORECASE)
# In what is one URL and nothing else, a password may contain anything but "@".
_URL_LOGIN = re.compile(_SCHEME + r"(?P<user>[^:/@]*):(?P<password>[^@]*)@")
_ENVIRONMENT = re.compile(rf"(?:^|_){_WORDS}S?(?:_|$)", re.IGNORECASE)
_SHORTEST = 6

_known: set[str] = set()


def hide_secrets(text: str) -> str:
    """A text without the passwords and tokens in it.

    Those of URLs, those that stand behind a telling key (``password=...``), those that URLs given to `note_secrets`
    hold, and those of environment variables whose names say so (``HF_TOKEN``, ``PGPASSWORD``, ...).
    """
    text = _LOGIN.sub(rf"\g<scheme>\g<user>:{HIDDEN}@", text)
    text = _TOKEN.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _SETTING.sub(rf"\g<key>{HIDDEN}", text)
    for secret in sorted(_known | _of_environment(), key=len, reverse=True):
        if secret in text:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    return text


def note_secrets(*urls: str) -> None:
    """Have `hide_secrets` know what these URLs hold, also where it stands alone (drivers quote it in their errors)."""
    for url in urls:
        found = [match["password"] for match in _URL_LOGIN.finditer(url)]
        found += [match["user"] for match in _TOKEN.finditer(url)]
        found += [match["value"] for match in _QUERY.finditer(url)]
        for secret in found:
            _known.update(word for word in (secret, unquote(secret)) if len(word) >= _SHORTEST)


def without_passwords(text: str) -> str:
    """A text whose URLs connect as before once the passwords come from elsewhere (``PGPASSWORD``, ``~/.pgpass``,
    MLflow's variables): a user's name stays where a database needs it.

    A web server's login goes altogether: MLflow takes both from the environment, and half a login would stand in the
    way of that.
    """

    def login(match: re.Match[str]) -> str:
        web = match["scheme"].lower() in ("http://", "https://")
        return match["scheme"] if web else f"{match['scheme']}{match['user']}@"

    if _URL_LOGIN.match(text):
        text = _URL_LOGIN.sub(login, text, count=1)
    text = _TOKEN.sub(r"\g<scheme>", _LOGIN.sub(login, text))
    while (shorter := _QUERY.sub(lambda match: match["before"] if match["more"] else "", text)) != text:
        text = shorter
    return text


def _of_environment() -> set[str]:
    # A path is no secret: SECRETS_DIR, HF_TOKEN_PATH.
    return {
        value
        for name, value in os.environ.items()
        if _ENVIRONMENT.search(name) and len(value) >= _SHORTEST and not value.startswith(("/", "~", "."))
    }
