"""Adapters for pairs of texts, of one data set and of several that were joined: their cards hand both texts over."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from card_code import code_of, run_card
from tiny_models import SAMPLES, tiny_encoder
from trained_study import train_study

from peftsearch.export import predict_file

pytestmark = pytest.mark.slow

WORDS = ["party", "agreement", "clause", "fever", "infection", "lesion"]


def pairs(folder: Path, name: str, first: str, second: str) -> dict[str, Any]:
    """The section ``data`` of pairs that are alike or not, in columns with these names."""
    generator = random.Random(name)
    rows = []
    for number in range(40):
        one, other = generator.choice(WORDS), generator.choice(WORDS)
        rows.append({first: f"{one} {number}", second: other, "label": "same" if one == other else "other"})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": f"{name}.jsonl", "columns": {"text": first, "text_pair": second}}


def test_a_card_hands_both_texts_over(quiet_machine: None, tmp_path: Path) -> None:
    parts = {"one": pairs(tmp_path, "one", "premise", "claim"), "two": pairs(tmp_path, "two", "left", "right")}
    document = {
        "name": "pairs",
        "model": str(tiny_encoder(tmp_path / "model")),
        "domains": {"alone": {"data": parts["one"]}, "joined": {"data": {"join": parts}}},
        "methods": {"lora": {}},
        "search": {"trials": 1, "scheduler": "none", "seed": 3},
        "training": {"epochs": 1, "evaluations": 1, "batch_size": 12, "max_length": 32, "precision": "fp32"},
        "tracking": {"mlflow": "off"},
    }
    trials = dict.fromkeys(("alone", "joined"), ("lora", SAMPLES["lora"]))
    study = train_study(document, tmp_path, tmp_path / "storage", trials)
    for item in study.export(tmp_path / "out"):
        assert isinstance(item.folder, Path)
        card = (item.folder / "README.md").read_text()
        assert "tokenizer(texts, other_texts," in code_of(card), item.record.domain
        printed, _ = run_card(card)
        assert printed.startswith("['")
        # As predicting does, of the first data set's columns.
        found = predict_file(item.folder, tmp_path / "one.jsonl", tmp_path / f"{item.record.domain}.jsonl")
        assert (found.rows, found.unpredicted) == (40, 0)
