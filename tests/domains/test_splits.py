"""Cutting and limiting splits."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftsearch.domains.splits import cut, cut_by_stratum, limit, normalise, shared

SHARES = {"test": 0.15, "validation": 0.15}


@given(
    groups=st.lists(st.text(max_size=3) | st.sampled_from(["big", "bigger"]), min_size=3, max_size=80),
    seed=st.integers(0, 5),
    test=st.floats(0.01, 0.5),
    validation=st.floats(0.01, 0.4),
)
def test_a_cut_deals_every_row_once_and_no_group_twice(
    groups: list[str], seed: int, test: float, validation: float
) -> None:
    shares = {"test": test, "validation": validation}
    if len(set(groups)) < 3:
        with pytest.raises(ValueError, match="cannot make 3 splits"):
            cut(groups, shares, seed)
        return
    splits = cut(groups, shares, seed)
    assert set(splits) == {"train", "validation", "test"}
    assert all(splits.values())
    assert sorted(row for rows in splits.values() for row in rows) == list(range(len(groups)))
    assert all(rows == sorted(rows) for rows in splits.values())
    members = [{groups[row] for row in rows} for rows in splits.values()]
    assert sum(map(len, members)) == len(set(groups))
    assert splits == cut(groups, shares, seed)


@given(groups=st.lists(st.text("abcdef", max_size=2), min_size=3, max_size=60), seed=st.integers(0, 3))
def test_a_cut_does_not_depend_on_the_order_of_the_rows(groups: list[str], seed: int) -> None:
    if len(set(groups)) < 3:
        return
    shuffled = random.Random(seed).sample(groups, len(groups))

    def members(rows: list[str]) -> dict[str, set[str]]:
        return {split: {rows[row] for row in chosen} for split, chosen in cut(rows, SHARES, seed).items()}

    assert members(groups) == members(shuffled)


def test_shares_are_met() -> None:
    groups = [f"contract {number // 7}" for number in range(7000)]
    counts = {split: len(rows) for split, rows in cut(groups, SHARES, 0).items()}
    assert counts == {"test": 1050, "validation": 1050, "train": 4900}


def test_a_huge_group_stays_in_train() -> None:
    groups = ["huge"] * 80 + [f"small {number}" for number in range(20)]
    for seed in range(10):
        splits = cut(groups, SHARES, seed)
        assert set(range(80)) <= set(splits["train"])
        assert len(splits["test"]) == 15


def test_another_seed_is_another_cut() -> None:
    groups = [str(number) for number in range(100)]
    assert cut(groups, SHARES, 0) != cut(groups, SHARES, 1)


def test_the_cut_is_the_same_on_every_machine() -> None:
    # Golden: a changed hash would silently re-cut every study's data.
    assert cut([str(number) for number in range(12)], SHARES, 0) == {
        "test": [4, 7],
        "validation": [9, 10],
        "train": [0, 1, 2, 3, 5, 6, 8, 11],
    }


@given(keys=st.lists(st.text(max_size=2), max_size=40), at_most=st.integers(1, 50), seed=st.integers(0, 3))
def test_a_limit_takes_so_many_rows(keys: list[str], at_most: int, seed: int) -> None:
    rows = limit(keys, at_most, seed)
    if len(keys) <= at_most:
        assert rows is None
        return
    assert rows is not None
    assert len(rows) == at_most
    assert rows == sorted(set(rows))
    # The same texts are chosen in whatever order the file has them.
    backwards = limit(keys[::-1], at_most, seed)
    assert backwards is not None
    assert Counter(keys[row] for row in rows) == Counter(keys[::-1][row] for row in backwards)


def test_a_larger_limit_only_adds_rows() -> None:
    keys = [str(number) for number in range(100)]
    few, more = limit(keys, 10, 0), limit(keys, 30, 0)
    assert few is not None
    assert more is not None
    assert set(few) < set(more)
    assert limit(keys, None, 0) is None


def test_normalise() -> None:
    assert normalise("  The\u00a0TENANT\n pays ") == normalise("the tenant pays")
    assert normalise("\uff26ull") == "full"
    assert normalise("a b") != normalise("ab")


def test_shared_counts_rows_of_the_later_split() -> None:
    assert shared({"train": ["a", "b"], "validation": ["a", "a", "c"], "test": ["d", "c"]}) == {
        ("train", "validation"): 2,
        ("validation", "test"): 1,
    }


def test_every_split_sees_every_label_that_has_groups_enough() -> None:
    labels = [label for label in "abcde" for _ in range(40)] + ["rare"] * 10
    groups = [f"{label}-{number // 4}" for number, label in enumerate(labels)]
    splits = cut_by_stratum(groups, labels, {"test": 0.2, "validation": 0.2}, 0)
    for name, rows in splits.items():
        found = {labels[row] for row in rows}
        assert found >= set("abcde"), name
        assert len({groups[row] for row in rows}) == len(
            {groups[row] for row in rows}
            - {groups[row] for other, others in splits.items() if other != name for row in others}
        )
    assert 35 <= len(splits["test"]) <= 45
    assert sorted(row for rows in splits.values() for row in rows) == list(range(len(labels)))


def test_a_label_with_too_few_groups_is_trained_on() -> None:
    labels = ["a"] * 12 + ["single"] * 4
    groups = [str(number) for number in range(12)] + ["one document"] * 4
    splits = cut_by_stratum(groups, labels, {"test": 0.25, "validation": 0.25}, 0)
    assert set(range(12, 16)) <= set(splits["train"])
