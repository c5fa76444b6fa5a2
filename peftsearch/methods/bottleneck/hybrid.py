"""LoRA and bottleneck adapters in one PEFT method: trained together, saved as one adapter."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from peftsearch.methods.bottleneck.config import BottleneckConfig, listed
from peftsearch.methods.bottleneck.layer import BottleneckLayer
from peftsearch.methods.bottleneck.model import BottleneckModel
from peftsearch.methods.lora import ALL_LINEAR, ATTENTION, target_modules
from peftsearch.methods.sublayers import linear_layers


class HybridType(StrEnum):
    """The method's name in PEFT's mappings and in ``adapter_config.json``."""

    LORA_BOTTLENECK = "LORA_BOTTLENECK"


HYBRID_TYPE = HybridType.LORA_BOTTLENECK


@dataclass
class HybridConfig(BottleneckConfig):
    """Configuration of LoRA (Hu et al. 2021, arXiv:2106.09685) together with bottleneck adapters.

    What `BottleneckConfig` says of bottleneck adapters holds here; besides, every layer of `lora_target_modules`
    computes ``y <- y + (lora_alpha / r) * B A dropout(x)``. On a layer that has both, the bottleneck comes second.
    With inputs of dimension ``k`` and outputs of dimension ``d`` the update trains ``r * (k + d)`` parameters.

    Raises:
        ValueError: A field has a value that cannot work.
    """

    r: int = field(default=8, metadata={"help": "Rank of the low-rank update, at least 1."})
    lora_alpha: float = field(default=16.0, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": (
                "Names (or ends of names) of the linear layers with a low-rank update, one regular expression for "
                "their full names, or 'all-linear'. None: the projections of query and value."
            )
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HYBRID_TYPE  # type: ignore[assignment]
        self.lora_target_modules = listed(self.lora_target_modules)
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r must be a whole number of at least 1, not {self.r!r}.")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha must be a positive number, not {self.lora_alpha}.")


class HybridLayer(BottleneckLayer):
    """A frozen linear projection with low-rank updates, bottleneck adapters, or both.

    Built as `BottleneckLayer`, with two parts to choose from: ``lora`` and ``bottleneck``, each True or False.
    """

    # PEFT tells a tuner's parameters by one common prefix.
    adapter_layer_names = (*BottleneckLayer.adapter_layer_names, "bottleneck_lora_A", "bottleneck_lora_B")
    other_param_names = (*BottleneckLayer.other_param_names, "bottleneck_lora_scaling")

    def _make_room(self) -> None:
        super()._make_room()
        self.bottleneck_lora_A = nn.ModuleDict()
        self.bottleneck_lora_B = nn.ModuleDict()
        self.bottleneck_lora_scaling: dict[str, float] = {}

    def update_layer(
        self, adapter_name: str, config: BottleneckConfig, *, lora: bool = True, bottleneck: bool = True
    ) -> None:
        """Add a freshly initialised adapter under this name, which starts as the identity."""
        assert isinstance(config, HybridConfig)
        if lora:
            down = nn.Linear(self.in_features, config.r, bias=False)
            up = nn.Linear(config.r, self.out_features, bias=False)
            if config.init_weights:
                nn.init.zeros_(up.weight)
            self.bottleneck_lora_A[adapter_name] = down
            self.bottleneck_lora_B[adapter_name] = up
            self.bottleneck_lora_scaling[adapter_name] = config.lora_alpha / config.r
        if bottleneck:
            super().update_layer(adapter_name, config)
        else:
            self.bottleneck_dropout[adapter_name] = config.dropout
            self._settle(adapter_name, config)

    def _adapt(self, adapter_name: str, x: Tensor, y: Tensor, sublayer_input: Tensor | None) -> Tensor:
        if adapter_name in self.bottleneck_lora_A:
            down, up = self.bottleneck_lora_A[adapter_name], self.bottleneck_lora_B[adapter_name]
            assert isinstance(down, nn.Linear)
            hidden = self._cast_input_dtype(x, down.weight.dtype)
            hidden = F.dropout(hidden, self.bottleneck_dropout[adapter_name], training=self.training)
            y = (y + self.bottleneck_lora_scaling[adapter_name] * up(down(hidden))).to(y.dtype)
        return super()._adapt(adapter_name, x, y, sublayer_input)


class HybridModel(BottleneckModel):
    """A model with LoRA and bottleneck adapters in one; otherwise as `BottleneckModel`."""

    tuner_layer_cls = HybridLayer

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        assert isinstance(peft_config, HybridConfig)
        targets = peft_config.lora_target_modules
        if targets is None or targets == ATTENTION:
            peft_config.lora_target_modules = target_modules(model, ATTENTION)
        elif targets == ALL_LINEAR:
            output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
            names = [name for name in linear_layers(model) if model.get_submodule(name) is not output]
            peft_config.lora_target_modules = names

    @staticmethod
    def _check_target_module_exists(peft_config: HybridConfig, key: str) -> Any:
        # Either target; what is excluded from one is excluded from both.
        return BaseTuner._check_target_module_exists(peft_config, key) or _has_lora(peft_config, key)

    def _adapts_sublayer(self, peft_config: BottleneckConfig, key: str) -> bool:
        return bool(BaseTuner._check_target_module_exists(peft_config, key))

    def _parts(self, peft_config: BottleneckConfig, key: str) -> dict[str, bool]:
        assert isinstance(peft_config, HybridConfig)
        return {"lora": bool(_has_lora(peft_config, key)), "bottleneck": self._adapts_sublayer(peft_config, key)}


def _has_lora(config: HybridConfig, key: str) -> Any:
    """PEFT's answer to whether the configuration gives a layer a low-rank update."""
    as_lora = copy.copy(config)
    as_lora.target_modules = config.lora_target_modules
    return BaseTuner._check_target_module_exists(as_lora, key)
