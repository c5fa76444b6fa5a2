"""Parts of Ray die in mid-study: the ledger ends as that of a quiet run, and nothing stays behind."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_faults import RunningStudy, running
from study_runs import ledger, run

from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]

FAULTS = {
    "dispatcher": ["DispatcherActor"],
    "Train controller of a slot": ["TrainController"],
    "whole slot": ["TrainController", "RayTrainWorker"],
    "trial actor": ["TrialActor"],
}
"""What dies, and what the titles of its processes hold."""


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, topics_csv: Path) -> tuple[Path, Path]:
    """An undisturbed study: its storage and its file."""
    storage = tmp_path_factory.mktemp("quiet")
    path = storage / "parts.yaml"
    document: dict[str, Any] = {
        "name": "parts",
        "model": str(tiny_base),
        "domains": {
            "topics": {
                "data": {
                    "source": str(topics_csv),
                    "split": {"group": "document", "validation": 0.25, "test": 0.2},
                }
            }
        },
        "methods": {"lora": {"rank": {"low": 1, "high": 8}}, "prompt": {"tokens": [2, 4, 8]}, "full": {}},
        "search": {"trials": 6},
        "training": {"epochs": 6, "evaluations": 6, "batch_size": 8, "max_length": 16},
        "confirm": {"seeds": 1},
        "resources": {"cpus_per_worker": 1, "slots": 1},
        "tracking": {"mlflow": "off"},
    }
    path.write_text(yaml.safe_dump(document))
    run(path, storage)
    return storage, path


def _evaluations(study: RunningStudy) -> int:
    return sum(
        len(record.rungs) + len(record.confirmed.readings if record.confirmed else ()) for record in study.trials()
    )


def test_parts_of_ray_die_one_after_the_other(quiet: tuple[Path, Path], tmp_path: Path) -> None:
    """Each by SIGKILL, in one study: the ledger is that of a quiet run, number for number, and nothing stays behind.

    Ray frees a dead controller's CPUs only when the driver ends; the slot could not be started again (see
    `peftsearch.workers.cluster_state`).
    """
    rows = []
    with running(quiet[1], tmp_path) as study:
        study.wait_until(lambda: len(study.trials()) >= 4)
        for fault, titles in FAULTS.items():
            before = _evaluations(study)
            study.kill(*titles)
            # The first one may have been on its way already.
            seconds = study.wait_until(lambda before=before: _evaluations(study) >= before + 2)
            rows.append({"fault": fault, "seconds to recover": round(seconds, 1)})
        study.wait_until(lambda: any(record.confirmed for record in study.trials()))
        study.kill("DispatcherActor")
        assert study.ended() == 0, study.said()[-3000:]
        assert study.left_behind() == []
        assert "Traceback" not in study.said()
    print("\n".join(map(json.dumps, rows)))
    assert ledger("parts", tmp_path) == ledger("parts", quiet[0])


def test_the_head_dies_and_the_same_command_continues(quiet: tuple[Path, Path], tmp_path: Path) -> None:
    with running(quiet[1], tmp_path, environment={}) as study:
        study.wait_until(lambda: len(study.trials()) >= 4)
        study.kill("gcs_server")
        began = time.monotonic()
        assert study.ended(90) == 1
        seconds = time.monotonic() - began
        assert study.left_behind() == []
        said = study.said()
    assert "the Ray head at" in said
    assert "continues the study" in said
    assert "Traceback" not in said
    print(json.dumps({"fault": "Ray head killed", "seconds to end": round(seconds, 1)}))
    assert Study.open("parts", tmp_path).status()["state"] == "interrupted"
    run(quiet[1], tmp_path)
    assert ledger("parts", tmp_path) == ledger("parts", quiet[0])
