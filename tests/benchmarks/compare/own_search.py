"""Each with its own search and pruning, for the same time: how much of the front has each found by when?

    python tests/benchmarks/compare/own_search.py --minutes 10 --repeats 3 --json own-search.json --plot own-search.png

Random search over a bare PyTorch loop; Ray's documented pattern with OptunaSearch and ASHA; hyperparameter_search with
Optuna's TPE and median pruner; peftsearch as it is by default. All search the same ranks and learning rates, train at
most as long per trial, and have the machine for themselves. Exits with 1 where a contender fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from measured_process import hardware, measure, scratch
from same_trials import add_budget, budget_of
from search_curves import Point, curve, draw, middle, summary
from segment_records import read_records
from trial_list import draw_trials, prepare

HERE = Path(__file__).parent
GRACE = 180.0
"""Seconds after the deadline for a contender to come to an end by itself; what it finds then does not count."""


def searches(cores: int) -> dict[str, tuple[str, ...]]:
    """Scripts and options, by the name in the table. Who can trains a trial per core: that is the faster way."""
    number = str(cores)
    return {
        "random search, bare loop": ("floor_contender.py", "--lanes", number, "--threads", "1"),
        "Ray's pattern, OptunaSearch and ASHA": ("ray_contender.py", "--concurrency", number, "--threads", "1"),
        "hyperparameter_search, TPE and median": ("trainer_contender.py", "--threads", number),
        "peftsearch": ("peftsearch_contender.py", "--variant", "on"),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_budget(parser)
    parser.add_argument("--minutes", type=float, default=10.0, help="wall time of each search, its warm-up included")
    parser.add_argument("--repeats", type=int, default=3, help="each with another seed of the search")
    parser.add_argument("--only", action="append", metavar="WORDS", help="searches whose name holds these words")
    parser.add_argument("--json", type=Path, help="write all curves to a file")
    parser.add_argument("--plot", type=Path, help="write a picture of the curves (.png or .svg)")
    parser.add_argument("--keep", type=Path, help="keep what the contenders write in this (empty) folder")
    options = parser.parse_args()

    cores, limit = len(os.sched_getaffinity(0)), options.minutes * 60
    chosen = {
        name: command
        for name, command in searches(cores).items()
        if not options.only or any(word in name for word in options.only)
    }
    if not chosen:
        raise SystemExit(f"no search is called so: {', '.join(searches(cores))}")
    machine, budget = hardware(), budget_of(options)
    curves: dict[str, list[list[Point]]] = {name: [] for name in chosen}
    problems: list[str] = []
    with scratch(options.keep) as folder:
        # One configuration, of which nothing but data and budget is used: what is tried is each search's business.
        work = prepare(folder, budget, draw_trials(1, 1), cores)
        for repeat in range(options.repeats):
            for name, (script, *arguments) in chosen.items() if repeat % 2 == 0 else reversed(chosen.items()):
                place = folder / f"repeat-{repeat}" / script.removesuffix(".py")
                place.mkdir(parents=True)
                path = place / "records.jsonl"
                ends = ("--search-seed", str(repeat), "--deadline", str(time.time() + limit))
                command = [str(HERE / script), str(folder), str(path), *arguments, *ends]
                run = measure(command, kill_after=limit + GRACE, log=place / "output.txt")
                points = curve(read_records(path), run.began, limit, budget.rows, work.total_parameters)
                curves[name].append(points)
                reached = f"{points[-1].finished} trials, hypervolume {points[-1].hypervolume:.4f}"
                print(f"repeat {repeat + 1}: {name}: {reached}", file=sys.stderr, flush=True)
                if run.status:
                    problems.append(f"{name} ended with status {run.status}: {run.output.strip()[-1500:]}")
            if options.json:
                result = {
                    "hardware": machine,
                    "budget": asdict(budget),
                    "minutes": options.minutes,
                    "curves": {name: [[asdict(one) for one in each] for each in curves[name]] for name in curves},
                    "medians": {name: middle(curves[name], limit, "seconds") for name in curves},
                    "problems": problems,
                }
                options.json.write_text(json.dumps(result, indent=2) + "\n")
            if options.plot:
                draw(curves, limit, options.plot)
    print(summary(curves, limit))
    for problem in problems:
        print(problem, file=sys.stderr)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
