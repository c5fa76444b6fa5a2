"""Prompting the frozen base: likelihoods, shots, and the baselines that a worker reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from writing_study import MODELS, plan_and_worker, study, topic_rows, train

from peftsearch.training import prompting
from peftsearch.training.prompting import Question, _balanced, _common, _spread, answer_scores
from peftsearch.training.segment import Probe, ProbeResult

AUTO = {"encoder-decoder": AutoModelForSeq2SeqLM, "decoder": AutoModelForCausalLM}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MODELS.items()}


def baselines(file: Any, folder: Path) -> tuple[ProbeResult, Any]:
    plan, worker = plan_and_worker(file, folder)
    found = worker.do(Probe(next(iter(plan.models)), "d"))
    assert isinstance(found, ProbeResult), found
    return found, (plan, worker)


def labelled(count: int) -> list[dict[str, str]]:
    rows = topic_rows(count)
    return [{"text": row["text"], "label": "good" if "dog" in row["text"] else "bad"} for row in rows]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shared", [2, 20])
def test_an_answers_likelihood_is_that_of_one_plain_forward_pass(
    kind: str, shared: int, places: dict[str, Path]
) -> None:
    """Whether or not what the prompts share is computed once."""
    model = AUTO[kind].from_pretrained(places[kind]).eval()
    begin = list(range(10, 10 + shared))
    questions = [Question([*begin, 70, 71, 72], [[50], [51, 52, 53]]), Question([*begin, 80], [[54, 55], [56]])]
    found = answer_scores(model, "decoder" if kind == "decoder" else "encoder-decoder", questions, CPU)
    for question, scores in zip(questions, found, strict=True):
        for answer, score in zip(question.answers, scores, strict=True):
            with torch.no_grad():
                if kind == "decoder":
                    ids = torch.tensor([question.prompt + answer])
                    logits = model(input_ids=ids).logits[0, len(question.prompt) - 1 : -1]
                else:
                    begun = torch.tensor([[0, *answer[:-1]]])
                    logits = model(input_ids=torch.tensor([question.prompt]), decoder_input_ids=begun).logits[0]
            wanted = logits.log_softmax(-1)[range(len(answer)), answer].mean().item()
            assert score == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_the_label_that_a_rigged_model_prefers_wins(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(places[kind])
    rows = {"train": labelled(16), "validation": labelled(8)}
    for favourite in ("good", "bad"):
        model = AUTO[kind].from_pretrained(places[kind])
        with torch.no_grad():
            # The last layer's states are normalised, so that a row of the head that follows their mean wins everywhere.
            model.lm_head.weight[tokenizer(favourite, add_special_tokens=False)["input_ids"]] = 0.0
            others = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("good", "bad")]
            hidden = torch.zeros(model.config.hidden_size)
            handle = model.lm_head.register_forward_pre_hook(
                lambda _, inputs, seen=hidden: seen.copy_(inputs[0].mean((0, 1)))
            )
            ids = torch.tensor([tokenizer("text : dog label :")["input_ids"]])
            model(input_ids=ids, **({"decoder_input_ids": torch.tensor([[0]])} if kind != "decoder" else {}))
            handle.remove()
            for token in others:
                model.lm_head.weight[token] = -20 * hidden / hidden.norm() ** 2
            model.lm_head.weight[tokenizer(favourite, add_special_tokens=False)["input_ids"]] *= -1
        folder = tmp_path / favourite
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found, _ = baselines(study(folder / "study", folder, {"task": "classification"}, rows), folder)
        share = 0.25 if favourite == "good" else 0.75
        assert found.scores["zero_shot"]["accuracy"] == share
        assert found.titles["zero_shot"] == "zero-shot prompting"
        assert "on all validation examples" in found.details["zero_shot"]
        assert found.details["few_shot"].startswith("4 training examples in the prompt; ")
        assert found.parameters["zero_shot"] == 0


@pytest.mark.parametrize("kind", MODELS)
def test_prompting_leaves_the_base_as_it_was_and_shares_its_tensors(
    kind: str, places: dict[str, Path], tmp_path: Path
) -> None:
    rows = {"train": labelled(16), "validation": labelled(8)}
    plan, worker = plan_and_worker(study(tmp_path, places[kind], {"task": "classification"}, rows), tmp_path)
    worker.warm_up()
    base = worker.base(next(iter(plan.models)))
    before = base.fingerprint()
    model = base.language_model("decoder" if kind == "decoder" else "encoder-decoder")
    assert model is not None
    in_memory = {tensor.data_ptr() for tensor in base._tensors.values()}
    own = [name for name, tensor in model.named_parameters() if tensor.data_ptr() not in in_memory]
    assert set(own) <= {"lm_head.weight"}
    worker.do(Probe(next(iter(plan.models)), "d"))
    assert base.fingerprint() == before


def test_a_checkpoint_without_a_language_modelling_head_is_not_prompted(
    places: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModel

    folder = tmp_path / "headless"
    AutoModel.from_pretrained(places["decoder"]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(places["decoder"]).save_pretrained(folder)
    rows = {"train": labelled(16), "validation": labelled(8)}
    found, _ = baselines(study(tmp_path, folder, {"task": "classification"}, rows), tmp_path)
    assert set(found.scores) == {"majority"}


@pytest.mark.parametrize("kind", MODELS)
def test_choices_are_compared_behind_what_they_share(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {
            "question": "what can run ?",
            "context": text["text"],
            "choices": ["the dog", "a river", "the city"],
            "label": n % 3,
        }
        for n, text in enumerate(topic_rows(12))
    ]
    domain = {"task": "multiple_choice"}
    more = {"training": {"max_length": 48}}
    found, _ = baselines(
        study(tmp_path, places[kind], domain, {"train": rows, "validation": rows[:6]}, **more), tmp_path
    )
    assert {"zero_shot", "few_shot"} <= set(found.scores)
    assert "the choice of the highest" in found.details["zero_shot"]


@pytest.mark.parametrize("kind", MODELS)
def test_texts_are_written_without_and_with_shots(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    rows = {"train": topic_rows(32), "validation": topic_rows(8, seed=1)}
    domain = {"task": "summarization", "options": {"target_length": 10}}
    found, (plan, worker) = baselines(study(tmp_path, places[kind], domain, rows), tmp_path)
    prepared = worker.domain(next(iter(plan.models)), "d")
    assert set(found.scores) == {"lead", "zero_shot", "few_shot"}

    from peftsearch.training.evaluate import evaluate

    # Without shots it is the frozen model's own evaluation.
    whole = evaluate(AUTO[kind].from_pretrained(places[kind]).eval(), prepared, "validation", 64)
    assert found.scores["zero_shot"] == whole.scores
    # Shots that do not fit are left out.
    shown = prompting._shots(prepared, prepared.split("validation")[:], 128, 4)
    text = prepared.tokenizer.decode(prompting._joined(shown, prepared))
    assert len(shown) == int(found.details["few_shot"].split()[0])
    assert text.count("summar") == len(shown)
    assert all(row["reference"] in text for row in shown)
    assert text.count("<s>") == (kind == "decoder")
    assert "</s>" not in text
    assert prompting._shots(prepared, prepared.split("validation")[:], 40, 4) == []


def test_shots_are_balanced_over_labels_and_always_the_same() -> None:
    labels = [0] * 90 + [1] * 9 + [2]
    chosen = _balanced(labels, 6)
    assert chosen == _balanced(labels, 6)
    assert len({labels[row] for row in chosen[:3]}) == 3
    assert abs(sum(labels[row] == 0 for row in chosen) - sum(labels[row] == 1 for row in chosen)) <= 1
    assert len(set(_balanced([0, 1], 10))) == 2


def test_at_most_200_examples_spread_over_the_split() -> None:
    rows = _spread(1000)
    assert len(rows) == 200
    assert rows[0] == 0
    assert rows[-1] == 999
    assert max(np.diff(rows)) <= 6
    assert _spread(3) == [0, 1, 2]


def test_what_prompts_begin_with_in_common() -> None:
    assert _common([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert _common([[1], [2]]) == 0
    assert _common([[1, 2]]) == 2


def test_an_encoder_is_not_prompted(tmp_path: Path) -> None:
    from tiny_models import tiny_encoder

    rows = {"train": labelled(16), "validation": labelled(8)}
    found, _ = baselines(study(tmp_path, tiny_encoder(tmp_path / "m"), {"task": "classification"}, rows), tmp_path)
    assert set(found.scores) == {"majority", "linear_probe"}


def test_tuning_beats_prompting(places: dict[str, Path], tmp_path: Path) -> None:
    rows = {"train": labelled(48), "validation": labelled(16)}
    file = study(tmp_path, places["decoder"], {"task": "classification"}, rows, training={"epochs": 8, "batch_size": 8})
    found, (plan, worker) = baselines(file, tmp_path)
    tuned = train(plan, worker, "full", learning_rate=3e-3)[-1].scores["accuracy"]
    assert tuned > max(found.scores["zero_shot"]["accuracy"], found.scores["few_shot"]["accuracy"])


@pytest.mark.parametrize("kind", MODELS)
def test_tied_weights_stay_tied_in_every_head_of_a_base(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    """A second task's model takes the tensors that the first one brought, in all places where they stand."""
    place = places[kind]
    if kind == "decoder":
        place = tmp_path / "tied"
        config = AUTO[kind].from_pretrained(places[kind]).config
        config.tie_word_embeddings = True
        AUTO[kind].from_config(config).save_pretrained(place)
        AutoTokenizer.from_pretrained(places[kind]).save_pretrained(place)
    classes = {"train": labelled(16), "validation": labelled(8)}
    texts = {"train": topic_rows(8), "validation": topic_rows(4)}
    plan, worker = plan_and_worker(study(tmp_path / "a", place, {"task": "classification"}, classes), tmp_path / "a")
    base = worker.base(next(iter(plan.models)))
    worker.warm_up()
    domain = {"task": "summarization", "options": {"target_length": 10}}
    other_plan, other = plan_and_worker(study(tmp_path / "b", place, domain, texts), tmp_path / "b")
    written = base.trial_model(other.domain(next(iter(other_plan.models)), "d"), seed=0, copy_weights=False)
    embedding = written.get_input_embeddings().weight
    if kind == "decoder":
        assert written.lm_head.weight is embedding
        assert embedding is base._tensors["model.embed_tokens.weight"]
    else:
        assert written.encoder.embed_tokens.weight is embedding
        assert written.decoder.embed_tokens.weight is embedding
