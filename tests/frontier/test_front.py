"""Fronts, hypervolume and picks, against brute force and against numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from frontier_study import TOTAL, make_facts, make_record
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsearch.frontier import choose, domain_fronts, front, hypervolume, pick
from peftsearch.frontier.front import CONSTANT, finalists, seed_noise
from peftsearch.spec import Confirmed, ConfirmSpec, Direction, Reading, StudyError, StudyFacts, TrialRecord, TrialState

VALUES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
PARAMETERS = st.one_of(st.sampled_from([0, 1, 10, 1000]), st.integers(0, 10_000_000))
TRIALS = st.lists(
    st.tuples(st.one_of(st.none(), VALUES), PARAMETERS, st.sampled_from(["COMPLETE", "COMPLETE", "PRUNED", "FAILED"])),
    max_size=20,
).map(
    lambda rows: [
        make_record(number, value, parameters, state=TrialState(state))
        for number, (value, parameters, state) in enumerate(rows)
    ]
)
DIRECTIONS = st.sampled_from(["maximize", "minimize"])


def is_beaten(record: TrialRecord, others: list[TrialRecord], direction: Direction) -> bool:
    assert record.value is not None
    for other in others:
        assert other.value is not None
        gain = (other.value - record.value) * (1 if direction == "maximize" else -1)
        saved = record.trainable_parameters - other.trainable_parameters
        if gain >= 0 and saved >= 0 and (gain > 0 or saved > 0):
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(TRIALS, DIRECTIONS)
def test_front_equals_brute_force(records: list[TrialRecord], direction: Direction) -> None:
    done = [record for record in records if record.state is TrialState.COMPLETE and record.value is not None]
    expected = {record.number for record in done if not is_beaten(record, done, direction)}
    found = front(records, direction)
    assert {record.number for record in found} == expected
    assert [record.number for record in found] == [
        record.number for record in sorted(found, key=lambda record: (record.trainable_parameters, record.number))
    ]


@settings(max_examples=200, deadline=None)
@given(TRIALS, DIRECTIONS, st.sampled_from([1000, 22_713_216]))
def test_hypervolume_equals_a_sum_over_rectangles(records: list[TrialRecord], direction: Direction, total: int) -> None:
    points = []
    for record in records:
        if record.state is TrialState.COMPLETE and record.value is not None:
            x = 1 - math.log10(max(record.trainable_parameters, 1)) / math.log10(total)
            y = record.value if direction == "maximize" else 1 - record.value
            points.append((min(1, max(0, x)), min(1, max(0, y))))
    # Every cell of the grid that the points' coordinates draw is dominated as a whole, or not at all.
    xs, ys = sorted({0.0, *(x for x, _ in points)}), sorted({0.0, *(y for _, y in points)})
    area = sum(
        (right - left) * (top - bottom)
        for left, right in pairwise(xs)
        for bottom, top in pairwise(ys)
        if any(x >= right and y >= top for x, y in points)
    )
    assert hypervolume(records, direction, total) == pytest.approx(area, abs=1e-12)


def test_hypervolume_of_known_points() -> None:
    def volume(*points: tuple[float, int]) -> float:
        return hypervolume([make_record(i, v, p) for i, (v, p) in enumerate(points)], "maximize", 10**6)

    assert volume() == 0
    assert volume((1.0, 0)) == 1
    assert volume((0.8, 1000)) == pytest.approx(0.4)
    assert volume((0.9, 10**6)) == 0
    assert volume((0.6, 100), (0.9, 10_000)) == pytest.approx(0.6 * 4 / 6 + 0.3 * 2 / 6)
    assert volume((1.7, 100)) == pytest.approx(4 / 6)
    assert hypervolume([make_record(0, 0.2, 1000)], "minimize", 10**6) == pytest.approx(0.4)


def test_only_full_budgets_count() -> None:
    records = [
        make_record(0, 0.5, 100),
        make_record(1, 0.9, 10, state=TrialState.PRUNED),
        make_record(2, 0.9, 10, state=TrialState.RUNNING),
        make_record(3, None, 0, state=TrialState.FAILED),
        make_record(4, math.nan, 1),
    ]
    assert [record.number for record in front(records, "maximize")] == [0]
    assert front([], "maximize") == []


def test_domain_fronts(facts: StudyFacts, records: list[TrialRecord]) -> None:
    fronts = domain_fronts(records, facts)
    assert list(fronts) == ["clinical", "legal"]
    found = fronts["clinical"]
    assert all(record.domain == "clinical" for record in found.records)
    assert found.counts == {
        "complete": sum(r.domain == "clinical" and r.state is TrialState.COMPLETE for r in records),
        "pruned": sum(r.domain == "clinical" and r.state is TrialState.PRUNED for r in records),
        "failed": 1,
        "running": 1,
    }
    assert found.hypervolume == hypervolume(found.records, "maximize", TOTAL)
    assert found.best is not None
    assert found.best.value == max(r.value or 0 for r in found.records if r.state is TrialState.COMPLETE)
    assert domain_fronts([], facts)["legal"].best is None


def test_fronts_by_model() -> None:
    facts = make_facts()
    small = facts.models["package:tiny/model"]
    facts = facts.model_copy(update={"models": {"small": small, "large": small}})
    records = [make_record(0, 0.5, 100, model="small"), make_record(1, 0.6, 50, model="large")]
    found = domain_fronts(records, facts)["clinical"]
    assert [record.number for record in found.front] == [1]
    assert {model: [record.number for record in own] for model, own in found.by_model.items()} == {
        "small": [0],
        "large": [1],
    }


# --- picks ---

FRONT = [
    make_record(3, 0.50, 1_000, method="prompt"),
    make_record(5, 0.80, 10_000),
    make_record(7, 0.82, 100_000, method="adapter"),
    make_record(9, 0.85, 10_000_000, method="full"),
]


def numbers(picked: list[TrialRecord]) -> list[int]:
    return [record.number for record in picked]


def test_picks() -> None:
    assert numbers(pick(FRONT, "frontier")) == [3, 5, 7, 9]
    assert numbers(pick(FRONT, "best")) == [9]
    # Above the line from (0, 0) to (1, 1): 0.857 - 0.25 = 0.607 for trial 5, 0.914 - 0.5 = 0.414 for trial 7.
    assert numbers(pick(FRONT, "knee")) == [5]
    losses = [record.model_copy(update={"value": 1 - (record.value or 0)}) for record in FRONT]
    assert numbers(pick(losses, "best", "minimize")) == [9]
    assert numbers(pick(losses, "knee", "minimize")) == [5]


def test_without_a_knee_the_best_is_picked() -> None:
    assert numbers(pick(FRONT[:1], "knee")) == [3]
    assert numbers(pick(FRONT[:2], "knee")) == [5]
    bent_down = [make_record(0, 0.5, 100), make_record(1, 0.51, 1000), make_record(2, 0.9, 10_000)]
    assert numbers(pick(bent_down, "knee")) == [2]
    straight = [make_record(0, 0.5, 100), make_record(1, 0.6, 1000), make_record(2, 0.7, 10_000)]
    assert numbers(pick(straight, "knee")) == [2]
    equal = [make_record(4, 0.5, 100), make_record(6, 0.5, 100)]
    assert numbers(pick(equal, "knee")) == [4]
    assert numbers(pick(equal, "best")) == [4]


def test_limits() -> None:
    assert numbers(pick(FRONT, "best", max_parameters=99_999)) == [5]
    assert numbers(pick(FRONT, "frontier", min_metric=0.8)) == [5, 7, 9]
    assert numbers(pick(FRONT, "frontier", min_metric=0.8, max_parameters=100_000)) == [5, 7]
    losses = [record.model_copy(update={"value": 1 - (record.value or 0)}) for record in FRONT]
    assert numbers(pick(losses, "frontier", "minimize", min_metric=0.19)) == [7, 9]


def test_the_smallest_that_is_good_enough() -> None:
    assert numbers(pick(FRONT, "smallest")) == [3]
    assert numbers(pick(FRONT, "smallest", min_metric=0.81)) == [7]
    assert numbers(pick([make_record(4, 0.5, 100), make_record(6, 0.6, 100)], "smallest")) == [6]


def confirmed(record: TrialRecord, *values: float) -> TrialRecord:
    readings = [Reading(seed=seed, value=value, loss=0.1) for seed, value in enumerate(values)]
    return record.model_copy(update={"confirmed": Confirmed.of(readings)})


def test_ties_within_the_error_bars_prefer_the_cheaper_and_say_so() -> None:
    # Means 0.84 and 0.83 with deviations of 0.01: twice the standard error of the difference is 0.0163.
    full, adapter = confirmed(FRONT[3], 0.83, 0.84, 0.85), confirmed(FRONT[2], 0.82, 0.83, 0.84)
    (choice,) = choose([*FRONT[:2], adapter, full], "best")
    assert (choice.record.number, choice.instead_of and choice.instead_of.number) == (7, 9)
    assert choice.reason == (
        "trial 7 (adapter) is picked rather than trial 9 (full): 0.8300 ± 0.0100 and 0.8400 ± 0.0100 over 3 and 3 "
        "seeds is a tie within the error bars, and it trains 100,000 parameters rather than 10,000,000"
    )
    # The cheapest of those that are tied, not the next one.
    lora = confirmed(FRONT[1], 0.81, 0.84, 0.84)
    assert numbers(pick([FRONT[0], lora, adapter, full], "best")) == [5]
    # A cheaper one that is even better is no worse, and no tie either.
    (choice,) = choose([confirmed(FRONT[1], 0.9, 0.91), full], "best")
    assert choice.record.number == 5
    assert choice.reason is not None
    assert "over 2 and 3 seeds is better, beyond the error bars, and it trains" in choice.reason
    losses = [
        record.model_copy(update={"value": 1 - (record.value or 0), "confirmed": None}) for record in (*FRONT[:2], full)
    ]
    worse = confirmed(losses[1], 0.20, 0.21, 0.22)
    assert numbers(pick([losses[0], worse, confirmed(losses[2], 0.15, 0.16, 0.17)], "best", "minimize")) == [9]
    assert numbers(pick([losses[0], worse, confirmed(losses[2], 0.19, 0.20, 0.22)], "best", "minimize")) == [5]


def test_one_that_diverges_with_some_seeds_is_no_tie() -> None:
    """As LoRA's with a high rate on DDI: its deviation is so large that Welch's interval reaches anything."""
    full = confirmed(FRONT[3], 0.38, 0.41, 0.48)
    wild = confirmed(FRONT[1], 0.0, 0.15, 0.28)
    assert numbers(pick([FRONT[0], wild, full], "best")) == [9]
    # One that reaches the other with a seed is a tie as before, and so is one of two seeds, which may be chance.
    assert numbers(pick([FRONT[0], confirmed(FRONT[1], 0.0, 0.15, 0.39), full], "best")) == [5]
    assert numbers(pick([FRONT[0], confirmed(FRONT[1], 0.0, 0.28), full], "best")) == [5]
    losses = [record.model_copy(update={"value": 1 - (record.value or 0)}) for record in (*FRONT[:2], FRONT[3])]
    wild, steady = confirmed(losses[1], 1.0, 0.85, 0.72), confirmed(losses[2], 0.62, 0.59, 0.52)
    assert numbers(pick([losses[0], wild, steady], "best", "minimize")) == [9]


def test_error_bars_are_welchs_confidence_interval() -> None:
    """Against the quantiles of Student's distribution that statistics books print."""
    one, other = (0.8, 0.03, 3), (0.7, 0.03, 3)
    assert seed_noise(one, other) == pytest.approx(2.776 * 0.03 * math.sqrt(2 / 3), rel=1e-3)
    # With unequal deviations the larger one's degrees of freedom count.
    assert seed_noise((0.8, 0.03, 3), (0.7, 1e-9, 30)) == pytest.approx(4.303 * 0.03 / math.sqrt(3), rel=1e-3)
    # A constant has no chance in it; a single seed varies as the others do.
    assert seed_noise(one, (0.7, 0.0, CONSTANT)) == pytest.approx(4.303 * 0.03 / math.sqrt(3), rel=1e-3)
    assert seed_noise(one, (0.7, 0.0, 1)) == pytest.approx(4.303 * 0.03 * math.sqrt(1 / 3 + 1), rel=1e-3)
    assert seed_noise((0.7, 0.0, 1), one) == seed_noise(one, (0.7, 0.0, 1))
    assert seed_noise((0.8, 0.0, 1), (0.7, 0.0, 1)) == seed_noise((0.8, 0.0, 3), (0.7, 0.0, 3)) == 0.0


