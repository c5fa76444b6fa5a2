"""How many slots fit a cluster."""

from __future__ import annotations

import pytest

from peftsearch.spec import ResourcesSpec, StudyError
from peftsearch.workers import SlotPlan


def fit(nodes: list[dict[str, float]], **resources: object) -> tuple[int, int, int, float]:
    plan = SlotPlan.fit(ResourcesSpec.model_validate(resources), nodes)
    return plan.slots, plan.workers, plan.cpus, plan.gpus


def test_every_core_has_a_slot() -> None:
    assert fit([{"CPU": 2}]) == (2, 1, 1, 0)
    assert fit([{"CPU": 8}, {"CPU": 8}], workers_per_trial=2) == (8, 2, 1, 0)
    assert fit([{}, {"CPU": 1}, {"CPU": 2}, {"CPU": 8}]) == (11, 1, 1, 0)
    assert fit([{"CPU": 8}], cpus_per_worker=3) == (2, 1, 3, 0)


def test_fewer_slots_than_cores_share_them() -> None:
    assert fit([{"CPU": 2}], slots=1) == (1, 1, 2, 0)
    assert fit([{"CPU": 8}], slots=3) == (3, 1, 2, 0)
    assert fit([{"CPU": 2}, {"CPU": 4}, {"CPU": 8}], slots=3) == (3, 1, 4, 0)
    assert fit([{"CPU": 8}, {"CPU": 8}], slots=2, workers_per_trial=2) == (2, 2, 4, 0)
    # Those that an autoscaler brings count where the others do not suffice.
    assert SlotPlan.fit(ResourcesSpec(slots=4), [{"CPU": 1}], [{"CPU": 16}] * 2).cpus == 8


@pytest.mark.parametrize(
    ("nodes", "resources", "expected"),
    [
        ([(4, 9)], {}, (4, 1, None)),
        # Some memory is left for the trial actors.
        ([(4, 8)], {}, (3, 1, "3 of the 4 slots")),
        ([(4, 7)], {}, (3, 1, "3 of the 4 slots")),
        ([(8, 7)], {}, (3, 2, "3 of the 8 slots")),
        ([(8, 7), (8, 7)], {}, (6, 2, "6 of the 16 slots")),
        # What is expected is not certain: one slot is tried.
        ([(8, 1)], {}, (1, 8, "1 of the 8 slots")),
        ([(8, 3)], {"workers_per_trial": 2}, (1, 4, "1 of the 4 slots")),
        ([(8, 7)], {"cpus_per_worker": 1}, (3, 1, "3 of the 8 slots")),
        # Asked for is asked for.
        ([(8, 7)], {"slots": 8}, (8, 1, None)),
    ],
)
def test_there_are_no_more_slots_than_memory_is_expected_to_hold(
    nodes: list[tuple[int, int]], resources: dict[str, object], expected: tuple[int, int, str | None]
) -> None:
    told: list[str] = []
    machines: list[dict[str, float]] = [{"CPU": cores, "memory": gib * 2**30} for cores, gib in nodes]
    plan = SlotPlan.fit(ResourcesSpec.model_validate(resources), machines, worker_bytes=2 * 2**30, tell=told.append)
    slots, cpus, sentence = expected
    assert (plan.slots, plan.cpus) == (slots, cpus)
    if sentence is None:
        assert not told
    else:
        assert [text for text in told if sentence in text and "2.0 GiB" in text] == told != []
        # Machines of the same kind that join hold as many.
        assert plan.room([*machines, *machines]) == 2 * slots


def test_there_are_no_more_slots_than_trials_where_they_can_share_the_cores() -> None:
    plan = SlotPlan.fit(ResourcesSpec(), [{"CPU": 8}], trials=2)
    assert (plan.slots, plan.cpus) == (2, 4)
    assert SlotPlan.fit(ResourcesSpec(), [{"CPU": 8}], trials=20).slots == 8
    # Five cannot share eight cores evenly; three cores wait.
    plan = SlotPlan.fit(ResourcesSpec(), [{"CPU": 8}], trials=5)
    assert (plan.slots, plan.cpus) == (5, 1)
    assert plan.room([{"CPU": 8}] * 2) == 5


def test_a_study_goes_on_with_the_threads_that_it_had() -> None:
    plan = SlotPlan.fit(ResourcesSpec(), [{"CPU": 8}], threads=4, trials=20)
    assert (plan.slots, plan.cpus) == (2, 4)
    # On a smaller machine with what there is, and not where the file says otherwise.
    assert SlotPlan.fit(ResourcesSpec(), [{"CPU": 2}], threads=8).cpus == 2
    assert SlotPlan.fit(ResourcesSpec(cpus_per_worker=1), [{"CPU": 8}], threads=4).cpus == 1
    assert SlotPlan.fit(ResourcesSpec(slots=8), [{"CPU": 8}], threads=4).cpus == 1


