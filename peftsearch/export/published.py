"""What an exported folder says of itself to everybody who may see it: nothing of the machine that it came from."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from peftsearch.export.folder import ADAPTER_CONFIG, CARD, PROVENANCE
from peftsearch.spec.locations import PACKAGE_PREFIX

PUSHED = "pushed"
"""Where the provenance lists what came with it: ``files``, their names, and ``card``, the card's SHA-256."""
# Folders of an absolute path within a text: not the slashes of a URL, of "and/or", or of a relative path.
_FOLDERS = re.compile(r"(?:(?<![\w:/.~-])|(?<=file://))/(?:[^/\s'\"]+/)+")


def publish(folder: Path) -> None:
    """Prepare a folder for being seen by others: its provenance loses the ledger's address, where the study tracked
    and the folders of absolute paths, and gains a list of the files, by which a later push knows them again. The
    adapter's configuration calls the base as `published_base` does. The card is the caller's.
    """
    path = folder / PROVENANCE
    known = json.loads(path.read_text(encoding="utf-8"))
    _rename_base(folder / ADAPTER_CONFIG, known.get("model", {}).get("path", ""))
    known.pop("ledger", None)
    known.get("specification", {}).pop("tracking", None)
    known = without_folders(known)
    known[PUSHED] = {
        "files": sorted(file.name for file in folder.iterdir()),
        "card": digest((folder / CARD).read_bytes()),
    }
    path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def published_base(location: str, path: str) -> str:
    """What a base model is called where others see it: a Hub id or a package's resource as it is, and a folder
    ``./NAME``, which `transformers` looks for in the current folder and never on the Hub, where that name may be
    another model's.

    Args:
        location: A Hub id, or the absolute path of a folder.
        path: The base in the study file's words.
    """
    if not Path(location).is_absolute():
        return location
    return path if path.startswith(PACKAGE_PREFIX) else f"./{Path(location).name}"


def _rename_base(config: Path, path: str) -> None:
    if not config.is_file():
        return
    known = json.loads(config.read_text(encoding="utf-8"))
    location = known.get("base_model_name_or_path")
    if isinstance(location, str):
        shown = published_base(location, path)
        # Some methods name the base's tokenizer, too.
        known = {key: shown if value == location else value for key, value in known.items()}
        config.write_text(json.dumps(known, indent=2, sort_keys=True), encoding="utf-8")


def digest(content: bytes) -> str:
    """A file's SHA-256."""
    return hashlib.sha256(content).hexdigest()


def without_folders(value: Any) -> Any:
    """A text, or all texts of a JSON value, without the folders of absolute paths: their last parts stay."""
    if isinstance(value, dict):
        # What a class is called is nobody's path, whatever it looks like.
        return {without_folders(key): item if key == "labels" else without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_folders(item) for item in value)
    if not isinstance(value, str):
        return value
    # A path by itself may hold spaces.
    if value.startswith("/") and "\n" not in value and len(Path(value).parts) > 2:
        return Path(value).name
    return _FOLDERS.sub("", value)
