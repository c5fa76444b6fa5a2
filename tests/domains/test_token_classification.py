"""Token classification: files, word pieces, truncation, entity scores, and learning."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import classification_report, f1_score
from seqeval.scheme import IOB2
from tiny_models import tiny_decoder, tiny_encoder, tiny_encoder_decoder
from transformers import AutoTokenizer
from writing_study import plan_and_worker, train
from writing_study import study as written_study

from peftsearch.domains import get_metric, get_task, load_domain
from peftsearch.domains.tasks import LossOptions, Prediction, Task, Tokenization
from peftsearch.domains.tasks.token_classification import IGNORED, LOST
from peftsearch.spec import DataSpec, StudyError, StudyFile
from peftsearch.training.segment import Probe, ProbeResult

Make = Callable[..., StudyFile]
TASK = get_task("token_classification")
DOMAIN = {"task": "token_classification"}
LABELS = ("O", "B-C", "I-C", "B-D", "I-D")
MODELS = {"encoder": tiny_encoder, "encoder-decoder": tiny_encoder_decoder, "decoder": tiny_decoder}


def iob(*sentences: str) -> str:
    """An IOB file of sentences such as ``the/O fever/B-D``."""
    return "\n".join("".join(word.replace("/", "\t") + "\n" for word in s.split()) for s in sentences)


def write_splits(path: Path, train: str, validation: str, test: str, suffix: str = "tsv") -> dict[str, str]:
    found = {}
    for split, text in (("train", train), ("validation", validation), ("test", test)):
        found[split] = f"{split}.{suffix}"
        (path / found[split]).write_text(text, encoding="utf-8")
    return found


def refused(study: Make, data: dict[str, Any], **domain: Any) -> str:
    file = study(data, domain={**DOMAIN, **domain})
    with pytest.raises(StudyError) as caught:
        load_domain("d", file.spec, file.folder)
    assert caught.value.loc[:2] == ("domains", "d")
    return file.explain(caught.value)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make(folder / kind) for kind, make in MODELS.items()}


@pytest.fixture(scope="module")
def tokenizers(models: dict[str, Path]) -> dict[str, Any]:
    return {kind: AutoTokenizer.from_pretrained(folder) for kind, folder in models.items()}


def tokenized(
    tokenizer: Any, sentences: Sequence[str], *, max_length: int = 64, kind: Any = "encoder", task: Task = TASK
) -> tuple[dict[str, list[Any]], Tokenization]:
    """A split of sentences such as ``the/O fever/B-D``."""
    pairs = [[word.rsplit("/", 1) for word in sentence.split(" ")] for sentence in sentences]
    table = pa.table({"tokens": [[w for w, _ in p] for p in pairs], "tags": [[t for _, t in p] for p in pairs]})
    read = task.read(table, DataSpec(source="x"), "x", ())
    how = Tokenization(tokenizer, max_length, kind)
    return task.tokenize(read, LABELS, how)[:], how


# --- reading ---


@pytest.mark.parametrize("suffix", ["tsv", "txt", "iob", "conll", "bio"])
def test_files_are_read_as_iob_by_their_suffix(tmp_path: Path, study: Make, suffix: str) -> None:
    splits = write_splits(tmp_path, iob("no/O fever/B-D", "rash/B-D"), iob("x/B-D"), iob("y/B-D"), suffix)
    file = study(splits, domain=DOMAIN)
    raw = load_domain("d", file.spec, file.folder)
    assert raw.labels == ("O", "B-D", "I-D")
    assert raw.splits["train"].select(["tokens", "tags"]).to_pydict() == {
        "tokens": [["no", "fever"], ["rash"]],
        "tags": [["O", "B-D"], ["B-D"]],
    }
    assert raw.metric.name == "entity_f1"


def test_other_tasks_still_read_tsv_files_as_tables(tmp_path: Path, study: Make) -> None:
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"t{n}\tc{n % 2}\n" for n in range(20)))
    file = study({"source": "a.tsv"})
    assert load_domain("d", file.spec, file.folder).labels == ("c0", "c1")


def test_columns_of_lists_and_class_labels(tmp_path: Path, study: Make) -> None:
    import datasets

    tags = ["O", "B-D", "I-D"]
    features = datasets.Features(
        {"words": datasets.List(datasets.Value("string")), "ner": datasets.List(datasets.ClassLabel(names=tags))}
    )
    rows = {"words": [["no", "fever", str(n)] for n in range(20)], "ner": [[0, 1, 2]] * 20}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    with (tmp_path / "a.jsonl").open("w") as file:
        for words in rows["words"]:
            file.write(json.dumps({"words": words, "ner": tags}) + "\n")
    read = []
    for source in ("saved", "a.parquet", "a.jsonl"):
        made = study({"source": source, "columns": {"tokens": "words", "tags": "ner"}}, domain=DOMAIN)
        read.append(load_domain("d", made.spec, made.folder))
    assert {raw.fingerprint for raw in read} == {read[0].fingerprint}
    assert read[0].splits["train"].column("tags").to_pylist()[0] == tags


def test_documents_keep_their_sentences_together(tmp_path: Path, study: Make) -> None:
    text = "".join(f"-DOCSTART-\tO\n\n{iob(f'a{n}/O b/B-D', f'c{n}/B-D')}\n" for n in range(10))
    (tmp_path / "a.iob").write_text(text)
    file = study({"source": "a.iob", "split": {"group": "document"}}, domain=DOMAIN)
    raw = load_domain("d", file.spec, file.folder)
    groups = [set(table.column("group").to_pylist()) for table in raw.splits.values()]
    assert sum(map(len, groups)) == 10


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        (
            iob("a/O b/B-D", "c/O d/O e/I-D"),
            "train.tsv, line 6: the tag 'I-D' continues no entity (the tag before is 'O') at the word 'e': correct it, "
            "or set 'repair: true'",
        ),
        (iob("a/O b/B-D", "c/X-D"), "train.tsv, line 4: the tag 'X-D' is none of O, B-TYPE and I-TYPE"),
        ("a\tO\nb\n", "train.tsv, line 2: the word 'b' has no tag"),
        (iob("a/O b/O"), "no word of train is tagged as part of an entity"),
        ("\n\n", "train.tsv holds no sentences"),
    ],
)
def test_broken_files(tmp_path: Path, study: Make, train: str, sentence: str) -> None:
    explained = refused(study, write_splits(tmp_path, train, iob("x/B-D"), iob("x/B-D")))
    assert sentence in explained
    assert explained.startswith("study.yaml, line ")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "row 3: 2 words in 'tokens' but 1 tags in 'tags'"),
        ({"tokens": [], "tags": []}, "column 'tokens' of a.jsonl holds no words in row 3"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "holds an empty word in row 3, position 2"),
        ({"tokens": None, "tags": ["O"]}, "column 'tokens' of a.jsonl holds no list in row 3"),
        ({"tokens": ["a", "b"], "tags": ["O", "I-C"]}, "a.jsonl, row 3, word 2: the tag 'I-C' continues no entity"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "column 'tokens' mixes kinds of values"),
    ],
)
def test_broken_rows(tmp_path: Path, study: Make, row: dict[str, Any], sentence: str) -> None:
    rows: list[dict[str, Any]] = [{"tokens": [f"w{n}", "x"], "tags": ["O", "B-D"]} for n in range(20)]
    rows[2] = row
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    assert sentence in refused(study, {"source": "a.jsonl"})


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (
            {"tokens": ["a b"] * 9, "tags": ["O O"] * 9},
            "column 'tokens' of a.parquet holds texts: token classification",
        ),
        ({"tokens": [["a"]] * 9, "tags": [[1]] * 9}, "column 'tags' of a.parquet holds lists of numbers without names"),
        (
            {"tokens": [[1]] * 9, "tags": [["O"]] * 9},
            "column 'tokens' of a.parquet holds lists of numbers, not of words",
        ),
        ({"words": [["a"]] * 9, "tags": [["O"]] * 9}, "a.parquet has no column 'tokens'"),
    ],
)
def test_wrong_columns(tmp_path: Path, study: Make, table: dict[str, Any], sentence: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert sentence in refused(study, {"source": "a.parquet"})


def test_a_type_that_train_never_shows(tmp_path: Path, study: Make) -> None:
    splits = write_splits(tmp_path, iob("a/B-Disease"), iob("b/B-Disease"), iob("c/B-Diseases x/O d/B-Diseases"))
    sentence = "the type 'Diseases' has 2 entities in test but none in train; did you mean 'Disease'"
    assert sentence in refused(study, splits)


def test_repair_counts_what_it_repaired(tmp_path: Path, study: Make) -> None:
    splits = write_splits(tmp_path, iob("a/O b/I-D c/B-D", "d/B-D"), iob("e/B-D"), iob("f/B-D"))
    assert "set 'repair: true'" in refused(study, splits)
    file = study(splits, domain={**DOMAIN, "options": {"repair": True}})
    raw = load_domain("d", file.spec, file.folder)
    assert "1 tags in 1 sentences of train stood in a wrong place and were read as conlleval does" in " ".join(
        raw.warnings
    )
    assert raw.splits["train"].column("tags").to_pylist()[0] == ["O", "B-D", "B-D"]


def test_metrics_of_one_type(tmp_path: Path, study: Make) -> None:
    assert get_metric(TASK, "f1/D", (), LABELS).name == "f1/D"
    splits = write_splits(tmp_path, iob("a/B-D"), iob("b/B-D"), iob("c/B-D"))
    assert "is about the label 'B-D', which the data lacks" in refused(study, splits, metric="f1/B-D")


# --- word pieces ---


@pytest.mark.parametrize(("kind", "carrier"), [("encoder", 0), ("encoder-decoder", 0), ("decoder", -1)])
def test_one_piece_of_each_word_carries_its_tag(tokenizers: dict[str, Any], kind: str, carrier: int) -> None:
    """The first; of decoders the last, before which they have not read the word."""
    tokenizer = tokenizers[kind]
    columns, _ = tokenized(tokenizer, ["no/O zebra/B-D fever/I-D ox/O"], kind=kind)
    pieces = [["no"], ["z", "##e", "##b", "##r", "##a"], ["fever"], ["o", "##x"]]
    names = tokenizer.convert_ids_to_tokens(columns["input_ids"][0])
    assert [names[place] for place in columns["positions"][0]] == [word[carrier] for word in pieces]
    batch = TASK.collate(columns, 0, multiple_of=1)
    carried = [(names[i], LABELS[n]) for i, n in enumerate(batch["labels"][0].tolist()) if n != IGNORED]
    assert carried == [(word[carrier], tag) for word, tag in zip(pieces, ["O", "B-D", "I-D", "O"], strict=True)]


def test_the_carrying_piece_is_an_option(tokenizers: dict[str, Any]) -> None:
    task = get_task("token_classification", options={"piece": "last"})
    columns, _ = tokenized(tokenizers["encoder"], ["ox/O no/O"], task=task)
    assert columns["positions"] == [[2, 3]]


@pytest.mark.parametrize("kind", MODELS)
def test_words_without_pieces_do_not_shift_the_others(tokenizers: dict[str, Any], kind: str) -> None:
    """Some tokenizers make nothing of blanks that are none to us."""
    columns, how = tokenized(tokenizers[kind], ["\u00a0/O fever/B-D \u2003/O \u00a0/O no/O", "\u00a0/B-C"], kind=kind)
    names = [tokenizers[kind].convert_ids_to_tokens(ids) for ids in columns["input_ids"]]
    unknown = tokenizers[kind].unk_token
    found = [[names[row][place] for place in places] for row, places in enumerate(columns["positions"])]
    assert found == [[unknown, "fever", unknown, unknown, "no"], [unknown]]
    assert how.warnings == []


def test_byte_level_tokenizers_need_no_prefix_space(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=["<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["the fever is high"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    columns, _ = tokenized(tokenizer, ["the/O fever/B-D is/O high/O"])
    names = tokenizer.convert_ids_to_tokens(columns["input_ids"][0])
    # As in running text, words after the first bring their blank along.
    assert [names[place] for place in columns["positions"][0]] == ["the", "Ġfever", "Ġis", "Ġhigh"]
    columns, _ = tokenized(tokenizer, ["é€x/O fever/B-D"])
    names = tokenizer.convert_ids_to_tokens(columns["input_ids"][0])
    assert (columns["positions"][0][0], names[columns["positions"][0][1]]) == (0, "Ġfever")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["no", "zebra", "\u00a0", "a-b", "Ü", "fever", "[SEP]"]), min_size=1, max_size=12))
def test_every_word_keeps_its_own_tag(words: list[str]) -> None:
    tokenizer = _shared_tokenizer()
    sentence = " ".join(f"{word}/{'B-D' if n % 2 else 'O'}" for n, word in enumerate(words))
    columns, _ = tokenized(tokenizer, [sentence])
    places = columns["positions"][0]
    assert LOST not in places
    assert places == sorted(set(places))
    alone = [tokenized(tokenizer, [f"{word}/O"])[0]["input_ids"][0][1] for word in words]
    assert [columns["input_ids"][0][place] for place in places] == alone


_SHARED: list[Any] = []


def _shared_tokenizer() -> Any:
    if not _SHARED:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            _SHARED.append(AutoTokenizer.from_pretrained(tiny_encoder(Path(folder))))
    return _SHARED[0]


def test_slow_tokenizers_are_refused(tokenizers: dict[str, Any]) -> None:
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ValueError, match="SlowTokenizer does not say which piece belongs to which word"):
        tokenized(SlowTokenizer(), ["a/O"])


# --- truncation ---


def test_what_is_cut_off_is_counted_and_counts_as_missed(tokenizers: dict[str, Any]) -> None:
    sentences = ["no/O fever/B-D zebra/B-C no/O rash/B-D fever/I-D", "fever/B-D no/O"]
    columns, how = tokenized(tokenizers["encoder"], sentences, max_length=6)
    # [CLS] no fever z ##e [SEP]
    assert columns["positions"] == [[1, 2, 3, LOST, LOST, LOST], [1, 2]]
    assert how.warnings == [
        "1 of 2 sentences do not fit into the 6 tokens of max_length: 1 of 4 entities are lost or cut and count as "
        "missed"
    ]
    references = TASK.references(columns)
    assert references == [[0, 3, 1, 0, 3, 4], [3, 0]]
    batch = TASK.collate(columns, 0)
    logits = torch.zeros(2, 8, 5)
    for row, labels in enumerate(batch["labels"].tolist()):
        for place, label in enumerate(labels):
            logits[row, place, label if label != IGNORED else 3] = 9.0
    predictions = TASK.predict(torch.nn.Identity(), SimpleNamespace(logits=logits), batch, Prediction("encoder"))
    assert predictions == [[0, 3, 1, 0, 0, 0], [3, 0]]
    scores = TASK.score(predictions, references, LABELS)
    assert (scores["precision"], scores["recall"]) == (1.0, 0.75)


def test_soft_tokens_in_front_do_not_shift_the_tags(tokenizers: dict[str, Any]) -> None:
    columns, _ = tokenized(tokenizers["encoder"], ["no/O fever/B-D"])
    batch = TASK.collate(columns, 0)
    logits = torch.randn(1, 8, 5)
    longer = torch.cat([torch.randn(1, 3, 5), logits], dim=1)
    for method in (TASK.losses, lambda output, batch: TASK.predict(None, output, batch, Prediction("encoder"))):  # type: ignore[arg-type]
        short, long = method(SimpleNamespace(logits=logits), batch), method(SimpleNamespace(logits=longer), batch)
        assert list(short) == list(long)


def test_losses_are_means_over_words() -> None:
    logits = torch.randn(2, 8, 3, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.full((2, 8), IGNORED)
    labels[0, 1], labels[0, 4] = 2, 0
    each = torch.nn.functional.cross_entropy(logits[0, [1, 4]].float(), torch.tensor([2, 0]), reduction="none")
    losses = TASK.losses(SimpleNamespace(logits=logits), {"labels": labels})
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([each.mean().item(), 0.0])
    losses.sum().backward()
    weights = torch.tensor([1.0, 1.0, 5.0])
    weighted = TASK.losses(SimpleNamespace(logits=logits), {"labels": labels}, LossOptions(class_weights=weights))
    assert weighted[0].item() == pytest.approx(((5 * each[0] + each[1]) / 2).item())


# --- scores ---

# The example of the conlleval documentation, in seqeval's README: one of two entities is found exactly.
README_TRUE = [["O", "O", "O", "B-C", "I-C", "I-C", "O"], ["B-D", "I-D", "O"]]
README_PRED = [["O", "O", "B-C", "I-C", "I-C", "I-C", "O"], ["B-D", "I-D", "O"]]


def score(predicted: list[list[str]], actual: list[list[str]]) -> dict[str, float]:
    number = {label: n for n, label in enumerate(LABELS)}
    return TASK.score([[number[t] for t in s] for s in predicted], [[number[t] for t in s] for s in actual], LABELS)


def test_the_published_example() -> None:
    scores = score(README_PRED, README_TRUE)
    assert scores["entity_f1"] == scores["precision"] == scores["recall"] == scores["strict_f1"] == 0.5
    assert (scores["f1/C"], scores["f1/D"], scores["entity_macro_f1"]) == (0.0, 1.0, 0.5)
    assert scores["token_accuracy"] == pytest.approx(8 / 10)
    # Words by type: C has 3 right of 4 guessed and 3 wanted, D has all.
    assert scores["word_macro_f1"] == pytest.approx((6 / 7 + 1) / 2)


def test_a_stray_inside_tag_starts_an_entity_for_conlleval_but_not_strictly() -> None:
    scores = score([["O", "I-D", "I-D"], ["B-D", "I-C", "O"]], [["O", "B-D", "I-D"], ["B-D", "O", "O"]])
    assert scores["entity_f1"] == pytest.approx(2 * 2 / (3 + 2))
    assert scores["strict_f1"] == pytest.approx(2 * 1 / (1 + 2))


def test_nothing_found_and_nothing_to_find() -> None:
    scores = score([["O", "O"]], [["O", "O"]])
    assert (scores["entity_f1"], scores["strict_f1"], scores["word_macro_f1"], scores["token_accuracy"]) == (0, 0, 0, 1)
    assert set(scores) == {*TASK.metrics, *(f"{m}/{t}" for m in TASK.label_metrics for t in "CD")}


SEQUENCES = st.lists(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1), min_size=1)


@settings(max_examples=60, deadline=None)
@given(SEQUENCES)
@pytest.mark.filterwarnings("ignore")
def test_entity_scores_are_seqevals(pairs: list[list[tuple[str, str]]]) -> None:
    predicted, actual = ([[pair[side] for pair in row] for row in pairs] for side in (0, 1))
    scores = score(predicted, actual)
    assert scores["entity_f1"] == pytest.approx(float(f1_score(actual, predicted, zero_division=0)))
    if any(tag != "O" for row in (*predicted, *actual) for tag in row):
        report = classification_report(actual, predicted, output_dict=True, zero_division=0)
        for kind in "CD":
            if kind in report:
                assert scores[f"f1/{kind}"] == pytest.approx(report[kind]["f1-score"])
                assert scores[f"recall/{kind}"] == pytest.approx(report[kind]["recall"])
        assert scores["entity_macro_f1"] == pytest.approx(report["macro avg"]["f1-score"])
    if any(tag.startswith("B") for row in actual for tag in row):
        strict = f1_score(actual, predicted, mode="strict", scheme=IOB2, zero_division=0)
        assert scores["strict_f1"] == pytest.approx(float(strict))


# --- baselines and learning ---


def test_guesses() -> None:
    train = {"words": [["breast", "cancer", "is"], ["cancer", "cell"]], "tags": [[3, 4, 0], [4, 0]]}
    split = {"words": [["breast", "cancer", "cancer", "new"], ["cancer", "is"]], "tags": [[3, 4, 0, 0], [3, 0]]}
    guesses = TASK.guesses(train, split, LABELS)
    assert guesses["majority"].predictions == [[0, 0, 0, 0], [0, 0]]
    # What follows nothing of its type starts an entity.
    assert guesses["lexicon"].predictions == [[3, 4, 4, 0], [3, 0]]


def sentences(count: int, seed: int) -> str:
    """Diseases and companies among other words: easy, but for words that the model reads in pieces."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        words = [f"{draw.choice(['the', 'no', 'red', 'dog', 'is', 'with'])}/O" for _ in range(draw.randint(3, 6))]
        place = draw.randrange(len(words) + 1)
        kind = draw.choice(["chronic/B-D fever/I-D", "anemia/B-D", "bond/B-C market/I-C", "equity/B-C"])
        found.append(" ".join([*words[:place], kind, *words[place:]]))
    return iob(*found)


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_learns_to_tag(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    splits = write_splits(tmp_path, sentences(96, 0), sentences(24, 1), sentences(24, 2))
    training = {"epochs": 4, "batch_size": 8, "evaluations": 2, "head_learning_rate": 0.02}
    file = written_study(tmp_path, models[kind], {**DOMAIN, "data": splits}, {}, training=training)
    plan, worker = plan_and_worker(file, tmp_path)
    first, last = train(plan, worker, "lora", rank=4, targets="attention", learning_rate=1e-2)
    assert last.loss < first.loss
    baselines = worker.do(Probe(next(iter(plan.models)), "d"))
    assert isinstance(baselines, ProbeResult)
    assert baselines.scores["majority"]["entity_f1"] == 0.0
    assert last.scores["entity_f1"] > max(0.8, baselines.scores["majority"]["entity_f1"])
    if kind == "encoder":
        assert baselines.scores["linear_probe"]["entity_f1"] > 0.5
        assert baselines.parameters["linear_probe"] == 33 * 5
    prompt = train(plan, worker, "prompt", number=1, tokens=4, learning_rate=3e-2)[-1]
    assert prompt.scores["entity_f1"] > 0.1


def test_classes_can_be_balanced(models: dict[str, Path], tmp_path: Path) -> None:
    splits = write_splits(tmp_path, sentences(32, 0), sentences(8, 1), sentences(8, 2))
    training = {"epochs": 1, "class_weights": "balanced", "label_smoothing": 0.1}
    file = written_study(tmp_path, models["encoder"], {**DOMAIN, "data": splits}, {}, training=training)
    plan, worker = plan_and_worker(file, tmp_path)
    assert train(plan, worker, "full", learning_rate=1e-3)[-1].scores["entity_f1"] >= 0.0


def test_the_ncbi_disease_corpus(study: Make) -> None:
    shared = os.environ.get("PEFTSEARCH_SHARED_DATA")
    if shared is None:
        pytest.skip("PEFTSEARCH_SHARED_DATA is not set")
    files = {split: f"{shared}/ncbi_disease/{split}.tsv" for split in ("train", "validation", "test")}
    file = study(files, domain=DOMAIN)
    raw = load_domain("d", file.spec, file.folder)
    starts = {
        split: sum(tag == "B-Disease" for tags in table.column("tags").to_pylist() for tag in tags)
        for split, table in raw.splits.items()
    }
    assert {split: table.num_rows for split, table in raw.splits.items()} == {
        "train": 5424,
        "validation": 917,
        "test": 939,
    }
    assert starts == {"train": 5134, "validation": 787, "test": 959}
