"""Batches: every example once per pass, whatever the sizes, and the same for the same seed."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from peftsearch.training.data_order import DataOrder


@given(st.lists(st.integers(1, 64), min_size=1, max_size=300), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_each_pass_holds_every_example_once(lengths: list[int], batch_size: int, seed: int) -> None:
    steps = -(-len(lengths) // batch_size)
    order = DataOrder(lengths, batch_size, seed)
    for epoch in range(2):
        rows = [row for step in range(steps) for row in order.batch(epoch * steps + step)]
        assert sorted(rows) == list(range(len(lengths)))


def test_any_worker_finds_the_same_batch() -> None:
    lengths = [random.Random(0).randint(1, 50) for _ in range(500)]
    whole = DataOrder(lengths, 16, seed=3)
    expected = [whole.batch(step) for step in range(70)]
    assert [DataOrder(lengths, 16, seed=3).batch(step) for step in range(69, -1, -1)] == expected[::-1]
    assert expected != [DataOrder(lengths, 16, seed=4).batch(step) for step in range(70)]


def test_little_is_padded() -> None:
    lengths = [random.Random(0).randint(4, 64) for _ in range(2000)]
    order = DataOrder(lengths, 16, seed=0)
    padded = sum(max(lengths[row] for row in order.batch(step)) * 16 for step in range(125))
    assert padded < 1.15 * sum(lengths)
