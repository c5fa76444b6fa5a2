"""How many slots fit a cluster."""

from __future__ import annotations

import pytest

from peftsearch.spec import ResourcesSpec, StudyError
from peftsearch.workers import SlotPlan


def fit(nodes: list[dict[str, float]], **resources: object) -> tuple[int, int, int, float]:
    plan = SlotPlan.fit(ResourcesSpec.model_validate(resources), nodes)
    return plan.slots, plan.workers, plan.cpus, plan.gpus


def test_one_slot_takes_all_cores_of_a_small_machine() -> None:
    assert fit([{"CPU": 2}]) == (1, 1, 2, 0)


def test_two_workers_share_the_cores() -> None:
    assert fit([{"CPU": 2}], workers_per_trial=2) == (1, 2, 1, 0)


def test_slots_fill_a_cluster_node_by_node() -> None:
    assert fit([{"CPU": 8}, {"CPU": 5}], cpus_per_worker=2) == (6, 1, 2, 0)


def test_one_slot_per_gpu() -> None:
    assert fit([{"CPU": 4}, {"CPU": 32, "GPU": 4}, {"CPU": 16, "GPU": 2}], gpus_per_worker=1) == (6, 1, 8, 1)


def test_trials_over_several_gpus() -> None:
    assert fit([{"CPU": 32, "GPU": 8}], gpus_per_worker=1, workers_per_trial=4)[:2] == (2, 4)


def test_slots_are_as_large_as_leaves_few_cores_of_different_machines_unused() -> None:
    assert fit([{"CPU": 2}, {"CPU": 4}, {"CPU": 8}]) == (3, 1, 4, 0)
    assert fit([{"CPU": 1}, {"CPU": 8}]) == (1, 1, 8, 0)
    assert fit([{}, {"CPU": 1}, {"CPU": 2}]) == (3, 1, 1, 0)
    assert fit([{"CPU": 8}, {"CPU": 8}], workers_per_trial=2) == (2, 2, 4, 0)


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
