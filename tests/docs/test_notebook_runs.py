"""The example notebook: executed by a real kernel, with a small study in the place of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from documented import ROOT
from trained_study import lively_base

NOTEBOOKS = sorted((ROOT / "studies").rglob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_git_has_no_output_of_a_notebook(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None
    assert (path.parent / re.findall(r'^STUDY = "(.+?)"', code[0].source)[0]).is_file()


@pytest.mark.slow
@pytest.mark.ray
def test_the_notebook_runs(
    tmp_path: Path, tiny_base: Path, write_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = write_study(
        "noted",
        model=str(lively_base(tiny_base, tmp_path / "lively")),
        methods={"lora": {"rank": [2, 4]}, "full": {}},
        search={"trials": 1, "scheduler": "none"},
        training={"epochs": 2, "evaluations": 2, "batch_size": 16, "max_length": 16},
    )
    (path,) = NOTEBOOKS
    notebook = nbformat.read(path, as_version=4)
    given = f"STUDY = {str(file)!r}\nSTORAGE = {str(tmp_path / 'storage')!r}\nOVERRIDES = []"
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    # What is replaced sets the same names.
    assert re.findall(r"^\w+", parameters.source, re.MULTILINE) == re.findall(r"^\w+", given, re.MULTILINE)
    parameters.source = given
    # The first cell that fails raises, with its traceback.
    NotebookClient(
        notebook, timeout=570, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [html_of(output) for output in outputs]
    assert sum("<iframe" in html and "srcdoc=" in html for html in shown) == 1
    assert sum("<table" in html for html in shown) == 2
    # One prediction: a label of the data.
    assert any(label in str(outputs[-1]) for label in ("contract", "disease", "market"))


def html_of(output: Any) -> str:
    return str(output.get("data", {}).get("text/html", ""))
