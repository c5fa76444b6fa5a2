"""A task trained on a tiny model, from records to scores, as a study does it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_models import SAMPLES

from peftsearch.domains import PreparedDomain
from peftsearch.methods import METHODS
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import Probe, ProbeResult, Segment, SegmentResult, TrialPlan
from peftsearch.training.worker import Worker


@dataclass
class TaskRun:
    """One domain ``d`` on one model, with a worker that trains it."""

    plan: StudyPlan
    worker: Worker

    @classmethod
    def make(cls, folder: Path, model: Path, domain: dict[str, Any], records: Any, **training: Any) -> TaskRun:
        """Write records and a study file, plan it, and start a worker."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "records.json").write_text(json.dumps(records))
        document = {
            "name": "s",
            "model": str(model),
            "domains": {"d": {**domain, "data": {"source": "records.json", **domain.get("data", {})}}},
            "methods": {"lora": {}, "prompt": {}, "full": {}},
            "training": {"epochs": 4, "evaluations": 2, "batch_size": 8, "max_length": 48, **training},
        }
        (folder / "s.json").write_text(json.dumps(document))
        plan = plan_study(StudyFile.load(folder / "s.json"), folder / "cache")
        return cls(plan, Worker(plan.for_workers(folder / "out", threads=1), WorkerGroup()))

    @property
    def model(self) -> str:
        return next(iter(self.plan.models))

    @property
    def domain(self) -> PreparedDomain:
        return PreparedDomain.load(self.worker.plan.domains[self.model, "d"])

    def probe(self) -> dict[str, dict[str, float]]:
        """Scores of the baselines."""
        outcome = self.worker.do(Probe(self.model, "d"))
        assert isinstance(outcome, ProbeResult), outcome
        return outcome.scores

    def train(self, method: str = "lora", number: int = 0, **changes: Any) -> list[SegmentResult]:
        """Train a trial to its full budget."""
        defaults = {name: item.space for name, item in METHODS[method].hyperparameters.items()}
        trial = TrialPlan(number, self.model, "d", method, defaults | SAMPLES[method] | changes, seed=0)
        steps = self.plan.budgets["d", method].evaluation_steps
        results = []
        for step in steps:
            outcome = self.worker.do(Segment(trial, step, final=step == steps[-1]))
            assert isinstance(outcome, SegmentResult), outcome
            results.append(outcome)
        return results
