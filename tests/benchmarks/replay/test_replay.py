"""Search policies on a made-up table of learning curves: what is counted, and that it is the same every time."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replay_policies
from curve_table import Curve, DomainTable, Evaluation, read_table
from record_curves import record
from replay_policies import PLACES, POLICIES, Search, grid_hypervolume, markdown, search, summarise

from peftsearch.search.proposals import startup_trials
from peftsearch.search.run import StudyRun
from peftsearch.spec import SearchSpec, StudyError, TrialState

RANKS, RATES, TOKENS = (1, 2, 4, 8, 16, 32), (3e-4, 1e-3, 3e-3, 1e-2), (4, 8, 16)
EVALUATIONS = 4


def made_up(failing: bool = False) -> DomainTable:
    """24 LoRA configurations and 3 prompts: more parameters help, one learning rate is best; cheap ones learn fast."""
    curves = []
    for rank in RANKS:
        for rate in RATES:
            top = 0.4 + 0.08 * math.log2(2 * rank) - 0.2 * math.log10(rate / 3e-3) ** 2
            curves.append(_curve("lora", {"rank": rank, "learning_rate": rate, "alpha": 16}, 1000 * rank, top))
    for tokens in TOKENS:
        curves.append(_curve("prompt", {"tokens": tokens, "init": "random"}, 100 * tokens, 0.2 + 0.01 * tokens))
    if failing:
        broken = curves[7]
        curves[7] = Curve("lora", broken.hyperparameters, broken.parameters, TrialState.FAILED, broken.evaluations[:1])
    return DomainTable("topics", "accuracy", "maximize", 10**6, tuple(curves))


def _curve(method: str, hyperparameters: dict[str, object], parameters: int, top: float) -> Curve:
    values = [top * (1 - math.exp(-1.5 * (index + 1))) for index in range(EVALUATIONS)]
    evaluations = tuple(
        Evaluation(10 * (index + 1), (index + 1) / 2, value, 1 - value, 0.5) for index, value in enumerate(values)
    )
    return Curve(method, hyperparameters, parameters, TrialState.COMPLETE, evaluations)


TABLE = made_up()


def write(table: DomainTable, path: Path) -> Path:
    head = {"metric": table.metric, "direction": table.direction, "total_parameters": table.total_parameters}
    lines = [f"# {json.dumps({table.domain: head})}"]
    lines.append("domain,method,hyperparameters,parameters,state,step,epoch,value,loss,seconds")
    for curve in table.curves:
        text = json.dumps(curve.hyperparameters).replace('"', '""')
        for point in curve.evaluations:
            numbers = f"{point.step},{point.epoch},{point.value!r},{point.loss!r},{point.seconds}"
            lines.append(f'{table.domain},{curve.method},"{text}",{curve.parameters},{curve.state.value},{numbers}')
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_table(write(made_up(failing=True), tmp_path / "curves.csv")) == {"topics": made_up(failing=True)}
    assert TABLE.epochs == 27 * 2
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"no table of learning curves: write one with record_curves\.py"):
        read_table(other)


def test_the_space_is_between_the_ends_of_the_grid_and_a_proposal_gets_the_next_curve() -> None:
    assert TABLE.space("lora") == {
        "rank": {"low": 1, "high": 32, "log": True},
        "learning_rate": {"low": 3e-4, "high": 1e-2, "log": True},
        "alpha": 16,
    }
    assert TABLE.space("prompt") == {"tokens": {"low": 4, "high": 16, "log": False}, "init": "random"}
    found = TABLE.nearest("lora", {"rank": 11, "learning_rate": 2e-3, "alpha": 16}).hyperparameters
    assert (found["rank"], found["learning_rate"]) == (8, 3e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_search_spends_its_budget_and_no_more(policy: str) -> None:
    found = search(TABLE, POLICIES[policy], 0, TABLE.epochs)
    assert TABLE.epochs <= found.epochs[-1] < TABLE.epochs + 1
    assert all(0 < step <= 0.5 for step in np.diff(found.epochs))
    assert all(growth >= 0 for growth in np.diff(found.hypervolume))
    assert 0.5 * grid_hypervolume(TABLE) < found.hypervolume[-1] <= grid_hypervolume(TABLE) + 1e-12
    if POLICIES[policy]["scheduler"] == "none":
        # Two epochs each, whatever the trial.
        assert found.trials == found.complete == 27
    else:
        assert found.trials > 35
        assert found.complete < found.trials


def test_tpe_takes_over_when_it_does_in_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[SearchSpec] = []

    class Watched(StudyRun):
        def __init__(self, spec: SearchSpec, *args: Any) -> None:
            given.append(spec)
            super().__init__(spec, *args)

    monkeypatch.setattr("peftsearch.search.run.StudyRun", Watched)
    for settings in ({}, {"startup_trials": 7}):
        search(TABLE, POLICIES["tpe"] | settings, 0, 4)
    assert [startup_trials(spec) for spec in given] == [startup_trials(SearchSpec()), 7] == [4, 7]


@pytest.mark.parametrize("slots", [1, 3])
def test_the_same_seed_gives_the_same_search(slots: int) -> None:
    first, again = (search(TABLE, POLICIES["tpe-pareto"], 5, 30, slots) for _ in range(2))
    assert first == again
    assert search(TABLE, POLICIES["tpe-pareto"], 6, 30, slots) != first


def test_a_configuration_that_failed_when_it_was_recorded_costs_what_it_took() -> None:
    table = made_up(failing=True)
    assert table.epochs == 26 * 2 + 0.5
    found = search(table, {"sampler": "random", "scheduler": "none"}, 3, 200)
    assert found.complete < found.trials
    # Every other trial has taken two epochs; the last one may have been cut short.
    failed = round((2 * found.trials - found.epochs[-1]) / 1.5)
    assert 0 <= found.trials - found.complete - failed <= 1


def test_what_a_summary_says() -> None:
    whole = grid_hypervolume(TABLE)
    slow = Search((0.0, 10.0, 40.0), (0.0, 0.5 * whole, whole), 20, 20)
    fast = Search((0.0, 10.0, 20.0), (0.0, 0.7 * whole, whole), 30, 10)
    never = Search((0.0, 10.0), (0.0, 0.9 * whole), 40, 10)
    summary = summarise([slow, fast, never], TABLE, 1.0)
    quarter = PLACES // 4
    assert summary.mean[quarter] == pytest.approx(0.7)
    # Student's t for three values is 4.30.
    assert summary.high[quarter] - summary.mean[quarter] == pytest.approx(4.3027 * 0.2 / math.sqrt(3), rel=1e-3)
    assert summary.reached == pytest.approx(2 / 3)
    assert summary.to_target == pytest.approx(40 / TABLE.epochs)
    assert summarise([never, never, fast], TABLE, 1.0).to_target is None
    text = markdown({"topics": {"tpe": summary}}, 1.0)
    assert "| TPE, no pruning | " in text
    assert "0.700 ± 0.497" in text
    assert "74.1% | 67% | 30 (10) |" in text


def test_the_command_writes_figures_a_table_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write(TABLE, tmp_path / "curves.csv")
    options = [
        "--table",
        str(table),
        "--seeds",
        "2",
        "--budget",
        "0.5",
        "--to",
        str(tmp_path / "out"),
        "--set",
        "eta=2",
    ]
    monkeypatch.setattr(sys, "argv", ["replay_policies.py", *options, "--policies", "random", "tpe-pareto"])
    replay_policies.main()
    figures = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert figures["settings"] == {"seeds": 2, "slots": 1, "search": {"eta": 2}}
    domain = figures["domains"]["topics"]
    assert list(domain["policies"]) == ["random", "tpe-pareto"]
    assert len(domain["epochs"]) == len(domain["policies"]["random"]["mean"]) == PLACES + 1
    assert domain["configurations"] == 27
    assert (tmp_path / "out" / "replay.png").read_bytes().startswith(b"\x89PNG")
    assert "TPE, front-aware ASHA" in (tmp_path / "out" / "replay.md").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_a_grid_is_recorded_once(write_study: Callable[..., Path], tmp_path: Path) -> None:
    file = write_study(
        "grid",
        methods={
            "lora": {"rank": [1, 2], "learning_rate": [1e-3, 1e-2]},
            "prompt": {"tokens": [2, 4], "learning_rate": 1e-2},
        },
        search={"sampler": "grid", "trials": 4, "scheduler": "none"},
        confirm={"seeds": 0},
    )
    target = tmp_path / "curves.csv"
    with pytest.raises(StudyError):
        record(file, tmp_path / "storage", target, ["search.trials=none"])
    assert record(file, tmp_path / "storage", target, []) == 6
    text = target.read_text()
    (table,) = read_table(target).values()
    assert [curve.method for curve in table.curves].count("lora") == 4
    assert all(len(curve.evaluations) == 4 for curve in table.curves)
    assert record(file, tmp_path / "storage", target, []) == 6
    assert target.read_text() == text
    assert search(table, POLICIES["tpe-pareto"], 0, table.epochs).complete > 0
