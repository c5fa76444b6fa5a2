"""The floor: a bare PyTorch loop, one trial after another, in one process with all threads or one process per core.

    floor_contender.py FOLDER RECORDS --lanes N --threads N [--shuffled] [--search-seed N --deadline SECONDS]

With ``--search-seed`` it does not run the list but searches at random until the deadline (seconds since 1970).
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segment_records import write_record
from trial_list import SEARCHED_RANKS, SEARCHED_RATES, Trial


@dataclass(frozen=True)
class Lane:
    """What one process is told.

    Attributes:
        folder: Work and data.
        records: Where results go.
        threads: CPU threads.
        shuffled: See `BareLoop`.
        search_seed: Of a random search; None runs the list.
        deadline: When to stop.
    """

    folder: Path
    records: Path
    threads: int
    shuffled: bool
    search_seed: int | None
    deadline: float


def run_lane(lane: Lane, counter: Any) -> None:
    """Train the trials that no other lane has taken."""
    # Before torch is imported: OpenMP reads it once.
    os.environ["OMP_NUM_THREADS"] = str(lane.threads)
    from bare_loop import BareLoop, Progress

    loop = BareLoop(lane.folder, lane.threads, shuffled=lane.shuffled)
    trials = iter(loop.work.trials) if lane.search_seed is None else random_trials(lane.search_seed)
    taken = -1
    while True:
        with counter.get_lock():
            number = counter.value
            counter.value += 1
        trial = next(itertools.islice(trials, number - taken - 1, None), None)
        taken = number
        if trial is None or time.time() >= lane.deadline:
            return

        def report(progress: Progress, trial: Trial = trial) -> bool:
            write_record(
                lane.records,
                trial=trial.number,
                rank=trial.rank,
                learning_rate=trial.learning_rate,
                final=progress.step == loop.work.budget.steps,
                **vars(progress),
            )
            return time.time() < lane.deadline

        loop.train(trial, report)


def random_trials(seed: int) -> Iterator[Trial]:
    """Configurations without end, uniform on a logarithmic scale."""
    generator = random.Random(seed)

    def draw(low: float, high: float) -> float:
        return math.exp(generator.uniform(math.log(low), math.log(high)))

    low, high = SEARCHED_RANKS
    for number in itertools.count():
        rank = min(high, int(draw(low, high + 1)))
        yield Trial(number, rank, draw(*SEARCHED_RATES))


def main() -> None:
    """Run the lanes, and wait for them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--lanes", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--shuffled", action="store_true")
    parser.add_argument("--search-seed", type=int)
    parser.add_argument("--deadline", type=float, default=math.inf)
    options = parser.parse_args()
    lane = Lane(**{name: value for name, value in vars(options).items() if name != "lanes"})
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    if options.lanes == 1:
        run_lane(lane, counter)
        return
    processes = [context.Process(target=run_lane, args=(lane, counter)) for _ in range(options.lanes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
