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
