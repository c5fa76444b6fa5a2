"""QLoRA: LoRA over a frozen base that is stored in four or eight bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from peftsearch.methods.base import Hyperparameter, base_quantization, dropout, learning_rate
from peftsearch.methods.lora import ALL_LINEAR, VARIANT, Lora, lora_hyperparameters


class QLora(Lora):
    """LoRA on every linear layer, over a base in nf4 with double quantisation (or in int8)."""

    name = "qlora"
    title = "QLoRA"
    source = "Dettmers et al. 2023, arXiv:2305.14314"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        **lora_hyperparameters(ALL_LINEAR),
        "variant": VARIANT,
        "quantization": base_quantization(("nf4", "int8")),
        "dropout": dropout(),
        "learning_rate": learning_rate(1e-4, 1e-2),
    }
    priors = ({"rank": 16, "alpha": 32.0, "learning_rate": 2e-4},)
