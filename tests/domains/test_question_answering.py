"""Extractive question answering: windows, targets, the choice among answers, scores, learning, bad input."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from task_runs import TaskRun
from tiny_models import MAX_LENGTH, WORDS, tiny_decoder, tiny_encoder, tiny_encoder_decoder
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from peftsearch.domains import get_task
from peftsearch.domains.raw import load_domain
from peftsearch.domains.tasks import LossOptions, Prediction, Task, Tokenization
from peftsearch.domains.tasks.base import EXAMPLE
from peftsearch.spec import DataSpec, StudyError, StudyFile

DATA = DataSpec(source="x")
CONTEXT = "The dog can run. The cat sees red houses, and a bird eats."
LONG = " ".join(word for word in WORDS if len(word) > 3)
MAKERS = {"encoder": tiny_encoder, "encoder-decoder": tiny_encoder_decoder, "decoder": tiny_decoder}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make(folder / kind) for kind, make in MAKERS.items()}


def task(**options: Any) -> Task:
    return get_task("question_answering", options=options)


def answers(*pairs: tuple[str, int]) -> dict[str, Any]:
    return {"text": [text for text, _ in pairs], "answer_start": [start for _, start in pairs]}


def read(records: list[dict[str, Any]]) -> pa.Table:
    return task().read(pa.Table.from_pylist(records), DATA, "a.json", ("data",))


def at(context: str, *found: str) -> dict[str, Any]:
    return {
        "question": "what?",
        "context": context,
        "answers": answers(*((text, context.index(text)) for text in found)),
    }


def how(models: dict[str, Path], kind: Any = "encoder", max_length: int = 64, **more: Any) -> Tokenization:
    return Tokenization(AutoTokenizer.from_pretrained(models[kind]), max_length, kind, **more)


def target(row: dict[str, Any]) -> str | None:
    """The text that a row's target stands for; None for the target "no answer"."""
    if row["start"] == row["null"]:
        assert row["end"] == row["null"]
        return None
    return row["passage"][row["first"][row["start"]] : row["last"][row["end"]]]


@pytest.mark.parametrize("kind", MAKERS)
def test_targets_are_the_answers_texts(kind: str, models: dict[str, Path]) -> None:
    found = read(
        [at(CONTEXT, "red houses"), at(CONTEXT), at(CONTEXT, "bird", "dog"), at(CONTEXT, "The dog"), at(CONTEXT, ".")]
    )
    rows = task().tokenize(found, (), how(models, kind)).to_list()
    assert [target(row) for row in rows] == ["red houses", None, "bird", "The dog", "."]
    assert [row["answers"] for row in rows] == [["red houses"], [], ["bird", "dog"], ["The dog"], ["."]]


def test_an_answer_inside_a_token_makes_the_token_the_target(models: dict[str, Path]) -> None:
    context = "the dog"
    (row,) = task().tokenize(read([{**at(context), "answers": answers(("o", 5))}]), (), how(models)).to_list()
    assert target(row) == "dog"


def test_where_no_answer_is_said(models: dict[str, Path]) -> None:
    """An encoder's at the first token, a decoder's at an end token after all that it has to see."""
    found = read([at("the dog", "dog")])
    rows = {kind: task().tokenize(found, (), how(models, kind))[0] for kind in MAKERS}
    tokenizers = {kind: AutoTokenizer.from_pretrained(models[kind]) for kind in MAKERS}
    assert rows["encoder"]["null"] == 0
    assert rows["encoder"]["input_ids"][0] == tokenizers["encoder"].cls_token_id
    assert rows["encoder-decoder"]["null"] == 0
    decoder = rows["decoder"]
    assert decoder["null"] == len(decoder["input_ids"]) - 1
    assert decoder["input_ids"][-1] == tokenizers["decoder"].eos_token_id
    assert tokenizers["decoder"].decode(decoder["input_ids"], skip_special_tokens=True) == "what? the dog"


