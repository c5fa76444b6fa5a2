"""torch.compile of a trial's layers, for training.

Each layer of the transformer is compiled by itself, not the model as a whole: its layers have one code and other
weights, and so have those of the next trial. One graph serves all of them; another one is made for another rank or
bottleneck size. Lengths of texts are dynamic, so a longer batch makes no further one.

Evaluations run as they are written (`uncompiled`): a trial's score is what plain transformers gives.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

_GRAPHS = 512
"""Graphs of one code at most: with torch's own limit of 8, trials of a ninth rank would train as if nothing had been
asked for."""


def check_compiler(device: torch.device) -> None:
    """Compile next to nothing, so that what is missing here is known before the first trial.

    Raises:
        ValueError: torch.compile does not work here; it says why, in a sentence.
    """
    probe: Any = torch.compile(torch.cos, fullgraph=True)
    try:
        probe(torch.ones(8, device=device))
    except Exception as error:
        words = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"training.compile: torch.compile does not work here ({words}): install a C compiler, or leave it out"
        ) from error


def compile_layers(model: nn.Module) -> None:
    """Let a trial's model run its layers compiled from now on, except in `uncompiled`.

    Args:
        model: A transformer, with trainable parameters attached.

    Raises:
        ValueError: It has no layers that are known as such.
    """
    from peftsearch.methods.sublayers import find_sublayers

    layers = dict.fromkeys(find_sublayers(model).blocks.values())
    if not layers:
        raise ValueError(f"training.compile: no layers were found in {type(model).__name__}: leave it out")
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, _GRAPHS)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 8 * _GRAPHS)
    for path in layers:
        model.get_submodule(path).compile(dynamic=True)


def release_layers(model: nn.Module) -> None:
    """Undo `compile_layers` in a model that is not used any more.

    A compiled module refers to itself, so that its weights would stay until Python looks for cycles, which is rarely.
    """
    for module in model.modules():
        module._compiled_call_impl = None


def uncompiled() -> AbstractContextManager[None]:
    """Everything runs as it is written."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
