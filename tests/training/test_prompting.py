"""Prompting the frozen base: likelihoods, shots, and the baselines that a worker reports."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config
from writing_study import AUTO, MODELS, plan_and_worker, study, topic_rows, train

from peftsearch.training import asking, prompting
from peftsearch.training.asking import balanced
from peftsearch.training.likelihood import Question, answer_scores, common
from peftsearch.training.prompting import _spread
from peftsearch.training.segment import PROMPTED, Probe, ProbeResult

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


def rigged(kind: str, place: Path, words: tuple[str, ...], folder: Path) -> Path:
    """A model for which the first of some words is likely everywhere, and the others are unlikely."""
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AUTO[kind].from_pretrained(place)
    tokens = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    with torch.no_grad():
        # The last layer's states are normalised, so that a row of the head that follows their mean wins everywhere.
        model.lm_head.weight[tokens] = 0.0
        hidden = torch.zeros(model.config.hidden_size)
        handle = model.lm_head.register_forward_pre_hook(
            lambda _, inputs, seen=hidden: seen.copy_(inputs[0].mean((0, 1)))
        )
        ids = torch.tensor([tokenizer("text : dog label :")["input_ids"]])
        model(input_ids=ids, **({"decoder_input_ids": torch.tensor([[0]])} if kind != "decoder" else {}))
        handle.remove()
        for token in tokens:
            model.lm_head.weight[token] = -20 * hidden / hidden.norm() ** 2
        model.lm_head.weight[tokens[0]] *= -1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_the_label_that_a_rigged_model_prefers_wins(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    rows = {"train": labelled(16), "validation": labelled(8)}
    for words in (("good", "bad"), ("bad", "good")):
        folder = rigged(kind, places[kind], words, tmp_path / words[0])
        found, _ = baselines(study(folder / "study", folder, {"task": "classification"}, rows), folder)
        share = 0.25 if words[0] == "good" else 0.75
        assert found.scores["zero_shot"]["accuracy"] == share
        assert found.titles["zero_shot"] == "zero-shot prompting"
        assert "on all validation examples" in found.details["zero_shot"]
        assert found.details["few_shot"].startswith("4 training examples in the prompt; ")
        assert found.parameters["zero_shot"] == 0


@pytest.mark.parametrize("kind", MODELS)
def test_each_of_several_labels_is_asked_about_by_itself(
    kind: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {
        split: [{"text": row["text"], "label": ["animal"] * ("dog" in row["text"]) + ["text"]} for row in topic_rows(n)]
        for split, n in (("train", 16), ("validation", 8))
    }
    for words in (("yes", "no"), ("no", "yes")):
        folder = rigged(kind, places[kind], words, tmp_path / words[0])
        found, (plan, worker) = baselines(study(folder / "study", folder, {"task": "multi_label"}, rows), folder)
        # Nearly every label, of which 2 + 8 of 16 are right; or nearly none.
        score = found.scores["zero_shot"]["micro_f1"]
        assert score > 0.6 if words[0] == "yes" else score < 0.3
        assert "training examples in the prompt; the labels for which yes" in found.details["few_shot"]
    domain, tokenizer = worker.domain(next(iter(plan.models)), "d"), AutoTokenizer.from_pretrained(places[kind])
    asked = asking.ASKED["multi_label"](domain, tokenizer, domain.split("validation")[:], 512, 2)
    assert asked is not None
    assert asked.shots == 2
    assert len(asked.questions) == 8 * 2
    assert asked.decide([np.array([-1.0, -2.0]), np.array([-2.0, -1.0])] * 8) == [[1, 0]] * 8
    prompt = tokenizer.decode(asked.questions[1].prompt)
    # One that applies and one that does not.
    assert prompt.count("yes or no? answer : yes") == prompt.count("yes or no? answer : no") == 1
    assert "does the label text apply, yes or no? answer :" in prompt[-60:]
    # Where a label's question costs as much as an example may, two labels leave half of the examples.
    monkeypatch.setattr(prompting, "PROMPTS", 1)
    base = worker.base(next(iter(plan.models)))
    assert prompting.Prompting(base, domain, 2, CPU, "validation", 4).examples == 2


@pytest.mark.parametrize("kind", MODELS)
def test_labels_are_called_by_the_names_that_the_study_gives_them(
    kind: str, places: dict[str, Path], tmp_path: Path
) -> None:
    """Codes say nothing to a model that has never seen them; of a trained one the labels stay what they are."""
    rows = {
        split: [{"text": row["text"], "label": "01"["dog" in row["text"]]} for row in topic_rows(n)]
        for split, n in (("train", 16), ("validation", 8))
    }
    domain_spec = {"task": "classification", "options": {"names": {"1": "house", "0": "river"}}}
    # A model that would rather write this word than any other.
    folder = rigged(kind, places[kind], ("house", "river"), tmp_path / "model")
    found, (plan, worker) = baselines(study(tmp_path / "study", folder, domain_spec, rows), tmp_path)
    domain, tokenizer = worker.domain(next(iter(plan.models)), "d"), AutoTokenizer.from_pretrained(places[kind])
    assert domain.labels == ("0", "1")
    truth = [row["label"] for row in rows["validation"]]
    assert found.scores["zero_shot"]["accuracy"] == pytest.approx(truth.count("1") / len(truth))
    asked = asking.ASKED["classification"](domain, tokenizer, domain.split("validation")[:], 512, 2)
    assert asked is not None
    prompt = tokenizer.decode(asked.questions[0].prompt)
    assert "as one of : river, house." in prompt
    assert prompt.count("label : river") == prompt.count("label : house") == 1


@pytest.mark.parametrize("kind", MODELS)
def test_a_score_is_the_mean_of_the_scales_numbers(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    pairs = [{"text": f"dog {n}", "text_pair": "red house", "label": float(n % 5)} for n in range(24)]
    rows = {"train": pairs[:16], "validation": pairs[16:]}
    data = {"columns": {"text": "text", "text_pair": "text_pair", "label": "label"}}
    domain_spec = {"task": "similarity", "options": {"range": [0, 4]}, "data": data}
    found, (plan, worker) = baselines(study(tmp_path, places[kind], domain_spec, rows), tmp_path)
    assert {"zero_shot", "few_shot"} <= set(found.scores)
    domain, tokenizer = worker.domain(next(iter(plan.models)), "d"), AutoTokenizer.from_pretrained(places[kind])
    asked = asking.ASKED["similarity"](domain, tokenizer, domain.split("validation")[:], 512, 2)
    assert asked is not None
    equal, certain = np.zeros(5), np.array([0.0, 0.0, 0.0, 0.0, 50.0])
    assert asked.decide([equal, certain]) == pytest.approx([2.0, 4.0])
    assert "by their probabilities" in asked.how


def test_the_numbers_of_a_scale() -> None:
    assert asking.scale_numbers(0.0, 5.0).tolist() == [0, 1, 2, 3, 4, 5]
    assert asking.scale_numbers(0.0, 1.0) == pytest.approx(np.arange(11) / 10)
    assert asking.scale_numbers(0.0, 100.0) == pytest.approx(np.arange(11) * 10)


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
    chosen = balanced(labels, 6)
    assert chosen == balanced(labels, 6)
    assert len({labels[row] for row in chosen[:3]}) == 3
    assert abs(sum(labels[row] == 0 for row in chosen) - sum(labels[row] == 1 for row in chosen)) <= 1
    assert len(set(balanced([0, 1], 10))) == 2


def test_at_most_200_examples_spread_over_the_split() -> None:
    rows = _spread(1000, PROMPTED)
    assert len(rows) == 200
    assert rows[0] == 0
    assert rows[-1] == 999
    assert max(np.diff(rows)) <= 6
    assert _spread(3, PROMPTED) == [0, 1, 2]
    assert _spread(1000, None) == list(range(1000))


@pytest.mark.parametrize("limit", [None, 6])
def test_the_test_split_is_prompted_as_a_whole_unless_the_study_limits_it(
    limit: int | None, places: dict[str, Path], tmp_path: Path
) -> None:
    rows = {"train": labelled(16), "validation": labelled(8), "test": labelled(12)}
    plan, worker = plan_and_worker(study(tmp_path, places["decoder"], {"task": "classification"}, rows), tmp_path)
    found = worker.do(Probe(next(iter(plan.models)), "d", read_test=True, prompted=limit))
    assert isinstance(found, ProbeResult), found
    assert found.examples == {"majority": 12, "zero_shot": limit or 12, "few_shot": limit or 12}
    assert ("on 6 of 12 test examples" if limit else "on all test examples") in found.details["zero_shot"]
    assert found.read_at is not None


def test_what_prompts_begin_with_incommon() -> None:
    assert common([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common([[1], [2]]) == 0
    assert common([[1, 2]]) == 2


def test_an_encoder_is_not_prompted(tmp_path: Path) -> None:
    from tiny_models import tiny_encoder

    rows = {"train": labelled(16), "validation": labelled(8)}
    found, _ = baselines(study(tmp_path, tiny_encoder(tmp_path / "m"), {"task": "classification"}, rows), tmp_path)
    assert set(found.scores) == {"majority", "linear_probe"}


def test_a_prompt_that_has_no_room_in_the_model_fails_before_the_model_sees_it() -> None:
    model = SimpleNamespace(config=GPT2Config(n_positions=8))
    questions = [Question([1], [[2]]), Question([1] * 7, [[2, 3], [2]])]
    prompting._check_length(model, 8)
    with pytest.raises(ValueError, match="have 9 tokens, the model has 8 positions"):
        prompting._check_length(model, max(map(prompting._length, questions)))


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
