"""A tiny base model and a small labelled data set, made on the spot: real weights, real tokenizer, no network."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from gcs_server import gcs_server  # noqa: F401  (one server for all tests that ask for it)
from postgres_server import postgres_server  # noqa: F401  (the same)
from s3_server import s3_server  # noqa: F401  (the same)
from small_disk import small_disk  # noqa: F401  (shared by tests of several folders)

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several test processes share the cores: threads of one would wait for those of the others.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # What a shell starts in the background ignores Ctrl-C, and so would all programs that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is, and nothing of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

_LONGEST = (
    "export/test_forms.py",
    "battery/test_battery.py",
    "docs/test_documented_runs.py",
    "studies/test_published_studies.py",
    "training/test_worker_groups.py",
    "training/test_sessions.py",
    "training/test_out_of_memory.py",
    "tracking/test_mlflow.py",
    "tracking/test_live_pages.py",
    "export/test_export.py",
    "export/test_predict.py",
    "training/test_writing_groups.py",
    "cluster/test_cluster_runs.py",
    "methods/test_bottleneck.py",
    "benchmarks/compare/test_compare_training.py",
    "training/test_packing.py",
    "tracking/test_moved_storage.py",
    "fuzz/test_damaged_storage.py",
    "tracking/test_ledger_outages.py",
    "training/test_crew.py",
)
"""Files that take longest (a minute and more): where several processes share the files, they are begun first, so that
none is left with one of them at the end. Goes with ``--no-loadscope-reorder``, as pytest-xdist goes by the number of
tests, of which these have few."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        here = Path(__file__).parent
        ranks = {here / name: rank for rank, name in enumerate(_LONGEST)}
        items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep how the session ended for `pytest_unconfigure`."""
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave without C++'s exit handlers where tests have had Ray in this process.

    A thread that Ray leaves after its shutdown may log while they destroy its logger: a segmentation fault behind the
    summary (in ``spdlog::logger::sink_it_`` of ``_raylet.so``) made the status of 61 passed tests 139. Ray has had the
    like at its exit before: https://github.com/ray-project/ray/issues/36885.
    """
    if "ray._raylet" in sys.modules and not hasattr(config, "workerinput") and _STATUS in config.stash:
        import ray

        ray.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_STATUS])


TOPICS = {
    "contract": [
        "party",
        "agreement",
        "clause",
        "breach",
        "liability",
        "termination",
        "notice",
        "governing",
        "law",
        "indemnify",
    ],
    "disease": [
        "fever",
        "infection",
        "lesion",
        "chronic",
        "acute",
        "anemia",
        "fracture",
        "benign",
        "malignant",
        "syndrome",
    ],
    "market": ["share", "dividend", "bond", "yield", "equity", "hedge", "futures", "margin", "broker", "index"],
}
FILLER = ["the", "of", "and", "with", "for", "under", "any", "such", "no", "other"]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer BERT with random (but fixed) weights and a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *(w for topic in TOPICS.values() for w in topic)]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def topics_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 240 short texts about three topics, with a document column to group by."""
    path = tmp_path_factory.mktemp("data") / "topics.csv"
    generator = random.Random(0)
    lines = ["text,label,document"]
    for index in range(240):
        label = sorted(TOPICS)[index % 3]
        words = [generator.choice(TOPICS[label] if generator.random() < 0.6 else FILLER) for _ in range(8)]
        lines.append(f"{' '.join(words)} {generator.choice(FILLER)},{label},d{index // 6}-{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def write_study(tmp_path: Path, tiny_base: Path, topics_csv: Path) -> Callable[..., Path]:
    """Writes a study file over the tiny base; keyword arguments replace whole sections."""

    def write(name: str = "tiny", **sections: Any) -> Path:
        document: dict[str, Any] = {
            "name": name,
            "model": str(tiny_base),
            "domains": {
                "topics": {
                    "data": {
                        "source": str(topics_csv),
                        "split": {"group": "document", "validation": 0.25, "test": 0.2},
                    }
                }
            },
            "methods": {"lora": {}, "adapter": {"bottleneck": [4, 8, 16]}, "prompt": {"tokens": [2, 4, 8]}, "full": {}},
            "search": {"trials": 3, "seed": 0},
            "training": {"epochs": 2, "evaluations": 4, "batch_size": 16, "max_length": 16},
            "resources": {"cpus_per_worker": 1, "slots": 1},
            "tracking": {"mlflow": "off"},
            **sections,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path

    return write
