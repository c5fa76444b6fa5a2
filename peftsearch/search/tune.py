"""Ray Tune, driven by a `StudyRun`: searcher, scheduler and callback are adapters without a mind of their own."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftsearch.search.run import StudyRun

# Read by ray.tune when it is imported or run.
TUNE_SETTINGS = {
    # The CSV, JSON and TensorBoard loggers cost more per trial as trials pile up, and nobody reads them here.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Tune's snapshots would be a second, unsynchronised ledger, and grow with the number of trials.
    "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
    # On interruption, trial actors wait in a call that does not return: Tune need not wait for them.
    "TUNE_FORCE_TRIAL_CLEANUP_S": "2",
}
os.environ.update({name: os.environ.get(name, value) for name, value in TUNE_SETTINGS.items()})

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.progress_reporter import TrialProgressCallback  # noqa: E402
from ray.tune.schedulers import TrialScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

from peftsearch.search.trainable import BROKEN, FAILED, FINAL, RESULT, RETRIES, TrialActor  # noqa: E402

_ACTOR_MEMORY = 2**20
"""A trial's resource request must not be empty, and a trial actor needs no CPU of its own."""

_LOSSES = 3
"""So often a trial is continued after its actor could not be started, or was lost more often than Tune bears."""


def run_trials(
    run: StudyRun, dispatcher: Any, concurrency: Callable[[], int], stopped: Callable[[], bool], scratch: Path
) -> None:
    """Run a study's remaining trials to their end, or until told to stop.

    Args:
        run: Decides and records.
        dispatcher: Handle of the slots' dispatcher.
        concurrency: Trials at a time, by now; with one trial at a time the order of events is determined.
        stopped: Asked often; once true, nothing new is started and the running trials stay RUNNING in the ledger.
        scratch: A folder for Tune's own files, which nothing here reads.
    """
    # Where it is a lost trial actor that ends the last round, its trial is still to be continued.
    losses: Counter[int] = Counter()
    while True:
        _run_round(run, dispatcher, concurrency, stopped, losses, scratch)
        if stopped() or not run.interrupted:
            return