def test_two_workers_share_the_cores() -> None:
    assert fit([{"CPU": 2}], workers_per_trial=2) == (1, 2, 1, 0)


def test_slots_fill_a_cluster_node_by_node() -> None:
    assert fit([{"CPU": 8}, {"CPU": 5}], cpus_per_worker=2) == (6, 1, 2, 0)


def test_one_slot_per_gpu() -> None:
    assert fit([{"CPU": 4}, {"CPU": 32, "GPU": 4}, {"CPU": 16, "GPU": 2}], gpus_per_worker=1) == (6, 1, 8, 1)


def test_trials_over_several_gpus() -> None:
    assert fit([{"CPU": 32, "GPU": 8}], gpus_per_worker=1, workers_per_trial=4)[:2] == (2, 4)


def test_workers_of_a_slot_may_be_on_several_machines() -> None:
    assert fit([{"CPU": 2}, {"CPU": 2}, {"CPU": 1}], workers_per_trial=5, cpus_per_worker=1)[:2] == (1, 5)


def test_no_worker_gets_halves_of_two_gpus() -> None:
    assert fit([{"CPU": 8, "GPU": 2}], gpus_per_worker=0.75)[0] == 2
    assert fit([{"CPU": 8, "GPU": 2}], gpus_per_worker=0.5)[0] == 4


def test_the_number_of_slots_follows_the_machines() -> None:
    plan = SlotPlan.fit(ResourcesSpec(cpus_per_worker=2), [{"CPU": 4}])
    assert plan.follows
    assert [plan.room(nodes) for nodes in ([], [{"CPU": 1}], [{"CPU": 5}], [{"CPU": 4}, {"CPU": 2}])] == [0, 0, 2, 3]
    assert not SlotPlan.fit(ResourcesSpec(cpus_per_worker=2, slots=1), [{"CPU": 4}]).follows


def test_a_cluster_that_grows_is_asked_for_what_it_has_not_yet() -> None:
    resources = ResourcesSpec(gpus_per_worker=1, slots=6)
    plan = SlotPlan.fit(resources, [{"CPU": 2}], [{"CPU": 16, "GPU": 4}] * 3)
    assert (plan.slots, plan.cpus, plan.gpus) == (6, 4, 1)
    assert SlotPlan.fit(ResourcesSpec(slots=4, cpus_per_worker=1), [{"CPU": 2}], grows=True).slots == 4
    assert SlotPlan.fit(ResourcesSpec(gpus_per_worker=1), [{"CPU": 2}], [{"CPU": 16, "GPU": 4}]).slots == 1
    with pytest.raises(StudyError, match="needs 1 GPUs and the cluster has 0"):
        SlotPlan.fit(resources, [{"CPU": 2}], grows=True)


def test_gpus_of_several_machines_make_no_worker() -> None:
    with pytest.raises(StudyError, match="needs 2 GPUs of one machine and none has more than 1"):
        fit([{"CPU": 8, "GPU": 1}] * 2, gpus_per_worker=2)


@pytest.mark.parametrize(
    ("resources", "sentence"),
    [
        ({"gpus_per_worker": 1}, "needs 1 GPUs and the cluster has 0"),
        ({"cpus_per_worker": 3}, "3 CPUs each and the cluster has 2"),
        ({"slots": 3, "cpus_per_worker": 1}, "3 slots do not fit: the cluster holds 2"),
    ],
)
def test_what_does_not_fit_is_refused(resources: dict[str, object], sentence: str) -> None:
    with pytest.raises(StudyError, match=sentence):
        fit([{"CPU": 2}], **resources)


@pytest.mark.parametrize(
    ("gpus_per_worker", "nodes", "told"),
    [
        (0, [{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2}], ["4 GPUs stay idle"]),
        (0, [{"CPU": 8, "GPU": 1}], ["1 GPU stays idle"]),
        (0, [{"CPU": 8}], []),
        (1, [{"CPU": 8, "GPU": 2}], []),
    ],
)
def test_gpus_that_a_study_does_not_ask_for_are_named(
    gpus_per_worker: int, nodes: list[dict[str, float]], told: list[str]
) -> None:
    said: list[str] = []
    SlotPlan.fit(ResourcesSpec(gpus_per_worker=gpus_per_worker), nodes, tell=said.append)
    assert len(said) == len(told)
    for sentence, words in zip(said, told, strict=True):
        assert words in sentence
        assert "resources: {gpus_per_worker: 1}" in sentence
