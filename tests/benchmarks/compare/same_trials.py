"""The same trials, run by a bare PyTorch loop, by Ray's documented pattern, by Trainer.hyperparameter_search and by
peftsearch: what does each of them cost beside the training?

    python tests/benchmarks/compare/same_trials.py --repeats 3 --json same-trials.json --markdown same-trials.md

Each contender runs in a process of its own; every repeat runs all of them, in turns forwards and backwards. Exits with
1 where a contender fails or has done other work than the others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench_figures import Figures, add_ratios, differences, figures_of, markdown, medians
from measured_process import hardware, measure, scratch
from peftsearch_contender import VARIANTS
from segment_records import Record, read_records
from targets import FLOORS, RAYS, SHUFFLED, TRAINER, verdict_table, verdicts
from trial_list import DOMAINS, Budget, Work, draw_trials, prepare

HERE = Path(__file__).parent
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative, of the last training loss: sums in another order (another number of threads) after a hundred steps."""
NO_BF16 = {
    "fp32": "peftsearch, bf16 is left out: this processor has no bf16 arithmetic, and emulates it",
    "bf16": "this processor has no bf16 arithmetic, and emulates it: all figures are those of the emulation",
}
"""Said where that is so, by the precision of all."""
TOLERANCE_OF_DROPOUT = 0.05
"""The same where the base drops: the contenders' random numbers need not be the same."""


@dataclass(frozen=True)
class Contender:
    """One way to run the list.

    Attributes:
        name: In the table.
        command: Script and options.
        lanes: Trials at once; None where the contender itself says so, in a file ``lanes`` beside its records.
        exact: Whether it trains the same batches in the same precision as the floor.
    """

    name: str
    command: tuple[str, ...]
    lanes: int | None
    exact: bool = True


