"""With how many threads a worker computes, where the study file leaves that to a measurement.

More threads are not always faster: on small models and short texts they wait for one another. Sums that are split over
another number of threads round otherwise, so the number is found once, by the first worker of a study, and kept in the
study's folder: every other worker, and every later run, takes it from there. One that may use fewer cores than that
takes all of them: its sums round otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from peftsearch.files import Place, create_json, patiently, persist, read_json

if TYPE_CHECKING:
    from peftsearch.domains import PreparedDomain
    from peftsearch.spec import TrainingSpec
    from peftsearch.training.base_model import FrozenBase
    from peftsearch.training.budget import Budget

_SECONDS = 1.5
"""What the measurement may take; a step that has begun is finished."""

_ROUNDS = 8
_BATCHES = 64
"""Batches of a domain that are looked at."""


def kept_threads(study_folder: Place) -> int | None:
    """The number that a study's first worker found; None where none has been found.

    Raises:
        StorageError: The folder cannot be read.
    """
    where = _file(study_folder)
    kept = patiently(where, lambda: read_json(where), "read")
    return None if kept is None else int(kept["threads"])


def keep_threads(study_folder: Place, threads: int, seconds: Mapping[int, float]) -> int:
    """Keep a number that was found, unless another worker was faster; returns the one that counts.

    Args:
        study_folder: Where.
        threads: What was found.
        seconds: Time of a step by number of threads, for people.

    Raises:
        StorageError: The folder cannot be read or written.
    """
    where = _file(study_folder)
    found = {"threads": threads, "seconds per step": {str(count): round(value, 4) for count, value in seconds.items()}}

    def keep() -> None:
        create_json(where, found)

    persist(where, keep)
    return kept_threads(study_folder) or threads


def counts_up_to(cpus: int) -> list[int]:
    """The numbers of threads that are compared: the largest first, then powers of two."""
    powers = [2**power for power in range(cpus.bit_length()) if 2**power < cpus]
    return [cpus, *reversed(powers)]


def fastest(
    counts: Sequence[int], step: Callable[[int], object], clock: Callable[[], float] = time.perf_counter
) -> tuple[int, dict[int, float]]:
    """The number of threads with the shortest step, and each one's time in seconds.

    All numbers take turns, so that whatever else the machine does slows down each of them; the first round warms up,
    and of the others the fastest counts. Where not even one further round fits into the time, steps are long, and the
    first number is taken: long steps are large products, which gain from every core.

    Args:
        counts: What is compared; the first is preferred.
        step: Does one with so many threads.
        clock: Seconds.
    """
    if len(counts) == 1:
        return counts[0], {}
    began = clock()
    rounds: list[list[float]] = []
    while len(rounds) <= _ROUNDS:
        times = []
        for count in counts:
            if clock() - began > _SECONDS:
                break
            start = clock()
            step(count)
            times.append(clock() - start)
        if len(times) < len(counts):
            break
        rounds.append(times)
    found = {count: min(times) for count, *times in zip(counts, *rounds[1:], strict=True) if times}
    return (min(found, key=lambda count: found[count]) if found else counts[0]), found


def training_step(
    base: FrozenBase,
    domains: Mapping[str, tuple[PreparedDomain, Budget]],
    training: TrainingSpec,
    workers: int,
) -> Callable[[int], None]:
    """A forward and backward pass with a given number of threads.

    It is that of an adapter, whatever the method: through all frozen layers, at a batch of middling size of the domain
    that takes most of the study's time. Nothing is changed by it, torch's random numbers neither.

    Args:
        base: The frozen base.
        domains: Those of its model, with their budgets.
        training: How trials are trained.
        workers: How many share a batch.
    """
    import torch

    from peftsearch.domains.tasks import LossOptions
    from peftsearch.training.attention import use_fast_attention
    from peftsearch.training.batches import collated
    from peftsearch.training.data_order import DataOrder
    from peftsearch.training.dropout import use_fast_dropout
    from peftsearch.training.precision import training_autocast

    middling: dict[str, list[int]] = {}
    work: dict[str, int] = {}
    for name, (prepared, budget) in domains.items():
        lengths = prepared.lengths("train")
        order = DataOrder(lengths, training.batch_size, 0, training.tokens_per_batch, budget.steps_per_epoch)
        batches = [order.batch(step) for step in range(min(_BATCHES, budget.steps_per_epoch))]
        padded = [len(rows) * max(lengths[row] for row in rows) for rows in batches]
        ranked = sorted(range(len(batches)), key=lambda number: padded[number])
        middling[name] = batches[ranked[len(ranked) // 2]]
        work[name] = padded[ranked[len(ranked) // 2]] * budget.total_steps
    chosen = max(work, key=lambda name: work[name])
    domain, rows = domains[chosen][0], middling[chosen]
    parts = workers * training.gradient_accumulation
    task, rows = domain.task, rows[: -(-len(rows) // parts)]
    batch = collated(task, domain.split("train")[rows], domain.pad_token_id, base.device)
    inputs = {name: value for name, value in batch.items() if name not in task.hidden}
    with torch.random.fork_rng(devices=[]):
        model = base.common_model(domain)
    use_fast_attention()
    use_fast_dropout(model)
    model.train()
    model.enable_input_require_grads()

    def step(threads: int) -> None:
        torch.set_num_threads(threads)
        with torch.random.fork_rng(devices=[]):
            with training_autocast(training.precision, base.device):
                output = model(**inputs)
            task.losses(output, batch, LossOptions()).mean().backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    return step


def _file(study_folder: Place) -> Place:
    return study_folder / "threads.json"
