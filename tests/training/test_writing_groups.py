"""Two workers that hold a part of a model each write what one worker writes, train it and probe it alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from group_runs import GroupRun, run_group
from tiny_models import SAMPLES
from writing_study import MODELS, plan_and_worker, study, topic_rows

from peftsearch.training.segment import Probe, ProbeResult, Segment, SegmentResult, TrialPlan

pytestmark = pytest.mark.slow

ROWS = {"train": topic_rows(18), "validation": topic_rows(7, seed=1)}
DOMAIN = {"task": "summarization", "options": {"target_length": 6}}


@pytest.mark.parametrize("kind", MODELS)
def test_texts_are_written_on_parts_of_the_base(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind](tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}))
    (tmp_path / "general.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in ROWS["train"]))
    file = study(
        tmp_path,
        model,
        DOMAIN,
        ROWS,
        forgetting={"source": "general.jsonl"},
        training={"evaluation_batch_size": 2, "batch_size": 5},
    )
    plan, worker = plan_and_worker(file, tmp_path)
    name = next(iter(plan.models))
    trials = [
        TrialPlan(number, name, "d", method, SAMPLES[method], seed=0)
        for number, method in enumerate(("lora", "prompt", "full"))
    ]
    segments = [Segment(trial, plan.budgets["d", trial.method].total_steps, final=True) for trial in trials]
    work = [Probe(name, "d"), *segments]
    expected = [worker.do(piece) for piece in work]
    found = run_group(GroupRun(plan.for_workers(tmp_path / "two", threads=1), [work], "fsdp"))
    for outcomes in found.outcomes:
        probed, *results = outcomes
        assert isinstance(probed, ProbeResult)
        assert isinstance(expected[0], ProbeResult)
        assert probed.scores.keys() == expected[0].scores.keys()
        for baseline, scores in expected[0].scores.items():
            assert probed.scores[baseline] == pytest.approx(scores, abs=1e-4)
        for result, other in zip(results, expected[1:], strict=True):
            assert isinstance(result, SegmentResult), result
            assert isinstance(other, SegmentResult), other
            assert result.loss == pytest.approx(other.loss, abs=1e-4)
            assert result.scores == pytest.approx(other.scores, abs=1e-4)
