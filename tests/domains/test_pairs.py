"""The texts of a pair, as each kind of model reads them: never glued to one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from domain_files import save_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peftsearch.domains import get_task
from peftsearch.domains.models import Architecture
from peftsearch.domains.tasks import Task, Tokenization
from peftsearch.export.pipelines import pipeline_code
from peftsearch.export.predict import Predictor
from peftsearch.export.purpose import Purpose
from peftsearch.export.usage import Use, usage
from peftsearch.spec import ColumnsSpec, DataSpec, DomainFacts
from peftsearch.training.asking import _texts

FIRST, SECOND = "the tenant pays rent.", "a patient has no fever"
DATA = DataSpec(source="x", columns=ColumnsSpec(text_pair="text_pair"))
TASKS = {
    "classification": ("classification", {}, ["a", "b"]),
    "relation": ("relation", {}, ["a", "b"]),
    "multi_label": ("multi_label", {}, [["a"], ["b"]]),
    "similarity": ("similarity", {}, [0.0, 1.0]),
}
CALLS = {"classification": "classify", "relation": "classify", "multi_label": "classify", "similarity": "rate"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A decoder's, of bytes as GPT-2's, that puts nothing between texts; and an encoder's, as BERT's."""
    folder = tmp_path_factory.mktemp("tokenizers")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    backend.train_from_iterator([FIRST, SECOND], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    places = {"decoder": folder, "encoder": save_tokenizer(tmp_path_factory.mktemp("encoder"))}
    return {kind: AutoTokenizer.from_pretrained(place) for kind, place in places.items()}


def read(task: Task, labels: Sequence[Any]) -> pa.Table:
    rows = {"text": [FIRST] * 2, "text_pair": [SECOND] * 2, "label": labels}
    return task.read(pa.table(rows), DATA, "a.json", ("data",))


def checked(task: Task, labels: Sequence[Any]) -> tuple[str, ...]:
    table = read(task, labels)
    return task.check({"train": table, "validation": table}, DATA, ())


def made(task: Task, labels: Sequence[Any], how: Tokenization) -> Any:
    return task.tokenize(read(task, labels), checked(task, labels), how)


@pytest.mark.parametrize("name", TASKS)
def test_a_decoder_reads_the_second_text_on_a_line_of_its_own(name: str, tokenizers: dict[str, Any]) -> None:
    kind, options, labels = TASKS[name]
    task, tokenizer = get_task(kind, options=options), tokenizers["decoder"]
    whole = made(task, labels, Tokenization(tokenizer, 100, "decoder"))[0]["input_ids"]
    assert tokenizer.decode(whole) == f"{FIRST}\n{SECOND}"
    # Where the first text is cut, too.
    cut = made(task, labels, Tokenization(tokenizer, len(whole) // 2, "decoder"))[0]["input_ids"]
    assert len(cut) == len(whole) // 2
    first, second = tokenizer.decode(cut).split("\n")
    assert FIRST.startswith(first)
    assert SECOND.startswith(second)
    assert _texts({"input_ids": [whole]}, tokenizer) == [f"{FIRST}\n{SECOND}"]


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
@pytest.mark.parametrize("name", TASKS)
def test_cards_and_predictions_read_pairs_as_the_study_does(
    name: str, architecture: Architecture, tokenizers: dict[str, Any]
) -> None:
    kind, options, labels = TASKS[name]
    task, tokenizer = get_task(kind, options=options), tokenizers[architecture]
    data = made(task, labels, Tokenization(tokenizer, 100, architecture))
    wanted = data[0]["input_ids"]
    facts = DomainFacts.model_construct(labels=checked(task, labels), max_length=100)
    use = Use(task, facts, architecture, pair=True)
    assert list(_card_ids(use, tokenizer)) == wanted
    for call in _pipeline_inputs(use):
        (pair,) = call
        pair = {"text": FIRST, "text_pair": pair["text_pair"].replace("What goes with it.", SECOND)}
        assert tokenizer(**pair)["input_ids"] == wanted
    head = task.heads[architecture]
    columns = {"text": "text", "text_pair": "text_pair"}
    purpose = Purpose("d", task, architecture, head, 100, columns)
    exported: Any = SimpleNamespace(labels=facts.labels)
    predictor = Predictor(exported, purpose, torch.nn.Identity(), tokenizer, torch.device("cpu"))
    assert predictor._tokenized([{"text": FIRST, "text_pair": SECOND}])[0]["input_ids"] == wanted


@pytest.mark.parametrize("context", [None, FIRST])
def test_choices_stand_on_a_line_of_their_own(context: str | None, tokenizers: dict[str, Any]) -> None:
    task, tokenizer = get_task("multiple_choice"), tokenizers["decoder"]
    row = {"question": "has the tenant fever?", "choices": ["no", SECOND], "label": 1}
    row |= {} if context is None else {"context": context}
    data = DataSpec(source="x", columns=ColumnsSpec(context="context") if context else ColumnsSpec())
    table = task.read(pa.Table.from_pylist([row] * 2), data, "a.json", ("data",))
    (ids, _) = task.tokenize(table, (), Tokenization(tokenizer, 100, "decoder"))["input_ids"]
    before = f"{context}\nhas the tenant fever? " if context else "has the tenant fever?\n"
    assert [tokenizer.decode(own) for own in ids] == [f"{before}no", f"{before}{SECOND}"]
    use = Use(task, DomainFacts.model_construct(labels=(), max_length=100), "decoder", pair=False)
    space = _names(use, tokenizer)
    with pytest.raises(_SeenError) as seen:
        space["choose"]("has the tenant fever?", ["no", SECOND], context or "")
    longest = max(ids, key=len)
    assert seen.value.args[0][1] == longest


class _SeenError(Exception):
    """What a model was given."""


def _names(use: Use, tokenizer: Any) -> dict[str, Any]:
    """What a card's code defines, around a model that says what it was given."""

    def model(**inputs: Any) -> Any:
        raise _SeenError(inputs["input_ids"].tolist())

    code = "\n".join(usage(use)).split("\nprint(")[0]
    space: dict[str, Any] = {"tokenizer": tokenizer, "model": model, "torch": torch, "labels": use.facts.labels}
    exec(compile(code, "card", "exec"), space)
    return space


def _card_ids(use: Use, tokenizer: Any) -> list[int]:
    """What a card's function gives to the model."""
    with pytest.raises(_SeenError) as seen:
        _names(use, tokenizer)[CALLS[use.task.name]]([FIRST], [SECOND])
    found: list[int] = seen.value.args[0][0]
    return found


def _pipeline_inputs(use: Use) -> list[Any]:
    """What a card gives to a pipeline; nothing where no pipeline does the task."""
    calls: list[Any] = []

    def pipeline(*args: Any, **kwargs: Any) -> Callable[..., list[Any]]:
        def pipe(texts: Any, **kwargs: Any) -> list[Any]:
            calls.append(texts)
            return []

        return pipe

    code = [line for line in pipeline_code(use, "model=model", lengthens=False) if not line.startswith("from ")]
    exec(compile("\n".join(code), "card", "exec"), {"pipeline": pipeline, "model": None})
    return calls