def test_without_error_bars_nothing_is_tied() -> None:
    clear = [*FRONT[:2], confirmed(FRONT[2], 0.80, 0.81, 0.82), confirmed(FRONT[3], 0.84, 0.85, 0.86)]
    single = [*FRONT[:2], confirmed(FRONT[2], 0.84), confirmed(FRONT[3], 0.84)]
    for front_ in (FRONT, clear, single, [*FRONT[:3], confirmed(FRONT[3], 0.8, 0.9)]):
        (choice,) = choose(front_, "best")
        assert (choice.record.number, choice.instead_of, choice.reason) == (9, None, None)
    # A front is a front: it is shown whole.
    assert [choice.instead_of for choice in choose(clear, "frontier")] == [None] * 4


def test_latency_is_a_limit_too() -> None:
    took = {3: 9.0, 5: 2.0, 7: 4.0, 9: 3.0}
    found = choose(FRONT, "frontier", max_latency=3.0, latencies=took)
    assert [choice.record.number for choice in found] == [5, 9]
    with pytest.raises(StudyError, match=r"at most 1 ms for an example: the fastest, trial 5 \(lora\), takes 2 ms"):
        choose(FRONT, "best", max_latency=1.0, latencies=took)
    # Nought is a limit too.
    with pytest.raises(StudyError, match="no trial that is left takes at most 1 ms"):
        choose(FRONT, "best", min_metric=0.0, max_latency=1.0, latencies=took)


