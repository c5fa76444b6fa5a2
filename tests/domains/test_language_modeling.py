"""Language modelling: blocks, masks, losses, perplexity, learning, bad input."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from task_runs import TaskRun
from tiny_models import WORDS, tiny_decoder, tiny_encoder, tiny_encoder_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftsearch.domains import get_task
from peftsearch.domains.tasks import LossOptions, Prediction, Task, Tokenization
from peftsearch.domains.tasks.base import EXAMPLE, PART
from peftsearch.domains.tasks.language_modeling import IGNORED
from peftsearch.spec import DataSpec, StudyError

MAKERS = {"encoder": tiny_encoder, "encoder-decoder": tiny_encoder_decoder, "decoder": tiny_decoder}
KNOWN = [word for word in WORDS if len(word) > 3]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make(folder / kind) for kind, make in MAKERS.items()}


def task(**options: Any) -> Task:
    return get_task("language_modeling", options=options)


def how(models: dict[str, Path], kind: Any, max_length: int = 16, **more: Any) -> Tokenization:
    return Tokenization(AutoTokenizer.from_pretrained(models[kind]), max_length, kind, **more)


def table(*texts: str) -> pa.Table:
    return task().read(pa.table({"text": list(texts)}), DataSpec(source="x"), "a.csv", ())


def text_of(words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(KNOWN) for _ in range(words))


@pytest.mark.parametrize("pack", [True, False])
def test_a_decoder_predicts_every_token_once(pack: bool, models: dict[str, Path]) -> None:
    setting = how(models, "decoder", max_length=8)
    texts = [text_of(20, 1), text_of(3, 2), "dog", text_of(9, 4)]
    rows = task(pack=pack).tokenize(table(*texts), (), setting).to_list()
    bos, eos = setting.tokenizer.bos_token_id, setting.tokenizer.eos_token_id
    streams = [[*setting.tokenizer(text)["input_ids"], eos] for text in texts]
    assert all(stream[0] == bos for stream in streams)
    wanted = [token for stream in streams for token in (stream if pack else stream[1:])]
    predicted = [token for row in rows for token in row["labels"] if token != IGNORED]
    assert predicted == wanted[1:] if pack else wanted
    for row in rows:
        assert 2 <= len(row["input_ids"]) <= 8
        # What is predicted at a position is the next token of the block.
        assert row["labels"] == [*row["input_ids"][1:], IGNORED]
    # All of a text's bytes count, those of the tokens that nothing predicts excepted (the first is a mark).
    assert sum(row["bytes"] for row in rows) == pytest.approx(sum(map(len, texts)))


def test_blocks_belong_to_the_text_that_they_begin_in(models: dict[str, Path]) -> None:
    setting = how(models, "decoder", max_length=8)
    rows = task().tokenize(table(text_of(20), "dog", "cat", text_of(5)), (), setting)
    # <s> and 20 words and </s>, twice <s> word </s>, <s> and 5 words and </s>: 35 tokens in steps of 7.
    assert rows[EXAMPLE] == [0, 0, 0, 0, 3]
    assert task(pack=False).tokenize(table(text_of(20), "dog"), (), setting)[EXAMPLE] == [0, 0, 0, 1]


def test_blocks_hold_one_data_set_of_a_join(models: dict[str, Path]) -> None:
    joined = table("dog", "cat", "bird").append_column(PART, pa.array(["a", "a", "b"]))
    rows = task().tokenize(joined, (), how(models, "decoder"))
    assert rows[EXAMPLE] == [0, 2]
    assert [len(ids) for ids in rows["input_ids"]] == [6, 3]


def test_an_encoders_blocks_have_marks_around_them(models: dict[str, Path]) -> None:
    setting = how(models, "encoder", max_length=10)
    texts = [text_of(13, 1), text_of(4, 2)]
    cls, sep, mask = (getattr(setting.tokenizer, f"{name}_token_id") for name in ("cls", "sep", "mask"))
    rows = task().tokenize(table(*texts), (), setting).to_list()
    restored = []
    for row in rows:
        assert row["input_ids"][0] == cls
        assert row["input_ids"][-1] == sep
        restored += [
            shown if wanted == IGNORED else wanted
            for shown, wanted in zip(row["input_ids"], row["labels"], strict=True)
        ][1:-1]
        masked = [shown for shown, wanted in zip(row["input_ids"], row["labels"], strict=True) if wanted != IGNORED]
        # At least one in each block; in scoring all that is predicted is hidden.
        assert masked
        assert set(masked) == {mask}
    bare = [setting.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert restored == [*bare[0], sep, *bare[1]]


def test_masks_are_drawn_as_berts(models: dict[str, Path]) -> None:
    setting = how(models, "encoder", max_length=66, training=True)
    text = table(text_of(64 * 200))
    rows = task(mask_copies=2).tokenize(text, (), setting)
    plain = setting.tokenizer(text.column("text").to_pylist(), add_special_tokens=False)["input_ids"][0]
    assert len(rows) == 400
    shown, wanted = np.array(rows["input_ids"]), np.array(rows["labels"])
    chosen = wanted != IGNORED
    assert chosen[:, 1:-1].mean() == pytest.approx(0.15, abs=0.01)
    assert not chosen[:, [0, -1]].any()
    fates = Counter(
        "masked" if a == setting.tokenizer.mask_token_id else "kept" if a == b else "replaced"
        for a, b in zip(shown[chosen], wanted[chosen], strict=True)
    )
    assert fates["masked"] / fates.total() == pytest.approx(0.8, abs=0.03)
    assert fates["kept"] / fates.total() == pytest.approx(0.1, abs=0.03)
    assert np.array_equal(np.where(chosen, wanted, shown)[0::2, 1:-1].ravel(), plain)
    # Copies differ, and the same text is always masked the same.
    assert not np.array_equal(chosen[0::2], chosen[1::2])
    assert task(mask_copies=2).tokenize(text, (), setting)[:] == rows[:]
    assert rows["input_ids"][0] == task().tokenize(text, (), setting)["input_ids"][0]
    assert len(task(mask_copies=2).tokenize(text, (), how(models, "encoder", max_length=66))) == 200


def test_the_loss_of_a_decoder_is_its_own(models: dict[str, Path]) -> None:
    """The same mean that transformers computes from labels, for each row by itself."""
    setting = how(models, "decoder", max_length=12)
    rows = task(pack=False).tokenize(table(text_of(8, 1), text_of(4, 2)), (), setting)
    model = AutoModelForCausalLM.from_pretrained(models["decoder"]).eval()
    batch = task().collate(rows[:], setting.tokenizer.pad_token_id)
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        ours = task().losses(output, batch).tolist()
        theirs = [
            float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in rows["input_ids"]
        ]
    assert ours == pytest.approx(theirs, rel=1e-5)
    predictions = task().predict(model, output, batch, Prediction("decoder"))
    counts = [len(ids) - 1 for ids in rows["input_ids"]]
    assert [count for _, count, _ in predictions] == counts
    scores = task().score(predictions, [None, None], ())
    nats = sum(loss * count for loss, count in zip(theirs, counts, strict=True))
    assert scores["perplexity"] == pytest.approx(math.exp(nats / sum(counts)), rel=1e-5)
    size = len(text_of(8, 1)) + len(text_of(4, 2))
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("in_front", [0, 5])
def test_losses_behind_soft_tokens(in_front: int) -> None:
    logits = torch.zeros(2, in_front + 3, 4)
    logits[0, in_front] = torch.tensor([0.0, 2.0, 0.0, 0.0])
    batch = {"labels": torch.tensor([[1, 2, IGNORED], [3, IGNORED, IGNORED]])}
    sure, even = math.log(3 + math.e**2), math.log(4)
    output = SimpleNamespace(logits=logits)
    assert task().losses(output, batch).tolist() == pytest.approx([(sure - 2 + even) / 2, even])
    smoothed = task().losses(output, batch, LossOptions(label_smoothing=0.4)).tolist()
    assert smoothed == pytest.approx([(0.6 * (sure - 2) + 0.4 * (sure - 0.5) + even) / 2, even])


def test_perplexity_weighs_tokens_not_texts() -> None:
    # 3 tokens at 1 nat each, 1 token at 5 nats: mean 2 nats, and 8 nats on 16 bytes.
    scores = task().score([[3.0, 3, 12.0], [5.0, 1, 4.0]], [None, None], ())
    assert scores == {"perplexity": pytest.approx(math.e**2), "bits_per_byte": pytest.approx(0.5 / math.log(2))}
    assert task().merge([[3.0, 3, 12.0], [5.0, 1, 4.0]]) == [8.0, 4, 16.0]
    assert math.isfinite(task().score([[1e6, 1, 1.0]], [None], ())["perplexity"])


def test_the_unigram_guess() -> None:
    train = {"labels": [[7, 7, 8, IGNORED]]}
    split = {"labels": [[7, IGNORED], [9, IGNORED]], EXAMPLE: [0, 0], "bytes": [1.0, 2.0]}
    guess = task().guesses(train, split, ())["unigram"]
    # Three of seven sevenths (2 + 1 of 3 + 3 kinds) for the 7, one sixth for the unseen 9.
    assert guess.predictions == [[pytest.approx(math.log(6 / 3) + math.log(6 / 1)), 2, 3.0]]


def test_bad_input(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"column 'text' of a\.csv holds no text in row 2"):
        table("dog", " ")
    with pytest.raises(StudyError, match=r"language_modeling is for encoders and decoders"):
        TaskRun.make(
            tmp_path,
            models["encoder-decoder"],
            {"task": "language_modeling"},
            [{"text": text_of(9, n)} for n in range(20)],
        )
    with pytest.raises(ValueError, match="has no mask token"):
        task().tokenize(table("dog"), (), Tokenization(how(models, "decoder").tokenizer, 16, "encoder"))


def sentences(count: int) -> list[dict[str, str]]:
    """Two sentences that are always the same, after a number."""
    draw = random.Random(0)
    kinds = ["the dog can run to the big house", "a red bird is not in one old tree"]
    return [{"text": f"{number % 10} {number // 10 % 10} {draw.choice(kinds)}"} for number in range(count)]


@pytest.mark.parametrize(
    ("kind", "method"), [("encoder", "full"), ("decoder", "full"), ("encoder", "prompt"), ("decoder", "prompt")]
)
def test_learning_lowers_perplexity(kind: str, method: str, models: dict[str, Path], tmp_path: Path) -> None:
    domain = {"task": "language_modeling", "options": {"pack": False}}
    run = TaskRun.make(tmp_path, models[kind], domain, sentences(100), epochs=8, evaluations=8, max_length=24)
    assert run.domain.direction == "minimize"
    results = run.train(method, **({"learning_rate": 1e-2} if method == "full" else {}))
    assert results[-1].scores["perplexity"] < results[0].scores["perplexity"]
    if method == "full":
        baselines = run.probe()
        assert results[-1].scores["perplexity"] < baselines["unigram"]["perplexity"]
        # What the model knows before it is tuned: these know nothing.
        untuned = baselines["zero_shot"]["perplexity"]
        assert results[0].scores["perplexity"] < untuned
        assert untuned > baselines["unigram"]["perplexity"]
    if kind == "decoder":
        # Nearly all texts have as many tokens: the mean over texts is that over tokens.
        assert math.log(results[-1].scores["perplexity"]) == pytest.approx(results[-1].loss, rel=0.05)
