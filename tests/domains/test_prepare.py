"""Preparing a domain: end to end, once, and safely."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from domain_files import WORDS, rows, save_tokenizer, write_json_lines
from tiny_models import tiny_encoder_decoder
from transformers import (
    AutoTokenizer,
    BartConfig,
    BertConfig,
    GPT2Config,
    LEDConfig,
    LlamaConfig,
    MPNetConfig,
    RobertaConfig,
)

from peftsearch.domains import PreparedDomain, load_raw, prepare_domain
from peftsearch.spec import DomainFacts, StudyError, StudyFile, StudySpec

Make = Callable[..., StudyFile]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def prepare(file: StudyFile, tokenizer: str, cache: Path) -> PreparedDomain:
    return prepare_domain("d", file.spec, folder=file.folder, model_location=tokenizer, revision=None, cache=cache)


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_end_to_end(tmp_path: Path, study: Make, tokenizer: str, cache: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", rows(40))
    file = study({"source": "a.jsonl", "limit": {"train": 24}}, domain={"metric": "macro_f1", "max_length": 5})
    prepared = prepare(file, tokenizer, cache)
    assert (prepared.name, prepared.task.name) == ("d", "classification")
    assert (prepared.metric, prepared.direction) == ("macro_f1", "maximize")
    assert (prepared.labels, prepared.max_length, prepared.pad_token_id) == (("c0", "c1"), 5, 0)
    assert prepared.rows == {"train": 24, "validation": 6, "test": 6}
    assert prepared.source == "a.jsonl"
    assert prepared.warnings == ("100% of train fills all 5 tokens of max_length: texts are cut off",)
    for split, count in prepared.rows.items():
        dataset = prepared.split(split)
        assert dataset.num_rows == count
        assert dataset.cache_files, "memory-mapped"
        assert set(dataset.column_names) == {"input_ids", "labels"}
        assert all(tokens[0] == 2 and len(tokens) == 5 for tokens in dataset[:]["input_ids"])
    raw = load_raw("d", file.spec, file.folder)
    assert [prepared.labels[number] for number in prepared.split("test")[:]["labels"]] == raw["test"].column(
        "label"
    ).to_pylist()
    with pytest.raises(KeyError, match="no split 'dev'; its splits: train, validation, test"):
        prepared.split("dev")
    assert sorted(os.listdir(cache)) == [prepared.folder.name], "nothing temporary is left"


def test_what_is_known_survives_disk_and_pickle(tmp_path: Path, study: Make, tokenizer: str, cache: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", rows(40))
    prepared = prepare(study({"source": "a.jsonl"}), tokenizer, cache)
    assert PreparedDomain.load(prepared.folder) == prepared
    copy = pickle.loads(pickle.dumps(prepared))
    assert copy == prepared
    assert copy.split("train")[:] == prepared.split("train")[:]
    facts = prepared.facts()
    assert facts.fingerprint == prepared.fingerprint
    assert DomainFacts.model_validate_json(facts.model_dump_json()) == facts


def test_the_same_content_is_tokenised_once(
    tmp_path: Path, study: Make, tokenizer: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json_lines(tmp_path / "a.jsonl", rows(40))
    file = study({"source": "a.jsonl"})
    first = prepare(file, tokenizer, cache)
    before = inodes(cache)
    monkeypatch.setattr(type(first.task), "tokenize", None)
    assert prepare(file, tokenizer, cache) == first
    assert inodes(cache) == before


def test_whatever_changes_the_tokens_is_tokenised_anew(
    tmp_path: Path, study: Make, tokenizer: str, cache: Path
) -> None:
    write_json_lines(tmp_path / "a.jsonl", rows(40))
    data = {"source": "a.jsonl"}
    first = prepare(study(data), tokenizer, cache)
    shorter = prepare(study(data, max_length=8), tokenizer, cache)
    other_words = str(save_tokenizer(tmp_path / "words", [*WORDS, "more"]))
    other_tokenizer = prepare(study(data), other_words, cache)
    other_metric = prepare(study(data, domain={"metric": "f1/c1"}), tokenizer, cache)
    # The fingerprint of the data knows nothing of tokenizers ...
    assert {first.fingerprint} == {prepared.fingerprint for prepared in (shorter, other_tokenizer, other_metric)}
    # ... but all of the data.
    limited = prepare(study({**data, "limit": 5}), tokenizer, cache)
    reseeded = prepare(study({**data, "split": {"seed": 1}}), tokenizer, cache)
    write_json_lines(tmp_path / "a.jsonl", [{"text": "the tenant zero", "label": "c0"}, *rows(40)[1:]])
    retold = prepare(study(data), tokenizer, cache)
    write_json_lines(tmp_path / "a.jsonl", [{"text": "the tenant 0", "label": "c1"}, *rows(40)[1:]])
    relabelled = prepare(study(data), tokenizer, cache)
    different = [first, limited, reseeded, retold, relabelled]
    assert len({prepared.fingerprint for prepared in different}) == len(different)
    everything = [*different, shorter, other_tokenizer, other_metric]
    assert len({prepared.folder for prepared in everything}) == len(everything)


def test_a_tokenizer_that_was_used_before_is_the_same_tokenizer(tmp_path: Path, study: Make, cache: Path) -> None:
    """Truncation and padding are stored in a tokenizer's file but set by every call."""
    folder = save_tokenizer(tmp_path / "one")
    write_json_lines(tmp_path / "a.jsonl", rows(40))
    file = study({"source": "a.jsonl"})
    first = prepare(file, str(folder), cache)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    again = prepare(file, str(folder), cache)
    assert again.folder == first.folder


