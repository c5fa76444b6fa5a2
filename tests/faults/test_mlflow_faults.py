"""MLflow's server is away, wrong, or silent: the study goes on, and nothing is missing or doubled afterwards."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from agreement import Undisturbed, assert_mlflow_agrees, assert_undisturbed, differences, shown
from forks import command
from injections import Driver
from mlflow_proxy import Proxy
from table import Row
from tracking_study import Server

from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]
END = 180.0
"""Seconds that a study waits for MLflow after its last trial at most: 60 for its runs, and 120 for what is left."""


def test_a_server_that_fails_in_every_way_for_a_while(
    undisturbed: Undisturbed,
    drive: Callable[..., Driver],
    tmp_path: Path,
    proxy: Proxy,
    mlflow_server: Server,
    note: Callable[[Row], None],
) -> None:
    """In one study: answers that are lost, errors, a server that is killed and one that takes its place, silence. All
    is there at the end, once."""
    first = Server(mlflow_server.storage)
    first.start()
    proxy.target_port = first.port
    seconds: dict[str, float] = {}
    try:
        driver = drive(undisturbed.file, tmp_path, "flaky", "--set", f"tracking.mlflow={proxy.uri}")

        def trains_on(fault: str, further: int) -> None:
            before, began = proxy.requests, time.monotonic()
            assert driver.wait_progress(1), f"the study ended before {fault}"
            seconds[fault] = time.monotonic() - began
            assert driver.wait_progress(further), f"the study ended during {fault}"
            # The fault is one only if the driver meets it; after each it tries again later than before.
            with driver.held():
                driver.wait_until(lambda: proxy.requests > before, 45)

        assert driver.wait_progress(1)
        assert driver.wait_until(lambda: proxy.requests > 0)
        proxy.mode = "lost"
        trains_on("lost", 3)
        proxy.mode = "error"
        trains_on("error", 3)
        proxy.mode = "pass"
    finally:
        first.kill()
    trains_on("stopped", 3)
    # Another process that serves the same store: as if it had been started again, at once.
    proxy.mode = "hang"
    proxy.target_port = mlflow_server.port
    trains_on("hanging", 2)
    proxy.mode = "pass"
    assert driver.wait() == 0, driver.output[-3000:]
    assert driver.leftovers() == []
    assert "peftsearch sync" not in driver.output
    study = Study.open("flaky", tmp_path)
    counted = assert_undisturbed(study, undisturbed, proxy.uri)
    assert differences(shown(proxy.uri, "flaky"), shown(undisturbed.uri, undisturbed.name)) == []
    for fault, injected in (
        ("lost", "a proxy hands requests on and answers 500: what was done is not known"),
        ("error", "a proxy answers 500 to everything"),
        ("stopped", "SIGKILL to the server; another takes its place while the study runs"),
        ("hanging", "a proxy accepts, and does not answer for a while"),
    ):
        happened = "training does not wait; what is missing is written when it is back, nothing twice"
        titles = {
            "lost": "MLflow's answers lost",
            "error": "MLflow answers errors",
            "stopped": "MLflow's server stopped",
            "hanging": "MLflow hangs for a while",
        }
        note(Row(titles[fault], injected, happened, counted.lost, counted.duplicated, (seconds[fault],)))


@pytest.mark.parametrize("absence", ["away", "hanging"])
def test_a_server_that_is_absent_throughout_is_filled_in_by_sync(
    undisturbed: Undisturbed,
    drive: Callable[..., Driver],
    tmp_path: Path,
    proxy: Proxy,
    absence: str,
    note: Callable[[Row], None],
) -> None:
    """The study is not slowed, ends soon after its last trial, and says what to do. What that writes is all that the
    server would have if it had been there."""
    name = f"server-{absence}"
    if absence == "away":
        proxy.refuse()
    else:
        proxy.mode = "hang"
    driver = drive(undisturbed.file, tmp_path, name, "--set", f"tracking.mlflow={proxy.uri}")
    driver.wait_until(lambda: "writing MLflow" in driver.output)
    trained = time.monotonic()
    assert driver.wait() == 0, driver.output[-3000:]
    ended = time.monotonic() - trained
    assert ended < END
    assert driver.leftovers() == []
    assert f"run 'peftsearch sync {name}' when it is back" in driver.output
    study = Study.open(name, tmp_path)
    assert_undisturbed(study, undisturbed, None)
    early = command("sync", name, "--storage", tmp_path)
    assert early.returncode == 2
    assert "Traceback" not in early.stderr
    assert proxy.uri in early.stderr
    proxy.listen()
    proxy.mode = "pass"
    began = time.monotonic()
    done = command("sync", name, "--storage", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    synced = time.monotonic() - began
    counted = assert_undisturbed(study, undisturbed, proxy.uri)
    assert differences(shown(proxy.uri, name), shown(undisturbed.uri, undisturbed.name)) == []
    kinds = {
        "away": ("MLflow away throughout", "connections are refused"),
        "hanging": ("MLflow hangs throughout", "a proxy accepts and never answers"),
    }
    fault, injected = kinds[absence]
    happened = (
        f"the study ends {ended:.0f} s after its last trial and says to sync; that takes {synced:.0f} s and leaves "
        "what a server that was there would show"
    )
    note(Row(fault, injected, happened, counted.lost, counted.duplicated))


def test_a_store_that_is_filled_from_the_ledger_is_the_live_one_to_the_millisecond(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The ledger of the very study that a server followed live, shown in an empty store: times of runs and of metrics
    are the same too."""
    from mlflow import MlflowClient

    shutil.copytree(undisturbed.storage / "studies", tmp_path / "studies")
    specification = tmp_path / "studies" / undisturbed.name / "study.json"
    specification.write_text(specification.read_text().replace(undisturbed.uri, "auto"))
    study = Study.open(undisturbed.name, tmp_path)
    assert study.sync() == len(study.trials())
    uri = study.mlflow_tracking_uri
    assert uri is not None
    assert uri != undisturbed.uri
    assert_mlflow_agrees(study, uri)
    assert differences(shown(uri, study.name), shown(undisturbed.uri, study.name)) == []
    there, here = MlflowClient(tracking_uri=undisturbed.uri), MlflowClient(tracking_uri=uri)
    for live, filled in zip(undisturbed.study.trials(), study.trials(), strict=True):
        assert live.mlflow_run_id is not None
        assert filled.mlflow_run_id is not None
        first, second = there.get_run(live.mlflow_run_id), here.get_run(filled.mlflow_run_id)
        assert (first.info.start_time, first.info.end_time) == (second.info.start_time, second.info.end_time)
        assert first.data.metrics == pytest.approx(second.data.metrics)
        for metric in first.data.metrics:
            found, expected = (
                [(item.step, item.timestamp) for item in client.get_metric_history(run.info.run_id, metric)]
                for client, run in ((here, second), (there, first))
            )
            assert found == expected, metric
