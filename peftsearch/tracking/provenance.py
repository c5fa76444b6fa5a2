"""What a result rests on: versions, hardware, and the state of the study file's repository."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

SUBMITTED_COMMIT = "PEFTSEARCH_SUBMITTED_COMMIT"
"""Environment variable of a job: the commit of its study file, which runs from a copy outside the repository."""

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
        study_folder: Folder of the study file; where it is a git checkout, its commit is recorded. In a job, the commit
            is the one that the submitting machine knew.
    """
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": str(os.cpu_count()),
    }
    for name in _PACKAGES:
        try:
            facts[f"version.{name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := os.environ.get(SUBMITTED_COMMIT) or study_commit(study_folder):
        facts["git_commit"] = commit
    return facts


def study_commit(folder: Path) -> str | None:
    """The commit that a folder's git checkout is at, and whether something in it differs; None where it is none."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + (" (with uncommitted changes)" if _git(folder, "status", "--porcelain") else "")


def _cpu_name() -> str:
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