def _run_round(
    run: StudyRun,
    dispatcher: Any,
    concurrency: Callable[[], int],
    stopped: Callable[[], bool],
    losses: Counter[int],
    scratch: Path,
) -> None:
    # Trial actors live with the driver and the dispatcher: no lost machine takes one along.
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    resources = tune.PlacementGroupFactory([{"memory": _ACTOR_MEMORY}], bundle_label_selector=[here])
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        tuner = tune.Tuner(
            tune.with_resources(TrialActor, resources),
            tune_config=tune.TuneConfig(
                search_alg=_Searcher(run, dispatcher, concurrency, stopped),
                scheduler=_Scheduler(run, concurrency, stopped),
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=folder,
                verbose=0,
                callbacks=[_Recorder(run, dispatcher, stopped, losses), _Quiet()],
                stop=_Interruption(stopped),
                failure_config=tune.FailureConfig(max_failures=3),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        tuner.fit()


class _Adapter:
    """Tune pickles searcher, scheduler and callbacks for its own restore, which this project does not use (the ledger
    is the truth); the live objects behind an adapter stay out of that pickle."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Searcher(_Adapter, Searcher):  # type: ignore[misc]
    def __init__(
        self, run: StudyRun, dispatcher: Any, concurrency: Callable[[], int], stopped: Callable[[], bool]
    ) -> None:
        super().__init__()
        self.run = run
        self.dispatcher = dispatcher
        self.concurrency = concurrency
        self.stopped = stopped
        self.live: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        if len(self.live) >= self.concurrency():
            return None
        record = None if self.stopped() else self.run.next_trial()
        if record is None:
            return Searcher.FINISHED
        self.live.add(trial_id)
        return {
            "plan": self.run.plan(record),
            "budget": self.run.domains[record.domain].budgets[record.method],
            "done": len(record.rungs),
            "dispatcher": self.dispatcher,
        }

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Scheduler(_Adapter, TrialScheduler):  # type: ignore[misc]
    """Records a result and passes the decision on. Tune asks about every result but a trial's last."""

    def __init__(self, run: StudyRun, concurrency: Callable[[], int], stopped: Callable[[], bool]) -> None:
        super().__init__()
        self.run = run
        self.concurrency = concurrency
        self.stopped = stopped
        self.ended: list[Any] = []
        self.kept = 0

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = self.run.evaluated(_number(trial), result[RESULT], result[RETRIES], final=False)
        return TrialScheduler.CONTINUE if goes_on and not self.stopped() else TrialScheduler.STOP  # type: ignore[no-any-return]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # `reuse_actors` keeps one actor for trials that are still to be proposed (2.60.0, `_ObjectCache.cache_object`),
        # and proposals wait for a trial's end here: of four that end, three actors would be stopped, and three
        # processes started again.
        if (more := self.concurrency() - self.kept) > 0 and hasattr(tune_controller, "_actor_cache"):
            tune_controller._actor_cache.increase_max(trial.placement_group_factory, more)
            self.kept += more

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        pass

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        # The one that ends now is still to be wound up; Tune must be left with one trial at least.
        self.ended = [*(other for other in self.ended if not _forget(tune_controller, other)), trial]

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        pass

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return next((trial for trial in tune_controller.get_live_trials() if trial.status == "PENDING"), None)

    def debug_string(self) -> str:
        return "peftsearch"


class _Recorder(_Adapter, tune.Callback):  # type: ignore[misc]
    """Records a trial's last result, which Tune does not show to a scheduler, and what broke."""

    def __init__(self, run: StudyRun, dispatcher: Any, stopped: Callable[[], bool], losses: Counter[int]) -> None:
        self.run = run
        self.dispatcher = dispatcher
        self.stopped = stopped
        self.losses = losses

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if not result.get(FINAL):
            # A trial actor that is lost is started again with this: what the ledger has is not trained again.
            trial.config["done"] += 1
            return
        if BROKEN in result:
            self.run.broken = result[BROKEN]
        elif FAILED in result:
            self.run.failed(_number(trial), result[FAILED], result[RETRIES])
        else:
            self.run.evaluated(_number(trial), result[RESULT], result[RETRIES], final=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.dispatcher.end.remote(trial.config["plan"].key)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.dispatcher.end.remote(trial.config["plan"].key)
        if self.stopped():
            return
        # What goes wrong in a trial comes as a result. Here its process was lost, which is no trial's fault.
        number = _number(trial)
        self.losses[number] += 1
        if self.losses[number] <= _LOSSES:
            self.run.again(number)
            return
        error = trial.get_pickled_error() or trial.get_error()
        self.run.failed(number, f"its trial actor was lost {_LOSSES + 1} times: {_last_line(error)}")


class _Quiet(_Adapter, TrialProgressCallback):  # type: ignore[misc]
    """Takes the place of Tune's own, which holds on to every trial that there was, and prints nothing here."""

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        pass

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        pass

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        pass


class _Interruption(_Adapter, tune.Stopper):  # type: ignore[misc]
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.stopped()


def _forget(controller: Any, trial: Any) -> bool:
    """Have Tune drop a trial that has ended; returns whether it has.

    Tune keeps every trial with its results, for snapshots and for an analysis that nobody reads here: memory that grows
    with the study, and work at its end (2.60.0, ``TuneController._trials``, ``_trials_to_cache`` and others). The
    ledger has what is to be kept.
    """
    if trial.status != "TERMINATED":
        return False
    getattr(controller, "_trial_metadata", {}).pop(trial.trial_id, None)
    for name in ("_stopped_trials", "_trials_to_cache"):
        getattr(controller, name, set()).discard(trial)
    if trial in (known := controller.get_trials()):
        known.remove(trial)
    return True


def _number(trial: Any) -> int:
    return int(trial.config["plan"].number)


def _last_line(error: BaseException | None) -> str:
    if error is None:
        return "its process ended"
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
