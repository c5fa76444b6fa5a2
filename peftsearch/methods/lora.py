"""LoRA: a low-rank update beside chosen linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, dropout, learning_rate
from peftsearch.spec import Range

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_ATTENTION = "attention"


class Lora(Method):
    """W + (alpha / rank) B A with A of shape (rank, in) and B of shape (out, rank); B starts at zero."""

    name = "lora"
    title = "LoRA"
    source = "Hu et al. 2021, arXiv:2106.09685"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "rank": Hyperparameter("int", Range(low=1, high=64, log=True), "Rank of the update", 1, 65536),
        "alpha": Hyperparameter(
            "float", 32.0, "The update is scaled by alpha / rank", 1e-6, 1e6, shapes_parameters=False
        ),
        "dropout": dropout(),
        "targets": Hyperparameter(
            "str",
            _ATTENTION,
            "Adapted layers: attention (PEFT's choice for the architecture, usually query and value), all-linear, "
            "or names of modules separated by commas",
        ),
        "learning_rate": learning_rate(1e-4, 1e-2),
    }
    priors = ({"rank": 16, "alpha": 32.0, "learning_rate": 3e-4},)

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError where the model has no such layers."""
        from peft import LoraConfig, get_peft_model

        targets = str(hyperparameters["targets"])
        target_modules: str | list[str] | None
        if targets == _ATTENTION:
            target_modules = None
        elif targets == "all-linear":
            target_modules = targets
        else:
            target_modules = [name.strip() for name in targets.split(",") if name.strip()]
        config = LoraConfig(
            task_type=context.peft_task_type,
            r=hyperparameters["rank"],
            lora_alpha=hyperparameters["alpha"],
            lora_dropout=hyperparameters["dropout"],
            target_modules=target_modules,
        )
        try:
            return get_peft_model(model, config)  # type: ignore[no-any-return]
        except ValueError as error:
            if target_modules is None or targets == "all-linear":
                raise
            raise ValueError(f"{type(model).__name__} has no linear layer named {targets!r}: {error}") from None
