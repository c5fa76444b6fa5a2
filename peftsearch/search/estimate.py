"""What a study will take, roughly, before anything is trained: memory per worker, and time.

Good to a factor of about two: enough to tell minutes from days, and a model that fits from one that does not.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peftsearch.domains import CheckedDomain, ExpectedDomain
from peftsearch.methods import BYTES_PER_WEIGHT
from peftsearch.search.cells import base_forms
from peftsearch.search.run import TrialCost
from peftsearch.search.vocabulary import ScoredPositions
from peftsearch.training import activations
from peftsearch.training.budget import tokens_of_a_pass

if TYPE_CHECKING:
    import torch

    from peftsearch.domains import PreparedDomain
    from peftsearch.methods import Quantization
    from peftsearch.search.cells import Cell
    from peftsearch.search.counts import ParameterCount, ParameterCounter
    from peftsearch.search.plan import StudyPlan
    from peftsearch.spec import DataSpec, ModelFacts, StudySpec
    from peftsearch.training.segment import ModelPlace

Format = Literal["fp32", "bf16"]

PROCESS_BYTES = 600 * 2**20
"""A worker before it holds a model: Python with torch, transformers, PEFT and Ray Train (resident, measured)."""

EFFICIENCY: Mapping[Format, float] = {"fp32": 0.7, "bf16": 0.3}
"""Share of `measured_speed` that training reaches: attention, normalisation, conversions and the optimiser take time
and hardly any of the operations that are counted. Measured with MiniLM on AVX-512 cores (0.7 in fp32, 0.2 to 0.3 under
bf16 autocast); large models on accelerators do better (Chowdhery et al. 2022, "PaLM": 0.46), small ones worse.
"""


GPU_LAYER_SECONDS = 1e-3
"""What a GPU takes at least for a forward pass through one layer, however small the batch: the time to launch its
kernels one after another. Backward takes twice as much. An assumption (12 layers then train at 28 steps per second),
not a measurement."""

REFERENCE_GPU = "NVIDIA A100"
REFERENCE_SPEED: Mapping[Format, float] = {"fp32": 19.5e12, "bf16": 312e12}
"""What GPU hours are given for where a study wants a GPU and this machine has none, and its peak in operations per
second (its data sheet; dense products, bf16 on tensor cores)."""


@dataclass(frozen=True)
class ModelShape:
    """What the estimates need to know of a model.

    Attributes:
        parameters: All of them.
        embeddings: Those that are looked up rather than multiplied with: the table of token embeddings.
        layers: Transformer layers, of encoder and decoder together.
        hidden: Width of a layer.
        weight_bytes: Bytes per parameter in memory.
        vocabulary: Tokens that a language-modelling head scores.
        tied: Whether that head multiplies with the table of token embeddings, and has no weights of its own.
        never_quantised: Of the others, those that keep their format in a quantised base, too.
    """

    parameters: int
    embeddings: int
    layers: int
    hidden: int
    weight_bytes: int
    vocabulary: int = 0
    tied: bool = False
    never_quantised: int = 0

    @classmethod
    def of(cls, config: Any, parameters: int, never_quantised: int = 0) -> ModelShape:
        """From a configuration of `transformers`; what an unusual one does not say counts as 0."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        layers = int(getattr(text, "num_hidden_layers", 0) or 0)
        if getattr(config, "is_encoder_decoder", False):
            layers += int(getattr(text, "num_decoder_layers", None) or getattr(text, "decoder_layers", None) or layers)
        hidden = int(getattr(text, "hidden_size", 0) or 0)
        dtype = getattr(config, "dtype", None)
        vocabulary = int(getattr(text, "vocab_size", 0) or 0)
        return cls(
            parameters=parameters,
            embeddings=vocabulary * hidden,
            layers=layers,
            hidden=hidden,
            weight_bytes=int(getattr(dtype, "itemsize", 4)),
            vocabulary=vocabulary,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            never_quantised=never_quantised,
        )


