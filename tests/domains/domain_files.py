"""Texts, files and tokenizers that the tests of domains are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "tenant", "pays", "rent", "patient", "has", "fever", "no", "."]


def save_tokenizer(folder: Path, words: list[str] = WORDS, **kwargs: Any) -> Path:
    """A word-level tokenizer that marks texts and pairs as BERT's does, and the configuration of a BERT beside it."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **(special | kwargs),
    ).save_pretrained(folder)
    BertConfig(vocab_size=len(words)).save_pretrained(folder)
    return folder


def rows(count: int, labels: int = 2) -> list[dict[str, str]]:
    """Distinct texts with alternating labels."""
    return [{"text": f"the tenant {number}", "label": f"c{number % labels}"} for number in range(count)]


def write_json_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
