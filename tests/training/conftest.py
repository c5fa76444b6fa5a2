from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A worker in the test's process sets how many threads compute, for whatever comes after it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
