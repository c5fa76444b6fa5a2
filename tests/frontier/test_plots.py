"""Pictures: what is in them, and that nothing in a name becomes markup."""

from __future__ import annotations

import io
import re
import warnings

import pytest
from frontier_study import make_facts, make_record, make_study

from peftsearch.frontier import domain_fronts, domain_report, front_figure, front_png, pick
from peftsearch.spec import Baseline, StudyError, StudyFacts, TrialRecord, TrialState
from peftsearch.tracking.mlflow_runs import NOTE_LENGTH, THIS_RUN

NASTY = "</script><script>alert('x')</script> \"quoted\" & 🩺"


def test_figure_shows_every_trial_that_has_a_place(facts: StudyFacts, records: list[TrialRecord]) -> None:
    figure = front_figure(records, "clinical", facts)
    mine = [record for record in records if record.domain == "clinical"]
    front = domain_fronts(records, facts)["clinical"].front
    points = [
        (trace, x, y) for trace in figure.data if trace.mode == "markers" for x, y in zip(trace.x, trace.y, strict=True)
    ]
    shown = {(x, y) for _, x, y in points}
    placed = [record for record in mine if record.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert shown == {(record.trainable_parameters, record.value) for record in placed}
    bold = {(x, y) for trace, x, y in points if trace.marker.opacity == 1.0}
    assert bold == {(record.trainable_parameters, record.value) for record in front}
    line = next(trace for trace in figure.data if trace.mode == "lines")
    # A step line: at each number of parameters the best metric that so many can buy.
    assert [line.x[0], line.y[0]] == [front[0].trainable_parameters, front[0].value]
    assert all(b >= a for a, b in zip(line.x, line.x[1:], strict=False))
    assert all(b >= a for a, b in zip(line.y, line.y[1:], strict=False))
    assert figure.layout.xaxis.type == "log"
    labels = [annotation.text for annotation in figure.layout.annotations]
    assert labels == ["majority class 0.210", "logistic regression on frozen embeddings 0.690"]
    names = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert len(names) == len(set(names))


def test_methods_keep_their_colour_and_symbol(facts: StudyFacts, records: list[TrialRecord]) -> None:
    looks: dict[str, set[tuple[str, str]]] = {}
    for domain in facts.domains:
        some = [record for record in records if record.method != "lora" or domain == "legal"]
        for trace in front_figure(some, domain, facts).data:
            if trace.legendgroup:
                looks.setdefault(trace.legendgroup, set()).add((trace.marker.color, trace.marker.symbol))
    assert set(looks) == {"lora", "adapter", "prompt", "full"}
    assert all(len(look) == 1 for look in looks.values())
    assert len({colour for look in looks.values() for colour, _ in look}) == 4
    assert len({symbol for look in looks.values() for _, symbol in look}) == 4


def test_names_do_not_become_markup() -> None:
    facts = make_facts(description=NASTY)
    facts.domains["clinical"].baselines["package:tiny/model"]["majority"] = Baseline(title=NASTY, value=0.2)
    record = make_record(0, 0.5, 10, hyperparameters={"init_text": NASTY}, method="lora<b>")
    figure = front_figure([record], "clinical", facts)
    assert "<script>" not in str([trace.text for trace in figure.data])
    assert front_png([record], facts).startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["none", "running only", "pruned only", "one", "equal", "$x$ and ^_"])
def test_sparse_studies_can_be_drawn(kind: str, facts: StudyFacts) -> None:
    records = {
        "none": [],
        "running only": [make_record(0, None, 10, state=TrialState.RUNNING)],
        "pruned only": [make_record(0, 0.3, 10, state=TrialState.PRUNED)],
        "one": [make_record(0, 0.3, 0)],
        "equal": [make_record(0, 0.3, 10), make_record(1, 0.3, 10)],
        "$x$ and ^_": [make_record(0, 0.3, 10, method="$x$ and ^_{")],
    }[kind]
    assert front_png(records, facts).startswith(b"\x89PNG")
    report = domain_report(records, facts, "clinical")
    assert report.note.startswith("# example: clinical")


