"""What a study will take, roughly, before anything is trained: memory per worker, and time.

Good to a factor of about two: enough to tell minutes from days, and a model that fits from one that does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from peftsearch.search.plan import StudyPlan

Format = Literal["fp32", "bf16"]

PROCESS_BYTES = 600 * 2**20
"""A worker before it holds a model: Python with torch, transformers, PEFT and Ray Train (resident, measured)."""

EFFICIENCY: Mapping[Format, float] = {"fp32": 0.7, "bf16": 0.3}
"""Share of `measured_speed` that training reaches: attention, normalisation, conversions and the optimiser take time
and hardly any of the operations that are counted. Measured with MiniLM on AVX-512 cores (0.7 in fp32, 0.2 to 0.3 under
bf16 autocast); large models on accelerators do better (Chowdhery et al. 2022, "PaLM": 0.46), small ones worse.
"""


@dataclass(frozen=True)
class ModelShape:
    """What the estimates need to know of a model.

    Attributes:
        parameters: All of them.
        embeddings: Those that are looked up rather than multiplied with: the table of token embeddings.
        layers: Transformer layers, of encoder and decoder together.
        hidden: Width of a layer.
        weight_bytes: Bytes per parameter in memory.
    """

    parameters: int
    embeddings: int
    layers: int
    hidden: int
    weight_bytes: int

    @classmethod
    def of(cls, config: Any, parameters: int) -> ModelShape:
        """From a configuration of `transformers`; what an unusual one does not say counts as 0."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        layers = int(getattr(text, "num_hidden_layers", 0) or 0)
        if getattr(config, "is_encoder_decoder", False):
            layers += int(getattr(text, "num_decoder_layers", None) or getattr(text, "decoder_layers", None) or layers)
        hidden = int(getattr(text, "hidden_size", 0) or 0)
        dtype = getattr(config, "dtype", None)
        return cls(
            parameters=parameters,
            embeddings=int(getattr(text, "vocab_size", 0) or 0) * hidden,
            layers=layers,
            hidden=hidden,
            weight_bytes=int(getattr(dtype, "itemsize", 4)),
        )


def activation_bytes(shape: ModelShape, batch: int, length: int, compute_bytes: int) -> int:
    """Activations kept for the backward pass.

    Per layer ``34 * batch * length * hidden`` bytes with two bytes per number, attention matrices not kept: Korthikanti
    et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", equation 2. An upper bound for
    parameter-efficient methods, which need not keep the inputs of frozen layers.

    Args:
        shape: The model.
        batch: Texts per worker.
        length: Tokens per text.
        compute_bytes: Bytes per number in the forward pass.
    """
    return 17 * compute_bytes * shape.layers * batch * length * shape.hidden


def trial_bytes(shape: ModelShape, trainable: int, trains_copy: bool, activations: int) -> int:
    """What a trial adds to the frozen weights.

    Adapter weights (4 bytes each), or a second copy of the model for methods that train it; 4 bytes of gradient and
    8 bytes of AdamW's two moments per trainable parameter; and the activations.
    """
    weights = shape.parameters * shape.weight_bytes if trains_copy else 4 * trainable
    return weights + (4 + 8) * trainable + activations


def training_operations(shape: ModelShape, tokens: float, trains_copy: bool) -> float:
    """Floating-point operations of training on so many tokens.

    ``6 N T`` where all weights are trained: 2 in the forward pass, 2 backward through the activations, 2 for the
    weights' gradients (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1; N is counted without
    embeddings).
    ``4 N T`` where the weights are frozen: their gradients are not computed.
    """
    return (6 if trains_copy else 4) * (shape.parameters - shape.embeddings) * tokens


def evaluation_operations(shape: ModelShape, tokens: float) -> float:
    """Floating-point operations of a forward pass: ``2 N T``."""
    return 2 * (shape.parameters - shape.embeddings) * tokens


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
        seconds: Wall time of all trials on this machine if none is pruned; None where it cannot be said.
        device: What was measured, for people.
    """

    worker_bytes: int
    largest: str
    seconds: float | None
    device: str


def estimate(plan: StudyPlan) -> Estimate:
    """Estimate a checked study; measures this machine for about 0.2 s."""
    import torch

    from peftsearch.training.precision import computes_bf16

    on_gpu = plan.spec.resources.gpus_per_worker > 0
    device = torch.device("cuda" if on_gpu else "cpu")
    missing = on_gpu and not torch.cuda.is_available()
    bf16 = not missing and plan.spec.training.precision != "fp32" and computes_bf16(device)
    training: Format = "bf16" if bf16 or plan.spec.training.precision == "bf16" else "fp32"
    worker_bytes, largest = _memory(plan, training, on_gpu)
    if missing:
        return Estimate(worker_bytes, largest, None, "no GPU on this machine")
    speeds = {name: measured_speed(device, name) * EFFICIENCY[name] for name in sorted({training, "fp32"})}
    count = torch.cuda.device_count() if on_gpu else 1
    name = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} CPU cores"
    seconds = _seconds(plan, speeds[training], speeds["fp32"]) / count
    return Estimate(worker_bytes, largest, seconds, f"{count} x {name}" if count > 1 else name)


def _shape(plan: StudyPlan, model: str) -> ModelShape:
    from peftsearch.training.base_model import model_config

    place = plan.models[model]
    return ModelShape.of(model_config(place.location, place.revision), plan.model_facts[model].total_parameters)


def _memory(plan: StudyPlan, training: Format, on_gpu: bool) -> tuple[int, str]:
    shapes = {model: _shape(plan, model) for model in plan.models}
    resources = plan.spec.resources
    batch = -(-plan.spec.training.batch_size // resources.workers_per_trial)
    # A worker keeps every base of the study that it has seen.
    bases = sum(shape.parameters * shape.weight_bytes for shape in shapes.values())
    peaks = {}
    for item in plan.cells:
        cell, shape = item.cell, shapes[item.cell.model]
        length = plan.domains[cell.domain].max_length
        compute_bytes = 2 if training == "bf16" else 4
        activations = activation_bytes(shape, batch, length, compute_bytes)
        peak = trial_bytes(shape, item.largest.trainable, cell.space.method.trains_copy, activations)
        peaks[cell.key] = (peak, cell.method)
    peak, method = max(peaks.values())
    return (0 if on_gpu else PROCESS_BYTES) + bases + peak, method


def _seconds(plan: StudyPlan, training_speed: float, full_speed: float) -> float:
    """Evaluations on the way run in the training's precision, the one at the full budget in the weights' own."""
    shapes = {model: _shape(plan, model) for model in plan.models}
    seconds = 0.0
    for item in plan.cells:
        cell, shape = item.cell, shapes[item.cell.model]
        budget, data = plan.budgets[cell.domain], plan.prepared[cell.model, cell.domain]
        # Batches hold texts of similar length (training/data_order.py), so hardly anything is padded.
        tokens = budget.total_steps * plan.spec.training.batch_size * fmean(data.lengths("train"))
        evaluation = evaluation_operations(shape, sum(data.lengths("validation")))
        trial = training_operations(shape, tokens, cell.space.method.trains_copy) / training_speed
        trial += (len(budget.evaluation_steps) - 1) * evaluation / training_speed + evaluation / full_speed
        seconds += plan.spec.search.trials * trial
    return seconds