def contenders(cores: int, precision: str, *, bf16: bool) -> list[Contender]:
    """All of them, in the order of the table.

    ``peftsearch, bf16`` is there where the others compute in fp32 and the processor multiplies bf16 itself (``bf16``):
    emulated, it is slower than fp32, and a study would not choose it.
    """
    threads, half = ("--threads", str(cores)), str(max(1, cores // 2))
    one = ("floor_contender.py", "--lanes", "1", *threads)
    per_core = ("floor_contender.py", "--lanes", str(cores), "--threads", "1")
    found = [
        Contender(FLOORS[0], one, 1),
        Contender(FLOORS[1], per_core, cores),
        Contender(SHUFFLED[0], (*one, "--shuffled"), 1, exact=False),
        Contender(SHUFFLED[1], (*per_core, "--shuffled"), cores, exact=False),
        Contender(RAYS[0], ("ray_contender.py", "--concurrency", "1", *threads), 1),
        Contender(RAYS[1], ("ray_contender.py", "--concurrency", "2", "--threads", half), 2),
        Contender(TRAINER[0], ("trainer_contender.py", *threads), 1),
    ]
    for variant in VARIANTS:
        if variant == "bf16" and (precision == "bf16" or not bf16):
            continue
        name = f"peftsearch, {variant.replace('_', ' ')}"
        exact = variant != "bf16"
        found.append(Contender(name, ("peftsearch_contender.py", "--variant", variant), None, exact))
    return found


def run_repeat(
    chosen: Sequence[Contender], folder: Path, number: int, kill_after: float
) -> tuple[dict[str, Figures], dict[str, list[Record]], list[str]]:
    """Run each contender once; returns figures, records, and a sentence for each that failed."""
    figures: dict[str, Figures] = {}
    records: dict[str, list[Record]] = {}
    failures = []
    for contender in chosen if number % 2 == 0 else reversed(chosen):
        place = folder / f"repeat-{number}" / contender.command[0].removesuffix(".py") / _short(contender)
        place.mkdir(parents=True)
        path = place / "records.jsonl"
        script, *options = contender.command
        arguments = [str(HERE / script), str(folder), str(path), *options]
        run = measure(arguments, kill_after=kill_after, log=place / "output.txt")
        found = read_records(path)
        print(f"repeat {number + 1}: {contender.name}: {run.ended - run.began:.1f} s", file=sys.stderr, flush=True)
        if run.status or not found:
            failures.append(f"{contender.name} ended with status {run.status}: {run.output.strip()[-1500:]}")
            continue
        records[contender.name] = found
        lanes = contender.lanes or int((place / "lanes").read_text())
        figures[contender.name] = figures_of(found, run, lanes)
    # In the table's order, whatever the order of the runs.
    names = [contender.name for contender in chosen if contender.name in figures]
    return {name: figures[name] for name in names}, {name: records[name] for name in names}, failures


def _short(contender: Contender) -> str:
    return "-".join(word.strip("-") for word in contender.command[1:]) or "run"


def main() -> None:
    """Run the benchmark."""
    options = _parser().parse_args()
    budget = budget_of(options)
    cores = len(os.sched_getaffinity(0))
    machine = hardware()
    bf16 = bool(machine["bf16"])
    if not bf16:
        print(NO_BF16[budget.precision], file=sys.stderr)
    every = contenders(cores, budget.precision, bf16=bf16)
    chosen = [one for one in every if not options.only or any(word in one.name for word in options.only)]
    if not chosen:
        raise SystemExit(f"no contender is called so: {', '.join(one.name for one in every)}")
    with scratch(options.keep) as folder:
        work = prepare(folder, budget, draw_trials(options.ranks, options.rates), cores)
        repeats: list[dict[str, Figures]] = []
        problems: list[str] = []
        for number in range(options.repeats):
            figures, records, failures = run_repeat(chosen, folder, number, options.kill_after)
            exact = [contender.name for contender in chosen if contender.exact and contender.name in records]
            tolerance = TOLERANCE_OF_DROPOUT if budget.dropout else TOLERANCE[budget.precision]
            wrong = differences(records, work, exact, tolerance)
            problems += [f"repeat {number + 1}: {text}" for text in (*failures, *wrong)]
            repeats.append(add_ratios(figures, FLOORS))
            result = _result(work, machine, repeats, problems)
            if options.json:
                # After each repeat: a long run that is cut off leaves what it has measured.
                options.json.write_text(json.dumps(result, indent=2) + "\n")
    table = f"{markdown(medians(repeats))}\n\n{verdict_table(verdicts(repeats))}"
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n")
    for problem in problems:
        print(problem, file=sys.stderr)
    raise SystemExit(1 if problems else 0)


def _result(
    work: Work, machine: dict[str, Any], repeats: Sequence[dict[str, Figures]], problems: Sequence[str]
) -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("peftsearch", "torch", "transformers", "peft", "ray", "optuna", "mlflow")
    return {
        "hardware": machine,
        "packages": {name: version(name) for name in packages},
        "budget": asdict(work.budget),
        "trials": [asdict(trial) for trial in work.trials],
        "examples_per_trial": work.examples,
        "medians": medians(repeats),
        "targets": verdicts(repeats),
        "repeats": list(repeats),
        "problems": list(problems),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_budget(parser)
    parser.add_argument("--ranks", type=int, default=4, help="LoRA ranks in the list")
    parser.add_argument("--rates", type=int, default=3, help="learning rates in the list, each with every rank")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", action="append", metavar="WORDS", help="contenders whose name holds these words")
    parser.add_argument("--kill-after", type=float, default=3600.0, help="seconds for one contender at most")
    parser.add_argument("--json", type=Path, help="also write all figures to a file")
    parser.add_argument("--markdown", type=Path, help="also write the table to a file")
    parser.add_argument("--keep", type=Path, help="keep what the contenders write in this (empty) folder")
    return parser


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The options that say how much each trial trains."""
    parser.add_argument("--domain", choices=sorted(DOMAINS), default=Budget.domain)
    parser.add_argument("--rows", type=int, default=Budget.rows, help="training examples")
    parser.add_argument("--validation", type=int, default=Budget.validation, help="validation examples")
    parser.add_argument("--max-length", type=int, default=Budget.max_length, help="tokens per text at most")
    parser.add_argument("--batch-size", type=int, default=Budget.batch_size)
    parser.add_argument("--steps", type=int, default=Budget.steps, help="steps per trial")
    parser.add_argument("--evaluations", type=int, default=Budget.evaluations, help="evaluations per trial")
    parser.add_argument(
        "--no-dropout",
        dest="dropout",
        action="store_false",
        help="switch the base model's dropout off: losses must then agree to a thousandth",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=Budget.precision)


def budget_of(options: argparse.Namespace) -> Budget:
    """What `add_budget` has read."""
    names = [field.name for field in fields(Budget) if field.name != "seed"]
    return Budget(**{name: getattr(options, name) for name in names})


if __name__ == "__main__":
    main()
