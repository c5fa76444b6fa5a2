"""BitFit: only the biases are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, learning_rate

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class BitFit(Method):
    """The biases of all linear layers and layer norms, as trained differences from the base's."""

    name = "bitfit"
    title = "BitFit"
    source = "Ben Zaken et al. 2022, arXiv:2106.10199"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {"learning_rate": learning_rate(1e-4, 1e-2)}
    priors = ({"learning_rate": 1e-3},)

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError where the model has no biases (as Llama and T5 have none)."""
        from peft import get_peft_model

        from peftsearch.methods.bias import register
        from peftsearch.methods.bias.config import BiasConfig

        register()
        config = BiasConfig(task_type=context.peft_task_type, modules_to_save=list(context.modules_to_save) or None)
        return get_peft_model(model, config)  # type: ignore[no-any-return]
