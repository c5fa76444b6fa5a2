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


def disturb(quiet: tuple[Path, Path], storage: Path, fault: str, *titles: str, confirming: bool = False) -> None:
    """Run the study, kill these processes in its middle, and compare it with the undisturbed one."""
    with running(quiet[1], storage) as study:
        study.wait_until(lambda: _under_way(study, confirming))
        time.sleep(0.3)
        before = study.trials()
        study.kill(*titles)
        seconds = study.wait_until(lambda: study.trials() != before)
        assert study.ended() == 0, study.said()[-3000:]
        assert study.left_behind() == []
        assert "Traceback" not in study.said()
    print(json.dumps({"fault": fault, "seconds to recover": round(seconds, 1)}))
    assert ledger("parts", storage) == ledger("parts", quiet[0])


def _under_way(study: RunningStudy, confirming: bool) -> bool:
    if confirming:
        return any(record.confirmed for record in study.trials())
    return len(study.trials()) >= 5


def test_the_dispatcher_dies_in_the_search(quiet: tuple[Path, Path], tmp_path: Path) -> None:
    disturb(quiet, tmp_path, "dispatcher killed", "DispatcherActor")


def test_the_dispatcher_dies_while_finalists_are_confirmed(quiet: tuple[Path, Path], tmp_path: Path) -> None:
    disturb(quiet, tmp_path, "dispatcher killed in confirmation", "DispatcherActor", confirming=True)


def test_a_slots_train_controller_dies(quiet: tuple[Path, Path], tmp_path: Path) -> None:
    """Ray frees a dead controller's CPUs only when the driver ends: the slot could not be started again (see
    `peftsearch.workers.cluster_state`)."""
    disturb(quiet, tmp_path, "Train controller killed", "TrainController")


def test_a_whole_slot_dies(quiet: tuple[Path, Path], tmp_path: Path) -> None:
    disturb(quiet, tmp_path, "slot killed (controller and workers)", "TrainController", "RayTrainWorker")


def test_trial_actors_die(quiet: tuple[Path, Path], tmp_path: Path) -> None:
    disturb(quiet, tmp_path, "trial actor killed", "TrialActor")


def test_the_head_dies_and_the_same_command_continues(quiet: tuple[Path, Path], tmp_path: Path) -> None:
    with running(quiet[1], tmp_path, environment={}) as study:
        study.wait_until(lambda: _under_way(study, False))
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
