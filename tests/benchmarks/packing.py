"""How many examples a second a device trains, one trial at a time and in packs.

    python tests/benchmarks/packing.py [--model minilm|decoder-1b|FOLDER] [--method lora] [--sizes 1 2 4 8 16]
                                       [--device auto] [--steps 20] [--compile] [--json FILE]

Models are built from their configurations, with random weights: nothing is downloaded. Every trial classifies texts of
just the length asked for, in batches of its own. "Alone" is a trial as `pack: 1` trains it, one segment from the first
timed step to the last; the packs are what `resources.pack` makes of so many. On a GPU a profile of some steps says how
many kernels a step starts, for which share of the time the GPU computes, and (in the file) which kernels take most.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

WORDS = [f"w{number}" for number in range(2000)]
RANKS = [4, 8, 16, 32]
"""Trials of a pack differ, as those of a search do."""


@dataclass
class Row:
    """Figures of one size."""

    trials: int
    how: str
    step_ms: float
    examples_per_second: float
    peak_memory_gb: float
    kernels_per_step: int | None = None
    computing: float | None = None
    """Share of the time in which the GPU computes."""
    kernels: list[tuple[str, float]] = field(default_factory=list)
    """The kernels that take most of it: name, and milliseconds per step."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="minilm, decoder-1b, or the folder of a model")
    parser.add_argument("--method", default="lora", choices=("lora", "adapter", "prompt", "mixed"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens per text")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("--compile", action="store_true", help="also one trial whose layers torch.compile compiles")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    options = parser.parse_args()
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.threads} threads"
    print(f"{options.model}, {options.method}, batches of {options.batch_size} x {options.length} tokens, on {name}")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options, device)
    print(
        f"\n{'trials':>6}  {'how':10}{'step ms':>9}{'examples/s':>12}{'gain':>7}{'peak GB':>9}{'kernels':>9}{'busy':>7}"
    )
    for row in rows:
        gain = row.examples_per_second / rows[0].examples_per_second
        kernels = "" if row.kernels_per_step is None else row.kernels_per_step
        busy = "" if row.computing is None else f"{row.computing:.0%}"
        print(
            f"{row.trials:6}  {row.how:10}{row.step_ms:9.1f}{row.examples_per_second:12.1f}{gain:7.2f}"
            f"{row.peak_memory_gb:9.2f}{kernels:>9}{busy:>7}"
        )
    if options.json:
        figures = {"device": name, **{k: str(v) for k, v in vars(options).items()}, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(folder: Path, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """The table: a trial alone, and packs of every size."""
    from peftsearch.search.plan import plan_study
    from peftsearch.spec import StudyFile
    from peftsearch.training.compiled import compile_layers
    from peftsearch.training.distributed import WorkerGroup
    from peftsearch.training.packing import Pack
    from peftsearch.training.packing.host import Host
    from peftsearch.training.segment import Segment, TrialPlan
    from peftsearch.training.session import TrialSession
    from peftsearch.training.worker import Worker

    plan = plan_study(StudyFile.load(write_study(folder, options)), folder / "cache")
    worker = Worker(plan.for_workers(folder, threads=options.threads), WorkerGroup(device=device))
    (model,) = plan.models
    base, domain = worker.base(model), worker.domain(model, "d")

    def session(number: int) -> TrialSession:
        methods = ["lora", "adapter", "prompt"]
        method = methods[number % 3] if options.method == "mixed" else options.method
        values = configuration(method, RANKS[number % len(RANKS)])
        trial = TrialPlan(number, model, "d", method, values, seed=number)
        return worker.new_session(Segment(trial, 10**6))

    def timed(steps: Callable[[int], None], trials: int, how: str) -> Row:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        steps(3)
        wait(device)
        began = time.perf_counter()
        steps(options.steps)
        wait(device)
        seconds = (time.perf_counter() - began) / options.steps
        row = Row(trials, how, 1e3 * seconds, trials * options.batch_size / seconds, peak(device))
        if device.type == "cuda":
            row.kernels_per_step, row.computing, row.kernels = profiled(steps, device)
        print(f"  {how} {trials}: {row.examples_per_second:.1f} examples/s", flush=True)
        return row

    alone = session(0)
    rows = [timed(lambda count: alone.catch_up(alone.step + count), 1, "alone")]
    if options.compile:
        compiled = session(0)
        compile_layers(compiled.model)
        rows.append(timed(lambda count: compiled.catch_up(compiled.step + count), 1, "compiled"))
    host = Host(base, domain, None)
    for size in options.sizes:
        pack = Pack([session(number) for number in range(size)], host)
        rows.append(timed(lambda count, pack=pack: [pack.step() for _ in range(count)], size, "packed"))  # type: ignore[misc]
        pack.close()
        del pack
    return rows


def profiled(
    steps: Callable[[int], None], device: torch.device, count: int = 3, most: int = 12
) -> tuple[int, float, list[tuple[str, float]]]:
    """Kernels per step, for which share of the time one of them runs, and the largest: name, milliseconds per step."""
    from torch.profiler import ProfilerActivity, profile

    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        began = time.perf_counter()
        steps(count)
        wait(device)
        seconds = time.perf_counter() - began
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    taken: Counter[str] = Counter()
    for event in kernels:
        taken[event.name] += event.time_range.elapsed_us()
    largest = [(name, round(time_us / 1e3 / count, 4)) for name, time_us in taken.most_common(most)]
    return len(kernels) // count, taken.total() / 1e6 / seconds, largest


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device) -> float:
    """GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import psutil

    return float(psutil.Process().memory_info().rss / 1e9)


def configuration(method: str, size: int) -> dict[str, Any]:
    """A trial's hyperparameters."""
    values: dict[str, dict[str, Any]] = {
        "lora": {"rank": size, "alpha": 32.0, "targets": "attention", "variant": "lora", "dropout": 0.0},
        "adapter": {
            "bottleneck": 4 * size,
            "activation": "gelu",
            "placement": "pfeiffer",
            "scale": 4.0,
            "quantization": "none",
            "dropout": 0.0,
        },
        "prompt": {"tokens": size, "init": "vocabulary", "init_text": ""},
    }
    return {**values[method], "learning_rate": 1e-3}


def write_study(folder: Path, options: argparse.Namespace) -> Path:
    """A study of one domain whose texts are all equally long."""
    import yaml

    base = options.model if Path(options.model).is_dir() else build(options.model, folder / "model", options.length)
    draw = random.Random(0)
    # Two tokens stand around a text.
    lines = ["text,label"] + [
        f"{' '.join(draw.choices(WORDS, k=options.length - 2))},{('a', 'b')[row % 2]}"
        for row in range(64 * options.batch_size)
    ]
    data = folder / "texts.csv"
    data.write_text("\n".join(lines) + "\n")
    document = {
        "name": "packing",
        "model": str(base),
        "domains": {"d": {"data": {"source": str(data), "split": {"validation": 0.1, "test": 0.1}}}},
        "methods": {"lora": {}, "adapter": {}, "prompt": {}},
        "training": {
            "epochs": 100,
            "evaluations": 1,
            "batch_size": options.batch_size,
            "max_length": options.length,
            "precision": options.precision,
        },
        "tracking": {"mlflow": "off"},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def build(name: str, folder: Path, length: int) -> Path:
    """A model of a known shape with random weights, and a tokenizer that knows the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    if name == "minilm":
        # sentence-transformers/all-MiniLM-L6-v2
        BertModel(
            BertConfig(
                vocab_size=30522,
                hidden_size=384,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=1536,
                pad_token_id=0,
            )
        ).save_pretrained(folder)
    elif name == "decoder-1b":
        # The shape of Llama 3.2 1B, with a small vocabulary.
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=8192,
            max_position_embeddings=max(2048, 2 * length),
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            dtype="bfloat16",
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    else:
        raise SystemExit(f"no such model: {name}; write minilm, decoder-1b or a folder")
    return folder


if __name__ == "__main__":
    main()
