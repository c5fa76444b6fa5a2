"""A tiny base model, a small study on it, and the command line in this process."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "the", "tenant", "landlord", "pays", "patient", "has", "fever", "no"]
LONGEST = 32


@dataclass(frozen=True)
class Result:
    """What a command line left: exit status, standard output and standard error."""

    status: int
    out: str
    err: str


def save_base(folder: Path) -> Path:
    """A BERT with two layers of 16, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=LONGEST,
        **{f"{word[1:-1].lower()}_token": word for word in SPECIAL},
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LONGEST,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def small_study(model: Path | str) -> dict[str, Any]:
    """A study of two domains, as its YAML file would be parsed."""
    return {
        "name": "small",
        "model": str(model),
        "domains": {
            "legal": {"data": {"train": "train.csv", "test": "test.csv"}, "metric": "macro_f1"},
            "clinical": {"data": {"source": "notes.csv"}},
        },
        "methods": {"lora": {"rank": {"low": 1, "high": 4}}, "full": {}},
        "search": {"trials": 2},
        "training": {"epochs": 1, "evaluations": 2, "batch_size": 4, "max_length": 16},
        "tracking": {"mlflow": "off"},
    }


def write_rows(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def rows(count: int, word: str) -> list[tuple[str, str]]:
    """Distinct texts with two labels in turn."""
    return [(f"the {word} {number} pays", "yes" if number % 2 else "no") for number in range(count)]


def write_study(folder: Path, study: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its content; empty where there is no folder.

    Of a ledger only that it is there: SQLite moves what was written between its files when somebody reads.
    """
    return {
        str(path.relative_to(folder)): _content(path)
        for path in sorted(folder.rglob("*"))
        if not path.name.endswith(("-wal", "-shm"))
    }


def _content(path: Path) -> str:
    if path.is_dir() or path.name == "ledger.db":
        return path.name
    return hashlib.sha256(path.read_bytes()).hexdigest()
