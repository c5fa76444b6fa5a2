"""Run by .ci/run after the README's quickstart command: looks at the results as a user's script would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def peftsearch(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("peftsearch")), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def dominates(a: dict[str, Any], b: dict[str, Any]) -> bool:
    no_worse = a["value"] >= b["value"] and a["trainable_parameters"] <= b["trainable_parameters"]
    return no_worse and (a["value"], -a["trainable_parameters"]) != (b["value"], -b["trainable_parameters"])


def main(to: str) -> None:
    status = json.loads(peftsearch("status", "quickstart", "--json"))
    assert status["state"] == "finished", status
    trials = json.loads(peftsearch("trials", "quickstart", "--json"))["trials"]
    assert len(trials) == status["planned"], (len(trials), status)
    assert {trial["method"] for trial in trials} == {"lora", "adapter", "prompt", "full"}
    assert not [trial for trial in trials if trial["state"] in ("RUNNING", "FAILED")], trials
    fronts = json.loads(peftsearch("frontier", "quickstart", "--json"))["domains"]
    assert set(fronts) == {"clinical", "legal"}
    for name, front in fronts.items():
        complete = [trial for trial in trials if trial["domain"] == name and trial["state"] == "COMPLETE"]
        expected = {b["number"] for b in complete if not any(dominates(a, b) for a in complete)}
        assert {trial["number"] for trial in front["front"]} == expected, name
        assert all(trial["mlflow_run_id"] for trial in front["front"]), name
        best = max(trial["value"] for trial in front["front"])
        print(f"{name}: {len(front['front'])} on the front, best {front['metric']} {best:.3f}")
    folders = peftsearch("export", "quickstart", "--to", to, "--pick", "knee").split()
    assert len(folders) == 2, folders
    for folder in folders:
        assert (Path(folder) / "README.md").is_file(), folder
        print(f"exported and verified: {Path(folder).parent.name}/{Path(folder).name}")
    print("the quickstart's results hold")


if __name__ == "__main__":
    main(sys.argv[1])
