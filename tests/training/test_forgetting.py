"""Forgetting: the rise of the loss on general text, measured once a trial is at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import tiny_encoder
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from writing_study import MODELS, plan_and_worker, prepare, study, topic_rows, train

from peftsearch.search.plan import plan_study
from peftsearch.spec import ForgettingSpec, StudyError
from peftsearch.training.base_model import FrozenBase
from peftsearch.training.forgetting import GeneralText, general_texts

TEXTS = [
    "the patient has a fever and an infection",
    "the party may give notice of a breach of the agreement",
    "a",
    "one dog and two cats ran to the house in the city by the river and did not find any of it",
]
ROWS = {"train": topic_rows(16), "validation": topic_rows(4, seed=1)}
DOMAIN = {"task": "summarization", "options": {"target_length": 10}}
LORA = {"rank": 4, "alpha": 8.0, "targets": "all-linear", "variant": "lora", "dropout": 0.0, "learning_rate": 2e-2}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in {**MODELS, "encoder": tiny_encoder}.items()}


def write_texts(folder: Path, texts: list[Any], column: str = "text") -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "general.jsonl").write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return {"source": "general.jsonl"}


@pytest.mark.parametrize("splits", [("train", "validation", "test"), ("train", "validation"), ("train",)])
def test_general_texts_are_those_that_nobody_trained_on(splits: tuple[str, ...], tmp_path: Path) -> None:
    """Bases have read the train splits of public corpora: of a test split it is more likely that they have not."""
    source = datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": [f"{split} a b"]}) for split in splits})
    source.save_to_disk(tmp_path / "general")
    assert general_texts(ForgettingSpec(source="general"), tmp_path) == (f"{splits[-1]} a b",)


def test_a_decoders_loss_is_transformers_own_over_all_tokens(places: dict[str, Path], tmp_path: Path) -> None:
    domain = prepare(study(tmp_path, places["decoder"], DOMAIN, ROWS), tmp_path / "cache")
    general = GeneralText(TEXTS, FrozenBase(str(places["decoder"])), domain, 3)
    model = AutoModelForCausalLM.from_pretrained(places["decoder"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(places["decoder"])
    losses, counts = [], []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"][:32]])
        if ids.shape[1] >= 4:
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=ids).loss.item())
            counts.append(ids.shape[1] - 1)
    assert general.base_loss == pytest.approx(np.average(losses, weights=counts), rel=1e-5)
    assert len(counts) == 3


def test_an_encoder_decoder_writes_the_second_half_of_each_text(places: dict[str, Path], tmp_path: Path) -> None:
    place = places["encoder-decoder"]
    domain = prepare(study(tmp_path, place, DOMAIN, ROWS), tmp_path / "cache")
    general = GeneralText(TEXTS[:1], FrozenBase(str(place)), domain, 3)
    ids = AutoTokenizer.from_pretrained(place)(TEXTS[0])["input_ids"]
    half = len(ids) // 2
    with torch.no_grad():
        model = AutoModelForSeq2SeqLM.from_pretrained(place).eval()
        loss = model(input_ids=torch.tensor([ids[:half]]), labels=torch.tensor([ids[half:]])).loss.item()
    assert general.base_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_trial_ends_with_the_rise_of_the_loss(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    from peftsearch.training.session import build_model, load_trained

    training = {"epochs": 2, "evaluations": 2, "batch_size": 8}
    forgetting = write_texts(tmp_path, TEXTS)
    plan, worker = plan_and_worker(
        study(tmp_path, places[kind], DOMAIN, ROWS, training=training, forgetting=forgetting), tmp_path
    )
    on_the_way, final = train(plan, worker, "lora", **LORA)
    assert "forgetting" not in on_the_way.scores
    rise = final.scores["forgetting"]
    assert abs(rise) > 1e-3

    path = next(iter(plan.models))
    domain, base = worker.domain(path, "d"), worker.base(path)
    model = build_model(base, domain, "lora", {"quantization": "none", **LORA}, 0)
    general = GeneralText(TEXTS, FrozenBase(str(places[kind])), domain, 64)
    # LoRA begins where the base is.
    assert general.rise(model) == pytest.approx(0.0, abs=1e-6)
    load_trained(model, tmp_path / "trials" / "00000" / "weights.safetensors")
    assert general.rise(model) == pytest.approx(rise, abs=1e-5)


def test_measuring_changes_no_other_number(places: dict[str, Path], tmp_path: Path) -> None:
    training = {"epochs": 2, "evaluations": 2, "batch_size": 8}
    found = []
    for name, more in (("with", {"forgetting": write_texts(tmp_path / "with", TEXTS)}), ("without", {})):
        file = study(tmp_path / name, places["decoder"], DOMAIN, ROWS, training=training, **more)
        plan, worker = plan_and_worker(file, tmp_path / name)
        found.append([train(plan, worker, "lora", number, **LORA) for number in range(2)])
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.loss, a.train_loss) == (b.loss, b.train_loss)
            assert {name: value for name, value in a.scores.items() if name != "forgetting"} == b.scores


def test_soft_prompts_and_masked_models_are_measured_too(places: dict[str, Path], tmp_path: Path) -> None:
    training = {"epochs": 1, "evaluations": 1, "batch_size": 8}
    forgetting = write_texts(tmp_path, TEXTS)
    file = study(tmp_path, places["decoder"], DOMAIN, ROWS, training=training, forgetting=forgetting)
    plan, worker = plan_and_worker(file, tmp_path)
    final = train(plan, worker, "prompt", tokens=3, init="vocabulary", init_text="", learning_rate=3e-2)[-1]
    assert np.isfinite(final.scores["forgetting"])

    rows = {split: [{"text": row["text"]} for row in records] for split, records in ROWS.items()}
    folder = tmp_path / "masked"
    forgetting = write_texts(folder, TEXTS)
    file = study(
        folder, places["encoder"], {"task": "language_modeling"}, rows, training=training, forgetting=forgetting
    )
    plan, worker = plan_and_worker(file, folder)
    assert abs(train(plan, worker, "lora", **LORA)[-1].scores["forgetting"]) > 1e-4


@pytest.mark.parametrize(
    ("texts", "forgetting", "domain", "message"),
    [
        (TEXTS, {"column": "body"}, DOMAIN, "general.jsonl has no column 'body'"),
        ([" ", None, ""], {}, DOMAIN, "column 'text' of general.jsonl holds no text"),
        ([1, 2], {}, DOMAIN, "column 'text' of general.jsonl holds no texts but numbers"),
        (TEXTS, {"source": "nowhere.jsonl"}, DOMAIN, "no file or folder 'nowhere.jsonl'"),
        (TEXTS, {}, {"task": "classification"}, "forgetting is measured with the language-modelling head"),
    ],
)
def test_bad_input_gets_one_sentence(
    texts: list[Any], forgetting: dict[str, Any], domain: dict[str, Any], message: str, places: Any, tmp_path: Path
) -> None:
    section = {**write_texts(tmp_path, texts), **forgetting}
    rows: Any = ROWS
    if domain["task"] == "classification":
        rows = {
            split: [{"text": row["text"], "label": row["target"]} for row in records] for split, records in ROWS.items()
        }
    with pytest.raises(StudyError) as raised:
        plan_study(study(tmp_path, places["decoder"], domain, rows, forgetting=section), tmp_path / "cache")
    assert message in str(raised.value)
    assert raised.value.loc[0] == "forgetting"
    assert "\n" not in raised.value.message


def test_texts_are_taken_evenly_from_the_whole_source(places: dict[str, Path], tmp_path: Path) -> None:
    section = write_texts(tmp_path, [f"text {number}" for number in range(100)] + [" "])
    file = study(tmp_path, places["decoder"], DOMAIN, ROWS, forgetting={**section, "rows": 3})
    plan = plan_study(file, tmp_path / "cache")
    assert plan.general_texts == ("text 0", "text 49", "text 99")
    assert plan.for_workers(tmp_path, 1).general_texts == plan.general_texts
    # A file may have any name, if its format is said.
    Path(tmp_path / section["source"]).rename(tmp_path / "general")
    file = study(
        tmp_path, places["decoder"], DOMAIN, ROWS, forgetting={"source": "general", "format": "jsonl", "rows": 3}
    )
    assert plan_study(file, tmp_path / "cache").general_texts == plan.general_texts
