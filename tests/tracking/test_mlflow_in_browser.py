"""What MLflow's own pages show of a study, in a real browser."""

from __future__ import annotations

import pytest
from browser import CHROMIUM, chromium
from tracking_study import Server, study_facts, trial

from peftsearch.frontier import domain_report
from peftsearch.tracking.mlflow_tracker import sync

CLOSE = '[data-component-id="mlflow.assistant.chat_panel.close"]'
PICTURE = """document.querySelector('img[src*="front.png"]')"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_domains_note_shows_the_picture_of_its_front(server: Server) -> None:
    from mlflow import MlflowClient

    facts, records = study_facts("pictured"), [trial(number) for number in range(4)]
    reports = {domain: domain_report(records, facts, domain) for domain in facts.domains}
    sync(server.uri, records, facts, reports)
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("pictured")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], 'attributes.run_name = "clinical"')
    address = f"{server.uri}/#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}"
    with chromium() as page:
        page.size(1280, 1300)
        page.open(f"{address}?workflowType=machine_learning")
        page.wait(f"{PICTURE} !== null")
        page.wait(f"{PICTURE}.complete")
        shown = page.evaluate(f"[{PICTURE}.getAttribute('src'), {PICTURE}.src, {PICTURE}.naturalWidth]")
        assert shown[2] > 0, (shown, page.problems)
        page.wait(f"document.querySelector({CLOSE!r}) !== null")
        page.click(CLOSE)
        page.wait(f"document.querySelector({CLOSE!r}) === null")
        # Wider than its column, it would push what is beside it out of the window.
        page.wait("document.body.innerText.includes('About this run')")
        beside = "[...document.querySelectorAll('*')].filter(e => e.textContent === 'About this run').at(-1)"
        left, right = page.evaluate(f"[{beside}.getBoundingClientRect().left, {PICTURE}.getBoundingClientRect().right]")
        assert right <= left < 1280
