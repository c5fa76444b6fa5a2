"""Batches: every example once per pass, whatever the sizes, and the same for the same seed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftsearch.training.budget import batch_length, batch_sizes, tokens_of_a_pass
from peftsearch.training.data_order import DataOrder


@given(st.lists(st.integers(1, 64), min_size=1, max_size=300), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_each_pass_holds_every_example_once(lengths: list[int], batch_size: int, seed: int) -> None:
    steps = -(-len(lengths) // batch_size)
    order = DataOrder(lengths, batch_size, seed)
    for epoch in range(2):
        rows = [row for step in range(steps) for row in order.batch(epoch * steps + step)]
        assert sorted(rows) == list(range(len(lengths)))


def test_any_worker_finds_the_same_batch() -> None:
    lengths = random.Random(0).choices(range(1, 51), k=500)
    whole = DataOrder(lengths, 16, seed=3)
    expected = [whole.batch(step) for step in range(70)]
    assert [DataOrder(lengths, 16, seed=3).batch(step) for step in range(69, -1, -1)] == expected[::-1]
    assert expected != [DataOrder(lengths, 16, seed=4).batch(step) for step in range(70)]


@pytest.mark.parametrize(("rows", "share"), [(500, 1.10), (2000, 1.05), (6000, 1.03)])
def test_little_is_padded(rows: int, share: float) -> None:
    lengths = random.Random(0).choices(range(4, 65), k=rows)
    order = DataOrder(lengths, 16, seed=0)
    batches = [order.batch(step) for step in range(-(-rows // 16))]
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
    assert padded < share * sum(lengths)


def test_a_text_has_other_neighbours_in_the_next_pass() -> None:
    # Lengths of their own: sorted whole, every pass would hold the same batches.
    order = DataOrder(random.Random(0).sample(range(10_000), 2000), 16, seed=0)
    first, second = ([set(order.batch(125 * epoch + step)) for step in range(125)] for epoch in range(2))
    kept = sum(max(len(batch & other) for other in second) for batch in first)
    assert kept < 2000 / 2


LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=200)


@given(LENGTHS, st.integers(1, 40), st.integers(8, 5000), st.integers(0, 300), st.integers(0, 2**31 - 1))
def test_with_a_limit_on_tokens_every_pass_has_equally_many_batches_within_it(
    lengths: list[int], batch_size: int, tokens: int, more: int, seed: int
) -> None:
    needed = len(batch_sizes(lengths, batch_size, tokens))
    # Another model's lengths may make more batches: those of this one are then cut further, as far as there are texts.
    steps = min(len(lengths), needed + more)
    order = DataOrder(lengths, batch_size, seed, tokens, needed + more)
    for epoch in range(2):
        batches = [order.batch(epoch * steps + step) for step in range(steps)]
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        for batch in batches:
            assert 1 <= len(batch) <= batch_size
            padded = len(batch) * -(-max(lengths[row] for row in batch) // 8) * 8
            assert padded <= tokens or len(batch) == 1


@given(st.integers(1, 10**6))
def test_a_length_counts_as_little_more_than_it_is(length: int) -> None:
    assert length <= batch_length(length) <= max(length + 7, length * 9 / 8)
    assert batch_length(length) % 8 == 0


def test_a_limit_on_tokens_fills_batches_and_draws_them_anew() -> None:
    lengths = random.Random(0).choices([8, 16, 64, 128], k=1000)
    order = DataOrder(lengths, 256, seed=0, tokens=1024)
    steps = len(batch_sizes(lengths, 256, 1024))
    first, second = ([set(order.batch(epoch * steps + step)) for step in range(steps)] for epoch in range(2))
    assert steps < 1.1 * sum(lengths) / 1024
    assert len(set(map(len, first))) >= 4
    assert not any(batch in second for batch in first)
    other = DataOrder(lengths, 256, seed=1, tokens=1024)
    assert [sorted(other.batch(step)) for step in range(steps)] != [sorted(order.batch(step)) for step in range(steps)]
    again = DataOrder(lengths, 256, seed=0, tokens=1024)
    assert set(again.batch(steps + 3)) == second[3]


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=60),
    st.integers(1, 20),
    st.one_of(st.none(), st.integers(1, 400)),
    st.integers(1, 4),
)
def test_no_pass_has_more_tokens_than_said(lengths: list[int], batch_size: int, tokens: int | None, parts: int) -> None:
    most = tokens_of_a_pass(batch_size, tokens, max(lengths), parts)
    order = DataOrder(lengths, batch_size, 0, tokens)
    steps = len(batch_sizes(lengths, batch_size, tokens)) if tokens else -(-len(lengths) // batch_size)
    for step in range(steps):
        rows = order.batch(step)
        size = -(-len(rows) // parts)
        passes = [rows[first : first + size] for first in range(0, len(rows), size)]
        assert max(len(own) * max(lengths[row] for row in own) for own in passes) <= most


@pytest.mark.parametrize(
    ("tokens", "parts", "expected"), [(None, 1, 16 * 40), (None, 3, 6 * 40), (320, 1, 320), (1000, 1, 640), (20, 1, 40)]
)
def test_how_many_tokens_a_pass_has_at_most(tokens: int | None, parts: int, expected: int) -> None:
    assert tokens_of_a_pass(16, tokens, 40, parts) == expected
