"""The scale benchmark's command, with few trials: what it prints is there, and nothing is lost on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, str(Path(__file__).parent / "scale.py")]


@pytest.mark.ray
@pytest.mark.slow
def test_a_hundred_simulated_trials(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    options = ["--trials", "120", "--slots", "4", "--segment-seconds", "0.02", "--json", str(target)]
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(target.read_text())
    assert figures["trials"] == figures["complete"] + figures["pruned"] == 120
    assert figures["pruned"] > 40
    assert figures["failed"] == 0
    assert figures["mlflow_complete"]
    assert len(figures["tenths"]) == 10
    assert sum(tenth["segments"] for tenth in figures["tenths"]) == figures["segments"]
    assert 0 < figures["utilisation"] <= 1
    # Generous, as other processes take their share of the machine: what grew with the square would be well above.
    assert figures["cpu_last_over_first"] < 3
    # Trial actors are used again: a process started for every trial costs a second (1 s here, and 0.05 s without).
    assert figures["tenths"][-1]["overhead_ms"] < 400
    # Four run at a time; those that have ended are dropped.
    assert max(tenth["tune"] for tenth in figures["tenths"]) < 30
    assert figures["memory_kb_per_trial"] < 500
    assert "overhead ms" in done.stdout
