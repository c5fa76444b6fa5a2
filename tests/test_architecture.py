"""The house rules: imports point one way, and the documentation names every key."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from peftsearch.methods import METHODS
from peftsearch.spec import StudySpec

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peftsearch"
ORDER = ("spec", "domains", "methods", "training", "workers", "search", "tracking", "frontier", "export", "cli")
# The modules at the top put the parts together, each with those before it; of the parts, only the command line knows
# them.
TOP = (
    "deferred_compile",
    "files",
    "ray_access",
    "held_folder",
    "ray_folder",
    "stopping",
    "events",
    "schema",
    "storage",
    "monitoring",
    "holder",
    "saved",
    "baselines",
    "driver",
    "handle",
    "study_ledger",
    "fork",
    "study_mlflow",
    "results",
    "warm_start",
    "preparing",
    "kept_weights",
    "running",
    "study",
    "live",
    "submit",
)
# Reading and writing files knows nothing of studies, and every part from training on does it.
FILES = {"files"}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peftsearch."):
            yield (node.module or "").split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "peftsearch":
            yield from (alias.name for alias in node.names if alias.name in TOP)
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("peftsearch."))


@pytest.mark.parametrize("part", ORDER)
def test_imports_point_one_way(part: str) -> None:
    allowed = set(ORDER[: ORDER.index(part) + 1]) | (set(TOP) if part == "cli" else set())
    allowed |= FILES if ORDER.index(part) >= ORDER.index("training") else set()
    for path in (PACKAGE / part).rglob("*.py"):
        assert set(imported(path)) <= allowed, path.relative_to(ROOT)


def test_the_modules_at_the_top_import_one_way() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert sorted(TOP) == sorted(name for name in modules - set(ORDER) if not name.startswith("__"))
    for place, name in enumerate(TOP):
        for path in (PACKAGE / f"{name}.py", *(PACKAGE / name).rglob("*.py")):
            found = set(imported(path)) if path.exists() else set()
            assert found & set(TOP) <= {*TOP[:place], *({name} if path.parent.name == name else ())}, path.relative_to(
                ROOT
            )


def test_the_top_level_is_as_drawn() -> None:
    expected = {"pyproject.toml", "studies", "peftsearch", "cluster", "tests", "dashboards", "README.md", "LICENSE"}
    import subprocess

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in tracked if not name.startswith(".")} == expected


def keys(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        annotation = field.annotation
        for candidate in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from keys(candidate)


def test_every_key_of_a_study_file_is_documented() -> None:
    text = (ROOT / "studies" / "README.md").read_text()
    missing = [key for key in keys(StudySpec) if key not in text]
    assert not missing
    for method in METHODS.values():
        assert f"`{method.name}`" in text
        assert not [name for name in method.hyperparameters if f"`{name}`" not in text], method.name
