"""P-tuning v2: trained keys and values in front of every attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, learning_rate
from peftsearch.methods.prefix import attach_deep_prompt
from peftsearch.spec import Range

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class PTuningV2(Method):
    """``tokens`` keys and values in front of every attention, trained as they are."""

    name = "p_tuning_v2"
    title = "P-tuning v2"
    source = "Liu et al. 2022, arXiv:2110.07602"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "tokens": Hyperparameter("int", Range(low=4, high=128, log=True), "Keys and values per attention", 1, 4096),
        "learning_rate": learning_rate(5e-4, 5e-2),
    }
    priors = ({"tokens": 20, "learning_rate": 5e-3},)

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError for an architecture without transformers' attention interface."""
        return attach_deep_prompt(model, context, tokens=hyperparameters["tokens"], hidden=None)
