"""The layer that adds bottleneck adapters to a linear projection."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftsearch.methods.bottleneck.config import ACTIVATIONS, BottleneckConfig
from peftsearch.methods.sublayers import features

CANNOT_MERGE = (
    "A bottleneck adapter cannot be merged into the base weights, because of its nonlinearity. Keep the adapter "
    "attached for inference, or call `unload()` to get the base model back."
)


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A frozen linear projection, followed by the bottleneck adapters attached to it.

    With the base's output ``y`` of shape (..., d), each active adapter in turn computes
    ``y <- y + up(activation(down(dropout(y))))``; a parallel one computes
    ``y <- y + scale * up(activation(down(dropout(x))))`` with the sublayer's input ``x`` of shape (..., d), which it
    learns from the layer that begins the sublayer (see `listen`). Adapters compute in the data type of their own
    parameters (under autocast: in autocast's) and return that of ``y``; nothing is assumed of the base's weight, which
    may be quantised.

    Args:
        base_layer: The projection: `nn.Linear`, `transformers`' `Conv1D`, or any other layer with ``in_features`` and
            ``out_features`` that returns one tensor whose last dimension is the latter.
        adapter_name: Name of the first adapter.
        config: Its configuration.
        parts: Passed on to `update_layer`.

    Raises:
        ValueError: The layer does not say how many features it puts out.
    """

    adapter_layer_names: tuple[str, ...] = ("bottleneck_down", "bottleneck_up")
    other_param_names: tuple[str, ...] = ("bottleneck_activation", "bottleneck_dropout", "bottleneck_scale")

    # PEFT is untyped; these are the parts of BaseTunerLayer that are used here.
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, **parts: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _features(self.get_base_layer())
        self._make_room()
        self._listening: RemovableHandle | None = None
        self._sublayer_input: Tensor | None = None
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, **parts)

    def _make_room(self) -> None:
        """Create what holds the adapters' parts by name."""
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_activation: dict[str, str] = {}
        self.bottleneck_dropout: dict[str, float] = {}
        self.bottleneck_scale: dict[str, float] = {}
        """Of the parallel adapters; sequential ones have none."""

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add a freshly initialised adapter under this name."""
        self.bottleneck_down[adapter_name] = nn.Linear(self.out_features, config.bottleneck_size)
        self.bottleneck_up[adapter_name] = nn.Linear(config.bottleneck_size, self.out_features)
        self.bottleneck_activation[adapter_name] = config.activation
        self.bottleneck_dropout[adapter_name] = config.dropout
        if config.placement == "parallel":
            self.bottleneck_scale[adapter_name] = config.scale
        if config.init_weights:
            self.reset_bottleneck_parameters(adapter_name, config.init_std)
        self._settle(adapter_name, config)

    def _settle(self, adapter_name: str, config: BottleneckConfig) -> None:
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_bottleneck_parameters(self, adapter_name: str, init_std: float | None = None) -> None:
        """Initialise an adapter as the identity: the up-projection and the biases are zero.

        Args:
            adapter_name: Which adapter.
            init_std: Standard deviation of the down-projection's weights, or None for Kaiming-uniform.
        """
        down, up = self._projections(adapter_name)
        if init_std is not None:
            nn.init.normal_(down.weight, std=init_std)
        else:
            nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)

    def listen(self, begin: nn.Module) -> None:
        """Remember the input of the layer that begins this layer's sublayer, for parallel adapters.

        A hook, so that `begin` stays what it is and may itself be adapted, now or later, by anything.
        """
        if self._listening is None:
            self._listening = begin.register_forward_pre_hook(self._remember)

    def stop_listening(self) -> None:
        """Undo `listen`."""
        if self._listening is not None:
            self._listening.remove()
        self._listening = self._sublayer_input = None

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the hook with the last parallel one."""
        super().delete_adapter(adapter_name)
        if not self.bottleneck_scale:
            self.stop_listening()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        # Taken, not kept: the activation would live on until the next batch.
        sublayer_input, self._sublayer_input = self._sublayer_input, None
        if self.disable_adapters:
            return y
        for adapter_name in self.active_adapters:
            y = self._adapt(adapter_name, x, y, sublayer_input)
        return y

    def _remember(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self.disable_adapters:
            self._sublayer_input = inputs[0]

    def _adapt(self, adapter_name: str, x: Tensor, y: Tensor, sublayer_input: Tensor | None) -> Tensor:
        # An adapter whose configuration targets other layers is active on the model, but absent here.
        if adapter_name not in self.bottleneck_down:
            return y
        scale = self.bottleneck_scale.get(adapter_name)
        if scale is None:
            return (y + self._change(adapter_name, y)).to(y.dtype)
        if sublayer_input is None:
            raise RuntimeError("A parallel adapter was called without the layer that begins its sublayer.")
        return (y + scale * self._change(adapter_name, sublayer_input)).to(y.dtype)

    def _change(self, adapter_name: str, x: Tensor) -> Tensor:
        down, up = self._projections(adapter_name)
        hidden = self._cast_input_dtype(x, down.weight.dtype)
        hidden = F.dropout(hidden, self.bottleneck_dropout[adapter_name], training=self.training)
        change: Tensor = up(ACTIVATIONS[self.bottleneck_activation[adapter_name]](down(hidden)))
        return change

    def _projections(self, adapter_name: str) -> tuple[nn.Linear, nn.Linear]:
        down, up = self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name]
        assert isinstance(down, nn.Linear)
        assert isinstance(up, nn.Linear)
        return down, up

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible: always raises ValueError."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """There is never anything to undo."""
        warnings.warn("Bottleneck adapters are never merged. Nothing to do.", stacklevel=2)


def _features(layer: nn.Module) -> tuple[int, int]:
    # The weight's shape would not do: that of a quantised layer is packed.
    found = features(layer)
    if found is None:
        raise ValueError(
            f"A bottleneck adapter needs a linear layer, and {type(layer).__name__} is none. Let `target_modules` "
            "name the linear projections that end the sublayers to adapt."
        )
    return found
