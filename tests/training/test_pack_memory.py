"""A pack that memory cannot hold gets smaller, with a sentence; no trial is lost or different for it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import SAMPLES

from peftsearch.search.plan import plan_study
from peftsearch.spec import StudyFile
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import Segment, SegmentResult, SetAside, TrialPlan
from peftsearch.training.worker import Worker

pytestmark = pytest.mark.slow

ROOM = 700 * 2**20
"""What may be allocated once the base is loaded; of the trials below each takes about 200 MB."""

LIMITED = """
import pickle, resource, sys
import psutil, torch
from peftsearch.training.crew import Crew
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.worker import Worker

plan, segments, room = pickle.load(open(sys.argv[1], "rb"))
worker = Worker(plan, WorkerGroup())
worker.at_once = len(segments)
(model,) = plan.models
worker.base(model).template(worker.domain(model, "topics"))
limit = psutil.Process().memory_info().vms + room
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
told, found = [], {}
crew = Crew(worker, lambda key, size, text: told.append((size, text)))
for lease, segment in enumerate(segments):
    crew.join(lease, segment)
while not crew.idle:
    found |= crew.advance()
pickle.dump((told, found), open(sys.argv[1], "wb"))
"""


def test_a_pack_that_does_not_fit_is_halved(write_study: Callable[..., Path], tmp_path: Path) -> None:
    training = {"epochs": 1, "evaluations": 1, "batch_size": 24, "max_length": 16, "precision": "fp32"}
    plan = plan_study(StudyFile.load(write_study(methods={"adapter": {}}, training=training)), tmp_path / "cache")
    values: dict[str, Any] = SAMPLES["adapter"] | {"bottleneck": 20_000}
    steps = plan.budgets["topics", "adapter"].total_steps
    (model,) = plan.models
    segments = [Segment(TrialPlan(n, model, "topics", "adapter", values, n), steps, final=True) for n in range(4)]
    handed = tmp_path / "handed.pickle"
    handed.write_bytes(pickle.dumps((plan.for_workers(tmp_path / "packed", threads=1), segments, ROOM)))
    # As much address space as there is memory: no arena for each thread.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    subprocess.run([sys.executable, "-c", LIMITED, str(handed)], env=environment, check=True, timeout=600)
    told, found = pickle.loads(handed.read_bytes())
    sizes = [size for size, _ in told]
    assert sizes[0] == 2
    assert told[0][1].startswith("4 trials of topics at once do not fit into memory: 2 from now on (out of memory: ")
    aside = [number for number, outcome in found.items() if isinstance(outcome, SetAside)]
    done = {number: outcome for number, outcome in found.items() if isinstance(outcome, SegmentResult)}
    assert len(aside) + len(done) == 4
    assert aside
    assert done
    # Whoever was set aside goes on elsewhere.
    other = Worker(plan.for_workers(tmp_path / "packed", threads=1), WorkerGroup())
    for number in aside:
        assert isinstance(other.do(segments[number]), SegmentResult)