@pytest.mark.parametrize("kind", MAKERS)
def test_long_contexts_become_windows_that_share_tokens(kind: str, models: dict[str, Path]) -> None:
    words = LONG.split()
    asked = [at(LONG, words[3]), at(LONG, words[-2]), at("a dog", "dog")]
    setting = how(models, kind, max_length=24)
    rows = task(stride=6).tokenize(read(asked), (), setting).to_list()
    assert all(len(row["input_ids"]) <= 24 for row in rows)
    first = [row for row in rows if row[EXAMPLE] == 0]
    assert [row[EXAMPLE] for row in rows] == [0] * len(first) + [1] * len(first) + [2]
    # Every word of the context is in a window, and neighbours share six of them.
    shown = [row["passage"].split() for row in first]
    assert shown[0][0] == words[0]
    assert shown[-1][-1] == words[-1]
    assert all(before[-6:] == after[:6] for before, after in itertools.pairwise(shown))
    assert {word for window in shown for word in window} == set(words)
    found = [target(row) for row in rows]
    assert found[0] == words[3]
    assert found[1 : len(first)] == [None] * (len(first) - 1)
    assert found[-2:] == [words[-2], "dog"]
    assert setting.warnings == [f"3 questions make {len(rows)} windows of 24 tokens"]


def test_answers_that_cannot_be_found_are_counted(models: dict[str, Path]) -> None:
    words = LONG.split()
    setting = how(models, max_length=24)
    whole, part = " ".join(words[:40]), " ".join(words[:8])
    rows = task(max_answer_length=7).tokenize(read([at(LONG, whole), at(LONG, part), at("a dog", "dog")]), (), setting)
    assert setting.warnings[:2] == [
        "1 of 3 answers are longer than the 7 tokens of max_answer_length: they cannot be predicted whole",
        "1 of 3 answers fit into no window of 24 tokens: they cannot be found",
    ]
    assert [target(row) for row in rows.to_list() if row[EXAMPLE] == 0] == [None] * rows[EXAMPLE].count(0)


def test_empty_windows_may_be_left_out_of_training_alone(models: dict[str, Path]) -> None:
    found = read([at(LONG, LONG.split()[n]) for n in range(0, 60, 3)])
    count = {
        (training, share): len(
            task(empty_windows=share).tokenize(found, (), how(models, max_length=24, training=training))
        )
        for training in (True, False)
        for share in (0.0, 0.5, 1.0)
    }
    assert count[False, 0.0] == count[False, 1.0] == count[True, 1.0]
    assert 20 <= count[True, 0.0] < count[True, 0.5] < count[True, 1.0]
    kept = task(empty_windows=0.0).tokenize(found, (), how(models, max_length=24, training=True)).to_list()
    assert None not in [target(row) for row in kept]
    with pytest.raises(ValueError, match="no window holds an answer as a whole"):
        task(empty_windows=0.0).tokenize(read([at(CONTEXT)]), (), how(models, training=True))


def test_long_questions_are_cut_off(models: dict[str, Path]) -> None:
    setting = how(models, max_length=24)
    rows = task().tokenize(read([{**at("the dog", "dog"), "question": LONG}]), (), setting).to_list()
    assert [target(row) for row in rows] == ["dog"]
    assert setting.warnings == ["1 questions are cut off after 12 tokens, half of max_length"]


def test_a_stride_that_leaves_no_room(models: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="a stride of 9 leaves no room for new text in windows of 24 tokens"):
        task(stride=9).tokenize(read([at(CONTEXT)]), (), how(models, max_length=24))


def test_tokenizers_without_offsets_are_refused() -> None:
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match="does not say where its tokens stand in the text"):
        task().tokenize(read([at(CONTEXT)]), (), Tokenization(slow, 64, "encoder"))


def output(start: list[list[float]], end: list[list[float]]) -> Any:
    # As models without names of their own give it: a mapping with attributes.
    return _Output(start_logits=torch.tensor(start), end_logits=torch.tensor(end))


class _Output(dict[str, Any]):
    __getattr__ = dict.__getitem__


def window(passage: str = "a b c") -> dict[str, Any]:
    """A batch of one window: null, a question's token, and three tokens of a context."""
    rows = {
        "input_ids": [[2, 9, 5, 6, 7]],
        "passage": [passage],
        "first": [[0, 0, 0, 2, 4]],
        "last": [[0, 0, 1, 3, 5]],
        "start": [3],
        "end": [4],
        "null": [0],
    }
    return task().collate(rows, 0, multiple_of=8)


