"""Where the attention and feed-forward sublayers of a transformer begin and end, found from the model itself.

No architecture is known by its name here: a block is an element of the model's lists of modules, its attention is what
is called attention, and the rest of its linear layers are the feed-forward sublayer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
# q, v, q_proj, value, query_proj, v_lin, ...; and layers that compute them together: qkv_proj, Wqkv, c_attn, in_proj.
_QUERY_OR_VALUE = re.compile(r"(^|_)w?(q|v|query|value)(_|$)|qkv|query_key_value|c_attn|in_proj", re.IGNORECASE)


@dataclass(frozen=True)
class Sublayers:
    """Names of the linear layers that make up the sublayers of a model's blocks, in the model's order.

    Attributes:
        attention_ends: The output projections of the attention sublayers (cross-attention included); () where they
            are not found in every block.
        feed_forward_ends: The last linear layers of the feed-forward sublayers; () where they are not found in every
            block.
        query_and_value: The projections of queries and values (or of both at once); all linear layers of the attention
            where none is called so.
        blocks: Name of a layer -> the name of its block, for example ``encoder.layer.3``.
    """

    attention_ends: tuple[str, ...]
    feed_forward_ends: tuple[str, ...]
    query_and_value: tuple[str, ...]
    blocks: dict[str, str]


def find_sublayers(model: nn.Module) -> Sublayers:
    """The sublayers of a transformer; on any device, quantised or not, with or without adapters attached.

    A sublayer ends in a linear layer that gives the block's width: of several, the one defined last. Layers of a
    mixture of experts do not count, for none of them is the end of its sublayer.

    Returns:
        What was found; blocks without attention contribute nothing, and a model without blocks has no sublayers.
    """
    linears = linear_layers(model)
    width = _hidden_size(model)
    blocks: dict[str, list[str]] = {}
    for name in linears:
        block = _block(model, name)
        if block is not None:
            blocks.setdefault(block, []).append(name)

    attention_ends: list[str | None] = []
    feed_forward_ends: list[str | None] = []
    query_and_value: list[str] = []
    block_of: dict[str, str] = {}
    for block, names in blocks.items():
        attentions: dict[str, list[str]] = {}
        others: list[str] = []
        for name in names:
            attention = _attention(block, name)
            if attention is not None:
                attentions.setdefault(attention, []).append(name)
            elif "expert" not in name.lower():
                others.append(name)
        if not attentions:
            continue
        block_of |= dict.fromkeys(names, block)
        for members in attentions.values():
            named = [name for name in members if _QUERY_OR_VALUE.search(name.rpartition(".")[2])]
            query_and_value += named or members
            attention_ends.append(_last(name for name in members if linears[name][1] == width))
        # A layer that takes less than the block's width ends an adapter of the block's own.
        feed_forward_ends.append(
            _last(name for name in others if linears[name][0] >= linears[name][1] and linears[name][1] == width)
        )
    return Sublayers(_all(attention_ends), _all(feed_forward_ends), tuple(query_and_value), block_of)


def feed_forward_input(model: nn.Module, end: str) -> str:
    """The name of a linear layer that reads what the feed-forward sublayer reads which ends in `end`.

    It is sought from `end` outwards: the nearest layer before it that projects from the width that `end` gives to the
    width that `end` takes (twice that, where a gated sublayer computes gate and value at once).

    Raises:
        ValueError: There is none.
    """
    linears = linear_layers(model)
    names = list(linears)
    inner, width = linears.get(end, (0, 0))
    parts = end.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        around = ".".join(parts[:depth]) + "."
        before = [
            name
            for name in names[: names.index(end) if end in linears else 0]
            if name.startswith(around) and linears[name][0] == width and linears[name][1] in (inner, 2 * inner)
        ]
        if before:
            return before[-1]
    raise ValueError(f"No linear layer was found that begins the feed-forward sublayer which ends in {end}.")


def name_pattern(sublayers: Sublayers, names: Iterable[str]) -> str:
    """One regular expression for the full names of these layers in every block, whatever the model is part of."""
    endings: dict[str, None] = {}
    for name in names:
        block = sublayers.blocks[name]
        # The list's own name stays: "output.dense" alone would match "attention.output.dense" too.
        outer = block.split(".")[-2]
        endings[rf"{re.escape(outer)}\.\d+{re.escape(name[len(block) :])}"] = None
    return rf"(.*\.)?({'|'.join(endings)})"


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name of every linear layer -> how many features it takes and gives.

    In the model's order. A layer with adapters counts once, under the name that it had before.
    """
    found: dict[str, tuple[int, int]] = {}
    adapted: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in adapted[-1:]):
            continue
        layer = module
        if isinstance(module, BaseTunerLayer):
            adapted.append(f"{name}.")
            layer = module.get_base_layer()
        if isinstance(layer, nn.Linear | Conv1D):
            size = features(layer)
            assert size is not None
            found[name] = size
    return found


def features(layer: nn.Module) -> tuple[int, int] | None:
    """How many features a linear layer takes and gives, whatever its weights are stored as; None if it is none."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    taken, given = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (taken, given) if isinstance(taken, int) and isinstance(given, int) else None


def _last(names: Iterable[str]) -> str | None:
    found = list(names)
    return found[-1] if found else None


def _all(names: list[str | None]) -> tuple[str, ...]:
    return () if None in names else tuple(name for name in names if name is not None)


def _block(model: nn.Module, name: str) -> str | None:
    """The outermost element of a list of modules that a layer is part of."""
    parts = name.split(".")
    for index in range(1, len(parts)):
        if parts[index].isdigit() and isinstance(model.get_submodule(".".join(parts[:index])), nn.ModuleList):
            return ".".join(parts[: index + 1])
    return None


def _attention(block: str, name: str) -> str | None:
    """The outermost module called attention between a block and a layer in it."""
    parts = name[len(block) + 1 :].split(".")
    for index, part in enumerate(parts[:-1]):
        if _ATTENTION.search(part):
            return ".".join((block, *parts[: index + 1]))
    return None


def _hidden_size(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None
