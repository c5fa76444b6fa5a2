"""What is trained on a CPU and on the stand-in for a GPU, to the same numbers; as a program, on the stand-in.

    python standin_cases.py LIBRARY FOLDER

A line of JSON for each case, as it ends: its name, its numbers and how often the host waited, or what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from test_crew import drain, segments, silent
from test_packing import planned
from tiny_models import SAMPLES

from peftsearch.search.plan import StudyPlan
from peftsearch.training.crew import Crew
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.packing import Pack
from peftsearch.training.packing.host import Host
from peftsearch.training.segment import Outcome, Probe, ProbeResult, Segment, SegmentResult, TrialPlan
from peftsearch.training.worker import Worker

CPU = torch.device("cpu")
PACKED = 5


@dataclass(frozen=True)
class Case:
    """Something that a worker does.

    Attributes:
        work: A method's name: its trial, every segment by another worker. ``baselines``, or ``pack``: the first
            segments of several trials at once.
        kind: Of model.
        training: Options of the training section.
        tolerance: By how much its numbers may differ from a CPU's, relatively; None where they are not compared.
    """

    work: str
    kind: str
    task: str
    training: dict[str, Any] = field(default_factory=dict)
    tolerance: float | None = 1e-3

    @property
    def name(self) -> str:
        return "-".join((self.work, self.kind, self.task, *self.training))

    def run(self, folder: Path, device: torch.device, waited: Callable[[], int]) -> dict[str, Any]:
        """Do it; its numbers, and how often the host waited.

        That is while a segment of a trial was trained, or a pack was made and trained before a trial of it ended.
        """
        folder.mkdir(parents=True)
        plan = planned(folder, self.kind, self.task, **self.training)
        if self.work == "baselines":
            result = new_worker(plan, folder, device).do(Probe(next(iter(plan.models)), "d"))
            assert isinstance(result, ProbeResult), result
            assert not result.failures, result.failures
            return {"numbers": result.scores}
        if self.work == "pack":
            return self._pack(plan, folder, device, waited)
        trial = TrialPlan(0, next(iter(plan.models)), "d", self.work, SAMPLES[self.work], 0)
        steps = plan.budgets["d", self.work].evaluation_steps
        numbers, waits = [], 0
        for step in steps:
            last = step == steps[-1]
            worker = new_worker(plan, folder, device)
            segment = Segment(trial, step, final=last, read_test=last)
            session = worker._session(segment)
            train = session._train

            def counted(to_step: int, train: Callable[[int], float] = train) -> float:
                nonlocal waits
                before = waited()
                loss = train(to_step)
                waits += waited() - before
                return loss

            session._train = counted  # type: ignore[method-assign]
            result = worker.do(segment)
            numbers.append(numbers_of(result))
            if isinstance(result, SegmentResult) and result.stopped:
                break
        return {"numbers": numbers, "waits": waits / len(numbers)}

    def _pack(self, plan: StudyPlan, folder: Path, device: torch.device, waited: Callable[[], int]) -> dict[str, Any]:
        first = [segments(plan, number)[0] for number in range(PACKED)]
        if device == CPU:
            return {"numbers": [numbers_of(new_worker(plan, folder, device).do(segment)) for segment in first]}
        worker = new_worker(plan, folder, device)
        host = Host(worker.base(first[0].trial.model), worker.domain(first[0].trial.model, "d"), None)
        members = [worker.new_session(segment) for segment in first]
        before = waited()
        made = Pack(members, host)
        waits = waited() - before
        made.close()
        crew = Crew(worker, silent)
        size = crew.size(first[0])
        for number, segment in enumerate(first):
            crew.join(number, segment)
        # Its first step checks the pack against the trials alone.
        assert crew.advance() == {}
        before = waited()
        for _ in range(first[0].to_step - 2):
            assert crew.advance() == {}
        waits += waited() - before
        found = drain(crew)
        return {"numbers": [numbers_of(found[number]) for number in range(PACKED)], "waits": waits, "size": size}


def new_worker(plan: StudyPlan, folder: Path, device: torch.device) -> Worker:
    """A worker on a device."""
    return Worker(plan.for_workers(folder / "study", threads=1), WorkerGroup(device=device))


def numbers_of(outcome: Outcome) -> dict[str, float]:
    """What a segment came to."""
    assert isinstance(outcome, SegmentResult), outcome
    test = {f"test {name}": value for name, value in outcome.test.scores.items()} if outcome.test else {}
    return {"loss": outcome.loss, "train loss": outcome.train_loss, **outcome.scores, **test}


E, S, D = "encoder", "encoder-decoder", "decoder"
HALF = 1e-2
"""The base of qlora computes in bf16 where the hardware does."""
CASES = [
    *(Case(method, E, "classification") for method in ("lora", "adapter", "hybrid", "prompt", "prefix", "p_tuning")),
    *(Case(method, E, "classification") for method in ("p_tuning_v2", "ia3", "bitfit", "full")),
    Case("qlora", E, "classification", tolerance=HALF),
    *(Case(method, D, "summarization") for method in ("lora", "p_tuning", "full")),
    Case("qlora", D, "summarization", tolerance=HALF),
    *(Case(method, S, "summarization") for method in ("lora", "prompt")),
    *(Case("lora", E, task) for task in ("question_answering", "token_classification", "similarity", "multi_label")),
    *(Case("lora", E, task) for task in ("multiple_choice", "language_modeling")),
    Case("lora", D, "language_modeling"),
    Case("qlora", D, "classification", {"gradient_checkpointing": True}, tolerance=HALF),
    Case("lora", E, "classification", {"gradient_accumulation": 3, "class_weights": "balanced"}),
    Case("lora", E, "classification", {"tokens_per_batch": 64, "label_smoothing": 0.1}),
    Case("lora", E, "classification", {"patience": 1}),
    Case("full", E, "classification", {"optimizer": "adamw_8bit"}, tolerance=None),
    *(Case(method, E, "classification", {"precision": "bf16"}, tolerance=None) for method in ("lora", "qlora")),
    *(Case("baselines", E, task) for task in ("question_answering", "similarity")),
    *(Case("baselines", kind, "classification") for kind in (S, D)),
    Case("pack", E, "classification"),
    Case("pack", S, "summarization"),
    Case("pack", D, "classification", {"precision": "bf16"}, tolerance=None),
]


def main(library: Path, folder: Path) -> None:
    """Run all cases on the stand-in."""
    from standin_gpu import GPU, standin_gpu

    with standin_gpu(library) as waits:
        for case in CASES:
            try:
                found = case.run(folder / case.name, GPU, lambda: waits.count)
            except Exception:
                found = {"error": traceback.format_exc()}
            print(json.dumps({"name": case.name, **found}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    status = 1
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
