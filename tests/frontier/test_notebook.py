"""Fronts and trials in Python and in notebooks: as tables, and as what shows itself."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, chromium
from frontier_study import make_facts, make_record

from peftsearch.frontier import Frontier, Trials, domain_fronts, front_figure, front_html
from peftsearch.spec import StudyError, StudyFacts, TrialRecord, TrialState

HOSTILE = '</iframe><script>document.title = "taken"</script>"\' onload="x'


def test_a_frontier_is_the_fronts_by_domain(records: list[TrialRecord], facts: StudyFacts) -> None:
    frontier = Frontier(records, facts)
    assert dict(frontier) == domain_fronts(records, facts)
    assert list(Frontier(records, facts, "legal")) == ["legal"]
    with pytest.raises(StudyError, match="no domain 'legl'; did you mean 'legal'"):
        Frontier(records, facts, "legl")


def test_tables_hold_what_the_lists_hold(records: list[TrialRecord], facts: StudyFacts) -> None:
    frame = Trials(records).to_pandas()
    assert list(frame["number"]) == [record.number for record in records]
    assert Trials(records).to_arrow().num_rows == len(records)
    frontier = Frontier(records, facts)
    on_fronts = [record.number for front in frontier.values() for record in front.front]
    assert list(frontier.to_pandas()["number"]) == on_fronts
    assert frontier.to_arrow().column("domain").to_pylist() == [
        name for name, front in frontier.items() for _ in front.front
    ]


def test_a_notebook_gets_the_page_whole(records: list[TrialRecord], facts: StudyFacts) -> None:
    bundle = Frontier(records, facts)._repr_mimebundle_()
    (written,) = re.findall(r'srcdoc="([^"]*)"', bundle["text/html"])
    assert html.unescape(written) == front_html(records, facts)
    # Nothing from anywhere else, and nothing that the frame may do to the notebook.
    assert re.findall(r'sandbox="([^"]*)"', bundle["text/html"]) == ["allow-scripts"]
    assert " src=" not in bundle["text/html"]
    for name in facts.domains:
        assert f"{name}: " in bundle["text/plain"]


def test_one_domain_shows_itself_alone(records: list[TrialRecord], facts: StudyFacts) -> None:
    bundle = domain_fronts(records, facts)["legal"]._repr_mimebundle_()
    assert "legal: " in bundle["text/plain"]
    assert "clinical: " not in bundle["text/plain"]
    assert bundle == Frontier(records, facts, "legal")._repr_mimebundle_()


def test_commands_in_a_notebook_name_the_studys_storage(records: list[TrialRecord], facts: StudyFacts) -> None:
    frontier = Frontier(records, facts, storage="/data/my studies")
    for shown in (frontier, frontier["legal"]):
        text = html.unescape(shown._repr_mimebundle_()["text/html"])
        assert "--storage '/data/my studies'" in text


def test_names_are_text_and_no_markup() -> None:
    facts = make_facts(study=HOSTILE[:40])
    record = make_record(0, 0.5, 10, model=HOSTILE, hyperparameters={"targets": HOSTILE})
    shown = Frontier([record], facts)._repr_mimebundle_()["text/html"]
    assert shown.count("<iframe") == shown.count("</iframe>") == 1
    assert "<script" not in shown
    table = Trials([record])._repr_mimebundle_()
    assert "<script" not in table["text/html"]
    assert html.escape("<script>") in table["text/html"]


def test_trials_show_whatever_their_state(records: list[TrialRecord]) -> None:
    assert Trials()._repr_mimebundle_()["text/html"].count("<tr") == 1
    shown = Trials([record for record in records if record.state is TrialState.FAILED])._repr_mimebundle_()
    assert "FAILED" in shown["text/html"]
    assert "FAILED" in shown["text/plain"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_works_inside_a_notebook(tmp_path: Path, records: list[TrialRecord], facts: StudyFacts) -> None:
    notebook = tmp_path / "notebook.html"
    shown = Frontier(records, facts)._repr_mimebundle_()["text/html"]
    notebook.write_text(f"<!DOCTYPE html><title>mine</title><body><h1>A notebook</h1>{shown}</body>")
    with chromium() as page:
        page.open(notebook.as_uri())
        frame = page.frame()
        # The plots are drawn by the page's script, which its policy names by hash; its address is not its own there.
        page.evaluate(
            "[...document.querySelectorAll('[role=tab]')].find(tab => tab.textContent === 'legal').click()", frame
        )
        marks = "document.querySelectorAll('#front [data-trial]').length"
        assert page.evaluate(marks, frame) == len(domain_fronts(records, facts)["legal"].front)
        # The link to the front stays in the frame's page.
        page.evaluate("document.querySelector('.skip').click()", frame)
        assert page.evaluate("document.activeElement.id", frame) == "main"
        assert page.evaluate("document.querySelector('h1').textContent", frame) == facts.study
        assert page.evaluate("document.title") == "mine"
        assert page.problems == []
        assert [address.split(":")[0] for address in page.requests if not address.startswith("data:")] == ["file"]


def test_a_domains_figure_is_plotlys(records: list[TrialRecord], facts: StudyFacts) -> None:
    frontier = Frontier(records, facts)
    assert frontier.figure("legal").to_json() == front_figure(records, "legal", facts).to_json()
    assert Frontier(records, facts, "legal").figure().to_json() == frontier.figure("legal").to_json()
    with pytest.raises(StudyError, match="several domains: name one of clinical, legal"):
        frontier.figure()
    with pytest.raises(StudyError, match="no domain 'legl'"):
        frontier.figure("legl")