@pytest.mark.parametrize("in_front", [0, 3])
def test_the_best_span_is_found_behind_soft_tokens(in_front: int) -> None:
    batch = window()
    # The question's token (50) and padding (90) are no candidates, nor are spans that end before they start.
    start = [[9.0] * in_front + [1.0, 50.0, 0.0, 2.0, 5.0, 90.0, 90.0, 90.0]]
    end = [[9.0] * in_front + [1.5, 50.0, 7.0, 3.0, 0.5, 90.0, 90.0, 90.0]]
    how_to = Prediction("encoder")
    assert task().predict(torch.nn.Module(), output(start, end), batch, how_to) == [
        {"text": "a", "start": 0, "score": 7.0, "null": 2.5}
    ]
    end[0][in_front + 2] = 1.0
    # Now c alone: 5 + 0.5; a to b: 0 + 3; b: 2 + 3.
    assert task().predict(torch.nn.Module(), output(start, end), batch, how_to) == [
        {"text": "c", "start": 4, "score": 5.5, "null": 2.5}
    ]
    start[0][in_front + 2] = 6.0
    assert task().predict(torch.nn.Module(), output(start, end), batch, how_to)[0]["text"] == "a b"
    assert task(max_answer_length=1).predict(torch.nn.Module(), output(start, end), batch, how_to)[0]["text"] == "a"


def test_windows_are_merged_as_berts_script_does() -> None:
    windows = [{"text": "x", "score": 5.0, "null": 9.0}, {"text": "y", "score": 6.0, "null": 7.0}]
    # The lowest null score is 7, the best answer has 6: 1 above.
    assert task().merge(windows) == ""
    assert task(null_threshold=0.9).merge(windows) == ""
    assert task(null_threshold=1.0).merge(windows) == "y"
    assert task(null_threshold=-2.0).merge([{"text": "y", "score": 6.0, "null": 5.0}]) == ""


def test_windows_without_an_answer_that_were_left_out_are_made_up_for() -> None:
    """Of ten such windows one was seen: each distribution takes an answer for ten times as likely as it is."""

    def merged(above: float, **options: float) -> str:
        return str(task(**options).merge([{"text": "y", "score": above, "null": 0.0}]))

    assert 2 * math.log(10) == pytest.approx(4.605, abs=1e-3)
    assert [merged(above, empty_windows=0.1) for above in (4.6, 4.7)] == ["", "y"]
    assert [merged(above, empty_windows=0.1, null_threshold=1.0) for above in (3.6, 3.7)] == ["", "y"]
    # All were seen, or none: there is nothing to make up for, or no telling what.
    for share in (1.0, 0.0):
        assert [merged(above, empty_windows=share) for above in (-0.1, 0.1)] == ["", "y"]


def test_the_loss_is_over_context_and_null() -> None:
    batch = window()
    start, end = [[1.0, 50.0, 0.0, 2.0, 5.0, 90.0, 90.0, 90.0]], [[1.5, 50.0, 7.0, 3.0, 0.5, 90.0, 90.0, 90.0]]

    def entropy(scores: list[float], right: int, smoothing: float) -> float:
        normaliser = math.log(sum(math.exp(score) for score in scores))
        each = [normaliser - score for score in scores]
        return (1 - smoothing) * each[right] + smoothing * sum(each) / len(each)

    for smoothing in (0.0, 0.1):
        wanted = (entropy([1, 0, 2, 5], 2, smoothing) + entropy([1.5, 7, 3, 0.5], 3, smoothing)) / 2
        given = task().losses(output(start, end), batch, LossOptions(label_smoothing=smoothing))
        assert given.tolist() == [pytest.approx(wanted, rel=1e-6)]
    # The same from a token classifier, whose two labels are start and end.
    logits = torch.stack((torch.tensor(start), torch.tensor(end)), dim=-1)
    assert torch.equal(task().losses(_Output(logits=logits), batch), task().losses(output(start, end), batch))


def test_the_loss_has_finite_gradients() -> None:
    batch = window()
    logits = torch.zeros(1, 8, 2, requires_grad=True)
    task().losses(_Output(logits=logits), batch, LossOptions(label_smoothing=0.1)).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, [1, 5, 6, 7]].abs().sum() == 0


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"answers": answers(("dog", 5))},
        "row 2: the answer 'dog' does not stand at character 5 of the context; it stands at 4",
    ),
    (
        {"answers": answers(("fox", 4))},
        "the answer 'fox' does not stand at character 4 of the context or anywhere else in it",
    ),
    ({"answers": answers(("dog", -54))}, "does not stand at character -54"),
    (
        {"answers": {"text": ["dog"], "answer_start": []}},
        "1 answers and 0 values of answer_start: each answer needs one",
    ),
    ({"answers": answers(("", 0))}, "an answer without text"),
    ({"answers": None}, "column 'answers' of a.json, row 2: no answers: expected {text: [...], answer_start: [...]}"),
    ({"question": " "}, "column 'question' of a.json holds no text in row 2"),
    ({"context": None}, "column 'context' of a.json holds no text in row 2"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=range(len(BAD)))
