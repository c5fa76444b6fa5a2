"""``peftsearch ui`` serves the studies' pages beside MLflow: they follow the ledger, under MLflow's names alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, chromium
from optuna.samplers import RandomSampler
from s3_server import S3Server
from tracking_study import MODEL, study_facts

from peftsearch.files import Place, place
from peftsearch.holder import hold
from peftsearch.spec import Rung, StudyError, StudySpec
from peftsearch.storage import StudyFolder, write_json
from peftsearch.study import Study
from peftsearch.tracking.ledger import Ledger, LedgerCell
from peftsearch.tracking.mlflow_tracker import default_tracking_uri
from peftsearch.tracking.ui import serve_ui

CELL = LedgerCell("clinical/lora", MODEL, "clinical", "lora", "accuracy", "maximize")


def begin(storage: Place, name: str = "made-up", mlflow: str = "auto", ledger: str = "auto") -> Study:
    """A study in a storage that has trained nothing yet."""
    from mlflow import MlflowClient

    facts = study_facts(name)
    spec = StudySpec.model_validate(
        {
            "name": name,
            "models": [MODEL],
            "domains": {key: {"metric": "accuracy", "data": {"source": "x.csv"}} for key in facts.domains},
            "methods": {"lora": {}, "prompt": {}},
            "search": {"trials": 4},
            "tracking": {"mlflow": mlflow, "ledger": ledger},
        }
    )
    folder = StudyFolder(storage, name)
    write_json(folder.spec, {"study": spec.model_dump(mode="json")})
    write_json(folder.facts, facts.model_dump(mode="json"))
    study = Study.open(name, storage)
    Ledger(study.ledger_url, name, [CELL]).close()
    if mlflow == "auto":
        assert isinstance(storage, Path)
        MlflowClient(tracking_uri=default_tracking_uri(storage)).create_experiment(name)
    return study


def train(study: Study, value: float, parameters: int, *, complete: bool = True) -> int:
    """Another trial in the ledger."""
    with closing(Ledger(study.ledger_url, study.name)) as ledger:
        record = ledger.ask(
            CELL.key,
            RandomSampler(seed=parameters),
            lambda trial: {"rank": trial.suggest_int("rank", 1, 64)},
            lambda number, _: {"seed": 0, "total_steps": 9, "trainable_parameters": parameters},
        )
        ledger.add_rung(record.number, Rung(step=9, epoch=1.0, value=value, loss=0.5, train_loss=0.6))
        ledger.set_run_id(record.number, f"{record.number:032x}")
        if complete:
            ledger.complete(record.number)
        return record.number


def get(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return begin(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def server(study: Study) -> Iterator[str]:
    from test_ui_hosts import free_port

    port = free_port()
    command = [sys.executable, "-m", "peftsearch", "ui", "--storage", str(study.folder.storage), "--port", str(port)]
    with (study.folder.path / "ui.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=10).close()
                break
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError((study.folder.path / "ui.log").read_text())
            time.sleep(0.3)
        yield url
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.mark.slow
def test_the_ledger_as_json(server: str, study: Study) -> None:
    address = f"{server}/peftsearch/studies/{study.name}/data.json"
    status, headers, body = get(address)
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert headers["cache-control"] == "no-store"
    data: dict[str, Any] = json.loads(body)
    assert (data["study"], data["state"], data["planned"]) == (study.name, "interrupted", 16)
    assert get(address, **{"If-None-Match": headers["etag"]})[0] == 304
    assert get(address, Host="rebound.example.org")[0] == 403
    assert get(f"{server}/peftsearch/studies/{study.name}", Host="rebound.example.org")[0] == 403
    status, _, body = get(f"{server}/peftsearch/studies/other/data.json")
    assert (status, b"no study 'other'" in body) == (404, True)
    for name in ("..", "%2e%2e%2fx", "a%2Fb", "%00"):
        assert get(f"{server}/peftsearch/studies/{name}/data.json")[0] == 404
    status, _, body = get(f"{server}/peftsearch/")
    assert status == 200
    assert f'href="/peftsearch/studies/{study.name}"'.encode() in body
    # MLflow has everything else.
    assert b"<title>MLflow</title>" in get(f"{server}/")[2]
    assert get(f"{server}/api/2.0/mlflow/experiments/get-by-name?experiment_name={study.name}")[0] == 200


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_live_page_follows_the_study_and_keeps_the_readers_choice(server: str, study: Study) -> None:
    with hold(study.folder.path, study.name), chromium() as page:
        first = train(study, 0.5, 100)
        page.size(1360, 900)
        page.open(f"{server}/peftsearch/studies/{study.name}#clinical")
        page.wait("document.querySelectorAll('#front [data-trial]').length === 1", 120)
        assert page.evaluate("document.querySelector('#state').textContent") == "running"
        page.click("[data-focus=scope-all]")
        page.click("[data-focus=dominated]")
        page.click(f"[data-focus=trial-{first}]")
        page.evaluate("scrollTo(0, 300)")
        running = train(study, 0.4, 50, complete=False)
        better = train(study, 0.7, 1000)
        page.wait("document.querySelectorAll('#front [data-trial]').length === 2", 120)
        assert page.evaluate(f"!!document.querySelector('#front [data-trial=\"{better}\"]')")
        assert f"Trial {first} " in page.evaluate("document.querySelector('#fixed').innerText")
        assert page.evaluate("document.querySelector('[data-focus=scope-all]').ariaPressed") == "true"
        assert page.evaluate("document.querySelector('[data-focus=dominated]').ariaPressed") == "false"
        assert page.evaluate("document.activeElement.dataset.focus") == f"trial-{first}"
        assert page.evaluate("scrollY") == 300
        assert str(running) in page.evaluate("document.querySelector('[aria-label^=Running] tbody').innerText")
        link = page.evaluate("[...document.querySelectorAll('#fixed a')].map(a => a.getAttribute('href'))")
        assert link == [f"/#/runs/{first:032x}"]
        assert page.problems == []
        assert {address.split("/studies/")[0] for address in page.requests} <= {f"{server}/peftsearch", "data:,"}


def test_an_installation_without_pages_is_told(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftsearch.tracking import ui

    monkeypatch.setattr(ui, "PLUGIN", "nobody")
    with pytest.raises(StudyError, match="install it again"):
        serve_ui(Path(str(study.folder.storage)), port=1)


def test_a_storage_is_refused_where_it_holds_no_study_at_all(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StudyError, match="there is no study in"):
            serve_ui(tmp_path, port=port)
        begin(tmp_path, mlflow="off")
        with pytest.raises(StudyError, match="cannot listen"):
            serve_ui(tmp_path, port=port)


@pytest.mark.slow
def test_a_study_that_tracks_elsewhere_has_its_page(tmp_path: Path) -> None:
    from test_ui_hosts import ui

    study = begin(tmp_path, mlflow="off")
    with ui(tmp_path) as (port, _):
        assert get(f"http://127.0.0.1:{port}/peftsearch/studies/{study.name}")[0] == 200


@pytest.mark.slow
def test_a_study_in_an_object_store_has_its_page(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_ui_hosts import ui

    monkeypatch.setenv("PEFTSEARCH_CACHE", str(tmp_path / "cache"))
    storage = place(s3_server.storage("pages"))
    with pytest.raises(StudyError, match="there is no study in 's3://studies/pages"):
        serve_ui(storage, port=1)
    study = begin(storage, mlflow="off", ledger=f"sqlite:///{tmp_path / 'ledger.db'}")
    number = train(study, 0.5, 100)
    with ui(storage) as (port, process):
        page = f"http://127.0.0.1:{port}/peftsearch/studies/{study.name}"
        assert get(page)[0] == 200
        status, _, body = get(f"{page}/data.json")
        assert (status, json.loads(body)["trials"]["number"]) == (200, [number]), body
        # It is live: the ledger is read again.
        later = train(study, 0.7, 1000)
        deadline = time.monotonic() + 60
        while (shown := json.loads(get(f"{page}/data.json")[2])["trials"]["number"]) == [number]:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert sorted(shown) == [number, later]
    assert process.stderr is not None
    assert "An object store holds no MLflow runs" in process.stderr.read()


def test_mlflow_finds_the_pages() -> None:
    (plugin,) = (found for found in entry_points(group="mlflow.app") if found.name == "peftsearch")
    assert plugin.load().__name__ == "app"
