"""Drivers that die at one of the ledger's writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peftsearch.tracking import Ledger


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def kill_at(ledger: Ledger, write: str, nth: int, when: str) -> None:
    """Have the driver die ``before`` or ``after`` the n-th call of one of the ledger's methods."""
    real: Callable[..., Any] = getattr(ledger, write)
    calls = 0

    def deadly(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and when == "before":
            raise Killed
        answer = real(*arguments, **options)
        if calls == nth:
            raise Killed
        return answer

    setattr(ledger, write, deadly)
