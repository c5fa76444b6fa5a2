"""The hybrid: LoRA and bottleneck adapters, trained together and exported as one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.adapter import BOTTLENECK
from peftsearch.methods.base import AttachContext, Hyperparameter, Method, base_quantization, dropout, learning_rate
from peftsearch.methods.lora import ATTENTION, lora_hyperparameters, target_modules

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Hybrid(Method):
    """Low-rank updates of the attention, and bottleneck adapters at the ends of (or beside) the sublayers."""

    name = "hybrid"
    title = "LoRA + bottleneck"
    source = "Hu et al. 2021, arXiv:2106.09685, with Houlsby et al. 2019, arXiv:1902.00751"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        **lora_hyperparameters(ATTENTION),
        **BOTTLENECK,
        "quantization": base_quantization(),
        "dropout": dropout(),
        "learning_rate": learning_rate(1e-4, 1e-2),
    }
    priors = ({"rank": 8, "alpha": 16.0, "bottleneck": 32, "learning_rate": 5e-4},)

    def packs(self, hyperparameters: Mapping[str, Any], *, bare: bool = False) -> bool:
        """Always: low-rank updates and bottlenecks."""
        return True

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError where the model has no such layers, or its sublayers are not clear."""
        from peft import get_peft_model

        from peftsearch.methods.bottleneck import HybridConfig, register

        register()
        config = HybridConfig(
            task_type=context.peft_task_type,
            r=hyperparameters["rank"],
            lora_alpha=hyperparameters["alpha"],
            lora_target_modules=target_modules(model, str(hyperparameters["targets"])),
            bottleneck_size=hyperparameters["bottleneck"],
            activation=hyperparameters["activation"],
            placement=hyperparameters["placement"],
            scale=hyperparameters["scale"],
            dropout=hyperparameters["dropout"],
            modules_to_save=list(context.modules_to_save) or None,
        )
        return get_peft_model(model, config)  # type: ignore[no-any-return]