def frozen_bytes(shape: ModelShape, quantization: Quantization | None, parts: int = 1, with_head: bool = False) -> int:
    """The frozen base in memory; of a quantised one the embeddings keep their format, as does what gives the
    vocabulary, and what `transformers` leaves as it is (`training.quantised.left_unquantised`).

    Args:
        shape: The model.
        quantization: How it is stored.
        parts: Among so many workers its layers are divided; each then has two layers whole, the one that computes and
            the next one (`training.sharding`).
        with_head: Whether it has the language-modelling head.
    """
    kept = shape.embeddings * (2 if with_head and not shape.tied else 1)
    multiplied = float(shape.parameters - kept) * shape.weight_bytes
    if quantization is not None:
        quantised = shape.parameters - kept - shape.never_quantised
        multiplied -= quantised * (shape.weight_bytes - BYTES_PER_WEIGHT[quantization])
    if parts > 1:
        multiplied = min(multiplied, multiplied / parts + 2 * multiplied / max(1, shape.layers))
    return round(multiplied + kept * shape.weight_bytes)


def activation_bytes(shape: ModelShape, batch: int, length: int, compute_bytes: int, recomputed: bool = False) -> int:
    """Activations kept for the backward pass: see `training.activations`.

    Args:
        shape: The model.
        batch: Texts per worker.
        length: Tokens per text.
        compute_bytes: Bytes per number in the forward pass.
        recomputed: Whether there is gradient checkpointing.
    """
    formula = activations.recomputed_bytes if recomputed else activations.activation_bytes
    return formula(shape.layers, shape.hidden, batch * length, compute_bytes)


def trial_bytes(
    shape: ModelShape, trainable: int, trains_copy: bool, activations: int, parts: int = 1, moments: int = 8
) -> int:
    """What a trial adds to the frozen weights.

    Adapter weights (4 bytes each), or a second copy of the model for methods that train it, and what the optimiser
    steps on where that is in half precision (4 bytes each); 4 bytes of gradient and AdamW's two moments (8 bytes
    together, or 2) per trainable parameter; and the activations. Of a copy in so many parts, a worker trains one.
    """
    weights = shape.parameters * shape.weight_bytes if trains_copy else 4 * trainable
    if trains_copy and shape.weight_bytes < 4:
        weights += 4 * trainable
    return (weights + (4 + moments) * trainable) // (parts if trains_copy else 1) + activations


def training_operations(shape: ModelShape, tokens: float, trains_copy: bool, scored: float = 0) -> float:
    """Floating-point operations of training on so many tokens, of which so many score the vocabulary.

    ``6 N T`` where all weights are trained: 2 in the forward pass, 2 backward through the activations, 2 for the
    weights' gradients (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1; N is counted without
    embeddings).
    ``4 N T`` where the weights are frozen: their gradients are not computed. A head that shares the embeddings' table
    multiplies with it all the same.
    """
    return (6 if trains_copy else 4) * _multiplications(shape, tokens, scored)


def evaluation_operations(shape: ModelShape, tokens: float, scored: float = 0) -> float:
    """Floating-point operations of a forward pass: ``2 N T``."""
    return 2 * _multiplications(shape, tokens, scored)


def _multiplications(shape: ModelShape, tokens: float, scored: float) -> float:
    # A head with weights of its own is among the parameters.
    return (shape.parameters - shape.embeddings) * tokens + (shape.embeddings * scored if shape.tied else 0)


