"""Prepared data that is gone: the study stops, and no trial is to blame."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lone_worker import new_worker
from tiny_models import SAMPLES

from peftsearch.search.plan import plan_study
from peftsearch.spec import StudyFile
from peftsearch.training.segment import Failure, Segment, SegmentResult, TrialPlan


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: shutil.rmtree(folder / "train")])
def test_a_trial_whose_data_is_gone_does_not_fail(
    damage: Callable[[Path], None], write_study: Callable[..., Path], tmp_path: Path
) -> None:
    plan = plan_study(StudyFile.load(write_study(methods={"lora": {}})), tmp_path / "cache")
    ((key, folder),) = plan.for_workers(tmp_path, threads=1).domains.items()
    assert isinstance(folder, Path)
    shutil.copytree(folder, tmp_path / "kept")
    damage(folder)
    worker = new_worker(plan, tmp_path / "study")
    trial = TrialPlan(0, key[0], key[1], "lora", SAMPLES["lora"], seed=0)
    segment = Segment(trial, plan.budgets["topics", "lora"].evaluation_steps[0])
    outcome = worker.do(segment)
    assert isinstance(outcome, Failure)
    assert outcome.of_study
    assert "topics" in outcome.error
    # The same worker goes on once it is there.
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", folder)
    assert isinstance(worker.do(segment), SegmentResult)
