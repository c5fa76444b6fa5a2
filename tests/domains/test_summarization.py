"""Summarisation: prompts and targets as tokens, their loss, and what is written, by either kind of model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from writing_study import MODELS, plan_and_worker, prepare, study, topic_rows, train

from peftsearch.domains import PreparedDomain
from peftsearch.domains.tasks.base import LossOptions, Prediction
from peftsearch.export.evaluate import evaluate_adapter
from peftsearch.export.folder import LABELS
from peftsearch.spec import StudyError
from peftsearch.training.evaluate import evaluate

KINDS = tuple(MODELS)
AUTO = {"encoder-decoder": AutoModelForSeq2SeqLM, "decoder": AutoModelForCausalLM}
ROWS = {"train": topic_rows(16), "validation": topic_rows(8, seed=1)}
Make = Callable[..., PreparedDomain]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MODELS.items()}


@pytest.fixture
def make(places: dict[str, Path], tmp_path: Path) -> Make:
    """Prepares a domain for a kind of model."""

    def prepared(kind: str, options: dict[str, Any] | None = None, rows: Any = None, **more: Any) -> PreparedDomain:
        options = {"target_length": 16, **(options or {})}
        domain = {"task": "summarization", "options": options, "data": more.pop("data", {})}
        return prepare(study(tmp_path, places[kind], domain, rows or ROWS, **more), tmp_path / "cache")

    return prepared


def batch_of(domain: PreparedDomain, rows: Any = slice(None), split: str = "validation") -> dict[str, Any]:
    return domain.task.collate(domain.split(split)[rows], domain.pad_token_id)


def shown(batch: dict[str, Any], task: Any) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in task.hidden}


@pytest.mark.parametrize(
    ("kind", "options", "prompt"),
    [
        ("encoder-decoder", {}, "summarize: the dog</s>"),
        ("encoder-decoder", {"prefix": "abstract of "}, "abstract of the dog</s>"),
        ("encoder-decoder", {"template": "{text} in one word:"}, "the dog in one word:</s>"),
        ("decoder", {}, "<s> text: the dog summary:"),
        ("decoder", {"prefix": "abstract of "}, "<s> text: the dog summary:"),
        ("decoder", {"template": "{text} = "}, "<s> the dog ="),
    ],
)
def test_what_the_model_reads(kind: str, options: dict[str, Any], prompt: str, make: Make) -> None:
    rows = {"train": [{"text": "the dog", "target": "one"}], "validation": [{"text": "The dog", "target": "A cat"}]}
    domain = make(kind, options, rows)
    row = domain.split("validation")[0]
    decode = domain.tokenizer.decode
    assert decode(row["input_ids"]).replace(" :", ":") == prompt.replace("</s>", " </s>")
    assert decode(row["labels"]) == "a cat </s>"
    assert domain.task.references(domain.split("validation")[:]) == ["A cat"]


def test_a_text_that_is_too_long_is_cut_and_the_template_is_not(make: Make) -> None:
    words = " ".join(["dog", "cat"] * 40)
    rows = {"train": [{"text": words, "target": "one"}], "validation": [{"text": words, "target": "one"}]}
    for kind, tail in (("decoder", "summary :"), ("encoder-decoder", "</s>")):
        domain = make(kind, rows=rows)
        ids = domain.split("train")[0]["input_ids"]
        assert len(ids) == 32
        assert domain.tokenizer.decode(ids).endswith(f"dog {tail}") or domain.tokenizer.decode(ids).endswith(
            f"cat {tail}"
        )
        assert domain.warnings == (
            "1 of 1 texts of validation stand in train too, up to case and white space: scores on validation flatter",
            "100% of train fills all 32 tokens of max_length: texts are cut off",
        )


def test_a_book_is_cut_where_its_tokens_are_and_not_where_its_letters_are(make: Make) -> None:
    """White space makes no token: of a text that begins with much of it, more is read."""
    gaps = (" " * 300 + "dog") * 40
    rows = {"train": [{"text": gaps, "target": "one"}], "validation": [{"text": "dog " * 9999, "target": "one"}]}
    domain = make("decoder", rows=rows)
    long, book = (domain.split(split)[0]["input_ids"] for split in ("train", "validation"))
    assert long == book
    assert len(book) == 32


def test_of_a_pair_the_longer_text_is_cut_first(make: Make) -> None:
    row = {"text": "red dog", "context": " ".join(["cat"] * 60), "target": "one"}
    domain = make("decoder", {}, {"train": [row], "validation": [row]}, data={"columns": {"text_pair": "context"}})
    ids = domain.split("train")[0]["input_ids"]
    assert len(ids) == 32
    assert domain.tokenizer.decode(ids).replace(" :", ":").startswith("<s> text: red dog cat cat")
    both = {"text": " ".join(["dog"] * 60), "context": " ".join(["cat"] * 60), "target": "one"}
    domain = make("decoder", {}, {"train": [both], "validation": [row]}, data={"columns": {"text_pair": "context"}})
    found = domain.tokenizer.decode(domain.split("train")[0]["input_ids"]).split()
    assert abs(found.count("dog") - found.count("cat")) <= 1
    assert found.count("dog") > 10


def test_a_chat_model_gets_a_users_message(places: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(places["decoder"]).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(places["decoder"])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}[answer] {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    domain = {"task": "summarization", "options": {"chat": True, "template": "sum {text}", "target_length": 16}}
    prepared = prepare(study(tmp_path, folder, domain, ROWS), tmp_path / "cache")
    row = prepared.split("train")[0]
    text = ROWS["train"][0]["text"]
    decoded = prepared.tokenizer.decode(row["input_ids"]).replace("[ ", "[").replace(" ]", "]")
    assert decoded.replace(" ", "") == f"<s>[user]sum{text}[answer]".replace(" ", "")
    assert prepared.tokenizer.decode(row["labels"]) == f"{ROWS['train'][0]['target']} </s>"
    with pytest.raises(StudyError, match="the tokenizer has no chat template: leave the option chat out"):
        prepare(study(tmp_path, places["decoder"], domain, ROWS), tmp_path / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_transformers_own(kind: str, make: Make, places: dict[str, Path]) -> None:
    domain = make(kind)
    model = AUTO[kind].from_pretrained(places[kind]).eval()
    batch = batch_of(domain)
    with torch.no_grad():
        found = domain.task.losses(model(**shown(batch, domain.task)), batch)
    for row in range(8):
        one = batch_of(domain, [row])
        # What transformers computes from labels, itself shifting them as its architecture wants.
        inputs = {name: one[name] for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            assert found[row].item() == pytest.approx(model(**inputs).loss.item(), rel=1e-5)
    with torch.no_grad():
        smooth = domain.task.losses(model(**shown(batch, domain.task)), batch, LossOptions(label_smoothing=0.3))
    assert not torch.allclose(found, smooth)


def test_the_decoder_of_other_architectures_begins_as_it_must(places: dict[str, Path], tmp_path: Path) -> None:
    """BART begins with its end token, mBART with the last token of the target."""
    from transformers import BartConfig, BartForConditionalGeneration, MBartConfig, MBartForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(places["encoder-decoder"])
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    small |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": len(tokenizer)}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    for name, model in (
        ("bart", BartForConditionalGeneration(BartConfig(**small, **tokens, decoder_start_token_id=2))),
        ("mbart", MBartForConditionalGeneration(MBartConfig(**small, **tokens))),
    ):
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        domain = {"task": "summarization", "options": {"target_length": 16}}
        prepared = prepare(study(tmp_path, folder, domain, ROWS), tmp_path / "cache")
        batch = batch_of(prepared)
        own = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        assert torch.equal(batch["decoder_input_ids"], own), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("generation", "theirs"),
    [
        ({}, {"num_beams": 1}),
        (
            {"beams": 3, "min_tokens": 4, "max_tokens": 9, "length_penalty": 2.0},
            {"num_beams": 3, "min_new_tokens": 4, "max_new_tokens": 9, "length_penalty": 2.0},
        ),
    ],
)
def test_what_is_written_is_what_transformers_generates(
    kind: str, generation: dict[str, Any], theirs: dict[str, Any], make: Make, places: dict[str, Path]
) -> None:
    domain = make(kind, {"generation": generation})
    model = AUTO[kind].from_pretrained(places[kind]).eval()
    batch = batch_of(domain)
    how = Prediction(domain.architecture, True, domain.tokenizer)
    found = domain.task.predict(model, None, batch, how)
    for row, text in enumerate(found):
        # One by one, so that nothing is filled up.
        ids = torch.tensor([domain.split("validation")[row]["input_ids"]])
        one = model.generate(input_ids=ids, do_sample=False, **{"max_new_tokens": 16, **theirs})
        new = one[0, ids.shape[1] :] if kind == "decoder" else one[0]
        assert text == domain.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert any(found)


@pytest.mark.parametrize("kind", KINDS)
def test_rungs_on_the_way_are_written_greedily(kind: str, make: Make, places: dict[str, Path]) -> None:
    model = AUTO[kind].from_pretrained(places[kind]).eval()
    plain, beams = make(kind), make(kind, {"generation": {"beams": 4, "length_penalty": -3.0}})
    batch = batch_of(plain)

    def written(domain: PreparedDomain, final: bool) -> list[str]:
        return domain.task.predict(model, None, batch, Prediction(domain.architecture, final, domain.tokenizer))

    assert written(beams, False) == written(plain, True)
    assert written(beams, True) != written(plain, True)


def test_sampling_draws_the_same_every_time_and_leaves_the_training_alone(make: Make, places: dict[str, Path]) -> None:
    model = AUTO["decoder"].from_pretrained(places["decoder"]).eval()
    domain = make("decoder", {"generation": {"sample": True, "temperature": 1.5}})
    batch = batch_of(domain)
    how = Prediction("decoder", True, domain.tokenizer)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = domain.task.predict(model, None, batch, how)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert domain.task.predict(model, None, batch, how) == first
    assert first != domain.task.predict(model, None, batch, Prediction("decoder", False, domain.tokenizer))


@pytest.mark.parametrize("kind", KINDS)
def test_an_ngram_occurs_once_in_an_answer_but_may_be_quoted_from_the_prompt(
    kind: str, make: Make, places: dict[str, Path]
) -> None:
    model = AUTO[kind].from_pretrained(places[kind]).eval()
    # A model that wants nothing but the word "dog", and if it must not, "cat", ...
    domain = make(kind, {"generation": {"no_repeat_ngram": 2, "min_tokens": 6, "max_tokens": 6}})
    words = domain.tokenizer("dog cat bird tree", add_special_tokens=False)["input_ids"]
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[words] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    batch = batch_of(domain)
    if kind == "decoder":
        batch["prompt_ids"][:, -3:] = words[0]
    for text in domain.task.predict(model, None, batch, Prediction(domain.architecture, True, domain.tokenizer)):
        assert text == "dog dog cat dog bird dog"


@pytest.mark.parametrize("kind", KINDS)
def test_soft_prompts_write_the_same_in_any_batch(kind: str, make: Make, places: dict[str, Path]) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    domain = make(kind)
    task_type = domain.head.peft_task_type
    configs: list[Any] = [LoraConfig(task_type=task_type, init_lora_weights=False, r=4)]
    if kind == "decoder":
        configs.append(PromptTuningConfig(task_type=task_type, num_virtual_tokens=5))
    for config in configs:
        torch.manual_seed(0)
        model = get_peft_model(AUTO[kind].from_pretrained(places[kind]), config).eval()
        how = Prediction(domain.architecture, True, domain.tokenizer)
        whole = domain.task.predict(model, None, batch_of(domain), how)
        alone = [domain.task.predict(model, None, batch_of(domain, [row]), how)[0] for row in range(8)]
        assert whole == alone
        with torch.no_grad():
            batch = batch_of(domain)
            together = domain.task.losses(model(**shown(batch, domain.task)), batch)
            one = batch_of(domain, [3])
            assert domain.task.losses(model(**shown(one, domain.task)), one).item() == pytest.approx(
                together[3].item(), rel=1e-4
            )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_model_learns_to_summarise(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    rows = {"train": topic_rows(64), "validation": topic_rows(16, seed=1)}
    training = {"epochs": 16, "evaluations": 2, "batch_size": 8}
    file = study(
        tmp_path, places[kind], {"task": "summarization", "options": {"target_length": 10}}, rows, training=training
    )
    plan, worker = plan_and_worker(file, tmp_path)
    results = train(plan, worker, "full", learning_rate=3e-3)
    assert results[-1].loss < results[0].loss
    domain = worker.domain(next(iter(plan.models)), "d")
    lead = domain.task.guesses(domain.split("train")[:], domain.split("validation")[:], ())["lead"].predictions
    assert results[-1].scores["rouge1"] > 0.9
    assert domain.task.score(lead, domain.task.references(domain.split("validation")[:]), ())["rouge1"] < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_scores_the_same_from_disk(kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    from peftsearch.training.session import build_model, load_trained

    domain = {"task": "summarization", "options": {"target_length": 10, "generation": {"beams": 2}}}
    training = {"epochs": 4, "evaluations": 2, "batch_size": 8}
    rows = {"train": topic_rows(32), "validation": topic_rows(16, seed=1)}
    file = study(tmp_path, places[kind], domain, rows, training=training)
    plan, worker = plan_and_worker(file, tmp_path)
    hyper = {
        "rank": 16,
        "alpha": 32.0,
        "targets": "all-linear",
        "variant": "lora",
        "dropout": 0.0,
        "learning_rate": 1e-2,
    }
    results = train(plan, worker, "lora", **hyper)
    assert results[-1].loss < results[0].loss
    path = next(iter(plan.models))
    prepared = worker.domain(path, "d")
    model = build_model(worker.base(path), prepared, "lora", {"quantization": "none", **hyper}, 0)
    load_trained(model, tmp_path / "trials" / "00000" / "weights.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(AUTO[kind].from_pretrained(places[kind]), tmp_path / "adapter")
    found = evaluate(reloaded, prepared, "validation", 64)
    assert found.scores == results[-1].scores
    assert found.loss == pytest.approx(results[-1].loss, rel=1e-5)
    # As "peftsearch evaluate" does it: the data is tokenised by the tokenizer in the adapter's folder, which holds no
    # configuration of the model.
    prepared.tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / LABELS).write_text("[]")
    scored = evaluate_adapter(tmp_path / "adapter", file, "d", "validation", tmp_path / "other")
    assert scored["scores"] == results[-1].scores
    untrained = evaluate(AUTO[kind].from_pretrained(places[kind]), prepared, "validation", 64)
    assert untrained.predictions != found.predictions


def test_the_lead_is_as_many_sentences_as_summaries_have_words(make: Make) -> None:
    rows = {
        "train": [{"text": "A dog.", "target": "one two three four"}, {"text": "A cat.", "target": "one two"}],
        "validation": [{"text": "The dog ran. A cat saw it. The bird did not.", "target": "The dog ran."}],
    }
    domain = make("decoder", rows=rows)
    guess = domain.task.guesses(domain.split("train")[:], domain.split("validation")[:], ())["lead"]
    assert guess.predictions == ["The dog ran."]
    assert "3 words" in guess.detail
    rows["train"].append({"text": "A bird.", "target": "one two three four five six"})
    domain = make("decoder", rows=rows)
    guess = domain.task.guesses(domain.split("train")[:], domain.split("validation")[:], ())["lead"]
    assert guess.predictions == ["The dog ran.\nA cat saw it."]


def test_targets_that_are_cut_are_counted_and_references_stay_whole(make: Make) -> None:
    long = " ".join(["dog"] * 30)
    rows = {
        "train": [{"text": "a", "target": "one"}, {"text": "b", "target": long}],
        "validation": [{"text": "c", "target": long}, {"text": "e", "target": "one"}],
    }
    domain = make("decoder", rows=rows)
    assert domain.warnings == (
        "train: 1 of 2 targets are longer than target_length (16 tokens) and cut off in training",
    )
    row = domain.split("train")[1]
    assert len(row["labels"]) == 16
    assert row["labels"][-1] == domain.tokenizer.eos_token_id
    assert domain.task.references(domain.split("validation")[:]) == [long, "one"]


@pytest.mark.parametrize(
    ("rows", "options", "more", "message"),
    [
        (
            {"train": [{"text": "a", "target": "dog " * 20}], "validation": ROWS["validation"]},
            {},
            {},
            "every target is longer than target_length (16 tokens; the shortest has 21): raise the option",
        ),
        (
            {"train": [{"text": "a", "target": " "}], "validation": ROWS["validation"]},
            {},
            {},
            "column 'target' of train.jsonl holds no text in row 1",
        ),
        (ROWS, {"template": "no place"}, {}, "the template 'no place' has no {text}"),
        (ROWS, {"template": "{text} {text_pair}"}, {}, "has {text_pair}: map columns.text_pair"),
        (ROWS, {"template": "cat " * 40 + "{text}"}, {}, "the prompt's template fills all 32 tokens of max_length"),
        (ROWS, {"target_length": 120}, {}, "max_length (32) and target_length (120) are together more than the 128"),
        (ROWS, {"generation": {"temperature": 0.5}}, {}, "temperature is for sampling"),
        (ROWS, {"generation": {"length_penalty": 2.0}}, {}, "length_penalty compares beams"),
        (ROWS, {"generation": {"min_tokens": 30}}, {}, "min_tokens is more than the 16 tokens"),
        (ROWS, {"generation": {"beam": 2}}, {}, "no such option"),
        (ROWS, {"generation": {"beams": 0}}, {}, "must be greater than or equal to 1, not 0"),
        (ROWS, {"generation": {"beams": "four"}}, {}, "must be a whole number, not 'four'"),
        (ROWS, {"generation": "beam"}, {}, "must be a section of keys and values, not 'beam'"),
        (ROWS, {"chat": "perhaps"}, {}, "must be true or false, not 'perhaps'"),
        (ROWS, {}, {"data": {"columns": {"target": "text"}}}, "the column 'text' cannot be both text and target"),
    ],
)
def test_bad_input_gets_one_sentence(
    rows: Any, options: dict[str, Any], more: dict[str, Any], message: str, make: Make
) -> None:
    with pytest.raises(StudyError) as raised:
        make("decoder", options, rows, **more)
    assert message in str(raised.value)
    assert "\n" not in raised.value.message


def test_an_encoder_cannot_summarise(tmp_path: Path) -> None:
    from tiny_models import tiny_encoder

    file = study(tmp_path, tiny_encoder(tmp_path / "encoder"), {"task": "summarization"}, ROWS)
    with pytest.raises(StudyError, match="is an encoder, and summarization is for encoder-decoders and decoders"):
        prepare(file, tmp_path / "cache")


def test_texts_in_other_scripts_are_said_to_score_nothing(make: Make) -> None:
    rows = {
        "train": [{"text": "a", "target": "これは"}, {"text": "b", "target": "one"}],
        "validation": ROWS["validation"],
    }
    assert any(
        "1 of 2 targets of train have no letter a-z" in warning for warning in make("decoder", rows=rows).warnings
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_writes_what_its_forward_passes_say(kind: str, make: Make, places: dict[str, Path]) -> None:
    """With cached keys and values, beside other rows, it is the text that one gets token by token without either."""
    from tiny_models import SAMPLES

    from peftsearch.training.base_model import FrozenBase, trainable
    from peftsearch.training.session import build_model

    domain, base = make(kind), FrozenBase(str(places[kind]))
    ends = domain.tokenizer.eos_token_id
    texts = set()
    for method, hyperparameters in SAMPLES.items():
        if method == "bitfit":
            # Neither T5 nor Llama has biases.
            continue
        model = build_model(base, domain, method, hyperparameters, seed=0).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.add_(0.3 * torch.randn_like(parameter))
        found = domain.task.predict(model, None, batch_of(domain, [0, 1, 2]), Prediction(kind, True, domain.tokenizer))
        for row, text in enumerate(found[:2]):
            ids = domain.split("validation")[row]["input_ids"]
            written: list[int] = []
            while len(written) < 16 and ends not in written:
                with torch.no_grad():
                    if kind == "decoder":
                        output = model(input_ids=torch.tensor([ids + written]))
                    else:
                        begun = torch.tensor([[0, *written]])
                        mask = torch.ones(1, len(ids), dtype=torch.int64)
                        output = model(input_ids=torch.tensor([ids]), attention_mask=mask, decoder_input_ids=begun)
                written.append(int(output.logits[0, -1].argmax()))
            assert text == domain.tokenizer.decode(written, skip_special_tokens=True).strip(), method
        texts |= set(found)
    assert len(texts) > 8
