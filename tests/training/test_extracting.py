"""Prompts whose answers are stretches of the text: what is asked, what is found again, and what it scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from writing_study import AUTO, MODELS, plan_and_worker, study

from peftsearch.training import extracting
from peftsearch.training import probe as probe_module
from peftsearch.training.extracting import EXTRACTED, entity_tags, line_ends, together
from peftsearch.training.segment import Probe, ProbeResult

LABELS = ("O", "B-Drug", "I-Drug", "B-Gene", "I-Gene")
ANIMALS = ("dog", "cat", "bird", "dog")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MODELS.items()}


def tags(words: str, **listed: list[str]) -> list[str]:
    return [LABELS[number] for number in entity_tags(words.split(), listed, LABELS)]


def test_entities_are_found_as_whole_words_whatever_their_case_and_blanks() -> None:
    assert tags("Alpha - synuclein binds aspirin", Gene=["alpha-synuclein"], Drug=[" Aspirin "]) == [
        "B-Gene", "I-Gene", "I-Gene", "O", "B-Drug",
    ]  # fmt: skip
    # Not inside a word, and not across half of one.
    assert tags("aspirins and anti aspirin", Drug=["aspirin", "iaspirin"]) == ["O", "O", "O", "B-Drug"]
    assert tags("iron iron oxide", Drug=["iron", "iron oxide"]) == ["B-Drug", "B-Drug", "I-Drug"]
    assert tags("p53 gene p53", Gene=["p53"]) == ["B-Gene", "O", "B-Gene"]
    assert tags("nothing here", Drug=["none", "", " "], Gene=[]) == ["O", "O"]
    # "none" is no entity, whatever the text says; a list's full stop is no part of one, an abbreviation's is.
    assert tags("None of them took aspirin .", Gene=["none"], Drug=["aspirin."]) == [*"OOOO", "B-Drug", "O"]
    assert tags("vit. C or vit.", Drug=["vit."]) == ["B-Drug", "O", "O", "B-Drug"]
    assert entity_tags(["New York", "is"], {"Drug": ["new york"]}, LABELS) == [1, 0]
    # What two types name goes to the one that comes first, always the same.
    assert tags("x y", Drug=["x"], Gene=["x"]) == tags("x y", Gene=["x"], Drug=["x"])


def test_a_text_from_its_windows() -> None:
    text = "name ____ ____ ____ date ____ ____ end"
    spans = [(found.start(), found.end()) for found in re.finditer(r"\S+", text)]
    windows = []
    for first in range(0, 6, 2):
        own = spans[first : first + 4]
        windows.append((text[own[0][0] : own[-1][1]], [0, *(end - own[0][0] for _, end in own), 0]))
    assert windows[0][0] == "name ____ ____ ____"
    # What repeats itself is no overlap.
    assert together(windows, 2) == text
    assert together([("one two", [3, 7]), ("oranges", [7])], 0) == "one two oranges"
    assert together(windows[:1], 2) == windows[0][0]


def answers(count: int, words: int = 8) -> list[dict[str, Any]]:
    """What runs in a text: one of three animals, or in every fifth nothing."""
    rows = []
    for number in range(count):
        animal = ANIMALS[number % len(ANIMALS)]
        text = f"{'red ' * (number % words)}the {animal if number % 5 else 'house'} can run"
        found = {"text": [animal], "answer_start": [text.index(animal)]} if number % 5 else {}
        rows.append(
            {"question": "what can run ?", "context": text, "answers": found or {"text": [], "answer_start": []}}
        )
    return rows


def writer(kind: str, place: Path, word: str, folder: Path) -> Path:
    """A model that writes one word, whatever it reads: to it all tokens are the same."""
    tokenizer, model = AutoTokenizer.from_pretrained(place), AUTO[kind].from_pretrained(place).eval()
    with torch.no_grad():
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(embeddings[7].clone().expand_as(embeddings))
        seen: list[torch.Tensor] = []
        handle = model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -1]))
        ids = torch.tensor([[5, 6, 7]])
        model(input_ids=ids, **({"decoder_input_ids": torch.tensor([[0]])} if kind != "decoder" else {}))
        handle.remove()
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        model.lm_head.weight[token] = seen[0]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def probe(file: Any, folder: Path) -> tuple[ProbeResult, Any, Any]:
    plan, worker = plan_and_worker(file, folder)
    found = worker.do(Probe(next(iter(plan.models)), "d"))
    assert isinstance(found, ProbeResult), found
    assert not found.failures
    return found, worker, worker.domain(next(iter(plan.models)), "d")


@pytest.mark.parametrize("kind", MODELS)
def test_what_a_model_writes_is_scored_as_the_answer(
    kind: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More do not fit beside a text in the tiny models.
    monkeypatch.setattr(probe_module, "SHOTS", 2)
    rows = {
        split: [row for row in answers(count) if row["answers"]["text"]]
        for split, count in (("train", 30), ("validation", 25))
    }
    domain = {"task": "question_answering", "options": {"max_answer_length": 1}}
    for word in ("dog", "cat"):
        folder = writer(kind, places[kind], word, tmp_path / word)
        file = study(folder / "study", folder, domain, rows, training={"max_length": 16})
        found, _, prepared = probe(file, folder)
        # Contexts of several windows are asked about once.
        assert len(prepared.lengths("validation")) > 20 or kind == "encoder-decoder"
        right = sum(row["answers"]["text"] == [word] for row in rows["validation"])
        assert found.scores["zero_shot"]["exact_match"] == pytest.approx(right / 20)
        assert found.examples["zero_shot"] == 20
        assert "the frozen model writes the answer, on all validation examples" in found.details["zero_shot"]
        assert found.details["few_shot"].startswith("2 training examples in the prompt; ")


@pytest.mark.parametrize("kind", MODELS)
def test_a_question_is_asked_below_its_whole_text(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    rows = {"train": answers(30), "validation": answers(20)}
    file = study(tmp_path, places[kind], {"task": "question_answering"}, rows, training={"max_length": 16})
    plan, worker = plan_and_worker(file, tmp_path)
    domain, tokenizer = worker.domain(next(iter(plan.models)), "d"), AutoTokenizer.from_pretrained(places[kind])
    seen = domain.split("validation")[:]
    asked = EXTRACTED["question_answering"](domain, tokenizer, seen, 400, 2)
    assert asked is not None
    assert asked.shots == 2
    assert len(asked.prompts) == 20
    for prompt, row in zip(asked.prompts, rows["validation"], strict=True):
        assert prompt.startswith('Answer the question with words of the text, or with "no answer"')
        *shots, own = prompt.split("Text: ")[1:]
        assert own == f"{row['context']}\nQuestion: what can run ?\nAnswer:"
        # One that has an answer and one that has none.
        assert sum(shot.endswith("Answer: no answer\n\n") for shot in shots) == 1
    assert asked.decide(["the dog", "No answer."]) == ["the dog", ""]
    # Of a text that does not fit the beginning is asked about; where no shot fits there is no few-shot prompt.
    short = EXTRACTED["question_answering"](domain, tokenizer, seen, 82, 0)
    assert short is not None
    assert short.how.endswith("contexts cut to fit)")
    assert all("Text: the" in prompt or "Text: red" in prompt for prompt in short.prompts)
    assert all(len(tokenizer(prompt)["input_ids"]) + short.most <= 82 for prompt in short.prompts)
    assert EXTRACTED["question_answering"](domain, tokenizer, seen, 82, 2) is None
    with pytest.raises(ValueError, match="the question and its answer fill the 40 tokens that a prompt may have"):
        EXTRACTED["question_answering"](domain, tokenizer, seen, 40, 0)


def sentences(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        words = ["the", ANIMALS[number % len(ANIMALS)], "can", "see", "a", "house" if number % 3 else "river"]
        tags = ["O", "B-Animal", "O", "O", "O", "B-Place" if number % 3 else "O"]
        rows.append({"tokens": words, "tags": tags})
    return rows


@pytest.mark.parametrize("kind", MODELS)
def test_entities_that_a_model_lists_are_scored(
    kind: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extracting, "ENTITY_TOKENS", 1)
    rows = {"train": sentences(24), "validation": sentences(16)}
    folder = writer(kind, places[kind], "dog", tmp_path / "model")
    found, _, domain = probe(study(tmp_path / "study", folder, {"task": "token_classification"}, rows), tmp_path)
    # "dog" is listed as an animal and as a place, and the first type takes it.
    assert found.scores["zero_shot"]["precision"] == 1
    assert found.scores["zero_shot"]["recall/Animal"] == pytest.approx(0.5)
    assert found.scores["zero_shot"]["recall/Place"] == 0
    tokenizer = AutoTokenizer.from_pretrained(places[kind])
    asked = EXTRACTED["token_classification"](domain, tokenizer, domain.split("validation")[:], 400, 2)
    assert asked is not None
    assert len(asked.prompts) == 2 * 16
    assert "of the type Place, separated by semicolons" in asked.prompts[1]
    shots = asked.prompts[1].split("Text: ")[1:-1]
    assert sorted(shot.split("Place: ")[1].strip() for shot in shots) == ["house", "none"]
    written = ["dog", "none", "cat; the", "house"] * 8
    predicted = asked.decide(written)[:2]
    assert [domain.labels[number] for number in predicted[0]] == ["O", "B-Animal", "O", "O", "O", "O"]
    assert [domain.labels[number] for number in predicted[1]] == ["B-Animal", "B-Animal", "O", "O", "O", "B-Place"]
    assert json.dumps(predicted)


def test_types_are_called_by_the_names_that_the_study_gives_them(places: dict[str, Path], tmp_path: Path) -> None:
    kind = "decoder"
    rows = {"train": sentences(24), "validation": sentences(16)}
    spec = {"task": "token_classification", "options": {"names": {"Place": "location"}}}
    _, _, domain = probe(study(tmp_path / "study", places[kind], spec, rows), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(places[kind])
    asked = EXTRACTED["token_classification"](domain, tokenizer, domain.split("validation")[:], 400, 2)
    assert asked is not None
    assert "of the type Animal, separated by semicolons" in asked.prompts[0]
    assert "of the type location, separated by semicolons" in asked.prompts[1]
    assert "Place" not in asked.prompts[1]
    assert asked.prompts[1].endswith("location:")
    predicted = asked.decide(["dog", "none", "cat; the", "house"] * 8)[:2]
    assert [domain.labels[number] for number in predicted[1]] == ["B-Animal", "B-Animal", "O", "O", "O", "B-Place"]


def test_a_line_ends_where_a_token_says_so(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = __import__("tokenizers").decoders.ByteLevel()
    tokenizer.train_from_iterator(["one\ntwo\n\nthree"] * 9, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ends = line_ends(fast)
    assert ends
    assert all("\n" in fast.decode([token]) for token in ends)
    assert not any("\n" in fast.decode([token]) for token in set(fast.get_vocab().values()) - ends)
