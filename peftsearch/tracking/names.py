"""How trials and scores are called where people read them, and what MLflow allows in a name."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peftsearch.spec import TrialRecord

_SHORT = {"learning_rate": "lr"}
_KEY_LENGTH = 250


def hyperparameter_text(name: str, value: Any) -> str:
    """``rank=8``, ``lr=3.1e-04``, ..."""
    if isinstance(value, float) and name == "learning_rate":
        value = f"{value:.1e}"
    elif isinstance(value, float):
        value = f"{value:.4g}"
    return f"{_SHORT.get(name, name)}={value}"


def configuration_text(hyperparameters: Mapping[str, Any], only: Iterable[str] | None = None) -> str:
    """Hyperparameters in one line, for example ``rank=8 dropout=0.1 lr=3.1e-04``; without empty ones.

    Args:
        hyperparameters: By name, in the method's order.
        only: Names to show; all where None.
    """
    names = set(hyperparameters if only is None else only)
    named = {name: value for name, value in hyperparameters.items() if name in names and value not in ("", None)}
    return " ".join(hyperparameter_text(name, value) for name, value in named.items())


def description_note(description: str) -> str:
    """A study's description as a note, which MLflow shows as Markdown: its paragraphs, lists and emphasis stay; HTML,
    links and pictures are shown as they were written."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in description)
    return re.sub(r"([\[\]])", r"\\\1", html.escape(text, quote=False))


def run_name(record: TrialRecord) -> str:
    """A trial's name in MLflow, for example ``12 lora rank=8 lr=3.1e-04``: number, method, its size, learning rate."""
    size = next((name for name in record.hyperparameters if name != "learning_rate"), "learning_rate")
    text = configuration_text(record.hyperparameters, {size, "learning_rate"})
    return shorten(f"{record.number} {record.method} {text}".rstrip(), _KEY_LENGTH)


def confirmation_name(record: TrialRecord, seed: int) -> str:
    """The name of a re-training in MLflow, for example ``12 lora rank=8 lr=3.1e-04 seed=2``."""
    return shorten(f"{run_name(record)} seed={seed}", _KEY_LENGTH)


def shorten(text: str, length: int) -> str:
    """The text, cut with an ellipsis where it is longer than ``length`` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def mlflow_names(names: Iterable[str]) -> dict[str, str]:
    """Names of metrics or parameters as MLflow accepts them: distinct names stay distinct.

    MLflow allows letters, digits, ``_ - . / :`` and spaces, at most 250 characters, and nothing that would be another
    path (``a//b``, ``../a``). Everything before the first slash is the name's group, such as ``f1`` in ``f1/LABEL``;
    slashes in the label are replaced. Names that would become equal, or were cut, end in a hash of the original.
    """
    cleaned = {name: _clean(name) for name in names}
    taken: set[str] = set()
    result = {}
    # Who needs no change keeps the name; some database back ends compare without case.
    for name, clean in sorted(cleaned.items(), key=lambda item: (item[0] != item[1], item[0])):
        result[name] = _hashed(clean, name) if len(clean) > _KEY_LENGTH or clean.lower() in taken else clean
        taken.add(result[name].lower())
    return result


def _clean(name: str) -> str:
    group, slash, label = name.partition("/")
    parts = [group, label.replace("/", "_")] if slash else [group]
    parts = [re.sub(r"[^\w.\- :]", "_", part).strip() for part in parts]
    return "/".join("_" if part.strip(".") == "" else part for part in parts)


def _hashed(clean: str, name: str) -> str:
    return f"{clean[: _KEY_LENGTH - 9]}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:8]}"
