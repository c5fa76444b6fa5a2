"""What the speed of an exported model is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_encoder
from transformers import AutoModelForSequenceClassification
from writing_study import prepare, study

from peftsearch.export import speed


def test_where_time_runs_out_short_and_long_texts_were_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [{"text": " ".join(["dog"] * count), "label": "ab"[count % 2]} for count in range(1, 61)]
    model = tiny_encoder(tmp_path / "model")
    domain = {"task": "classification", "max_length": 64}
    prepared = prepare(study(tmp_path, model, domain, {"train": texts, "validation": texts}), tmp_path / "cache")
    loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2).eval()
    shapes: list[tuple[int, ...]] = []

    def seen(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    loaded.register_forward_pre_hook(seen, with_kwargs=True)
    # Each measurement ends after its three first readings; one pass before it warms up.
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    measured = speed.measure_speed(loaded, prepared, "validation", 4, torch.device("cpu"))
    assert (measured.examples, len(shapes)) == (3, 8)
    single, batched = ([length for _, length in found] for found in (shapes[1:4], shapes[5:8]))
    assert [rows for rows, _ in shapes] == [1] * 4 + [4] * 4
    # The texts have 3 to 62 tokens.
    for lengths in (single, batched):
        assert min(lengths) < 48
        assert max(lengths) > 32