def test_bad_rows(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(StudyError) as caught:
        read([at(CONTEXT, "dog"), {**at(CONTEXT, "dog"), **change}])
    assert sentence in str(caught.value)


def test_answers_in_other_forms() -> None:
    listed = [{"text": "dog", "answer_start": 4}]
    found = read([{**at(CONTEXT), "answers": listed}, {**at(CONTEXT), "answers": []}])
    assert found.column("answers").to_pylist() == [[{"text": "dog", "start": 4}], []]
    none = {"question": "q", "context": "c", "answers": {"text": None, "answer_start": None}}
    assert read([none]).column("answers").to_pylist() == [[]]
    with pytest.raises(StudyError, match=r"row 1: the answer 'dog' begins at '4': answer_start must be a whole number"):
        read([{**at(CONTEXT), "answers": {"text": ["dog"], "answer_start": ["4"]}}])
    with pytest.raises(StudyError, match=r"expected \{text"):
        read([{**at(CONTEXT), "answers": "dog"}])


def test_train_without_any_answer() -> None:
    splits = {"train": read([at(CONTEXT)]), "validation": read([at(CONTEXT, "dog")])}
    with pytest.raises(StudyError, match="no training question has an answer"):
        task().check(splits, DATA, ())
    assert task().warnings({"train": splits["validation"], "validation": splits["train"]}, ()) == [
        "no question of validation has an answer"
    ]


@pytest.mark.parametrize(
    ("split", "metric", "kind"),
    [
        ("validation", "no_answer_f1", "without an answer"),
        ("test", "no_answer_exact_match", "without an answer"),
        ("validation", "has_answer_exact_match", "with an answer"),
        ("test", "has_answer_f1", "with an answer"),
    ],
)
def test_a_metric_of_questions_that_a_split_lacks_is_refused(
    split: str, metric: str, kind: str, tmp_path: Path
) -> None:
    """It would be undefined there, and the study would break at its first evaluation, or at its last."""
    both = [at(CONTEXT, "dog"), at(LONG), at(f"{CONTEXT} ", "cat"), at(f"{LONG} ")]
    one = [row for row in both if bool(row["answers"]["text"]) != (kind == "with an answer")]
    files = {"train": both, "validation": both, "test": both} | {split: one}
    for name, records in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    document = {
        "name": "s",
        "model": "m",
        "domains": {"d": {"task": "question_answering", "metric": metric, "data": {n: f"{n}.json" for n in files}}},
        "methods": {"lora": {}},
    }
    file = StudyFile.parse(json.dumps(document), "s.json", folder=tmp_path)
    with pytest.raises(StudyError) as caught:
        load_domain("d", file.spec, tmp_path)
    assert caught.value.loc == ("domains", "d", "metric")
    assert f"the metric {metric!r} is undefined on {split}, which has no question {kind}" in str(caught.value)
    other = metric.replace("no_", "has_") if "no_" in metric else metric.replace("has_", "no_")
    document["domains"]["d"]["metric"] = other
    assert load_domain("d", StudyFile.parse(json.dumps(document), "s.json").spec, tmp_path).metric.name == other


def colours(count: int, length: int = 6) -> list[dict[str, Any]]:
    """Which colour a text names: none in every third one."""
    draw, records = random.Random(0), []
    filler = [word for word in WORDS if len(word) > 3 and word not in ("green", "blue")]
    for number in range(count):
        words = [draw.choice(filler) for _ in range(length)]
        place = draw.randrange(length)
        words[place] = draw.choice(["green", "blue"]) if number % 3 else "dog"
        context = " ".join(words)
        found = [(words[place], len(" ".join(words[:place])) + (place > 0))] if number % 3 else []
        records.append({"question": "color?", "context": context, "answers": answers(*found)})
    return records


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_learning_beats_the_guesses(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    run = TaskRun.make(tmp_path, models[kind], {"task": "question_answering"}, colours(160), epochs=6, max_length=16)
    guesses = run.probe()
    assert guesses["no_answer"]["no_answer_f1"] == 1
    assert guesses["no_answer"]["has_answer_f1"] == 0
    linear = guesses.pop("linear_probe", None)
    guessed = max(guess["f1"] for guess in guesses.values())
    assert (linear is not None) == (kind == "encoder")
    if linear is not None:
        # Which word names a colour can be seen from the word.
        assert linear["f1"] > guessed + 0.2
    results = run.train("full", learning_rate=5e-3)
    assert results[-1].train_loss < results[0].train_loss
    assert results[-1].scores["f1"] > guessed + 0.2


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_windows_are_scored_and_questions_counted(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    domain = {"task": "question_answering", "metric": "exact_match"}
    run = TaskRun.make(
        tmp_path, models["encoder"], domain, colours(30, length=30), epochs=1, evaluations=1, max_length=20
    )
    assert len(run.domain.lengths("validation")) > 2 * run.domain.rows["validation"]
    (result,) = run.train(method)
    scored = result.scores["exact_match"] * run.domain.rows["validation"]
    assert scored == pytest.approx(round(scored))
    baselines = run.probe()
    assert baselines["no_answer"]["exact_match"] == pytest.approx(1 / 3, abs=0.2)
    probed = baselines["linear_probe"]["exact_match"] * run.domain.rows["validation"]
    assert probed == pytest.approx(round(probed))


def test_an_encoder_decoder_learns(models: dict[str, Path], tmp_path: Path) -> None:
    run = TaskRun.make(tmp_path, models["encoder-decoder"], {"task": "question_answering"}, colours(60))
    results = run.train("lora")
    assert results[-1].train_loss < results[0].train_loss


def test_guesses_are_one_for_each_question(models: dict[str, Path]) -> None:
    context = "the red house is big. a dog is here. it is not very old. it can eat."
    asked = [{**at(context), "question": "what is the red thing?"}, {**at("no."), "question": "who?"}]
    split = task().tokenize(read(asked), (), how(models, max_length=24))[:]
    assert len(split[EXAMPLE]) > 2
    found = task().guesses(split, split, ())
    assert found["no_answer"].predictions == ["", ""]
    assert found["sentence"].predictions == ["the red house is big.", "no."]


def test_peft_question_answering_swallows_token_types(models: dict[str, Path]) -> None:
    """PEFT 0.21.2: why the heads of encoders have no PEFT task type. Should this fail, they may have one."""
    from peft import LoraConfig, get_peft_model

    ids = torch.tensor([[2, 7, 3, 8, 9, 3]])
    types = [torch.zeros_like(ids), torch.tensor([[0, 0, 0, 1, 1, 1]])]
    differs = {}
    for task_type in ("QUESTION_ANS", None):
        base = AutoModelForQuestionAnswering.from_pretrained(models["encoder"])
        model = get_peft_model(base, LoraConfig(task_type=task_type, target_modules=["query"])).eval()
        with torch.no_grad():
            first, second = [model(input_ids=ids, token_type_ids=each).start_logits for each in types]
        differs[task_type] = not torch.equal(first, second)
    assert differs == {"QUESTION_ANS": False, None: True}
    assert task().heads["encoder"].peft_task_type is None


@pytest.mark.parametrize("kind", MAKERS)
def test_the_head_alone_is_fresh(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Every weight of the checkpoint's backbone is found (LlamaForQuestionAnswering finds none)."""
    run = TaskRun.make(tmp_path, models[kind], {"task": "question_answering"}, colours(30))
    fresh = run.worker.base(run.model).template(run.domain).fresh
    assert {name.split(".")[0] for name in fresh} <= {"qa_outputs", "score"}


def test_records_reach_the_model_from_a_study_file(models: dict[str, Path], tmp_path: Path) -> None:
    records = [{"q": row["question"], "c": row["context"], "a": row["answers"]} for row in colours(30)]
    domain = {
        "task": "question_answering",
        "max_length": MAX_LENGTH,
        "data": {"columns": {"question": "q", "context": "c", "answers": "a"}},
    }
    run = TaskRun.make(tmp_path, models["encoder"], domain, records)
    assert run.domain.metric == "f1"
    assert sum(run.domain.rows.values()) == 30
    assert json.loads(json.dumps(run.domain.task.references(run.domain.split("train")[:])))
