"""What a batch takes follows from all texts that a model reads for an example, not from the longest one alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from task_data import task_domain
from tiny_models import tiny_decoder, tiny_encoder, tiny_encoder_decoder

from peftsearch.domains import get_task
from peftsearch.search.estimate import TrialCosts
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import DataSpec, StudyFile
from peftsearch.training.activations import activation_bytes

MODELS = {"encoder": tiny_encoder, "encoder-decoder": tiny_encoder_decoder, "decoder": tiny_decoder}


def planned(write_study: Callable[..., Path], folder: Path, task: str, kind: str, **options: Any) -> StudyPlan:
    domain = task_domain(task, folder)
    domain["options"] |= options
    path = write_study(
        model=str(MODELS[kind](folder / kind)),
        domains={"d": domain},
        methods={"lora": {}},
        training={"epochs": 1, "evaluations": 1, "batch_size": 8, "max_length": 16, "precision": "fp32"},
    )
    return plan_study(StudyFile.load(path), folder / "cache")


@pytest.mark.parametrize(
    ("task", "kind", "options", "tokens"),
    [
        ("classification", "encoder", {}, 16),
        ("similarity", "encoder", {}, 16),
        ("similarity", "encoder", {"encoding": "separate", "range": [0, 5]}, 2 * 16),
        ("multiple_choice", "encoder", {}, 3 * 16),
        ("summarization", "encoder-decoder", {}, 16),
        ("summarization", "decoder", {}, 16 + 8),
    ],
)
def test_all_texts_of_an_example_count(
    task: str, kind: str, options: dict[str, Any], tokens: int, write_study: Callable[..., Path], tmp_path: Path
) -> None:
    plan = planned(write_study, tmp_path, task, kind, **options)
    (model,) = plan.models
    assert plan.example_tokens == {(model, "d"): tokens}
    lengths = plan.domains["d"].lengths("train")
    assert max(lengths) <= tokens
    if options.get("encoding") == "separate":
        # What a batch of such an example computes: both texts, as long as the longer one.
        rows = plan.domains["d"].split("train")
        pairs = zip(rows["first"], rows["second"], strict=True)
        assert list(lengths) == [2 * max(map(len, pair)) for pair in pairs]


def test_a_decoder_beside_an_encoder_decoder_counts_what_it_writes(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    both = [MODELS[kind](tmp_path / kind) for kind in ("encoder-decoder", "decoder")]
    path = write_study(
        model=str(both[0]),
        domains={"d": task_domain("summarization", tmp_path)},
        methods={"lora": {}},
        training={"epochs": 1, "evaluations": 1, "batch_size": 8, "max_length": 16, "precision": "fp32"},
    )
    document = yaml.safe_load(path.read_text())
    del document["model"]
    path.write_text(yaml.safe_dump(document | {"models": list(map(str, both))}))
    plan = plan_study(StudyFile.load(path), tmp_path / "cache")
    assert plan.example_tokens == {(str(both[0]), "d"): 16, (str(both[1]), "d"): 16 + 8}


def test_the_memory_of_choices_is_that_of_so_many_texts(write_study: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    one = planned(write_study, tmp_path / "one", "classification", "encoder")
    three = planned(write_study, tmp_path, "multiple_choice", "encoder")

    def memory(plan: StudyPlan) -> int:
        costs = TrialCosts(plan)
        (item,) = plan.cells
        return costs.memory(item.cell, item.largest) - 12 * item.largest.trainable - 4 * item.largest.trainable

    # The tiny encoder: 2 layers, width 32. Both are bases of the same size but for the head.
    of_a_text = activation_bytes(2, 32, 8 * 16, 4)
    assert memory(three) - memory(one) == pytest.approx(2 * of_a_text, rel=0.05)


def test_choices_of_data_that_is_not_at_hand_are_assumed() -> None:
    task = get_task("multiple_choice")
    for choices, texts in (("choices", 4), (["a", "b"], 2)):
        data = DataSpec.model_validate({"source": "hub:nobody/nothing", "columns": {"choices": choices}})
        assert task.texts_at_once({}, data) == texts
