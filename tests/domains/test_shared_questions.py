"""Real questions, where this machine has them: PubMedQA as classification of pairs, CUAD's as spans."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from peftsearch.domains import load_domain
from peftsearch.spec import StudyFile

SHARED = Path(os.environ.get("PEFTSEARCH_SHARED_DATA", "/nowhere"))
Make = Callable[..., StudyFile]


@pytest.mark.skipif(not (SHARED / "pubmedqa").is_dir(), reason="PEFTSEARCH_SHARED_DATA names no folder with pubmedqa")
def test_pubmedqa_is_classification_of_pairs(study: Make) -> None:
    data = {split: str(SHARED / f"pubmedqa/{split}.json") for split in ("train", "validation", "test")}
    file = study({**data, "columns": {"text": "question", "text_pair": "context"}})
    raw = load_domain("d", file.spec, file.folder)
    assert raw.labels == ("maybe", "no", "yes")
    assert {split: len(table) for split, table in raw.splits.items()} == {"train": 450, "validation": 50, "test": 500}
    assert not [warning for warning in raw.warnings if "stand in" in warning]


@pytest.mark.skipif(not (SHARED / "cuad_qa").is_dir(), reason="PEFTSEARCH_SHARED_DATA names no folder with cuad_qa")
def test_cuads_answers_stand_where_they_say(study: Make) -> None:
    data = {split: str(SHARED / f"cuad_qa/{split}.jsonl") for split in ("train", "validation", "test")}
    file = study(data, domain={"task": "question_answering"})
    raw = load_domain("d", file.spec, file.folder)
    unanswerable = {split: (raw.task.strata(table) or []).count("none") for split, table in raw.splits.items()}
    assert unanswerable == {"train": 1142, "validation": 282, "test": 277}
