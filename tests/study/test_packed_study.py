"""A study whose slot trains several trials at once finds what the same study finds that trains one after another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import command
from study_runs import run

from peftsearch.spec import TrialRecord, TrialState
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def write_file(folder: Path, base: Path, data: Path, name: str, **resources: Any) -> Path:
    document = {
        "name": name,
        "model": str(base),
        "domains": {
            "topics": {"data": {"source": str(data), "split": {"group": "document", "validation": 0.25, "test": 0.2}}}
        },
        "methods": {
            "lora": {"rank": {"low": 1, "high": 8, "log": True}, "variant": ["lora", "rslora", "dora"]},
            "adapter": {"bottleneck": [2, 4, 8], "placement": ["pfeiffer", "houlsby", "parallel"]},
            "prompt": {"tokens": [2, 4, 8]},
            "full": {},
        },
        # What is proposed depends on nothing but the trial's number.
        "search": {"trials": 4, "sampler": "random", "scheduler": "none"},
        "training": {"epochs": 3, "evaluations": 4, "batch_size": 16, "max_length": 16, "precision": "fp32"},
        "confirm": {"seeds": 2, "max_finalists": 2},
        "resources": {"cpus_per_worker": 1, "slots": 1, **resources},
        "tracking": {"mlflow": "off"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The tiny base without dropout, which a pack would draw otherwise."""
    folder = tmp_path_factory.mktemp("still-base")
    for path in tiny_base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config = {name: 0.0 if "dropout" in name else value for name, value in config.items()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_four_at_once_find_what_one_after_another_finds(base: Path, topics_csv: Path, tmp_path: Path) -> None:
    records: dict[str, list[TrialRecord]] = {}
    for name, pack in (("single", 1), ("packed", 4)):
        run(write_file(tmp_path, base, topics_csv, name, pack=pack), tmp_path)
        records[name] = Study.open(name, tmp_path).trials()
    assert len(records["packed"]) == len(records["single"]) == 16
    for packed, single in zip(records["packed"], records["single"], strict=True):
        assert packed.hyperparameters == single.hyperparameters
        assert packed.state is single.state is TrialState.COMPLETE
        assert [rung.step for rung in packed.rungs] == [rung.step for rung in single.rungs]
        for mine, own in zip(packed.rungs, single.rungs, strict=True):
            assert (mine.loss, mine.train_loss) == pytest.approx((own.loss, own.train_loss), rel=2e-3)
        assert packed.retries == 0
    # The same, and not the very same: they were trained in other company.
    packs = [record for record in records["packed"] if record.method in ("adapter", "prompt")]
    alone = {record.number: record for record in records["single"]}
    assert any(
        rung.train_loss != own.train_loss
        for record in packs
        for rung, own in zip(record.rungs, alone[record.number].rungs, strict=True)
    )
    for record in records["packed"]:
        if record.method == "full":
            assert [rung.train_loss for rung in record.rungs] == [
                rung.train_loss for rung in alone[record.number].rungs
            ]
    # An adapter from a pack is like any other on disk.
    done = command("export", "packed", "--to", tmp_path / "out", "--pick", "best", "--storage", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
