from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_models import MODELS


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small compute no faster on several."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of the base model of each kind."""
    return {kind: write(tmp_path_factory.mktemp(kind)) for kind, (write, _, _) in MODELS.items()}