def test_png_has_a_panel_per_domain(facts: StudyFacts, records: list[TrialRecord]) -> None:
    from matplotlib.image import imread

    both, one = (imread(io.BytesIO(front_png(records, facts, domain))) for domain in (None, "legal"))
    assert both.shape[1] == 2 * one.shape[1]
    assert front_png(records, facts) == front_png(records, facts)
    # MLflow shows a note's picture in its own size, in a column of less than 600 pixels.
    assert imread(io.BytesIO(domain_report(records, facts, "legal").files["front.png"])).shape[1] < 580


def test_report(facts: StudyFacts, records: list[TrialRecord]) -> None:
    report = domain_report(records, facts, "clinical")
    front = domain_fronts(records, facts)["clinical"]
    assert set(report.files) == {"front.html", "front.png", "front.json", "front.parquet", "trials.parquet"}
    assert report.on_front == {record.number for record in front.front}
    for how in ("best", "knee", "smallest"):
        (record,) = pick(front.front, how, front.facts.direction)
        assert how in report.picks[record.number].split()
    assert " ".join(report.picks.values()).split().count("best") == 1
    assert f"](get-artifact?path=front.png&run_uuid={THIS_RUN})" in report.note
    assert report.metrics["hypervolume"] == front.hypervolume
    assert report.metrics["baseline_majority"] == 0.21
    assert report.step == sum(record.state is not TrialState.RUNNING for record in front.records)
    assert "peftsearch export example --to adapters --domain clinical --pick knee" in report.note
    assert "--storage" not in report.note
    assert re.search(r"^\| trial \| method \|", report.note, re.MULTILINE)
    assert domain_report(records, facts, "clinical") == report
    with pytest.raises(StudyError, match="no domain"):
        domain_report(records, facts, "medical")


def test_commands_of_a_report_name_a_storage_of_its_own(facts: StudyFacts, records: list[TrialRecord]) -> None:
    report = domain_report(records, facts, "clinical", "/data/our trials")
    assert "--domain clinical --pick knee --storage '/data/our trials'\n" in report.note
    assert "--pick knee --storage '/data/our trials'" in report.files["front.html"].decode()


def test_notes_leave_out_settings_that_are_empty(facts: StudyFacts) -> None:
    record = make_record(0, 0.5, 10, hyperparameters={"tokens": 4, "init_text": "", "targets": None, "dropout": 0.0})
    note = domain_report([record], facts, "clinical").note
    assert "tokens=4 dropout=0" in note.replace("\\", "")
    assert "init" not in note
    assert "targets" not in note


def test_notes_of_large_fronts_fit(facts: StudyFacts) -> None:
    records = [
        make_record(i, i / 1000, 10 * i + 1, hyperparameters={"rank": i, "init_text": "word " * 30}) for i in range(500)
    ]
    assert len(domain_report(records, facts, "clinical").note) <= NOTE_LENGTH


def test_large_studies_are_drawn_in_seconds() -> None:
    import time

    records, facts = make_study(1250), make_facts()
    assert len(records) > 10_000
    front_png(records[:10], facts)
    start = time.process_time()
    front_png(records, facts)
    assert time.process_time() - start < 10


def test_perplexities_far_apart_are_drawn_on_a_logarithmic_axis(facts: StudyFacts) -> None:
    clinical = facts.domains["clinical"].model_copy(
        update={
            "metric": "perplexity",
            "direction": "minimize",
            "baselines": {"package:tiny/model": {"unigram": Baseline(title="unigram", value=900.0)}},
        }
    )
    facts = facts.model_copy(update={"domains": {"clinical": clinical}})
    records = [make_record(0, 12.5, 1000), make_record(1, 40_000.0, 2000)]
    figure = front_figure(records, "clinical", facts)
    assert figure.layout.yaxis.type == "log"
    low, high = figure.layout.yaxis.range
    assert 10**low < 12.5 < 40_000 < 10**high
    (label,) = (note for note in figure.layout.annotations if "unigram" in note.text)
    assert 10**label.y == pytest.approx(900)
    assert front_png(records, facts).startswith(b"\x89PNG")
    near = front_figure([make_record(0, 12.5, 1000)], "clinical", make_facts())
    assert near.layout.yaxis.type == "linear"


def test_names_in_other_scripts_are_drawn_without_a_word() -> None:
    facts = make_facts()
    facts = facts.model_copy(update={"domains": {"法律 \U0001f600": facts.domains["legal"]}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = front_png([make_record(0, 0.5, 10, domain="法律 \U0001f600")], facts)
    assert picture.startswith(b"\x89PNG")
