"""Frozen bases stored in four or eight bits by bitsandbytes: loading them, and sharing them between trials."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftsearch.methods import BYTES_PER_WEIGHT, Quantization
from peftsearch.training.memory import free_bytes
from peftsearch.training.precision import computes_bf16

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


def quantization_config(
    quantization: Quantization, device: torch.device, unquantised: Collection[str]
) -> BitsAndBytesConfig:
    """How `transformers` is to quantise a base while loading it.

    Args:
        quantization: nf4 (with double quantisation, arXiv:2305.14314) or int8 (arXiv:2208.07339).
        device: Where the base will compute; it computes in bf16 where the hardware does.
        unquantised: Paths of modules to leave as they are.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(unquantised))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if computes_bf16(device) else torch.float32,
        llm_int8_skip_modules=list(unquantised),
    )


def left_unquantised(model: PreTrainedModel, fresh_modules: Collection[str]) -> tuple[str, ...]:
    """The modules of a base that are not quantised: what the trial trains in full, what gives the vocabulary, and what
    `transformers` leaves as it is.
    """
    output = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is output and output is not None]
    return (*fresh_modules, *names, *never_quantised(model))


def never_quantised(model: PreTrainedModel) -> tuple[str, ...]:
    """Linear layers that `transformers` quantises for nobody: T5 has some, whose outputs fp16 cannot hold."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(name for name in linear if not should_convert_module(name, kept))


def check_quantisable(location: str, config: Any) -> None:
    """Refuse a base that is quantised already, by its configuration.

    Raises:
        ValueError: With one sentence.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        raise ValueError(
            f"the model {location!r} is stored quantised already ({getattr(method, 'value', method)}): name the model "
            "that it was made from, and let the method's hyperparameter quantization be nf4 or int8"
        )


def check_memory(
    location: str,
    model: PreTrainedModel,
    quantization: Quantization,
    device: torch.device,
    unquantised: Collection[str],
) -> None:
    """Refuse a base that does not fit into the device's free memory.

    Args:
        location: Its name, for the error.
        model: The base on the meta device, in the data type that it will be loaded in.
        quantization: As it is to be stored.
        device: Where it is to live.
        unquantised: Paths of modules that are not quantised.

    Raises:
        ValueError: With one sentence that gives both numbers.
    """
    from transformers.pytorch_utils import Conv1D

    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for name, module in model.named_modules():
        kept = any(name == path or name.startswith(f"{path}.") for path in unquantised)
        if isinstance(module, nn.Linear | Conv1D) and not kept:
            needed -= round(module.weight.numel() * (module.weight.element_size() - BYTES_PER_WEIGHT[quantization]))
    if device.type == "cuda":
        # A base is loaded in pieces larger than what is left in the reserve between others.
        torch.cuda.empty_cache()
    free = free_bytes(device)
    if needed > free:
        raise ValueError(
            f"the model {location!r} needs {needed / 1e9:.1f} GB as {quantization}, and {device} has "
            f"{free / 1e9:.1f} GB free: take a smaller model, or a machine with more memory"
        )


def settle(model: nn.Module) -> None:
    """Make a freshly loaded quantised model fit to be shared by trials: no forward pass will change it any more."""
    bitsandbytes = sys.modules["bitsandbytes"]
    # It says at every forward pass that int8 multiplies in half precision.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for layer in quantised_layers(model).values():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-bf16, bitsandbytes 0.50 repacks 4-bit weights at the first evaluation, in place, into
            # a form that passes no gradients back from then on (for its fused kernel, its pull request 1804).
            layer.support_avx512bf16_for_cpu = False
        elif layer.weight.CB is not None:
            layer.init_8bit_state()
        layer.register_forward_pre_hook(_before_forward)
        layer.register_forward_hook(_after_forward, always_call=True)


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    """The layers whose weights bitsandbytes holds, by name."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return {}
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def share_layer(layer: Any, known: Any) -> None:
    """Let a quantised layer use the weight of another one of the same kind and shape."""
    layer.weight = known.weight
    if hasattr(layer, "quant_state"):
        layer.quant_state = known.quant_state
    else:
        layer.state.CB, layer.state.SCB = known.state.CB, known.state.SCB


def shared_state(layer: Any) -> Iterator[Any]:
    """What a quantised layer holds besides its parameters, and what copies of it are to share."""
    if hasattr(layer, "quant_state"):
        yield layer.quant_state
    else:
        yield layer.state.CB
        yield layer.state.SCB


def scales(layer: Any) -> Iterator[torch.Tensor]:
    """The tensors that say, with its weight, what a quantised layer computes."""
    if hasattr(layer, "quant_state"):
        for state in (layer.quant_state, layer.quant_state.state2):
            if state is not None:
                yield state.absmax
                yield state.code
        if layer.quant_state.offset is not None:
            yield layer.quant_state.offset
    else:
        yield layer.state.SCB


def _before_forward(layer: Any, _: Any) -> None:
    if layer.bias is not None:
        layer.bias_as_loaded = layer.bias.data
    # PEFT's DoRA, on a CPU, replaces an int8 weight by one that claims to have its scales, which the layer would take
    # over although they are missing; the layer's own state has them.
    if getattr(layer.weight, "CB", None) is not None and layer.weight.SCB is None:
        layer.weight.CB = None


def _after_forward(layer: Any, *_: Any) -> None:
    # bitsandbytes casts the bias, in place and for good, to the data type of the input, which differs between training
    # (autocast) and evaluation: the base would be another one after the first trial.
    if layer.bias is not None and "bias_as_loaded" in layer.__dict__:
        layer.bias.data = layer.__dict__.pop("bias_as_loaded")
