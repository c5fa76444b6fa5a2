"""Full fine-tuning, the reference that every other method is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, learning_rate

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class FullFineTuning(Method):
    """All weights are trained, on a copy of the base."""

    name = "full"
    title = "full fine-tuning"
    source = "Devlin et al. 2019, arXiv:1810.04805"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {"learning_rate": learning_rate(1e-5, 1e-3)}
    priors = ({"learning_rate": 5e-5},)
    trains_copy = True

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`."""
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        return model  # type: ignore[no-any-return]
