"""Scoring exported folders in a fresh process: what was exported must give the ledger's score to whoever loads it.

As a program it reads a JSON list of jobs from standard input and answers each with one line of JSON: one process for
all folders, as most of the time goes into importing; but every folder's model is loaded anew, base included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from peftsearch.spec import StudyError


@dataclass(frozen=True)
class Job:
    """One folder to score.

    Attributes:
        folder: The exported folder.
        data: Folder of the prepared domain.
        split: The split to score.
        batch_size: Examples per forward pass, as in training.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads, as in training: another number adds in another order. PyTorch's choice for None.
        trust_remote_code: Whether the study file says that code which the base brings along may run.
        measure: Whether to measure how fast it is, too.
    """

    folder: str
    data: str
    split: str
    batch_size: int
    device: str
    threads: int | None = None
    trust_remote_code: bool = False
    measure: bool = False


@dataclass(frozen=True)
class Score:
    """What a folder scored, or why it could not be scored.

    Attributes:
        scores: All scores of the task.
        loss: Mean over the rows.
        examples: How many the scores rest on.
        error: Why it could not be scored.
        measured: The fields of `peftsearch.export.speed.Speed`, where that was asked for.
    """

    scores: dict[str, float]
    loss: float
    examples: int
    error: str | None = None
    measured: dict[str, Any] | None = None


def score_folders(jobs: Sequence[Job], told: Callable[[int, Score], None] = lambda *_: None) -> list[Score]:
    """Score folders in one fresh process.

    Args:
        jobs: The folders.
        told: Called with a job's position and its score as each is done.

    Raises:
        RuntimeError: The process died.
    """
    # -P: a file called "datasets.py" in the working folder must not take a library's place. The models were loaded by
    # this process before, so the fresh one needs no network.
    command = [sys.executable, "-P", "-m", "peftsearch.export.verify"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    found: list[Score] = []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as chatter,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=chatter, env=environment, encoding="utf-8"
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # A process that died before it read all is reported below.
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps([asdict(job) for job in jobs]))
                process.stdin.close()
            for line in process.stdout:
                found.append(Score(**json.loads(line)))
                told(len(found) - 1, found[-1])
            status = process.wait()
        except BaseException:
            process.kill()
            raise
        if status != 0 or len(found) != len(jobs):
            chatter.seek(0)
            lines = chatter.read().strip().splitlines() or ["no message"]
            raise RuntimeError(f"the process that verifies exports ended with status {status}: {lines[-1]}")
    return found


def main() -> None:
    """Answer the jobs on standard input."""
    # Libraries print to standard output now and then, which must not mix with the answers.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        _answer([Job(**job) for job in json.load(sys.stdin)], answers)


def _answer(jobs: Sequence[Job], answers: TextIO) -> None:
    for job in jobs:
        try:
            score = _score(job)
        except StudyError as error:
            score = Score({}, 0.0, 0, error.message)
        print(json.dumps(asdict(score)), file=answers, flush=True)


def _score(job: Job) -> Score:
    import torch

    from peftsearch.domains import PreparedDomain
    from peftsearch.export.folder import ExportedFolder
    from peftsearch.training.attention import leave_out_cudnn
    from peftsearch.training.distributed import WorkerGroup
    from peftsearch.training.evaluate import evaluate

    exported = ExportedFolder.read(Path(job.folder))
    domain = PreparedDomain.load(Path(job.data))
    device = torch.device(job.device)
    leave_out_cudnn(device)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    model = exported.load(domain, device, trust_remote_code=job.trust_remote_code)
    found = evaluate(model, domain, job.split, job.batch_size, WorkerGroup(device=device))
    measured = None
    if job.measure:
        from peftsearch.export.speed import measure_speed

        measured = measure_speed(model, domain, job.split, job.batch_size, device).as_json()
    return Score(found.scores, found.loss, found.examples, measured=measured)


if __name__ == "__main__":
    main()
