"""What a segment needed at most, and not what is left of it."""

from __future__ import annotations

import sys

import pytest
import torch

from peftsearch.training.memory import forget_peak, peak_resident

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_a_peak_is_seen_after_it_is_over_and_is_not_the_next_ones() -> None:
    forget_peak()
    before = peak_resident()
    held = torch.ones(200 * MIB // 4)
    del held
    peak = peak_resident()
    assert peak >= before + 150 * MIB
    forget_peak()
    assert peak_resident() <= peak - 150 * MIB
