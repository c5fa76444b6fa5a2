"""How much memory activations take; plain arithmetic, shared by the estimates and the workers."""

from __future__ import annotations


def activation_bytes(layers: int, hidden: int, tokens: int, compute_bytes: int) -> int:
    """Activations that a forward pass keeps for the backward pass.

    Per layer ``34 * tokens * hidden`` bytes with two bytes per number, attention matrices not kept: Korthikanti et al.
    2022, "Reducing Activation Recomputation in Large Transformer Models", equation 2. An upper bound for
    parameter-efficient methods, which need not keep the inputs of frozen layers.

    Args:
        layers: Transformer layers.
        hidden: Their width.
        tokens: Padded tokens of the batch.
        compute_bytes: Bytes per number in the forward pass.
    """
    return 17 * compute_bytes * layers * tokens * hidden


def recomputed_bytes(layers: int, hidden: int, tokens: int, compute_bytes: int) -> int:
    """As `activation_bytes`, with gradient checkpointing: each layer's input, and one layer's activations.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174), a checkpoint at each layer.
    """
    return compute_bytes * layers * tokens * hidden + activation_bytes(min(1, layers), hidden, tokens, compute_bytes)