def measured_speed(device: torch.device, number_format: Format, seconds: float = 0.1) -> float:
    """Floating-point operations per second of a matrix product: of a GPU, or of all CPU cores.

    The fastest of many products counts, and a CPU is measured on one core and multiplied, because whatever else the
    machine is doing would slow down the others.

    Args:
        device: Where to measure.
        number_format: In which numbers.
        seconds: How long to measure, after a warm-up.
    """
    import time

    import torch

    on_gpu = device.type == "cuda"
    size = 4096 if on_gpu else 768
    factors = torch.ones(size, size, dtype=torch.bfloat16 if number_format == "bf16" else torch.float32, device=device)
    threads = torch.get_num_threads()
    fastest = float("inf")
    try:
        if not on_gpu:
            torch.set_num_threads(1)
        end = time.perf_counter() + seconds
        while fastest == float("inf") or time.perf_counter() < end:
            # Several at least: the first product warms up.
            for _ in range(4):
                began = time.perf_counter()
                factors @ factors
                if on_gpu:
                    torch.cuda.synchronize(device)
                fastest = min(fastest, time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / fastest * (1 if on_gpu else threads)


@dataclass(frozen=True)
class Estimate:
    """What a study takes.

    Attributes:
        worker_bytes: Memory of one worker at its peak: of the GPU where it trains on one.
        largest: The method that decides `worker_bytes`.
        seconds: Wall time of all trials if none is pruned, and of confirming each cell's best one (what else is on the
            front is not known before).
        device: What was measured, for people.
        assumed: The time is a `REFERENCE_GPU`'s, because this machine has no GPU.
        memory_here: All memory of what a worker would compute on here: the machine's, or its smallest GPU's; None where
            it has no GPU and the study wants one.
    """

    worker_bytes: int
    largest: str
    seconds: float
    device: str
    assumed: bool = False
    memory_here: int | None = None


def estimate(plan: StudyPlan) -> Estimate | None:
    """Estimate a checked study; measures this machine for about 0.2 s.

    None for a plan without cells (of none of its models the parameters are known).
    """
    import torch

    if not plan.cells:
        return None

    on_gpu = plan.spec.resources.gpus_per_worker > 0
    device = torch.device("cuda" if on_gpu else "cpu")
    measured = measured_speeds(number_formats(plan.spec), on_gpu)
    assumed = {name: peak * EFFICIENCY[name] for name, peak in REFERENCE_SPEED.items()}
    costs = TrialCosts(plan, assumed if measured is None else measured)
    worker_bytes, largest = costs.largest()
    confirm = plan.spec.confirm

    def finalists(cell: Cell) -> int:
        # How many trials a front will have is not known before.
        return {"front": 0, "all": plan.trials(cell)}.get(confirm.finalists, 1)

    wanted: Counter[str] = Counter()
    for item in plan.cells:
        wanted[item.cell.domain] += finalists(item.cell)

    def trainings(cell: Cell) -> float:
        kept = min(1.0, (confirm.max_finalists or math.inf) / max(1, wanted[cell.domain]))
        return plan.trials(cell) + kept * finalists(cell) * confirm.seeds

    seconds = sum(trainings(item.cell) * (costs.seconds(item.cell) or 0.0) for item in plan.cells)
    if measured is None:
        reached = f"{assumed['bf16'] / 1e12:.0f} TFLOP/s in bf16 are assumed, {EFFICIENCY['bf16']:.0%} of its peak"
        reached += "; small models reach less"
        return Estimate(worker_bytes, largest, seconds, f"{REFERENCE_GPU} ({reached})", assumed=True)
    count = torch.cuda.device_count() if on_gpu else 1
    here = memory_here(on_gpu)
    name = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} CPU cores"
    described = f"{count} x {name}" if count > 1 else name
    return Estimate(worker_bytes, largest, seconds / count, described, memory_here=here)


def memory_here(on_gpu: bool) -> int:
    """Bytes of memory that this machine has, or its smallest GPU."""
    import psutil
    import torch

    if not on_gpu:
        return int(psutil.virtual_memory().total)
    return min(
        int(torch.cuda.get_device_properties(number).total_memory) for number in range(torch.cuda.device_count())
    )


def number_formats(spec: StudySpec) -> list[Format]:
    """The formats that a study computes in."""
    return sorted({_training_format(spec), "fp32"})


def measured_speeds(formats: Sequence[Format], on_gpu: bool) -> dict[Format, float] | None:
    """Operations per second that training reaches on this machine, by format.

    None where a GPU is wanted and this machine has none.
    """
    import torch

    if on_gpu and not torch.cuda.is_available():
        return None
    device = torch.device("cuda" if on_gpu else "cpu")
    return {name: measured_speed(device, name) * EFFICIENCY[name] for name in formats}


