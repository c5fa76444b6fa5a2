"""Numbers as people read them."""

from __future__ import annotations


def duration(seconds: float, *, rough: bool = False) -> str:
    """Seconds as ``42 s``, ``3 min 05 s`` or ``2 h 10 min``.

    Args:
        seconds: How long.
        rough: For estimates: whole minutes, or a few seconds at a time.
    """
    if rough:
        seconds = max(5, 5 * round(seconds / 5)) if seconds < 60 else 60 * round(seconds / 60)
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min" + ("" if rough else f" {rest:02} s")
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} days {hours % 24} h"


def size(count: float) -> str:
    """Bytes as ``512 MiB`` or ``1.5 GiB``."""
    mebibytes = count / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1000 else f"{mebibytes / 1024:.1f} GiB"
