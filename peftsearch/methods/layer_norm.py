"""Layer-norm tuning: only the normalisation layers are trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, learning_rate
from peftsearch.methods.module_names import inside, short_names

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class LayerNormTuning(Method):
    """The gains (and biases) of all normalisation layers, on copies of those layers."""

    name = "layer_norm"
    title = "layer-norm tuning"
    source = "Zhao et al. 2024, arXiv:2312.11420"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {"learning_rate": learning_rate(1e-4, 1e-2)}
    priors = ({"learning_rate": 1e-3},)

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError where the model has no normalisation layers."""
        from peft import LNTuningConfig, get_peft_model

        found = [
            path
            for path, module in model.named_modules()
            if _is_norm(module) and not inside(path, context.modules_to_save)
        ]
        if not found:
            raise ValueError(f"{type(model).__name__} has no normalisation layers to train; use another method")
        config = LNTuningConfig(
            task_type=context.peft_task_type,
            target_modules=short_names(model, found),
            modules_to_save=list(context.modules_to_save) or None,
        )
        with warnings.catch_warnings():
            # PEFT looks for a linear layer's sizes, which it does not need here.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            return get_peft_model(model, config)  # type: ignore[no-any-return]


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm of any kind: transformers' own (T5LayerNorm, LlamaRMSNorm) are known by name."""
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
