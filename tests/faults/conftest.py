"""A study to which nothing happens, the MLflow server that shows it, and what starts and ends disturbed ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from agreement import Undisturbed
from injections import Driver
from mlflow_proxy import Proxy
from table import Row
from tracking_study import Server, running_server

# Read when MLflow downloads something.
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("mlflow-server")) as running:
        yield running


@pytest.fixture(scope="session")
def faulted_file(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, topics_csv: Path) -> Path:
    """The study that all faults are done to: three methods, pruning, and a confirmation that reads the test split."""
    path = tmp_path_factory.mktemp("file") / "faulted.yaml"
    split = {"group": "document", "validation": 0.25, "test": 0.2}
    document = {
        "name": "faulted",
        "model": str(tiny_base),
        "domains": {"topics": {"data": {"source": str(topics_csv), "split": split}}},
        "methods": {
            "lora": {
                "rank": {"low": 1, "high": 8, "log": True},
                "learning_rate": {"low": 1e-3, "high": 3e-2, "log": True},
            },
            "prompt": {"tokens": [2, 4, 8], "learning_rate": {"low": 1e-2, "high": 2e-1, "log": True}},
            "full": {"learning_rate": {"low": 3e-4, "high": 1e-2, "log": True}},
        },
        "search": {"trials": 4},
        "confirm": {"seeds": 1},
        "training": {"epochs": 8, "evaluations": 8, "batch_size": 16, "max_length": 16},
        # A worker that is killed many times is no trial's fault.
        "resources": {"cpus_per_worker": 1, "slots": 1, "max_retries": 50},
    }
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, faulted_file: Path, mlflow_server: Server) -> Undisturbed:
    storage = tmp_path_factory.mktemp("undisturbed") / "storage"
    driver = Driver(faulted_file, storage, "undisturbed", "--set", f"tracking.mlflow={mlflow_server.uri}")
    try:
        assert driver.wait() == 0, driver.output[-3000:]
        assert driver.leftovers() == []
    finally:
        driver.end()
    return Undisturbed(faulted_file, storage, "undisturbed", mlflow_server.uri)


@pytest.fixture
def proxy(mlflow_server: Server) -> Iterator[Proxy]:
    """MLflow's server, through something that fails on demand."""
    standing = Proxy(mlflow_server.port)
    yield standing
    standing.refuse()


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    """Starts drivers; whatever is left of them at the test's end is killed."""
    started: list[Driver] = []

    def start(*arguments: object, **options: object) -> Driver:
        started.append(Driver(*arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for driver in started:
        driver.end()


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Keeps a row for `table.py`."""
    folder = request.config.cache.mkdir("faults")
    return lambda row: row.save(Path(folder))
