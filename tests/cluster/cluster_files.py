"""The files of ``cluster/`` as the tests read them: every document, every container, every start of Ray."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHED = ("aws.yaml", "gcp.yaml", "on-premises.yaml")
"""What ``ray up`` takes."""
SCRIPTS = ("install.sh", "passwords.sh", "slurm.sh", "kubernetes/databases.sh")
Document = dict[str, Any]


def installed(program: str) -> str:
    """A program that pip put beside this Python, whose environment need not be activated."""
    return str(Path(sys.executable).with_name(program))


def launched(name: str) -> Document:
    """A file for ``ray up``."""
    return dict(yaml.safe_load((CLUSTER / name).read_text()))


def compose() -> Document:
    """The compose file, with its merge keys resolved and its variables as written."""
    return dict(yaml.safe_load((CLUSTER / "compose.yaml").read_text()))


def kubernetes() -> list[Document]:
    """All Kubernetes documents, as ``kubectl apply -k`` would send them."""
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl")
    documents: list[Document] = []
    for folder in ("kubernetes", "kubernetes/job"):
        done = subprocess.run(["kubectl", "kustomize", str(CLUSTER / folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        documents += list(yaml.safe_load_all(done.stdout))
    return documents


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def pod_templates(document: Document) -> Iterator[tuple[str, Document]]:
    """Every pod template inside a document, with where it is."""

    def inside(value: Any, path: str) -> Iterator[tuple[str, Document]]:
        if isinstance(value, dict):
            if "containers" in value.get("spec", {}):
                yield path, value
            for key, item in value.items():
                yield from inside(item, f"{path}.{key}")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from inside(item, f"{path}[{index}]")

    yield from inside(document, f"{document['kind']}/{document['metadata']['name']}")


def containers(template: Document) -> list[Document]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def shell_blocks(text: str) -> list[str]:
    """The shell code of a Markdown text."""
    return re.findall(r"^ *```bash\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)


def project_version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def requirement(distribution: str) -> str:
    """The versions of a dependency that pyproject.toml allows, such as ``>=2.60,<2.61``."""
    from packaging.requirements import Requirement

    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        if (found := Requirement(text)).name == distribution:
            return str(found.specifier)
    raise KeyError(distribution)
