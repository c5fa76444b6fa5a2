"""The bottleneck adapter of Houlsby, Pfeiffer and He, as a searchable method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, base_quantization, dropout, learning_rate
from peftsearch.spec import Range

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

BOTTLENECK: Mapping[str, Hyperparameter] = {
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
        "pfeiffer: after each feed-forward sublayer; houlsby: after attention and feed-forward; parallel: beside each "
        "feed-forward sublayer",
        choices=("pfeiffer", "houlsby", "parallel"),
    ),
    "scale": Hyperparameter("float", 4.0, "Factor of a parallel adapter's change", 1e-3, 1e3, shapes_parameters=False),
}
"""What describes a bottleneck adapter, alone or as a part of the hybrid."""


class BottleneckAdapter(Method):
    """A small feed-forward bottleneck with a residual, after (or beside) the sublayers of every block."""

    name = "adapter"
    title = "bottleneck adapter"
    source = (
        "Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247; "
        "He et al. 2022, arXiv:2110.04366"
    )
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        **BOTTLENECK,
        "quantization": base_quantization(),
        "dropout": dropout(),
        "learning_rate": learning_rate(1e-4, 1e-2),
    }
    priors = ({"bottleneck": 64, "learning_rate": 1e-3},)

    def packs(self, hyperparameters: Mapping[str, Any], *, bare: bool = False) -> bool:
        """Always: bottlenecks."""
        return True

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError for an architecture whose sublayers are not clear."""
        from peft import get_peft_model

        from peftsearch.methods.bottleneck import BottleneckConfig, register

        register()
        config = BottleneckConfig(
            task_type=context.peft_task_type,
            bottleneck_size=hyperparameters["bottleneck"],
            activation=hyperparameters["activation"],
            placement=hyperparameters["placement"],
            scale=hyperparameters["scale"],
            dropout=hyperparameters["dropout"],
            modules_to_save=list(context.modules_to_save) or None,
        )
        return get_peft_model(model, config)  # type: ignore[no-any-return]
