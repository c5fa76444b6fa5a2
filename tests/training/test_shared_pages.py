"""The base is read once per machine: workers map its file into memory, and so share the pages that hold it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import SAMPLES

from peftsearch.search.plan import plan_study
from peftsearch.spec import StudyFile
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import Segment, SegmentResult, TrialPlan
from peftsearch.training.worker import Worker


def mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether a tensor's bytes are those of a file that is mapped into memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        begin, end = (int(number, 16) for number in fields[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return len(fields) == 6 and Path(fields[5]) == file
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_base_stays_in_the_pages_of_its_file(
    write_study: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    training = {"epochs": 1, "evaluations": 1, "batch_size": 16, "max_length": 16}
    plan = plan_study(StudyFile.load(write_study(methods={"lora": {}}, training=training)), tmp_path / "cache")
    threads = torch.get_num_threads()
    try:
        worker = Worker(plan.for_workers(tmp_path / "out", threads=1), WorkerGroup())
        trial = TrialPlan(0, next(iter(plan.models)), "topics", "lora", SAMPLES["lora"], seed=0)
        assert isinstance(worker.do(Segment(trial, 1)), SegmentResult)
    finally:
        torch.set_num_threads(threads)
    # Before and after a trial: nothing copies what nothing writes to.
    tensors = worker.base(trial.model)._tensors
    assert len(tensors) > 20
    assert [name for name, tensor in tensors.items() if not mapped(tensor, tiny_base / "model.safetensors")] == []
