"""What the driver tells of its study is what the ledger's trials say, however they came in."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
from tracking_study import study_facts, trial

from peftsearch.frontier.front import domain_fronts
from peftsearch.monitoring import StudyMetrics
from peftsearch.spec import TrialRecord, TrialState
from peftsearch.workers.metrics import (
    BACKLOG,
    BEST,
    FRONT,
    GPU_MEMORY,
    HYPERVOLUME,
    MEMORY,
    METHOD_BEST,
    SEGMENT_SECONDS,
    SEGMENTS,
    TRIALS,
    Meter,
    Metric,
    SlotMeter,
)


def trials(count: int) -> list[TrialRecord]:
    draw = random.Random(0)
    states = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED]
    return [
        trial(
            number,
            state=draw.choice(states),
            # Coarse, so that there are ties.
            value=draw.randrange(20) / 20,
            trainable_parameters=10 ** draw.randrange(6),
            domain=draw.choice(["clinical", "legal"]),
            method=draw.choice(["lora", "prompt"]),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("known", [0, 30, 60])
def test_trials_that_were_there_and_trials_that_come_count_alike(direction: str, known: int) -> None:
    facts = study_facts("s")
    domains = {name: item.model_copy(update={"direction": direction}) for name, item in facts.domains.items()}
    facts = facts.model_copy(update={"domains": domains})
    ended = trials(60)
    metrics = StudyMetrics(facts, ended[:known], lambda: 3)
    for record in ended[known:]:
        metrics.trial_changed(record.model_copy(update={"state": TrialState.RUNNING}))
        metrics.numbers()
        metrics.trial_changed(record)
    numbers = metrics.numbers()

    fronts = domain_fronts(ended, facts)
    assert numbers[HYPERVOLUME] == {(name,): found.hypervolume for name, found in fronts.items()}
    assert numbers[FRONT] == {(name,): len(found.front) for name, found in fronts.items()}
    best = {name: found.best for name, found in fronts.items()}
    assert numbers[BEST] == {(name, "accuracy"): record.value for name, record in best.items() if record}
    for (domain, method, _), value in numbers[METHOD_BEST].items():
        mine = [record for record in ended if (record.domain, record.method) == (domain, method)]
        values = [record.value for record in mine if record.state is TrialState.COMPLETE and record.value is not None]
        assert value == (max if direction == "maximize" else min)(values)
    assert sum(numbers[TRIALS].values()) == len(ended)
    assert {key: count for key, count in numbers[TRIALS].items() if count} == {
        (record.domain, record.method, record.state.value.lower()): sum(
            (other.domain, other.method, other.state) == (record.domain, record.method, record.state) for other in ended
        )
        for record in ended
    }
    assert numbers[BACKLOG] == {(): 3}


def test_a_study_without_a_finished_trial_has_no_best_one() -> None:
    metrics = StudyMetrics(study_facts("s"), [trial(0, state=TrialState.RUNNING)], lambda: 0)
    numbers = metrics.numbers()
    assert numbers[BEST] == numbers[METHOD_BEST] == {}
    assert set(numbers[HYPERVOLUME].values()) == set(numbers[FRONT].values()) == {0.0}


def test_a_worker_shows_its_memory_and_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    shown: dict[Metric, Mapping[tuple[str, ...], float]] = {}
    seen = threading.Event()

    class Recording(Meter):
        def show(self, metric: Metric, values: Mapping[tuple[str, ...], float]) -> None:
            shown[metric] = values
            if metric is GPU_MEMORY:
                seen.set()

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=80))
    with SlotMeter(Recording("s"), slot=2, rank=1).watching(torch.device("cuda", 0)):
        assert seen.wait(60)
    assert shown[GPU_MEMORY] == {("2", "1", "allocated"): 3.0, ("2", "1", "reserved"): 5.0, ("2", "1", "total"): 80.0}
    assert shown[MEMORY]["2", "1"] > 0


def test_ray_takes_labels_in_any_letters() -> None:
    """Of its own, it raises UnicodeEncodeError where a label is not ASCII (ray 2.60)."""
    meter = Meter("s")
    meter.show(BEST, {("Kündigung", "f1/🩺"): 0.5, ("legal", "accuracy"): 0.6})
    meter.count(SEGMENTS, slot="0", domain="Kündigung", method="lora", outcome="done")
    meter.observe(SEGMENT_SECONDS, 1.0, domain="Kündigung", method="lora", part="training")
