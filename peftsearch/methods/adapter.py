"""The bottleneck adapter of Houlsby and Pfeiffer, as a searchable method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, dropout, learning_rate
from peftsearch.spec import Range

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class BottleneckAdapter(Method):
    """A small feed-forward bottleneck with a residual, after the sublayers of every block."""

    name = "adapter"
    title = "bottleneck adapter"
    source = "Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "bottleneck": Hyperparameter("int", Range(low=4, high=256, log=True), "Size of the bottleneck", 1, 65536),
        "activation": Hyperparameter(
            "str",
            "gelu",
            "Nonlinearity of the bottleneck",
            choices=("relu", "gelu", "silu", "tanh"),
            shapes_parameters=False,
        ),
        "placement": Hyperparameter(
            "str",
            "pfeiffer",
            "pfeiffer: after each feed-forward sublayer; houlsby: after attention and feed-forward",
            choices=("pfeiffer", "houlsby"),
        ),
        "dropout": dropout(),
        "learning_rate": learning_rate(1e-4, 1e-2),
    }
    priors = ({"bottleneck": 64, "learning_rate": 1e-3},)

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError for an architecture whose sublayers are not known."""
        from peft import get_peft_model

        from peftsearch.methods.bottleneck import BottleneckConfig, register

        register()
        config = BottleneckConfig(
            task_type=context.peft_task_type,
            bottleneck_size=hyperparameters["bottleneck"],
            activation=hyperparameters["activation"],
            placement=hyperparameters["placement"],
            dropout=hyperparameters["dropout"],
        )
        return get_peft_model(model, config)  # type: ignore[no-any-return]
