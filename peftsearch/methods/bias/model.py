"""The tuner that trains a model's biases, and its layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftsearch.methods.bias.config import BiasConfig
from peftsearch.methods.module_names import inside, short_names

CANNOT_MERGE = "Trained biases are not merged: the base's own are never written to. Keep the adapter attached."


def layers_with_bias(model: nn.Module, leave_alone: tuple[str, ...] = ()) -> list[str]:
    """Paths of the linear layers and layer norms that add a bias to their output.

    Args:
        model: The model.
        leave_alone: Paths below which none is listed: modules that are trained in full.

    Returns:
        Paths; without the layer over the vocabulary of a language model, whose bias has an entry for every word.
    """
    words = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.LayerNorm | Conv1D)
        and module.bias is not None
        and module is not words
        and not inside(path, leave_alone)
    ]


class BiasLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A frozen layer and the trained change of its bias: ``base(x) + change``, which starts at zero.

    Args:
        base_layer: A linear layer or a layer norm with a bias.
    """

    adapter_layer_names = ("bitfit_bias",)

    # PEFT is untyped; these are the parts of BaseTunerLayer that are used here.
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bitfit_bias = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []

    def update_layer(self, adapter_name: str) -> None:
        """Add a change of zero under this name."""
        bias = self.get_base_layer().bias
        assert isinstance(bias, Tensor)
        self.bitfit_bias[adapter_name] = nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for adapter_name in self.active_adapters:
            if adapter_name in self.bitfit_bias:
                y = y + self.bitfit_bias[adapter_name].to(y.dtype)
        return y


class BiasModel(BaseTuner):  # type: ignore[misc]
    """A model whose biases are trained (Ben Zaken et al. 2022, arXiv:2106.10199), built by `peft.get_peft_model` and
    `peft.PeftModel.from_pretrained`.
    """

    prefix = "bitfit_"
    tuner_layer_cls = BiasLayer

    @staticmethod
    def _prepare_adapter_config(peft_config: BiasConfig, model_config: dict[str, Any]) -> BiasConfig:
        # The layers are looked for in the model, see _prepare_model.
        return peft_config

    def _prepare_model(self, peft_config: BiasConfig, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            found = layers_with_bias(model, tuple(peft_config.modules_to_save or ()))
            if not found:
                raise ValueError(
                    f"{type(model).__name__} has no biases to train; use another method, such as layer_norm"
                )
            peft_config.target_modules = short_names(model, found)

    def _create_and_replace(
        self,
        peft_config: BiasConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, BiasLayer) else BiasLayer(target)
        layer.update_layer(adapter_name)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)
