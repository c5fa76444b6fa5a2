"""Texts that hold the model's end token: T5 counts end tokens, and refuses batches in which texts differ in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from task_data import task_domain
from tiny_models import tiny_encoder, tiny_encoder_decoder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from peftsearch.domains import TASKS, get_task
from peftsearch.domains.raw import load_domain
from peftsearch.domains.tasks import Tokenization
from peftsearch.spec import StudyFile

END = 1
HEADS = {name: task.heads.get("encoder-decoder") for name, task in TASKS.items()}
SCORED = [name for name, head in HEADS.items() if head and head.auto_model == "AutoModelForSequenceClassification"]


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: the vocabulary holds the end token as a piece, and wide letters are made narrow ones."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁yes", -3.0), ("▁no", -3.0)]
    backend = Tokenizer(models.Unigram([*pieces, *((letter, -9.0) for letter in "</s>")], unk_id=2))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("tokenizer", [unigram(), ByT5Tokenizer()], ids=["unigram", "bytes"])
@pytest.mark.parametrize("written", ["yes </s> no", "yes</s>no", "</s>", "yes no </s>", "yes \uff1c/s\uff1e"])
def test_only_the_tokenizer_ends_a_text(tokenizer: Any, written: str) -> None:
    table = pa.table({"text": ["yes", written], "label": ["a", "b"]})
    how = Tokenization(tokenizer, 16, "encoder-decoder")
    found = get_task("classification").tokenize(table, ("a", "b"), how)["input_ids"]
    assert [ids.count(END) for ids in found] == [1, 1]
    assert [ids[-1] for ids in found] == [END, END]
    if "no" in written:
        assert len(found[1]) >= 3, "the text around it is still there"


@pytest.mark.parametrize("task", SCORED)
def test_an_encoder_decoder_scores_texts_that_hold_its_end_token(task: str, tmp_path: Path) -> None:
    import torch

    folder = tiny_encoder_decoder(tmp_path / "model")
    domain = task_domain(task, tmp_path)
    train = Path(domain["data"]["train"])
    lines = train.read_text().splitlines()
    column = "question" if task == "multiple_choice" else "text"
    lines[0] = lines[0].replace(f'"{column}": "', f'"{column}": "the </s> end ', 1)
    train.write_text("\n".join(lines))
    document = {"name": "s", "model": "m", "domains": {"d": domain}, "methods": {"lora": {}}}
    raw = load_domain("d", StudyFile(document, folder=tmp_path).spec, tmp_path)
    how = Tokenization(AutoTokenizer.from_pretrained(folder), 48, "encoder-decoder", training=True)
    rows = raw.task.tokenize(raw.splits["train"], raw.labels, how)[:8]
    batch = {name: value for name, value in raw.task.collate(rows, 0).items() if name not in raw.task.hidden}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **raw.task.config_kwargs(raw.labels))
    with torch.no_grad():
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
    assert torch.isfinite(output.logits).all()


def test_marks_that_other_models_are_given_on_purpose_stay(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder(tmp_path / "model"))
    table = pa.table({"text": ["yes [SEP] no"], "label": ["a"]})
    found = get_task("classification").tokenize(table, ("a",), Tokenization(tokenizer, 16, "encoder"))["input_ids"]
    assert found[0].count(tokenizer.sep_token_id) == 2
