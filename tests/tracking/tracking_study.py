"""A made-up study, and a real MLflow server on loopback to show it in."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from peftsearch.spec import Baseline, DomainFacts, ModelFacts, Rung, StudyFacts, TrialRecord, TrialState
from peftsearch.tracking.mlflow_tracker import prepare_environment
from peftsearch.tracking.ui import ui_command, ui_environment

prepare_environment()
MODEL = "package:tiny/model"
BEGIN = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Server:
    """An MLflow server that can be killed and started again on the same port and store."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.storage.mkdir(parents=True, exist_ok=True)
        with (self.storage / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*ui_command(self.storage, port=self.port)],
                env=ui_environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_for(f"{self.uri}/health", self.process)
        except TimeoutError as error:
            raise RuntimeError((self.storage / "server.log").read_text()) from error

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


@contextmanager
def running_server(storage: Path) -> Iterator[Server]:
    """A server that answers, and has ended afterwards."""
    server = Server(storage)
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.kill()


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 600) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"no answer from {url}")


def study_facts(name: str, **changes: object) -> StudyFacts:
    fields: dict[str, object] = {
        "study": name,
        "description": "A made-up study",
        "trials_per_cell": 4,
        "methods": ("lora", "prompt"),
        "domains": {
            domain: DomainFacts(
                task="classification",
                metric="accuracy",
                direction="maximize",
                labels=("a", "b"),
                rows={"train": 100, "validation": 50, "test": 50},
                max_length=64,
                fingerprint=f"{domain}-fingerprint",
                source="recipe:example",
                baselines={
                    MODEL: {
                        "majority": Baseline(title="majority class", value=0.3),
                        "linear_probe": Baseline(title="logistic regression on frozen embeddings", value=0.6),
                    }
                },
            )
            for domain in ("clinical", "legal")
        },
        "models": {
            MODEL: ModelFacts(
                location="/models/tiny", architecture="BertModel", total_parameters=1_000_000, fingerprint="weights"
            )
        },
        "provenance": {"python": "3.11.9", "version.torch": "2.13.0", "git_commit": "0123abcd (with changes)"},
    }
    return StudyFacts.model_validate(fields | changes)


def trial(number: int, evaluations: int = 3, state: TrialState = TrialState.COMPLETE, **changes: object) -> TrialRecord:
    """A trial after so many evaluations."""
    started = BEGIN + timedelta(minutes=number)
    rungs = [
        Rung(
            step=10 * (index + 1),
            epoch=(index + 1) / 3,
            value=round(0.5 + 0.01 * number + 0.02 * index, 6),
            loss=1.0 - 0.1 * index,
            train_loss=1.1 - 0.1 * index,
            train_seconds=0.5,
            evaluation_seconds=0.25,
            scores={
                "accuracy": round(0.5 + 0.01 * number + 0.02 * index, 6),
                "macro_f1": round(0.4 + 0.01 * index, 6),
                "f1/a": 0.3,
                "f1/b <x>": 0.2,
            },
            usage={"cpu_utilization_percentage": 40.0 + index, "process_memory_usage_megabytes": 300.0},
        )
        for index in range(evaluations)
    ]
    ended = state is not TrialState.RUNNING
    fields: dict[str, object] = {
        "number": number,
        "model": MODEL,
        "domain": "clinical" if number % 2 == 0 else "legal",
        "method": "lora",
        "state": state,
        "seed": 7,
        "value": rungs[-1].value if rungs else None,
        "trainable_parameters": 1000 * (number + 1),
        "exported_parameters": 1000 * (number + 1),
        "hyperparameters": {"rank": 8, "targets": "attention", "init_text": "", "learning_rate": 3.1e-4},
        "rungs": rungs,
        "train_seconds": 0.5 * evaluations,
        "evaluation_seconds": 0.25 * evaluations,
        "total_steps": 90,
        "started": started.isoformat(timespec="milliseconds"),
        "finished": (started + timedelta(seconds=30)).isoformat(timespec="milliseconds") if ended else None,
        "error": "ValueError: the loss became NaN" if state is TrialState.FAILED else None,
    }
    return TrialRecord.model_validate(fields | changes)