def _training_format(spec: StudySpec) -> Format:
    import torch

    from peftsearch.training.precision import computes_bf16

    on_gpu = spec.resources.gpus_per_worker > 0
    if spec.training.precision != "auto":
        return spec.training.precision
    # A GPU that is elsewhere is taken for one of the last years.
    missing = on_gpu and not torch.cuda.is_available()
    return "bf16" if missing or computes_bf16(torch.device("cuda" if on_gpu else "cpu")) else "fp32"


class MemoryCosts:
    """Memory of single configurations, by the formulas above; needs no data, only what is known of it.

    Args:
        spec: The study file.
        cells: All cells.
        shapes: The models.
        lengths: Tokens of an example at most, by model and domain: see `example_tokens`.
        scored: Where the vocabulary is scored, by model and domain.
    """

    def __init__(
        self,
        spec: StudySpec,
        cells: Iterable[Cell],
        shapes: Mapping[str, ModelShape],
        lengths: Mapping[tuple[str, str], int],
        scored: Mapping[tuple[str, str], ScoredPositions | None],
    ) -> None:
        self._spec = spec
        self._shapes = shapes
        self._lengths = lengths
        self._scored = scored
        self._compute_bytes = 2 if _training_format(spec) == "bf16" else 4
        # A worker keeps every base of the study that it has seen, and of each its quantised forms.
        self._parts = spec.resources.workers_per_trial if spec.resources.strategy == "fsdp" else 1
        with_head = {model for (model, _), found in scored.items() if found is not None}
        self._bases = sum(
            frozen_bytes(shapes[model], form, self._parts, model in with_head) for model, form in base_forms(cells)
        )

    def __call__(self, cell: Cell, count: ParameterCount) -> int:
        """Peak of one worker, in bytes: of the GPU where it trains on one."""
        return self._peak(cell, count, self.recomputes(cell, count))

    def recomputes(self, cell: Cell, count: ParameterCount) -> bool:
        """Whether a configuration is known to need gradient checkpointing, or is given it in any case.

        What free memory asks for besides, the workers find out.
        """
        wanted, limit = self._spec.training_of(cell.method).gradient_checkpointing, self._spec.search.max_memory
        if wanted != "auto":
            return wanted
        return limit is not None and self._peak(cell, count, False) > limit * 2**30

    def _peak(self, cell: Cell, count: ParameterCount, recomputed: bool) -> int:
        shape, training, resources = self._shapes[cell.model], self._spec.training_of(cell.method), self._spec.resources
        length = self._lengths[cell.model, cell.domain]
        parts = resources.workers_per_trial * training.gradient_accumulation
        tokens = tokens_of_a_pass(training.batch_size, training.tokens_per_batch, length, parts)
        kept = activation_bytes(shape, 1, tokens, self._compute_bytes, recomputed)
        evaluated, scored = 0, self._scored[cell.model, cell.domain]
        if scored is not None:
            kept += scored.training_bytes(-(-tokens // length), shape.vocabulary, self._compute_bytes)
            # The last evaluation is the largest one: in the weights' own format.
            evaluated = scored.evaluation_bytes(training.evaluation_batch_size, shape.vocabulary, shape.weight_bytes)
        moments = 2 if training.optimizer == "adamw_8bit" else 8
        copies = cell.space.method.trains_copy
        trial = trial_bytes(shape, count.trainable, copies, max(kept, evaluated), self._parts, moments)
        return (0 if resources.gpus_per_worker else PROCESS_BYTES) + self._bases + trial


def example_tokens(domain: CheckedDomain | ExpectedDomain, data: DataSpec) -> int:
    """Tokens that a model computes for one example of a domain, at most: of all texts that it reads for it, and, for a
    decoder that writes, of what it writes behind the prompt.
    """
    splits = domain.raw.splits if isinstance(domain, CheckedDomain) else {}
    written = domain.task.decodes and domain.architecture == "decoder"
    longest = domain.max_length + (int(domain.task.options.target_length) if written else 0)
    return longest * domain.task.texts_at_once(splits, data)


class TrialCosts:
    """Memory and time of single configurations, by the formulas above.

    Args:
        plan: The checked study.
        speeds: Operations per second of a slot, see `measured_speeds`; None where time cannot be said.
    """

    def __init__(self, plan: StudyPlan, speeds: Mapping[Format, float] | None = None) -> None:
        self.plan = plan
        self.speeds = speeds
        self._shapes = model_shapes(plan.models, plan.model_facts, plan.counter)
        self._format: Format = _training_format(plan.spec)
        self.memory = plan.memory(self._shapes)
        self._seconds = functools.cache(self._seconds_of)

    def __call__(self, cell: Cell, hyperparameters: Mapping[str, Any], count: ParameterCount) -> TrialCost:
        """A configuration's cost, given its parameters."""
        return TrialCost(self.memory(cell, count), self.seconds(cell))

    def largest(self) -> tuple[int, str]:
        """Peak of the worker that needs most, in bytes, and the method that it then trains."""
        return max((self.memory(item.cell, item.largest), item.cell.method) for item in self.plan.cells)

    def seconds(self, cell: Cell) -> float | None:
        """Training and evaluation up to the full budget; the same for all configurations of a cell."""
        return self._seconds(cell.model, cell.domain, cell.method, cell.space.method.trains_copy)

    def _seconds_of(self, model: str, domain: str, method: str, trains_copy: bool) -> float | None:
        """Evaluations on the way run in the training's precision, the one at the full budget in the weights' own."""
        if self.speeds is None:
            return None
        plan, shape = self.plan, self._shapes[model]
        budget, data = plan.budgets[domain, method], plan.prepared[model, domain]
        # Batches hold texts of similar length (training/data_order.py), so hardly anything is padded.
        epochs = budget.epoch(budget.total_steps)
        tokens, scored = (epochs * each for each in _tokens(data, "train"))
        operations = evaluation_operations(shape, *_tokens(data, "validation"))
        training, full = self.speeds[self._format], self.speeds["fp32"]
        passes = budget.total_steps * plan.spec.training_of(method).gradient_accumulation
        seconds = max(
            training_operations(shape, tokens, trains_copy, scored) / training, self._launches(shape, 3 * passes)
        )
        writing = self._launches(shape, self._evaluation_passes(data))
        on_the_way = max(operations / training, writing)
        return seconds + (len(budget.evaluation_steps) - 1) * on_the_way + max(operations / full, writing)

    def _launches(self, shape: ModelShape, passes: float) -> float:
        """Seconds below which no GPU does so many forward passes."""
        return GPU_LAYER_SECONDS * shape.layers * passes if self.plan.spec.resources.gpus_per_worker else 0.0

    def _evaluation_passes(self, data: PreparedDomain) -> int:
        """Forward passes of an evaluation; tasks that write texts take one for each token of an answer."""
        batches = -(-len(data.lengths("validation")) // self.plan.spec.training.evaluation_batch_size)
        if not data.task.decodes:
            return batches
        options = data.task.options
        return batches * int(options.generation.max_tokens or options.target_length)


def _tokens(data: PreparedDomain, split: str) -> tuple[int, int]:
    """The tokens of a split, and at how many positions the vocabulary is scored."""
    lengths, head = data.lengths(split), ScoredPositions.of(data)
    if head is None:
        return sum(lengths), 0
    # Of an encoder-decoder only the decoder's positions are.
    of_texts = head.of_text * len(lengths)
    return sum(lengths), of_texts if data.architecture == "encoder-decoder" else sum(lengths)


def model_shapes(
    places: Mapping[str, ModelPlace], facts: Mapping[str, ModelFacts], counter: ParameterCounter
) -> dict[str, ModelShape]:
    """What the estimates need to know of each model."""
    from peftsearch.domains.models import model_config

    return {
        model: ModelShape.of(
            model_config(place.location, place.revision, trust_remote_code=place.trust_remote_code),
            facts[model].total_parameters,
            counter.never_quantised(model),
        )
        for model, place in places.items()
    }
