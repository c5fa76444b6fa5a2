"""What has a path of its own on GPUs, run to its end without one: see `standin_gpu`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from standin_cases import CASES, CPU, Case
from standin_gpu import COMPILER, build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch knows real GPUs here"),
    pytest.mark.skipif(COMPILER is None, reason="no g++ here, which makes torch believe in the stand-in"),
]


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the cases came to on the stand-in, by name."""
    folder = tmp_path_factory.mktemp("standin")
    library = build(folder)
    program = Path(__file__).with_name("standin_cases.py")
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(program), str(library), str(folder / "cases")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=850,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert len(found) == len(CASES), done.stderr[-3000:]
    return {each["name"]: each for each in found}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_numbers_are_those_of_a_cpu(case: Case, on_gpu: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    found = on_gpu[case.name]
    assert "error" not in found, found["error"]
    if case.tolerance is None:
        return
    torch.set_num_threads(1)
    expected = case.run(tmp_path / "cpu", CPU, int)["numbers"]
    if case.work == "baselines":
        # A text on the edge may fall to the other side.
        assert found["numbers"].keys() == expected.keys()
        for name, scores in expected.items():
            assert found["numbers"][name] == pytest.approx(scores, abs=0.15), name
        return
    for there, here in zip(found["numbers"], expected, strict=True):
        assert there.keys() == here.keys()
        assert losses(there) == pytest.approx(losses(here), rel=case.tolerance)


def losses(numbers: dict[str, float]) -> list[float]:
    return [numbers["loss"], numbers["train loss"]]


def test_no_step_waits_for_the_gpu(on_gpu: dict[str, dict[str, Any]]) -> None:
    waits = {name: found.get("waits") for name, found in on_gpu.items()}
    trials = {case.name for case in CASES if case.work not in ("baselines", "pack")}
    # The loss is read once, at a segment's end; bitsandbytes fetches its two tables when it steps first.
    eight_bits = {case.name for case in CASES if case.training.get("optimizer") == "adamw_8bit"}
    assert {name: waits[name] for name in trials - eight_bits if waits[name] != 1} == {}
    assert [waits[name] for name in eight_bits] == [pytest.approx(1 + 2 / 3)]
    # A pack's losses stay where they are until a trial of it ends.
    assert {case.name: waits[case.name] for case in CASES if case.work == "pack" and waits[case.name]} == {}
