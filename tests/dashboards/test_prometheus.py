"""A real Prometheus reads a real study with the configuration of dashboards/, and answers every panel."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from dashboard_files import PROMETHEUS, dashboard, queries
from tracking_study import study_facts, trial

from peftsearch.driver import ray_cluster
from peftsearch.monitoring import StudyMetrics
from peftsearch.study import Study
from peftsearch.workers.metrics import PLANNED

SECONDS = 2
"""How often Ray renews its numbers and Prometheus reads them, which both do every 10 seconds elsewhere."""


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian and Ubuntu: apt-get install prometheus)")
    return found


def test_promtool_takes_the_configuration() -> None:
    done = subprocess.run(
        [program("promtool"), "check", "config", "--lint-fatal", PROMETHEUS], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def running(path: Path, storage: Path) -> Iterator[psutil.Process]:
    """The driver of a study, once it trains."""
    log = storage.parent / "driver.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_metrics_report_interval_ms": str(1000 * SECONDS)}
    with log.open("w") as output:
        driver = subprocess.Popen(
            [sys.executable, "-m", "peftsearch", "run", str(path), "--storage", str(storage)],
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 600
        while "training:" not in log.read_text():
            assert driver.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.3)
        yield psutil.Process(driver.pid)
    finally:
        driver.terminate()
        driver.wait(600)


@contextmanager
def prometheus(targets: Path, folder: Path) -> Iterator[str]:
    """The address of a Prometheus with our configuration, which looks for targets in a folder, and more often."""
    config = yaml.safe_load(PROMETHEUS.read_text())
    config["global"]["scrape_interval"] = f"{SECONDS}s"
    (found,) = config["scrape_configs"][0]["file_sd_configs"]
    found.update(files=[str(targets / Path(name).name) for name in found["files"]], refresh_interval=f"{SECONDS}s")
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait(60)


def get(server: str, path: str, **parameters: str) -> Any:
    url = f"{server}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        document = json.load(answer)
    assert document["status"] == "success"
    return document["data"]


def values(server: str, query: str, study: str = "observed") -> dict[str, float]:
    """What a panel shows now, by its series' labels; Grafana's variables are put in as Grafana does."""
    asked = query.replace("$study", study).replace("$__rate_interval", f"{10 * SECONDS}s")
    result = get(server, "query", query=asked)["result"]
    found = {json.dumps(item["metric"], sort_keys=True): float(item["value"][1]) for item in result}
    return {labels: value for labels, value in found.items() if not math.isnan(value)}


def wait_for(what: Callable[[], Any], seconds: float = 300.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := what():
                return found
        except (OSError, AssertionError):
            pass
        time.sleep(SECONDS / 2)
    return what()


def workers(driver: psutil.Process) -> list[psutil.Process]:
    return [process for process in driver.children(recursive=True) if "RayTrainWorker" in " ".join(process.cmdline())]


@pytest.mark.slow
@pytest.mark.ray
def test_every_panel_shows_a_running_study(write_study: Callable[..., Path], tmp_path: Path) -> None:
    program("prometheus")
    path = write_study(
        "observed",
        methods={"lora": {}, "prompt": {"tokens": [2, 4, 8]}},
        search={"trials": 2000, "scheduler": "none", "sampler": "random"},
        resources={"cpus_per_worker": 1, "slots": 1, "pack": 2},
        # Nobody is there: what is to be written waits.
        tracking={"mlflow": "http://127.0.0.1:9"},
    )
    storage = tmp_path / "storage"
    targets = storage / "prometheus" / "observed.json"
    with running(path, storage) as driver, prometheus(targets.parent, tmp_path / "prometheus") as server:
        (group,) = json.loads(targets.read_text())
        (target,) = group["targets"]
        assert ip_address(target.rpartition(":")[0]).is_loopback

        segments = 'sum(ray_peftsearch_segments_total{study="observed", outcome="done"})'
        assert wait_for(lambda: any(value > 4 for value in values(server, segments).values()))
        (worker,) = workers(driver)
        worker.kill()

        missing = dict(enumerate(queries()))
        deadline = time.monotonic() + 300
        while missing and time.monotonic() < deadline:
            missing = {key: (panel, query) for key, (panel, query) in missing.items() if not values(server, query)}
            if all("gpu" in query for _, query in missing.values()):
                break
            time.sleep(SECONDS)
        # Those that are left were answered, too: with nothing, for there is no GPU.
        assert [panel for panel, query in missing.values() if "gpu" not in query] == []

        (variable,) = dashboard()["templating"]["list"]
        source = variable["query"]["query"].removeprefix("label_values(").split(",")[0]
        assert get(server, "label/study/values", **{"match[]": source}) == ["observed"]
        assert all(values(server, query, study="another") == {} for _, query in queries())

        complete = 'sum(ray_peftsearch_trials{study="observed", state="complete"})'
        ended = Study.open("observed", storage).status()["counts"]["complete"]
        # What is in the ledger is told, and nothing that is not.
        (shown,) = wait_for(lambda: [value for value in values(server, complete).values() if value >= ended])
        assert shown <= Study.open("observed", storage).status()["counts"]["complete"]

        retried = values(server, "sum by (reason) (ray_peftsearch_retries_total)")
        assert retried['{"reason": "its worker died"}'] in (1, 2)
        (share,) = values(server, "avg(ray_peftsearch_hypervolume_ratio)").values()
        assert 0 < share < 1
        (backlog,) = values(server, "max(ray_peftsearch_mlflow_backlog_entries)").values()
        assert backlog > 0
        (planned,) = values(server, "max(ray_peftsearch_planned_trials)").values()
        assert planned == 4000
        busy = values(server, "sum by (slot) (rate(ray_peftsearch_slot_busy_seconds_total[20s]))")
        # Rates are extrapolated, and what is counted comes in steps.
        assert 0 < busy['{"slot": "0"}'] < 1.5
        # Ray's own series are left out, and so is what would only say who has measured.
        names = get(server, "label/__name__/values")
        assert {name for name in names if name.startswith("ray_") and not name.startswith("ray_peftsearch_")} == set()
        assert not [label for label in get(server, "labels") if label.startswith("otel_")]
    assert list(targets.parent.iterdir()) == []


@pytest.mark.slow
@pytest.mark.ray
def test_where_ray_exports_nothing_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_enable_metrics_collection", "0")
    metrics = StudyMetrics(study_facts("silent"), [], lambda: 0)
    with ray_cluster(None), metrics.exporting(tmp_path / "studies" / "silent", 1) as measured_as:
        # Dispatcher and slots are told this, and measure nothing.
        assert measured_as is None
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_metric_named_in_any_letters_takes_no_other_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", str(1000 * SECONDS))
    facts = study_facts("lettered")
    legal = facts.domains["legal"].model_copy(update={"metric": "f1/🩺"})
    facts = facts.model_copy(update={"domains": {**facts.domains, "legal": legal}})
    metrics = StudyMetrics(facts, [trial(0), trial(1)], lambda: 0)
    wanted = {metric.exported[0] for metric in (*metrics.numbers(), PLANNED)}
    with ray_cluster(None), metrics.exporting(tmp_path / "studies" / "lettered", 2) as measured_as:
        assert measured_as == "lettered"
        (group,) = json.loads((tmp_path / "prometheus" / "lettered.json").read_text())

        def told() -> str:
            with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=30) as answer:
                lines = answer.read().decode().splitlines()
            return "\n".join(line for line in lines if 'study="lettered"' in line)

        wait_for(lambda: wanted <= {line.partition("{")[0] for line in told().splitlines()}, 60)
        found = told()
    assert {line.partition("{")[0] for line in found.splitlines()} >= wanted
    assert r"f1/\\U0001fa7a" in found
