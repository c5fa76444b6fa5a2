"""What a study has found by now, and where it stands."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from peftsearch.handle import StudyHandle
from peftsearch.holder import is_held, last_driver, last_heard
from peftsearch.spec import StudySpec, TrialState
from peftsearch.study_ledger import open_ledger
from peftsearch.tracking.ledger import Ledger, hide_password

if TYPE_CHECKING:
    from peftsearch.frontier import Frontier, Trials


def trials(study: StudyHandle) -> Trials:
    """Every trial of the ledger, whatever its state: a list, with ``to_pandas`` and ``to_arrow``."""
    from peftsearch.frontier import Trials

    with closing(open_ledger(study)) as ledger:
        return Trials(ledger.records)


def frontier(study: StudyHandle, domain: str | None = None) -> Frontier:
    """The front of each domain, or of one: a dict, with ``to_pandas`` and ``to_arrow``; a notebook shows it as the
    Pareto page.

    Raises:
        StudyError: The study has no such domain.
    """
    from peftsearch.frontier import Frontier

    return Frontier(trials(study), study.facts(), domain, storage=study.folder.option)


def status(study: StudyHandle) -> dict[str, Any]:
    """Where the study stands, in the shape of ``status --json``.

    ``confirmations.planned`` is None until the search has ended: who the finalists are is not known before.
    """
    from peftsearch.search.cells import planned_trials

    driver = last_driver(study.folder.path)
    with closing(open_ledger(study)) as ledger:
        records = ledger.records
        planned = planned_trials(study.spec) - _left_out(study.spec, ledger)
        confirmations = _confirmations(study, ledger, planned)
    counts = {state.value.lower(): sum(r.state is state for r in records) for state in TrialState}
    held = is_held(study.folder.path)
    state = "running" if held else ("finished" if driver.get("state") == "finished" else "interrupted")
    return {
        "study": study.name,
        "state": state,
        "counts": counts,
        "planned": planned,
        "confirmations": confirmations,
        "elapsed_seconds": _elapsed(study, driver, held),
        "ledger": hide_password(study.ledger_url),
        "mlflow_tracking_uri": study.public_tracking_uri,
        "mlflow_experiment": driver.get("mlflow_experiment") or study.name,
        "storage": str(study.folder.storage),
        "folder": str(study.folder.path),
        "driver": {"host": driver.get("host"), "pid": driver.get("pid")},
        "error": driver.get("error"),
    }


def _confirmations(study: StudyHandle, ledger: Ledger, planned: int) -> dict[str, int | None]:
    from peftsearch.frontier.front import finalists

    records = ledger.records
    done = sum(len(record.confirmed.readings) for record in records if record.confirmed)
    failed = sum(len(ledger.failed_confirmations(record.number)) for record in records)
    searched = len(records) >= planned and not any(record.state is TrialState.RUNNING for record in records)
    wanted: int | None = None
    if study.spec.confirm.seeds == 0:
        wanted = 0
    elif searched:
        wanted = study.spec.confirm.seeds * len(finalists(records, study.facts(), study.spec.confirm))
    return {"done": done, "failed": failed, "planned": wanted}


def _left_out(spec: StudySpec, ledger: Ledger) -> int:
    """Combinations of grids that are outside the study's limits, where that leaves a cell fewer trials."""
    from peftsearch.search.cells import study_cells, trials_of
    from peftsearch.search.proposals import Grid

    if spec.search.sampler != "grid":
        return 0
    left_out = 0
    for cell in study_cells(spec):
        fitting = Grid(cell.space).size - ledger.infeasible(cell.key)
        left_out += max(0, trials_of(spec.search, cell.space) - fitting)
    return left_out


def _elapsed(study: StudyHandle, driver: dict[str, Any], held: bool) -> float:
    """Seconds of the last (or present) run; of one that was killed, until it was heard of last."""
    if "since" not in driver:
        return 0.0
    try:
        until = driver.get("until") or last_heard(study.folder.path, driver) or driver["since"]
        end = datetime.now(UTC) if held else datetime.fromisoformat(until)
        return max(0.0, (end - datetime.fromisoformat(driver["since"])).total_seconds())
    except (ValueError, TypeError):
        # The notes about a driver are for people: a damaged one costs no more than itself.
        return 0.0
