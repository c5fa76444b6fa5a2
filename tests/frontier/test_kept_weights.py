"""The files of trials that nobody will ask for again go while the study runs, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
from frontier_study import make_facts, make_record

from peftsearch.files import StorageError
from peftsearch.kept_weights import KeptWeights
from peftsearch.spec import Confirmed, TrialRecord, TrialState


class Storage:
    """Trials with files, some of which are gone after a while."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[TrialRecord] = []

    def trial(self, weights: KeptWeights, value: float | None, parameters: int, **changes: object) -> None:
        record = make_record(len(self.records), value, parameters, **changes)
        self.records.append(record)
        place = self.folder / "trials" / f"{record.number:05d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "weights.safetensors").touch()
        weights.trial_changed(record)

    def left(self) -> list[int]:
        return sorted(int(path.name) for path in (self.folder / "trials").iterdir())


def test_files_of_no_use_go_while_the_study_runs(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with KeptWeights(tmp_path, make_facts(), []) as weights:
        storage.trial(weights, 0.8, 100)  # 0: dominated by 3, and lora's best no more
        storage.trial(weights, None, 50, state=TrialState.PRUNED)  # 1
        storage.trial(weights, None, 70, state=TrialState.RUNNING)  # 2
        storage.trial(weights, 0.9, 90)  # 3: on the front
        storage.trial(weights, 0.7, 500, method="full")  # 4: dominated, but the best of its method
        storage.trial(weights, 0.6, 500, method="full")  # 5
        storage.trial(weights, None, 0, state=TrialState.FAILED)  # 6
        storage.trial(weights, 0.5, 100, domain="legal")  # 7: alone in its domain
    assert storage.left() == [2, 3, 4, 7]


def test_at_the_end_the_methods_fronts_and_what_was_confirmed_stay(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with KeptWeights(tmp_path, make_facts(), []) as weights:
        storage.trial(weights, 0.9, 90)
        storage.trial(weights, 0.7, 500, method="full", confirmed=Confirmed(seeds=3, mean=0.7, std=0.01))
        storage.trial(weights, 0.8, 500, method="full")
        storage.trial(weights, 0.6, 300, method="adapter")
        storage.trial(weights, None, 50, state=TrialState.PRUNED)
        storage.trial(weights, 0.5, 300, method="adapter")
        storage.trial(weights, 0.5, 200, method="adapter")
    # A slot has written a state after its trial was pruned.
    (tmp_path / "trials" / "00004").mkdir()
    with KeptWeights(tmp_path, make_facts(), storage.records) as weights:
        weights.sweep(storage.records)
    assert storage.left() == [0, 1, 2, 3, 6]


def test_a_continued_study_knows_what_it_kept(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with KeptWeights(tmp_path, make_facts(), []) as weights:
        storage.trial(weights, 0.8, 100)
    with KeptWeights(tmp_path, make_facts(), storage.records) as weights:
        storage.trial(weights, 0.9, 90)
    assert storage.left() == [1]


def test_files_that_cannot_be_deleted_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object) -> None:
        raise StorageError("cannot write s3://bucket: away")

    monkeypatch.setattr("peftsearch.kept_weights.delete_tree", away)
    storage = Storage(tmp_path)
    with KeptWeights(tmp_path, make_facts(), []) as weights:
        storage.trial(weights, None, 50, state=TrialState.PRUNED)
    assert storage.left() == [0]
    assert "trial 0 could not be deleted" in caplog.text
