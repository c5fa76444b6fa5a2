"""What a result rests on: versions, hardware, and the state of the study file's repository."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

_PACKAGES = (
    "peftsearch",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "ray",
    "optuna",
    "mlflow",
    "pyarrow",
    "scikit-learn",
)


def provenance(study_folder: Path) -> dict[str, str]:
    """Facts about software and hardware, as short texts by name.

    Args:
        study_folder: Folder of the study file; where it is a git checkout, its commit is recorded.
    """
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": str(os.cpu_count()),
    }
    for name in _PACKAGES:
        try:
            facts[f"version.{name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git(study_folder, "rev-parse", "HEAD")
    if commit:
        dirty = bool(_git(study_folder, "status", "--porcelain"))
        facts["git_commit"] = commit + (" (with uncommitted changes)" if dirty else "")
    return facts


def cpu_name() -> str:
    """What the processor is called."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
