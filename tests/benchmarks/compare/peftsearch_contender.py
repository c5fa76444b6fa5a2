"""This project: a study file with the list as a grid, run by ``Study.run`` with its ledger and MLflow.

    peftsearch_contender.py FOLDER RECORDS --variant NAME [--search-seed N --deadline SECONDS]

With ``--search-seed`` it does not run the list but searches as it does by default (TPE over both objectives,
front-aware ASHA) until the deadline (seconds since 1970), when it gets a SIGINT.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from segment_records import write_record
from trial_list import SEARCHED_RANKS, SEARCHED_RATES, Work, grid_of, study_document

VARIANTS = ("plain", "one_slot", "on", "bf16")


def sections(variant: str, cores: int) -> dict[str, dict[str, Any]]:
    """What a variant writes into the study file.

    - ``plain``: nothing that saves work; a slot per core with one thread each, one trial at a time in each.
    - ``one_slot``: the same with one slot that has all threads.
    - ``on``: slots, packs and threads as peftsearch chooses them, in the precision of the others. On a CPU with as many
      trials as cores or more, and memory for as many slots, it chooses what ``plain`` has.
    - ``bf16``: ``on`` with bf16 autocast.
    """
    on = {"slots": "auto", "pack": "auto", "threads_per_worker": "auto"}
    if variant == "plain":
        return {"resources": {"slots": cores, "cpus_per_worker": 1, "pack": 1}}
    if variant == "one_slot":
        return {"resources": {"slots": 1, "cpus_per_worker": cores, "pack": 1}}
    return {"resources": on, **({"training": {"precision": "bf16"}} if variant == "bf16" else {})}


def document(work: Work, variant: str, search_seed: int | None) -> dict[str, Any]:
    """The study file."""
    if search_seed is None:
        methods = grid_of(work.trials, work.alpha)
        search = {"sampler": "grid", "scheduler": "none", "trials": len(work.trials), "seed": work.budget.seed}
    else:
        ranks, rates = ({"low": low, "high": high, "log": True} for low, high in (SEARCHED_RANKS, SEARCHED_RATES))
        fixed = {"alpha": work.alpha, "targets": "attention", "dropout": 0.0}
        methods = {"lora": {"rank": ranks, "learning_rate": rates, **fixed}}
        search = {"trials": 100_000, "seed": search_seed}
    # The folder, not the package: a base without dropout is nowhere else.
    written = study_document(work.budget, methods, work.model, search=search)
    for name, values in sections(variant, work.cores).items():
        written[name] = {**written.get(name, {}), **values}
    return written


class Recorder:
    """Listens to a study's trials, and writes their evaluations down. Other events go nowhere."""

    def __init__(self, work: Work, records: Path) -> None:
        self.work = work
        self.records = records
        self.known: dict[int, int] = {}

    def trial_changed(self, record: Any) -> None:
        """See `peftsearch.events.StudyEvents`."""
        values = record.hyperparameters
        for rung in record.rungs[self.known.get(record.number, 0) :]:
            write_record(
                self.records,
                trial=record.number,
                rank=values["rank"],
                learning_rate=values["learning_rate"],
                step=rung.step,
                final=rung.step == self.work.budget.steps,
                # A study counts steps, not examples; that these were the examples, the losses show.
                examples=sum(len(batch) for batch in self.work.batches[: rung.step]),
                train_loss=rung.train_loss,
                loss=rung.loss,
                accuracy=rung.value,
                parameters=record.trainable_parameters,
                # Of a pack's steps each trial is said to have its share; all of them took the whole time.
                seconds=rung.train_seconds * rung.together + rung.evaluation_seconds,
            )
        self.known[record.number] = len(record.rungs)
        if record.error:
            raise RuntimeError(f"trial {record.number}: {record.error}")


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--search-seed", type=int)
    parser.add_argument("--deadline", type=float)
    options = parser.parse_args()

    import yaml

    from peftsearch import Study
    from peftsearch.events import SilentEvents
    from peftsearch.spec import THREADS
    from peftsearch.study import StudyInterrupted

    class Listener(Recorder, SilentEvents):
        """A recorder that hears of everything."""

    work = Work.read(options.folder)
    storage = Path(tempfile.mkdtemp(prefix="compare-peftsearch-", dir=options.records.parent))
    path = storage / "compare.yaml"
    path.write_text(yaml.safe_dump(document(work, options.variant, options.search_seed)))
    searching = options.search_seed is not None
    study = Study.from_file(path, storage=storage)
    if searching:
        stop = threading.Timer(options.deadline - time.time(), os.kill, (os.getpid(), signal.SIGINT))
        stop.daemon = True
        stop.start()
    with contextlib.suppress(*([StudyInterrupted] if searching else [])):
        study.run(events=Listener(work, options.records))
    # A variant may leave it to peftsearch how many trials are trained at once.
    lanes = work.cores // int(study.facts().provenance[THREADS])
    if not searching:
        # There are no more slots than trials; they may have more cores than threads.
        lanes = min(lanes, len(work.trials))
    options.records.with_name("lanes").write_text(str(lanes))


if __name__ == "__main__":
    main()
