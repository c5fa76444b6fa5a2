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
# `key=value`, `key: value`, `'key': 'two words'`, also where the quotes are escaped in JSON. A colon needs more care
# than "=": behind it a sentence may go on ("wrong password: see the manual"), or YAML a section.
_PROSE = r"(?:a|an|and|are|as|at|by|did|does|for|has|in|is|it|must|no|not|of|or|see|the|this|to|unknown|was|with|you)"
_KEY = rf"""{_WORDS}\\*["']?(?:\s*=\s*|[ \t]*:(?!//)[ \t]*(?!{_PROSE}\s|[\[{{(<|>]))"""
_QUOTED = r"""(?P<quote>["'])(?:\\.|(?!(?P=quote))[^\\\n])*(?P=quote)|(?P<escaped>\\+["']).*?(?P=escaped)"""
_PLAIN = r"""\\*["']?(?:[^\s&;,:'"\\]|\\(?!["'])|:(?=[^\s'"]))+"""
_SETTING = re.compile(rf"(?P<key>{_KEY})(?:[bfru]{{0,2}}(?:{_QUOTED})|{_PLAIN})", re.IGNORECASE)
# Tokens that are known by their looks: of an HTTP header, of Hugging Face, and AWS's keys. "The bearer of this letter"
# and "Basic authentication" are none.
_SHOWN = re.compile(
    r"(?P<before>\b(?i:bearer)\s+)(?=\S*[A-Z\d_]|\S{16})[\w.~+/=-]{5,}"
    r"|(?P<header>\b(?i:authorization)\\*[\"']?\s*[:=]\s*\\*[\"']?(?i:basic|token)\s+)[\w.~+/=-]+"
    r"|\b(?:hf_|api_org_)[A-Za-z\d]{16,}|\b(?:AKIA|ASIA)[A-Z\d]{16}\b"
)
_QUERY = re.compile(rf"(?P<before>[?&])[\w.-]*{_WORDS}=(?P<value>[^&\s'\"]*)(?P<more>&?)", re.IGNORECASE)
# In what is one URL and nothing else, a password may contain anything but "@".
_URL_LOGIN = re.compile(_SCHEME + r"(?P<user>[^:/@]*):(?P<password>[^@]*)@")
_ENVIRONMENT = re.compile(rf"(?:^|_|^PG){_WORDS}S?(?:_|$)", re.IGNORECASE)
_SHORTEST = 6

_known: set[str] = set()


def hide_secrets(text: str) -> str:
    """A text without the passwords and tokens in it.

    Those of URLs, those that stand behind a telling key (``password=...``, ``"token": "..."``), those that are known by
    their looks (``Bearer ...``, ``hf_...``, ``AKIA...``), those that URLs given to `note_secrets` hold, and those of
    environment variables whose names say so (``HF_TOKEN``, ``PGPASSWORD``, ...). Of a sentence behind such a key and a
    colon, a word may be taken for a secret.
    """
    text = _LOGIN.sub(rf"\g<scheme>\g<user>:{HIDDEN}@", text)
    text = _TOKEN.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _SETTING.sub(_without_value, text)
    text = _SHOWN.sub(lambda match: (match["before"] or match["header"] or "") + HIDDEN, text)
    for secret in sorted(_known | _of_environment(), key=len, reverse=True):
        if secret in text:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    return text


def _without_value(match: re.Match[str]) -> str:
    quote = match["quote"] or match["escaped"] or ""
    return f"{match['key']}{quote}{HIDDEN}{quote}"


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