@pytest.mark.parametrize(
    ("how", "limits", "message"),
    [
        ("knees", {}, "unknown pick 'knees'; did you mean 'knee'"),
        ("best", {"max_parameters": 999}, r"at most 999 parameters: the smallest, trial 3 \(prompt\), trains 1,000"),
        ("best", {"min_metric": 0.9}, r"reaches 0.9: the best, trial 9 \(full\), has 0.8500"),
        (
            "best",
            {"min_metric": 0.82, "max_parameters": 50_000},
            r"the best of them, trial 5 \(lora\), has 0.8000; trial 7 \(adapter\) reaches it with 100,000 parameters",
        ),
        ("best", {"min_metric": 0.9, "max_parameters": 999}, "the smallest, trial 3"),
    ],
)
def test_nothing_left_says_what_is_nearest(how: str, limits: dict[str, float], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        pick(FRONT, how, **limits)  # type: ignore[arg-type]


def test_nothing_to_pick_from() -> None:
    with pytest.raises(StudyError, match="no trial has reached the full budget yet"):
        pick([], "best")


@pytest.mark.parametrize(
    ("settings_", "chosen"),
    [
        # Best of its cell: 1 (lora), 5 (adapter), 3 (prompt). On the front: 4, 3, 0, 1.
        ({"finalists": "methods"}, [1, 5, 3]),
        ({"finalists": "front"}, [1, 0, 3, 4]),
        ({"finalists": "both"}, [1, 5, 3, 0, 4]),
        ({"finalists": "both", "max_finalists": 4}, [1, 5, 3, 0]),
        ({"finalists": "methods", "max_finalists": 2}, [1, 5]),
        ({"finalists": "all"}, [1, 5, 3, 0, 4, 7]),
        ({"finalists": "all", "max_finalists": 5}, [1, 5, 3, 0, 4]),
    ],
)
def test_finalists(settings_: dict[str, object], chosen: list[int]) -> None:
    records = [
        make_record(0, 0.7, 100),
        make_record(1, 0.9, 900),
        make_record(2, 0.95, 10, state=TrialState.PRUNED),
        make_record(3, 0.6, 50, method="prompt"),
        make_record(4, 0.5, 40, method="prompt"),
        make_record(5, 0.8, 1000, method="adapter"),
        make_record(6, 0.3, 40, method="adapter", domain="legal", state=TrialState.FAILED),
        make_record(7, 0.75, 2000, method="adapter"),
    ]
    found = finalists(records, make_facts(), ConfirmSpec.model_validate({"seeds": 2} | settings_))
    assert [record.number for record in found] == chosen


def test_each_domain_and_model_has_finalists_and_smaller_may_be_better() -> None:
    facts = make_facts()
    legal = facts.domains["legal"].model_copy(update={"direction": "minimize"})
    facts = facts.model_copy(update={"domains": facts.domains | {"legal": legal}})
    records = [
        make_record(0, 0.9, 10),
        make_record(1, 0.8, 10, model="other"),
        make_record(2, 20.0, 10, domain="legal"),
        make_record(3, 12.0, 10, domain="legal"),
    ]
    confirm = ConfirmSpec(seeds=1, finalists="methods")
    assert [record.number for record in finalists(records, facts, confirm)] == [0, 1, 3]
