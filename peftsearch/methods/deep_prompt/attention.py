"""How trained keys and values get into an attention module of `transformers`.

Every attention of `transformers` 5 calls a function that it looks up by ``config._attn_implementation``, with the
finished keys and values (after rotary positions, after the cache). An attention module with a deep prompt looks up
ours, which puts the prompt in front of them and goes on to the function that the model was meant to use. So the prompt
is seen at every step of generation, takes no position, and no cache or output is longer for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION = "peftsearch_deep_prompt"
"""Name of our function in `transformers`' attention interface."""

CHILD = "deep_prompt"
"""Name under which an attention module holds its prompt."""


class PromptedConfig:
    """A model's configuration as an attention module with a prompt sees it: all the same but the implementation.

    Args:
        config: The configuration itself, which the rest of the model goes on using: masks are made for its
            implementation.
    """

    _attn_implementation = IMPLEMENTATION

    def __init__(self, config: Any) -> None:
        self.prompted_config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "prompted_config":
            raise AttributeError(name)
        return getattr(self.prompted_config, name)


def is_attention(module: nn.Module) -> bool:
    """Whether a module computes attention through `transformers`' attention interface."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def heads_and_size(attention: nn.Module) -> tuple[int, int]:
    """Number of key-value heads of an attention module, and the size of one.

    Raises:
        ValueError: The module does not say.
    """
    config = attention.config
    heads = _first(attention, "num_key_value_heads") or _first(config, "num_key_value_heads")
    heads = heads or _first(attention, "num_heads", "n_heads", "num_attention_heads")
    heads = heads or _first(config, "num_attention_heads")
    size = _first(attention, "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    size = size or _first(config, "head_dim")
    if heads is None or size is None:
        raise ValueError(f"{type(attention).__name__} does not say how many heads it has and how large they are")
    return heads, size


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """The attention function of modules with a deep prompt.

    Args:
        module: The attention module; its child `CHILD` gives the prompt.
        query: Shape (batch, heads, queries, size).
        key: Shape (batch, key-value heads, keys, size); so is ``value``.
        value: See ``key``.
        attention_mask: As the model's own implementation wants it: None, (batch, keys), or (batch, 1 or heads,
            queries, keys), boolean or added to the scores.
        kwargs: What the model passes on; a ``position_bias`` has the shape of the scores.

    Raises:
        ValueError: A mask of another kind.
    """
    config: Any = module.config
    implementation: str = config.prompted_config._attn_implementation
    eager = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    prompt: tuple[Tensor, Tensor] | None = getattr(module, CHILD)()
    if prompt is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    # Of shape (key-value heads, tokens, size), the same for every example of the batch.
    prompt_key, prompt_value = (part.to(key.dtype).expand(key.shape[0], -1, -1, -1) for part in prompt)
    tokens = prompt_key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is not None:
        attention_mask = _widened(attention_mask, tokens)
    elif implementation == "sdpa" and causal and query.shape[2] > 1:
        # SDPA's own causal mask begins at the first key, which now is the prompt's.
        attention_mask = _widened(
            torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()[None, None], tokens
        )
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (tokens, 0))
    key, value = torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2)
    return function(module, query, key, value, attention_mask, **kwargs)


def _widened(mask: Tensor, tokens: int) -> Tensor:
    """The mask with columns for the prompt, which everybody sees."""
    if not isinstance(mask, Tensor):
        raise ValueError("deep prompts do not work with flex attention: load the model with sdpa or eager attention")
    if mask.dtype.is_floating_point:
        return F.pad(mask, (tokens, 0), value=0.0)
    if mask.ndim == 2 or mask.dtype == torch.bool:
        return torch.cat([mask.new_ones((*mask.shape[:-1], tokens)), mask], dim=-1)
    raise ValueError(f"deep prompts do not work with attention masks of type {mask.dtype}")


def _first(source: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(source, name, None), int)), None)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attend)
