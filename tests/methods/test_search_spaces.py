"""What a range stands for: to the grid, and to whoever draws from it."""

from __future__ import annotations

from random import Random

import pytest

from peftsearch.methods import method_space
from peftsearch.search.proposals import Grid
from peftsearch.spec import StudyError
from peftsearch.spec.space import Range


def test_a_range_with_a_step_reaches_its_end() -> None:
    assert Range(low=0.1, high=0.3, step=0.1).values == (0.1, 0.2, 0.3)
    assert Range(low=0, high=5, step=2).values == (0, 2, 4)
    assert Range(low=4, high=4).values == Range(low=4, high=4, step=3).values == (4,)
    assert Range(low=0.1, high=0.3).values is Range(low=0.1, high=0.3, log=True).values is None


def test_grids_and_draws_have_the_same_values() -> None:
    space = method_space(
        "lora",
        {"rank": Range(low=4, high=10, step=2), "dropout": Range(low=0.1, high=0.3, step=0.1), "learning_rate": 1e-3},
    )
    values = Grid(space).values
    assert values["rank"] == (4, 6, 8, 10)
    generator = Random(0)
    drawn = [space.draw(generator) for _ in range(200)]
    for name in ("rank", "dropout"):
        assert sorted({one[name] for one in drawn}) == list(values[name])
    assert {one["learning_rate"] for one in drawn} == {1e-3}
    assert all(isinstance(one["rank"], int) for one in drawn)


def test_draws_keep_to_their_range_and_its_scale() -> None:
    space = method_space("lora", {"learning_rate": Range(low=1e-5, high=1e-1, log=True)})
    generator = Random(0)
    rates = [float(space.draw(generator)["learning_rate"]) for _ in range(400)]
    assert min(rates) >= 1e-5
    assert max(rates) <= 1e-1
    # Half of them are below the middle of the scale, not of the range.
    assert 150 < sum(rate < 1e-3 for rate in rates) < 250
    with pytest.raises(StudyError, match="a range with a step"):
        Grid(space).check()
