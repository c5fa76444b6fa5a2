"""What a further point of the metric costs."""

from __future__ import annotations

import pytest
from frontier_study import make_facts, make_record

from peftsearch.frontier.front import domain_fronts
from peftsearch.frontier.marginal_cost import MarginalCost, costs_between_picks, marginal_costs
from peftsearch.spec import Confirmed, Rung, TrialRecord


def confirmed(record: TrialRecord, mean: float, std: float, seeds: int = 4) -> TrialRecord:
    return record.model_copy(update={"confirmed": Confirmed(seeds=seeds, mean=mean, std=std)})


SMALL = make_record(3, 0.70, 1_000, train_seconds=10.0, method="prompt")
KNEE = make_record(5, 0.80, 5_000, train_seconds=15.0)
BEST = make_record(9, 0.82, 1_005_000, train_seconds=300.0, method="full")


def test_each_trial_of_a_front_against_the_next_one() -> None:
    first, second = marginal_costs([SMALL, KNEE, BEST], "maximize")
    assert (first.cheaper, first.dearer, second.dearer) == (SMALL, KNEE, BEST)
    assert first.gain == pytest.approx(0.10)
    assert first.parameters_per_point == pytest.approx(400)
    assert second.parameters_per_point == pytest.approx(500_000)
    assert first.sentence("accuracy") == (
        "From trial 3 (prompt) to trial 5 (lora): accuracy +0.100 for 4,000 more parameters (5 times), 400 for each "
        "0.01; training takes 1.5 times the time."
    )
    assert "(201 times), 500,000 for each 0.01; training takes 20 times the time." in second.sentence("accuracy")


def test_as_long_is_said_of_equal_times() -> None:
    cheaper, dearer = (r.model_copy(update={"train_seconds": s}) for r, s in ((SMALL, 7.2), (KNEE, 7.25)))
    assert MarginalCost(cheaper, dearer, "maximize").sentence("accuracy").endswith("; training takes as long.")


def test_times_in_packs_and_alone_are_not_compared() -> None:
    shared = [Rung(step=10, epoch=1.0, value=0.7, loss=0.5, train_loss=0.5, train_seconds=10.0, together=7.5)]
    packed = SMALL.model_copy(update={"rungs": shared})
    assert packed.packed
    assert not KNEE.packed
    assert "training" not in MarginalCost(packed, KNEE, "maximize").sentence("accuracy")
    other = KNEE.model_copy(update={"rungs": shared})
    assert "; training takes 1.5 times the time" in MarginalCost(packed, other, "maximize").sentence("accuracy")


def test_equals_cost_nothing_and_are_no_step() -> None:
    twin = SMALL.model_copy(update={"number": 4})
    assert [cost.dearer.number for cost in marginal_costs([SMALL, twin, KNEE], "maximize")] == [5]
    assert marginal_costs([SMALL], "maximize") == []
    assert marginal_costs([], "maximize") == []


def test_a_point_of_a_perplexity_is_one_and_less_is_better() -> None:
    (cost,) = marginal_costs([make_record(1, 30.0, 1_000), make_record(2, 10.0, 41_000)], "minimize")
    assert (cost.gain, cost.point, cost.parameters_per_point) == (20.0, 1.0, 2000.0)
    assert "perplexity -20.000 for 40,000 more parameters (41 times), 2,000 for each 1." in cost.sentence("perplexity")


@pytest.mark.parametrize(
    ("means", "direction", "words"),
    [
        ((0.70, 0.80), "maximize", "over seeds +0.100 ± 0.017, beyond the error bars"),
        ((0.79, 0.80), "maximize", "over seeds +0.010 ± 0.017, within the error bars, so perhaps nothing"),
        ((0.81, 0.80), "maximize", "over seeds -0.010 ± 0.017, within the error bars, so perhaps nothing"),
        ((0.30, 0.20), "minimize", "over seeds -0.100 ± 0.017, beyond the error bars"),
    ],
)
def test_error_bars_say_whether_the_gain_is_one(means: tuple[float, float], direction: str, words: str) -> None:
    values = (0.70, 0.80) if direction == "maximize" else (0.30, 0.20)
    a, b = (make_record(n, value, 1000 * (n + 1)) for n, value in enumerate(values))
    cost = MarginalCost(confirmed(a, means[0], 0.01), confirmed(b, means[1], 0.01), direction)  # type: ignore[arg-type]
    assert words in cost.sentence("accuracy")
    # One seed has no error bar.
    assert MarginalCost(confirmed(a, means[0], 0.0, seeds=1), cost.dearer, cost.direction).seeds is None


def test_between_the_picks() -> None:
    between = make_record(7, 0.81, 400_000)
    found = domain_fronts([SMALL, KNEE, between, BEST], make_facts())["clinical"]
    assert [(cost.cheaper.number, cost.dearer.number) for cost in costs_between_picks(found)] == [(3, 5), (5, 9)]
    assert costs_between_picks(domain_fronts([SMALL], make_facts())["clinical"]) == []
    assert costs_between_picks(domain_fronts([], make_facts())["clinical"]) == []