@pytest.mark.parametrize("damage", ["manifest", "truncated", "flipped", "described", "garbage", "folder"])
def test_a_damaged_entry_is_made_again(
    tmp_path: Path, study: Make, tokenizer: str, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_json_lines(tmp_path / "a.jsonl", rows(40))
    file = study({"source": "a.jsonl"})
    first = prepare(file, tokenizer, cache)
    tokens = first.split("train")[:]
    if damage == "manifest":
        (first.folder / "manifest.json").unlink()
    elif damage == "garbage":
        (first.folder / "manifest.json").write_text("[]")
    elif damage == "truncated":
        arrow = next((first.folder / "train").glob("*.arrow"))
        arrow.write_bytes(arrow.read_bytes()[:-10])
    elif damage == "flipped":
        arrow = next((first.folder / "train").glob("*.arrow"))
        content = bytearray(arrow.read_bytes())
        content[len(content) // 2] ^= 1
        arrow.write_bytes(content)
    elif damage == "described":
        manifest = first.folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"c0"', '"c9"', 1))
    else:
        os.rename(first.folder / "validation", tmp_path / "gone")
    with pytest.raises(StudyError, match="is incomplete: delete that folder and run again"):
        PreparedDomain.load(first.folder)
    again = prepare(file, tokenizer, cache)
    assert "the prepared data of domain 'd'" in caplog.text
    assert "is damaged, and made anew" in caplog.text
    assert again == first
    assert again.split("train")[:] == tokens
    caplog.clear()
    assert prepare(file, tokenizer, cache) == first
    assert not caplog.records
    assert os.listdir(cache) == [first.folder.name]


def _prepare_in_process(spec: StudySpec, folder: Path, tokenizer: str, cache: Path) -> PreparedDomain:
    return prepare_domain("d", spec, folder=folder, model_location=tokenizer, revision=None, cache=cache)


def test_several_processes_may_prepare_the_same(tmp_path: Path, study: Make, tokenizer: str, cache: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", rows(400))
    file = study({"source": "a.jsonl"})
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        arguments = (file.spec, file.folder, tokenizer, cache)
        found = [job.result() for job in [pool.submit(_prepare_in_process, *arguments) for _ in range(4)]]
    assert found == [found[0]] * 4
    assert os.listdir(cache) == [found[0].folder.name]


def test_nothing_is_written_when_anything_is_wrong(tmp_path: Path, study: Make, tokenizer: str, cache: Path) -> None:
    write_json_lines(tmp_path / "train.jsonl", rows(20))
    write_json_lines(tmp_path / "test.jsonl", [{"text": "x", "label": None}])
    file = study({"train": "train.jsonl", "test": "test.jsonl"})
    with pytest.raises(StudyError, match=r"column 'label' of test\.jsonl holds no label in row 1"):
        prepare(file, tokenizer, cache)
    assert not cache.exists()


def test_a_failing_write_leaves_nothing(
    tmp_path: Path, study: Make, tokenizer: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    write_json_lines(tmp_path / "a.jsonl", rows(20))

    def full(self: Any, path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", full)
    with pytest.raises(StudyError, match=r"cannot write prepared data to .*No space left on device"):
        prepare(study({"source": "a.jsonl"}), tokenizer, cache)
    assert os.listdir(cache) == []


def test_a_study_without_a_test_split(tmp_path: Path, study: Make, tokenizer: str, cache: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", rows(20))
    prepared = prepare(study({"source": "a.jsonl", "split": {"test": 0}}), tokenizer, cache)
    assert prepared.rows == {"train": 16, "validation": 4}


def test_splits_that_the_data_brings_are_kept(tmp_path: Path, study: Make) -> None:
    write_json_lines(tmp_path / "train.jsonl", rows(20))
    write_json_lines(tmp_path / "test.jsonl", rows(3))
    file = study({"train": "train.jsonl", "test": "test.jsonl"})
    splits = load_raw("d", file.spec, file.folder)
    assert list(splits) == ["train", "validation", "test"]
    assert splits["test"].to_pylist() == rows(3)
    assert sorted(row["text"] for split in ("train", "validation") for row in splits[split].to_pylist()) == sorted(
        row["text"] for row in rows(20)
    )


def test_identical_texts_never_cross_a_cut(tmp_path: Path, study: Make) -> None:
    records = [{"text": text, "label": f"c{n % 2}"} for n in range(30) for text in (f"text {n}", f"TEXT  {n} ")]
    write_json_lines(tmp_path / "a.jsonl", records)
    file = study({"source": "a.jsonl"})
    texts = {
        split: {row["text"].lower().split()[1] for row in table.to_pylist()}
        for split, table in load_raw("d", file.spec, file.folder).items()
    }
    assert sum(map(len, texts.values())) == 30


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"model_max_length": 8}, "training.max_length: 16 tokens are more than the 8 that the model takes"),
        ({"pad_token": None}, "has neither a padding token nor an end token"),
    ],
)
def test_unusable_tokenizer(tmp_path: Path, study: Make, cache: Path, kwargs: dict[str, Any], sentence: str) -> None:
    write_json_lines(tmp_path / "a.jsonl", rows(20))
    file = study({"source": "a.jsonl"})
    with pytest.raises(StudyError) as caught:
        prepare(file, str(save_tokenizer(tmp_path / "t", **kwargs)), cache)
    assert sentence in file.explain(caught.value)
    assert not cache.exists()


def test_where_positions_are_relative_texts_may_be_longer_than_the_tokenizer_says(
    tmp_path: Path, study: Make, cache: Path
) -> None:
    """As Flan-T5 is trained on 1,024 tokens of PubMed, and its tokenizer says 512."""
    model = str(tiny_encoder_decoder(tmp_path / "t5"))
    assert AutoTokenizer.from_pretrained(model).model_max_length == 128
    records = [{"text": "the tenant shall pay " * 60, "label": f"c{number % 2}"} for number in range(20)]
    write_json_lines(tmp_path / "a.jsonl", [{**row, "text": f"{n} {row['text']}"} for n, row in enumerate(records)])
    file = study({"source": "a.jsonl"}, max_length=200)
    prepared = prepare_domain("d", file.spec, folder=file.folder, model_location=model, revision=None, cache=cache)
    assert {len(ids) for ids in prepared.split("train")["input_ids"]} == {200}


POSITIONS = {
    "bert": (BertConfig(max_position_embeddings=32, hidden_size=32, num_attention_heads=2, num_hidden_layers=1), 32),
    # Behind the padding's position.
    "roberta": (
        RobertaConfig(max_position_embeddings=34, hidden_size=32, num_attention_heads=2, num_hidden_layers=1),
        32,
    ),
    # Where words stand, and also how far they are apart.
    "mpnet": (MPNetConfig(max_position_embeddings=34, hidden_size=32, num_attention_heads=2, num_hidden_layers=1), 32),
    "gpt2": (GPT2Config(n_positions=32, n_embd=32, n_head=2, n_layer=1), 32),
    "bart": (BartConfig(max_position_embeddings=32, d_model=32, encoder_layers=1, decoder_layers=1), 32),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_texts_longer_than_the_table_of_positions_are_refused(
    kind: str, tmp_path: Path, study: Make, cache: Path
) -> None:
    """Also where the tokenizer states no limit: on a GPU, an index out of range would end the process."""
    config, positions = POSITIONS[kind]
    model = save_tokenizer(tmp_path / "model", eos_token="[SEP]")
    config.save_pretrained(model)
    assert AutoTokenizer.from_pretrained(model).model_max_length > 1e9
    write_json_lines(tmp_path / "a.jsonl", rows(20))
    prepare(study({"source": "a.jsonl"}, max_length=positions), str(model), cache)
    file = study({"source": "a.jsonl"}, max_length=positions + 1)
    with pytest.raises(StudyError) as caught:
        prepare(file, str(model), cache)
    expected = (
        f"training.max_length: {positions + 1} tokens are more than the {positions} that the model takes: lower it"
    )
    assert expected in file.explain(caught.value)


def test_computed_positions_have_no_end(tmp_path: Path, study: Make, cache: Path) -> None:
    """Rotary ones, of which a configuration only says how many the model was trained with."""
    model = save_tokenizer(tmp_path / "model", eos_token="[SEP]")
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    LlamaConfig(max_position_embeddings=32, **small).save_pretrained(model)
    write_json_lines(tmp_path / "a.jsonl", rows(20))
    assert prepare(study({"source": "a.jsonl"}, max_length=64), str(model), cache).max_length == 64


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (GPT2Config(n_positions=32, n_embd=32, n_head=2, n_layer=1), {"target_length": 16}, None),
        (
            GPT2Config(n_positions=32, n_embd=32, n_head=2, n_layer=1),
            {"target_length": 17},
            "max_length (16) and target_length (17) are together more than the 32 tokens that the model takes",
        ),
        (
            GPT2Config(n_positions=32, n_embd=32, n_head=2, n_layer=1),
            {"target_length": 4, "generation": {"max_tokens": 20}},
            "max_length (16) and generation.max_tokens (20) are together more than the 32",
        ),
        # Text and answer stand in tables of their own.
        (
            LEDConfig(max_encoder_position_embeddings=64, max_decoder_position_embeddings=20),
            {"target_length": 20},
            None,
        ),
        (
            LEDConfig(max_encoder_position_embeddings=64, max_decoder_position_embeddings=20),
            {"target_length": 21},
            "target_length (21) is more than the 20 tokens that the model writes",
        ),
    ],
)
def test_answers_have_positions_too(
    config: Any, options: dict[str, Any], sentence: str | None, tmp_path: Path, study: Make, cache: Path
) -> None:
    model = save_tokenizer(tmp_path / "model", eos_token="[SEP]")
    config.save_pretrained(model)
    records = [{"text": f"the tenant {number}", "target": "rent"} for number in range(20)]
    write_json_lines(tmp_path / "a.jsonl", records)
    file = study({"source": "a.jsonl"}, domain={"task": "summarization", "options": options})
    if sentence is None:
        assert prepare(file, str(model), cache).rows["train"]
        return
    with pytest.raises(StudyError) as caught:
        prepare(file, str(model), cache)
    assert sentence in file.explain(caught.value)


def test_no_tokenizer(tmp_path: Path, study: Make, cache: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", rows(20))
    (tmp_path / "empty").mkdir()
    file = study({"source": "a.jsonl"})
    with pytest.raises(StudyError, match=r"cannot load the tokenizer of '.*empty'") as caught:
        prepare(file, str(tmp_path / "empty"), cache)
    assert "\n" not in caught.value.message


def test_decoders_pad_with_their_end_token(tmp_path: Path, study: Make, cache: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", rows(20))
    folder = save_tokenizer(tmp_path / "t", pad_token=None, eos_token="[SEP]")
    assert prepare(study({"source": "a.jsonl"}), str(folder), cache).pad_token_id == 3


SHARED = os.environ.get("PEFTSEARCH_SHARED_DATA")


@pytest.mark.skipif(SHARED is None, reason="PEFTSEARCH_SHARED_DATA names no folder of published corpora")
@pytest.mark.parametrize(
    ("data", "counts", "labels"),
    [
        (
            {"header": ["sentence", "label"], "columns": {"text": "sentence"}}
            | {split: f"gad/{split}.tsv" for split in ("train", "validation", "test")},
            {"train": 4317, "validation": 478, "test": 527},
            2,
        ),
        (
            {split: f"cuad_clauses/{split}.jsonl" for split in ("train", "validation", "test")}
            | {"split": {"group": "contract"}},
            {"train": 8005, "validation": 912, "test": 967},
            23,
        ),
        (
            {split: f"pubmedqa/{split}.json" for split in ("train", "validation", "test")}
            | {"columns": {"text": "question", "text_pair": "context"}},
            {"train": 450, "validation": 50, "test": 500},
            3,
        ),
    ],
)
def test_published_corpora(
    study: Make, tokenizer: str, cache: Path, data: dict[str, Any], counts: dict[str, int], labels: int
) -> None:
    spec = study(data).spec
    prepared = prepare_domain("d", spec, folder=Path(str(SHARED)), model_location=tokenizer, revision=None, cache=cache)
    assert prepared.rows == counts
    assert len(prepared.labels) == labels
    assert not any("belong to" in warning for warning in prepared.warnings), "no contract crosses splits"
