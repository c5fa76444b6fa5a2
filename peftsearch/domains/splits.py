"""Cutting and limiting splits.

Every choice follows from a hash of the content and a seed, never from a generator's state: the same rows land in the
same split on every machine and in every order of the file.
"""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa


def normalise(text: str) -> str:
    """The text without what does not make it another text: letter case, width, and the amount of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def hash_order(value: str, seed: int) -> bytes:
    """A key to sort by: random to the eye, the same everywhere."""
    return hashlib.sha256(f"{seed}:{value}".encode("utf-8", "surrogatepass")).digest()


def cut(groups: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    """Deal rows to splits so that no group crosses splits.

    Groups are taken in the order of their hash: each goes to the first split whose share of the rows still has room
    for it. A split that has room for none gets the smallest group.

    Args:
        groups: The group of each row.
        shares: Share of the rows, for each split to be cut off; what is left is ``train``.
        seed: Another seed, another cut.

    Returns:
        Row numbers in ascending order, for each split of `shares` and for ``train``; none is empty.

    Raises:
        ValueError: Fewer groups than splits.
    """
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    if len(rows) < len(shares) + 1:
        raise ValueError(f"{len(rows)} distinct values cannot make {len(shares) + 1} splits")
    waiting = sorted(rows, key=lambda group: (hash_order(group, seed), group))
    splits: dict[str, list[int]] = {}
    for position, (name, share) in enumerate(shares.items()):
        room = round(share * len(groups))
        # As many groups must be left as there are splits still to fill, train included.
        spare = len(waiting) - (len(shares) - position)
        chosen: list[str] = []
        for group in waiting:
            if len(rows[group]) <= room and len(chosen) < spare:
                chosen.append(group)
                room -= len(rows[group])
        if not chosen:
            chosen = [min(waiting, key=lambda group: len(rows[group]))]
        taken = set(chosen)
        waiting = [group for group in waiting if group not in taken]
        splits[name] = sorted(itertools.chain.from_iterable(rows[group] for group in chosen))
    splits["train"] = sorted(itertools.chain.from_iterable(rows[group] for group in waiting))
    return splits


def cut_by_stratum(
    groups: Sequence[str], strata: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, list[int]]:
    """As `cut`, with each stratum dealt by itself, so that every split sees every stratum that has groups enough.

    A group belongs to the stratum of most of its rows. Strata with fewer groups than splits go to ``train`` whole: what
    was never trained cannot be tested. Where that would leave a split empty, strata are not told apart.

    Args:
        groups: The group of each row.
        strata: The stratum of each row: its label.
        shares: As for `cut`.
        seed: As for `cut`.

    Raises:
        ValueError: Fewer groups than splits.
    """
    members: dict[str, Counter[str]] = {}
    for group, stratum in zip(groups, strata, strict=True):
        members.setdefault(group, Counter())[stratum] += 1
    home = {group: min(counts, key=lambda name: (-counts[name], name)) for group, counts in members.items()}
    splits: dict[str, list[int]] = {name: [] for name in (*shares, "train")}
    for stratum in sorted(set(home.values())):
        rows = [row for row, group in enumerate(groups) if home[group] == stratum]
        try:
            dealt = cut([groups[row] for row in rows], shares, seed)
        except ValueError:
            dealt = {"train": list(range(len(rows)))}
        for name, chosen in dealt.items():
            splits[name] += [rows[row] for row in chosen]
    if not all(splits.values()):
        return cut(groups, shares, seed)
    return {name: sorted(chosen) for name, chosen in splits.items()}


def limit(keys: Sequence[str], at_most: int | None, seed: int) -> list[int] | None:
    """The rows of a random subset, in ascending order, or None where all are kept.

    Args:
        keys: What identifies each row; equal ones are told apart by their order.
        at_most: How many rows to keep.
        seed: Another seed, another subset.
    """
    if at_most is None or len(keys) <= at_most:
        return None
    seen: dict[str, int] = {}
    order = []
    for row, key in enumerate(keys):
        copy = seen[key] = seen.get(key, -1) + 1
        order.append((hash_order(f"limit:{copy}:{key}", seed), row))
    return sorted(row for _, row in sorted(order)[:at_most])


def shared(values: Mapping[str, Iterable[str]]) -> dict[tuple[str, str], int]:
    """How many rows of a later split hold a value that an earlier one holds too, for each pair of splits with any."""
    known = {split: list(found) for split, found in values.items()}
    counts = {}
    for first, second in itertools.combinations(known, 2):
        earlier = set(known[first])
        count = sum(value in earlier for value in known[second])
        if count:
            counts[first, second] = count
    return counts


def take(table: pa.Table, rows: Sequence[int] | None) -> pa.Table:
    """The named rows of a table, or the table itself for None."""
    return table if rows is None else table.take(pa.array(rows, pa.int64()))
