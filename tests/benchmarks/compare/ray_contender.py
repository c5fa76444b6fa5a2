"""Ray's documented pattern: a Tune function that runs a TorchTrainer per trial, reporting through TuneReportCallback.

    ray_contender.py FOLDER RECORDS --concurrency N --threads N [--search-seed N --deadline SECONDS]

As https://docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html shows it: the trial's id in the
name of the Train run, ``max_concurrent_trials``, a checkpoint reported by the worker, and Tune's callbacks (here
MLflow's) at the Tuner. The worker's loop is the floor's. With ``--search-seed`` it does not run the list but searches
with OptunaSearch and ASHA until the deadline (seconds since 1970).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any


def train_fn_per_worker(config: dict[str, Any]) -> None:
    """One trial in a worker of its own."""
    import sys

    sys.path.insert(0, config["modules"])
    import ray.train
    from bare_loop import BareLoop, Progress
    from segment_records import write_record
    from trial_list import Trial

    loop = BareLoop(Path(config["folder"]), config["threads"])
    trial = Trial(config["trial"], config["rank"], config["learning_rate"])
    steps = loop.work.budget.steps
    last: dict[str, Any] = {}

    def report(progress: Progress) -> bool:
        nonlocal last
        final = progress.step == steps
        write_record(
            Path(config["records"]),
            trial=trial.number,
            rank=trial.rank,
            learning_rate=trial.learning_rate,
            final=final,
            **vars(progress),
        )
        last = vars(progress)
        if not final:
            ray.train.report(last)
        return True

    model = loop.train(trial, report)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ray.train.report(last, checkpoint=ray.train.Checkpoint.from_directory(folder))


def main() -> None:
    """Run the list, or search."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--search-seed", type=int)
    parser.add_argument("--deadline", type=float)
    options = parser.parse_args()

    # Token authentication is off: which process started Ray last would otherwise decide whether this one may join.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray
    import ray.train
    import ray.train.torch
    import ray.tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.integration.ray_train import TuneReportCallback
    from trial_list import SEARCHED_RANKS, SEARCHED_RATES, Work

    work = Work.read(options.folder)
    searching = options.search_seed is not None
    storage = tempfile.mkdtemp(prefix="compare-ray-", dir=options.records.parent.resolve())
    fixed = {
        "folder": str(options.folder.resolve()),
        "records": str(options.records.resolve()),
        "threads": options.threads,
        "modules": str(Path(__file__).parent),
    }

    def train_driver_fn(config: dict[str, Any]) -> None:
        trial_id = ray.tune.get_context().get_trial_id()
        # Tune's ids are hexadecimal digits, and perhaps an underscore among them.
        number = int(trial_id.replace("_", ""), 16)
        searched = config.get("of_list", config)
        trainer = ray.train.torch.TorchTrainer(
            train_fn_per_worker,
            train_loop_config={**fixed, **searched, "trial": number},
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": options.threads}),
            run_config=ray.train.RunConfig(
                name=f"train-trial_id={trial_id}", callbacks=[TuneReportCallback()], storage_path=storage
            ),
        )
        trainer.fit()

    # One more CPU for each trial's driver than the workers take: with as many as the workers', they starve one another.
    ray.init(
        address="local",
        num_cpus=options.concurrency * (options.threads + 1),
        # Train's cleaner of the placement groups of trials that ASHA has killed asks the dashboard's State API.
        include_dashboard=searching,
        log_to_driver=False,
    )
    space: dict[str, Any]
    if searching:
        from ray.tune.schedulers import ASHAScheduler
        from ray.tune.search.optuna import OptunaSearch

        space = {
            "rank": ray.tune.lograndint(SEARCHED_RANKS[0], SEARCHED_RANKS[1] + 1),
            "learning_rate": ray.tune.loguniform(*SEARCHED_RATES),
        }
        how = ray.tune.TuneConfig(
            metric="accuracy",
            mode="max",
            search_alg=OptunaSearch(seed=options.search_seed),
            # One more than there are reports: ASHA kills a trial at the report that is its last.
            scheduler=ASHAScheduler(max_t=work.budget.evaluations + 1, grace_period=1, reduction_factor=3),
            num_samples=-1,
            max_concurrent_trials=options.concurrency,
            time_budget_s=max(1.0, options.deadline - time.time()),
        )
    else:
        listed = [{"rank": trial.rank, "learning_rate": trial.learning_rate} for trial in work.trials]
        space = {"of_list": ray.tune.grid_search(listed)}
        how = ray.tune.TuneConfig(max_concurrent_trials=options.concurrency)
    tuner = ray.tune.Tuner(
        train_driver_fn,
        param_space=space,
        tune_config=how,
        run_config=ray.tune.RunConfig(
            name="compare",
            storage_path=storage,
            verbose=0,
            callbacks=[MLflowLoggerCallback(tracking_uri=f"sqlite:///{storage}/mlflow.db", experiment_name="compare")],
        ),
    )
    results = tuner.fit()
    if results.errors and not searching:
        raise results.errors[0]
    ray.shutdown()


if __name__ == "__main__":
    main()
