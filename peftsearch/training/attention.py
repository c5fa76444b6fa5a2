"""Which kernels compute attention.

**On a GPU** not cuDNN's, see `leave_out_cudnn`.

**On the CPU** torch's fused kernel does not help training. With dropout `scaled_dot_product_attention` has no fused
kernel on the CPU: it computes plain products, in fp32 also under bf16 autocast, and draws its masks slowly. Without
dropout its fused kernel is slower in bf16 than plain products on processors without AMX (measured:
tests/benchmarks/README.md, "Steps"). So the same formula is computed here with plain products where that is faster, the
softmax in fp32. Evaluation outside of autocast, which records a trial's score, is left to `transformers`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from peftsearch.training.dropout import dropout as drop

_LONGEST = 512
"""Keys up to which plain products without dropout may take the memory of their scores, which a fused kernel saves."""


def leave_out_cudnn(device: torch.device) -> None:
    """Let this process compute attention on a GPU by torch's own kernels.

    cuDNN's come first on the newest GPUs, and plan anew, for a second, whenever a batch has another shape, as batches
    of texts have: https://github.com/modelscope/FunASR/issues/3704. What verifies a score computes as what found it.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def use_fast_attention() -> None:
    """Let models of this process compute their "sdpa" attention by `attend`; doing so again changes nothing."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `transformers`' attention function "sdpa", which see for all arguments.

    Returns:
        The attention's output, shape (batch, queries, heads, size), and None.
    """
    from transformers.integrations import sdpa_attention as original

    if not _pays(query, key, value, attention_mask, dropout) or kwargs.get("cache") is not None:
        fused: tuple[torch.Tensor, None] = original.sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **kwargs,
        )
        return fused
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = original.repeat_kv(key, groups), original.repeat_kv(value, groups)
    queries = query.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None
    if causal:
        # Room of a cache that nothing was written to yet.
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    if position_bias is not None:
        attention_mask = original.create_position_bias_mask(position_bias, attention_mask, causal, query, key)
    elif causal:
        attention_mask = torch.ones(queries, key.shape[2], dtype=torch.bool).tril()[None, None]
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    if attention_mask is not None:
        # In place: a product's backward pass does not need its output.
        scores += _added(attention_mask, scores.dtype)
    weights = drop(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _pays(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> bool:
    if query.device.type != "cpu" or query.ndim != 4 or query.shape[2] == 1 or torch.compiler.is_compiling():
        return False
    if mask is not None and mask.ndim != 4:
        return False
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if dropout > 0.0:
        return True
    if key.shape[2] > _LONGEST or query.dtype != torch.bfloat16 or _multiplies_tiles():
        return False
    # Whatever is scored outside of autocast is what plain transformers would give.
    return learns or torch.is_autocast_enabled("cpu")


@functools.cache
def _multiplies_tiles() -> bool:
    """Whether the processor has AMX for bf16, which torch's fused kernels use."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
