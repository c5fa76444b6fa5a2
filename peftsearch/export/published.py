"""What an exported folder says of itself to everybody who may see it: nothing of the machine that it came from."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from peftsearch.export.folder import CARD, PROVENANCE

PUSHED = "pushed"
"""Where the provenance lists what came with it: ``files``, their names, and ``card``, the card's SHA-256."""
# Folders of an absolute path within a text: not the slashes of a URL, of "and/or", or of a relative path.
_FOLDERS = re.compile(r"(?:(?<![\w:/.~-])|(?<=file://))/(?:[^/\s'\"]+/)+")


def publish(folder: Path) -> None:
    """Prepare a folder for being seen by others: its provenance loses the ledger's address, where the study tracked
    and the folders of absolute paths, and gains a list of the files, by which a later push knows them again.
    """
    path = folder / PROVENANCE
    known = json.loads(path.read_text(encoding="utf-8"))
    known.pop("ledger", None)
    known.get("specification", {}).pop("tracking", None)
    known = _without_folders(known)
    known[PUSHED] = {
        "files": sorted(file.name for file in folder.iterdir()),
        "card": digest((folder / CARD).read_bytes()),
    }
    path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(content: bytes) -> str:
    """A file's SHA-256."""
    return hashlib.sha256(content).hexdigest()


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        # What a class is called is nobody's path, whatever it looks like.
        return {
            _without_folders(key): item if key == "labels" else _without_folders(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    # A path by itself may hold spaces.
    if value.startswith("/") and "\n" not in value and len(Path(value).parts) > 2:
        return Path(value).name
    return _FOLDERS.sub("", value)
