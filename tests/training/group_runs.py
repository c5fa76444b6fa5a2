"""Trials on a group of worker processes over gloo, without Ray: what a slot's train loop does, in small."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from forks import programs

from peftsearch.training.segment import Outcome, Work, WorkerPlan

SECONDS = 1200.0
"""A group that takes longer hangs."""


@dataclass
class GroupRun:
    """What a group is to do.

    Attributes:
        plan: As a slot gets it.
        work: Pieces of work, one after another; a list is done by a new `Worker` in the same processes.
        strategy: ``ddp`` or ``fsdp``.
        workers: Processes.
        limits: Rank -> bytes of address space that the last worker's process may take beyond what it has with the base
            loaded.
        unloadable: The rank that fails to load the model when it is asked to once more.
        ballast: Rank -> megabytes that its process takes beside its work.
        leave: How often the first worker of the first process answers that it need not leave, before it must.
    """

    plan: WorkerPlan
    work: Sequence[Sequence[Work]]
    strategy: str
    workers: int = 2
    limits: dict[int, int] = field(default_factory=dict)
    unloadable: int | None = None
    ballast: dict[int, int] = field(default_factory=dict)
    leave: int | None = None


@dataclass
class GroupResult:
    """By rank: what it answered, and what its base hashed to before and after each worker's life."""

    outcomes: list[list[Outcome]]
    fingerprints: list[list[dict[str, int]]]


def run_group(run: GroupRun) -> GroupResult:
    """Start the processes and wait for them."""
    with tempfile.TemporaryDirectory() as scratch:
        handed = Path(scratch) / "run.pickle"
        handed.write_bytes(pickle.dumps(run))
        processes = programs(Path(__file__), [(handed, rank) for rank in range(run.workers)], SECONDS + 30)
        for process in processes:
            assert process.returncode == 0, (process.returncode, process.stdout[-5000:])
        results: list[Any] = [
            pickle.loads((Path(scratch) / f"{rank}.pickle").read_bytes()) for rank in range(run.workers)
        ]
    return GroupResult([result[0] for result in results], [result[1] for result in results])


def _main(handed: Path, rank: int) -> None:
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from peftsearch.training.distributed import WorkerGroup
    from peftsearch.training.worker import Worker

    # Where they wait for one another in vain, say where.
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    run: GroupRun = pickle.loads(handed.read_bytes())
    torch.set_num_threads(1)
    store = distributed.FileStore(str(handed.parent / "store"), run.workers)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=run.workers)
    group = WorkerGroup(rank, run.workers, torch.device("cpu"), run.strategy)  # type: ignore[arg-type]
    ballast = torch.ones(run.ballast.get(rank, 0), 2**18)
    outcomes, fingerprints = [], []
    for pieces in run.work:
        worker = Worker(run.plan, group)
        worker.warm_up()
        base = worker.base(next(iter(run.plan.models)))
        if rank in run.limits and pieces is run.work[-1]:
            _limit(run.limits[rank])
        if rank == 0 and run.leave is not None and pieces is run.work[0]:
            worker.must_leave = partial(_after, itertools.count(), run.leave)
        if run.unloadable is not None:
            base._templates.clear()
            if rank == run.unloadable:
                _fails_once(base)
        fingerprints.append(base.fingerprint())
        outcomes += [worker.do(piece) for piece in pieces]
        fingerprints.append(base.fingerprint())
        worker.close()
        left = [thing for thing in gc.get_objects() if isinstance(thing, DistributedDataParallel)]
        assert not left, "a model in DDP outlives its worker: whoever destroys its process group may hang"
    (handed.parent / f"{rank}.pickle").write_bytes(pickle.dumps((outcomes, fingerprints)))
    del ballast
    distributed.barrier()
    distributed.destroy_process_group()


def _fails_once(base: Any) -> None:
    load = base._load

    def fails(*arguments: Any, **options: Any) -> Any:
        base._load = load
        raise ValueError("a damaged file")

    base._load = fails


def _after(asked: Iterator[int], times: int) -> bool:
    return next(asked) >= times


def _limit(more: int) -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    # Unpickled by the name under which the test knows it.
    sys.path.insert(0, str(Path(__file__).parent))
    import group_runs

    group_runs._main(Path(sys.argv[1]), int(sys.argv[2]))
