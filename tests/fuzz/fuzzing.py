"""How long fuzz tests look for trouble: a fixed, short search in CI, a long random one by ``PEFTSEARCH_FUZZ=long``."""

from __future__ import annotations

import faulthandler
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG = os.environ.get("PEFTSEARCH_FUZZ") == "long"
HANG = 120.0
"""Seconds after which a case counts as hanging; the process then says where, and ends."""


def effort(examples: int) -> Any:
    """Settings of a fuzz test that looks at so many examples in CI, and at fifty times as many when asked."""
    return settings(
        max_examples=50 * examples if LONG else examples,
        derandomize=not LONG,
        database=None,
        # The machine's load is not the code's fault; hangs are caught below.
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def no_hang() -> Iterator[None]:
    """End the process with the stack of every thread where a case takes longer than `HANG`."""
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def damage(data: bytes, seed: int) -> bytes:
    """The data with one to a few kinds of damage, chosen by the seed: flips, cuts, insertions, repetitions, zeros."""
    chance = random.Random(seed)
    found = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 5, 20])):
        size = max(1, len(found))
        # Headers stand in front, and matter most.
        place = min(size - 1, chance.choice([chance.randrange(size), chance.randrange(min(size, 128))]))
        kind = chance.randrange(8)
        if kind == 0 and found:
            found[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del found[place:]
        elif kind == 2:
            found[place:place] = chance.randbytes(chance.choice([1, 4, 64]))
        elif kind == 3:
            found[place : place + chance.choice([1, 8, 4096])] = b""
        elif kind == 4:
            found[place : place + 8] = chance.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7])
        elif kind == 5:
            found += found[place : place + 512]
        elif kind == 6:
            found[place : place + 1] = chance.choice([b'"', b"{", b"[", b"\n", b",", b"\0", b"\xff", b"\t", b"'", b"}"])
        else:
            found += chance.randbytes(16)
    return bytes(found)


seeds = st.integers(0, 2**32 - 1)
"""Of `damage`: hypothesis shrinks towards the plainest."""
