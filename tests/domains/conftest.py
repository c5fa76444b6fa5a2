from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from domain_files import save_tokenizer

from peftsearch.spec import StudyFile


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tokenizer that knows `WORDS`."""
    return str(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., StudyFile]:
    """Makes a study with the domain ``d`` in the test's folder."""

    def make(data: dict[str, Any], *, domain: dict[str, Any] | None = None, max_length: int = 16) -> StudyFile:
        document = {
            "name": "s",
            "model": "m",
            "domains": {"d": {"data": data, **(domain or {})}},
            "methods": {"lora": {}},
            "training": {"max_length": max_length},
        }
        return StudyFile.parse(json.dumps(document, indent=1), "study.yaml", folder=tmp_path)

    return make
