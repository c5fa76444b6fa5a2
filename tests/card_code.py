"""The code that a model card shows: blocks that follow one another."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any


def blocks_of(card: str) -> list[str]:
    """The Python blocks of a card."""
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)


def code_of(card: str) -> str:
    """All of them as one program."""
    blocks = blocks_of(card)
    assert blocks
    return "\n".join(blocks)


def run_card(card: str) -> tuple[str, dict[str, Any]]:
    """Execute a card's code in this process: what it printed, and its names."""
    space: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code_of(card), "card", "exec"), space)
    return printed.getvalue(), space
