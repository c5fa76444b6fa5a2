"""Tables for programs and for people."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest
from frontier_study import make_facts, make_record
from rich.console import Console

from peftsearch.frontier import (
    domain_fronts,
    domain_report,
    escape_markdown,
    front_markdown,
    front_renderables,
    frontier_json,
    trials_arrow,
    trials_csv,
    trials_frame,
    trials_json,
    trials_parquet,
    trials_table,
    verdict,
)
from peftsearch.frontier.marginal_cost import costs_between_picks
from peftsearch.spec import Baseline, Confirmed, Rung, StudyError, StudyFacts, TrialRecord, TrialState

TRIAL_KEYS = {
    *("number", "model", "domain", "method", "state", "seed", "value", "trainable_parameters", "exported_parameters"),
    *("hyperparameters", "rungs", "train_seconds", "mlflow_run_id", "confirmed", "error"),
}


def shown(records: list[TrialRecord], facts: StudyFacts, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO())
    for renderable in front_renderables(records, facts):
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def with_probe(facts: StudyFacts, value: float) -> StudyFacts:
    facts = facts.model_copy(deep=True)
    for named in facts.domains["clinical"].baselines.values():
        named["linear_probe"] = Baseline(title="logistic regression on frozen embeddings", value=value)
    return facts


# --- JSON ---


def test_frontier_json_has_the_promised_shape(facts: StudyFacts, records: list[TrialRecord]) -> None:
    found = json.loads(json.dumps(frontier_json(records, facts), allow_nan=False))
    assert found["study"] == "example"
    assert set(found["domains"]) == {"clinical", "legal"}
    clinical = found["domains"]["clinical"]
    assert (clinical["metric"], clinical["direction"]) == ("accuracy", "maximize")
    assert set(clinical["counts"]) == {"complete", "pruned", "failed", "running"}
    assert 0 < clinical["hypervolume"] < 1
    assert clinical["front"]
    for trial in clinical["front"]:
        assert set(trial) >= TRIAL_KEYS
        assert trial["state"] == "COMPLETE"
        assert {"step", "epoch", "value"} <= set(trial["rungs"][0])


def test_the_picks_are_named(facts: StudyFacts, records: list[TrialRecord]) -> None:
    fronts = domain_fronts(records, facts)
    for name, domain in frontier_json(records, facts)["domains"].items():
        front, best = fronts[name].front, fronts[name].best
        assert best is not None
        assert set(domain["picks"]) == {"best", "knee", "smallest"}
        assert domain["picks"]["best"] == {"number": best.number, "instead_of": None, "reason": None}
        assert domain["picks"]["smallest"]["number"] == front[0].number
    assert f"Picks: best: trial {best.number}, knee: trial " in shown(records, facts)
    assert frontier_json([], facts)["domains"]["legal"]["picks"] == {}
    assert "Picks" not in shown([], facts)


def test_what_a_further_point_costs_is_said(facts: StudyFacts, records: list[TrialRecord]) -> None:
    for front in domain_fronts(records, facts).values():
        costs = costs_between_picks(front)
        assert costs
        for cost in costs:
            assert cost.sentence(front.facts.metric) in shown(records, facts)
            note = domain_report(records, facts, front.domain).note
            assert f"- {escape_markdown(cost.sentence(front.facts.metric))}\n" in note
    assert "more parameters" not in shown([], facts)


def test_a_tie_is_named_too(facts: StudyFacts) -> None:
    def confirmed(mean: float) -> Confirmed:
        return Confirmed(seeds=3, mean=mean, std=0.01)

    tied = [
        make_record(3, 0.80, 1_000, confirmed=confirmed(0.80)),
        make_record(5, 0.81, 9_000, confirmed=confirmed(0.81)),
    ]
    picks = frontier_json(tied, facts)["domains"]["clinical"]["picks"]
    assert (picks["best"]["number"], picks["best"]["instead_of"]) == (3, 5)
    assert "a tie within the error bars" in picks["best"]["reason"]
    text = " ".join(shown(tied, facts, width=400).split())
    assert (
        "Picks: best: trial 3, knee: trial 3, smallest: trial 3. trial 3 (lora) is picked rather than trial 5" in text
    )


def test_numbers_that_json_cannot_write_are_null() -> None:
    rung = Rung(step=1, epoch=0.1, value=0.1, loss=math.nan, train_loss=math.inf)
    found = trials_json([make_record(0, math.nan, 5, rungs=[rung])], "example")
    text = json.dumps(found, allow_nan=False)
    trial = json.loads(text)["trials"][0]
    assert trial["value"] is None
    assert (trial["rungs"][0]["loss"], trial["rungs"][0]["train_loss"]) == (None, None)


# --- Arrow, pandas, CSV, Parquet ---


def test_arrow_columns(records: list[TrialRecord]) -> None:
    table = trials_arrow(records)
    assert table.num_rows == len(records)
    rows = table.to_pylist()
    for row, record in zip(rows, records, strict=True):
        assert row["number"] == record.number
        assert row["state"] == record.state.value
        assert row["hyperparameters.learning_rate"] == record.hyperparameters["learning_rate"]
        assert row["hyperparameters.tokens"] == record.hyperparameters.get("tokens")
        assert len(row["rungs"]) == len(record.rungs)
    assert "scores.accuracy" in table.column_names
    assert not any("/" in name for name in table.column_names)


def test_hyperparameters_of_mixed_kinds_become_text() -> None:
    kinds = [8, 0.5, True, "all-linear", ["query", "value"], None, 2**70]
    records = [make_record(i, 0.5, 10, hyperparameters={"x": kind}) for i, kind in enumerate(kinds)]
    assert trials_arrow(records).column("hyperparameters.x").to_pylist() == [
        "8",
        "0.5",
        "true",
        "all-linear",
        '["query", "value"]',
        None,
        str(2**70),
    ]
    numbers = [make_record(i, 0.5, 10, hyperparameters={"x": value}) for i, value in enumerate([1, 0.5])]
    assert trials_arrow(numbers).column("hyperparameters.x").to_pylist() == [1.0, 0.5]


def test_no_trials_still_make_a_table(tmp_path: Path) -> None:
    assert trials_arrow([]).num_rows == 0
    assert trials_csv([]).startswith(b"number,model,")
    assert pyarrow.parquet.read_table(io.BytesIO(trials_parquet([]))).num_rows == 0
    assert trials_frame([]).empty


def test_csv_and_parquet_read_back(records: list[TrialRecord]) -> None:
    odd = make_record(999, 0.5, 10, error='a "quoted", line\nand more', domain="ü,<b>", hyperparameters={"rank": 4})
    every = [*records, odd]
    rows = list(csv.DictReader(io.StringIO(trials_csv(every).decode())))
    assert len(rows) == len(every)
    assert rows[-1]["error"] == 'a "quoted", line\nand more'
    assert rows[-1]["domain"] == "ü,<b>"
    assert json.loads(rows[0]["rungs"])[0]["step"] == 10
    frame = pd.read_parquet(io.BytesIO(trials_parquet(every)))
    assert frame["number"].tolist() == [record.number for record in every]
    assert trials_frame(every)["hyperparameters.rank"].dtype == pd.Int64Dtype()


def test_confirmations_have_columns() -> None:
    confirmed = Confirmed(seeds=3, mean=0.8, std=0.01, test_mean=0.79, test_std=0.02)
    table = trials_arrow([make_record(0, 0.8, 10, confirmed=confirmed), make_record(1, 0.8, 10)])
    assert table.column("confirmed.test_mean").to_pylist() == [0.79, None]


# --- for people ---


def test_terminal_table(facts: StudyFacts, records: list[TrialRecord]) -> None:
    text = shown(records, facts)
    found = domain_fronts(records, facts)["clinical"]
    for record in found.front:
        assert f"{record.trainable_parameters:,}" in text
        assert f"{record.value:.3f}" in text
    assert "Δ linear probe" in text
    assert "majority class 0.210" in text
    # What never differs is not shown.
    assert "alpha" not in text
    assert "no trials" not in text
    assert "No trial has reached the full budget yet" in shown([], facts)
    with pytest.raises(StudyError, match="no domain 'lega'; did you mean 'legal'"):
        front_renderables(records, facts, ["lega"])


def test_markup_in_names_is_shown_as_it_is(facts: StudyFacts) -> None:
    record = make_record(0, 0.5, 10, hyperparameters={"init_text": "[red]a|b[/red] <b>*x*</b>\n\x1b[31m"})
    assert "[red]a|b[/red] <b>*x*</b>" in shown([record], facts)
    assert "\x1b" not in shown([record], facts)
    table = front_markdown(domain_fronts([record], facts)["clinical"], facts)
    assert r"\[red\]a\|b\[/red\] &lt;b&gt;\*x\*&lt;/b&gt; \[31m" in table
    assert len(table.splitlines()) == 3
    assert escape_markdown("a_b `c` #d &") == r"a\_b \`c\` \#d &amp;"


def test_markdown_is_a_table(facts: StudyFacts, records: list[TrialRecord]) -> None:
    front = domain_fronts(records, facts)["legal"]
    lines = front_markdown(front, facts).splitlines()
    assert len(lines) == len(front.front) + 2
    assert len({line.count("|") for line in lines}) == 1
    short = front_markdown(front, facts, limit=2)
    assert f"{len(front.front) - 2} smaller trials" in short
    assert f"| {front.front[-1].number} |" in short
    assert front_markdown(domain_fronts([], facts)["legal"], facts) == "No trial has reached the full budget yet."


def test_confirmed_values_and_several_models_have_columns() -> None:
    facts = make_facts()
    confirmed = Confirmed(seeds=3, mean=0.8, std=0.01, test_mean=0.79, test_std=0.02)
    records = [make_record(0, 0.8, 10, confirmed=confirmed), make_record(1, 0.9, 20, model="other")]
    table = front_markdown(domain_fronts(records, facts)["clinical"], facts)
    assert "0.800 ± 0.010 (3)" in table
    assert "0.790 ± 0.020" in table
    assert "other" in table


def test_every_trial_is_listed(records: list[TrialRecord]) -> None:
    console = Console(width=160, file=io.StringIO())
    console.print(trials_table(records))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "FAILED: the loss became NaN" in text
    assert text.count("PRUNED") == sum(record.state is TrialState.PRUNED for record in records)


# --- did tuning pay? ---


@pytest.mark.parametrize(
    ("probe", "paid", "words"),
    [
        (
            0.60,
            True,
            r"^Tuning paid: \+0.200 over the logistic regression on frozen embeddings; .* majority class 0.210",
        ),
        (0.79, None, "open whether tuning paid: .* within the noise of 600 validation texts"),
        (0.80, False, "did not pay: nothing beats the logistic regression"),
        (0.85, False, r"did not pay: .* \(-0.050\)"),
        (0.10, True, r"\+0.590 over the majority class"),
    ],
)
def test_verdict(facts: StudyFacts, probe: float, paid: bool | None, words: str) -> None:
    found = verdict(domain_fronts([make_record(4, 0.8, 10)], with_probe(facts, probe))["clinical"])
    assert found.paid is paid
    assert re.search(words, found.sentence), found.sentence


@pytest.mark.parametrize(
    ("metric", "probe", "paid"),
    [
        *(("f1", 0.79, None), ("f1", 0.6, True), ("mcc", 0.79, None), ("mcc", 0.6, True)),
        # On how many texts a label's score rests is not known here: that of all of them is the least.
        *(("f1/contract", 0.79, None), ("f1/contract", 0.6, True), ("macro_f1", 0.79, None), ("macro_f1", 0.6, True)),
    ],
)
def test_every_bounded_metric_has_its_noise(facts: StudyFacts, metric: str, probe: float, paid: bool | None) -> None:
    facts = with_probe(facts, probe)
    facts.domains["clinical"].metric = metric
    assert verdict(domain_fronts([make_record(4, 0.8, 10)], facts)["clinical"]).paid is paid


def test_verdict_without_trials_or_baselines(facts: StudyFacts) -> None:
    assert verdict(domain_fronts([], facts)["clinical"]).paid is None
    bare = facts.model_copy(deep=True)
    bare.domains["clinical"].baselines.clear()
    found = verdict(domain_fronts([make_record(4, 0.8, 10)], bare)["clinical"])
    assert found.paid is None
    assert "no baseline" in found.sentence


def test_verdict_where_less_is_better(facts: StudyFacts) -> None:
    lower = with_probe(facts, 0.5)
    domain = lower.domains["clinical"].model_copy(update={"direction": "minimize", "metric": "error"})
    lower.domains["clinical"] = domain
    domain.baselines["package:tiny/model"]["majority"] = Baseline(title="majority class", value=0.9)
    assert verdict(domain_fronts([make_record(4, 0.4, 10)], lower)["clinical"]).paid is True
    assert verdict(domain_fronts([make_record(4, 0.6, 10)], lower)["clinical"]).paid is False
