"""The tuner that puts bottleneck adapters into a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from peftsearch.methods.bottleneck.config import PLACEMENTS, BottleneckConfig
from peftsearch.methods.bottleneck.layer import CANNOT_MERGE, BottleneckLayer
from peftsearch.methods.sublayers import feed_forward_input, find_sublayers, name_pattern


def target_pattern(model: nn.Module, placement: str) -> str:
    """The regular expression for the full names of the modules that a placement adapts.

    Args:
        model: A transformer.
        placement: A key of `PLACEMENTS`.

    Raises:
        ValueError: It is not clear where the model's sublayers end.
    """
    sublayers = find_sublayers(model)
    ends = {"attention": sublayers.attention_ends, "feed_forward": sublayers.feed_forward_ends}
    names: list[str] = []
    for sublayer in PLACEMENTS[placement]:
        if not ends[sublayer]:
            raise ValueError(
                f"Where the {sublayer.replace('_', '-')} sublayers of {type(model).__name__} end is not clear. Set "
                "`target_modules` to the names of the linear layers to adapt, for example ['self_attn.o_proj', "
                "'mlp.down_proj']."
            )
        names += ends[sublayer]
    return name_pattern(sublayers, names)


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """A model with bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021,
    arXiv:2005.00247; He et al. 2022, arXiv:2110.04366).

    Every targeted linear layer becomes a `BottleneckLayer`; the base's own parameters are frozen and never written to.
    Several adapters may be attached under different names; several active ones act one after another, in the order
    given to `set_adapter`. Built by `peft.get_peft_model` and `peft.PeftModel.from_pretrained`.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    @staticmethod
    def _prepare_adapter_config(peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:
        # PEFT would look the targets up in its tables; `_prepare_model` finds them in the model.
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = target_pattern(model, peft_config.placement)

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        begin = None
        if peft_config.placement == "parallel" and self._adapts_sublayer(peft_config, current_key):
            try:
                begin = self.model.get_submodule(feed_forward_input(self.model, current_key))
            except ValueError as error:
                raise ValueError(f"{current_key} cannot have a parallel adapter. {error}") from error
        layer = target
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config, **self._parts(peft_config, current_key))
        elif isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{current_key} cannot be adapted: nn.MultiheadAttention reads its weights without calling it."
            )
        else:
            try:
                layer = self.tuner_layer_cls(target, adapter_name, peft_config, **self._parts(peft_config, current_key))
            except ValueError as error:
                raise ValueError(f"{current_key} cannot be adapted. {error}") from error
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        if begin is not None:
            assert isinstance(layer, BottleneckLayer)
            layer.listen(begin.get_base_layer() if isinstance(begin, BaseTunerLayer) else begin)

    def _adapts_sublayer(self, peft_config: BottleneckConfig, key: str) -> bool:
        """Whether a targeted layer gets a bottleneck adapter."""
        return True

    def _parts(self, peft_config: BottleneckConfig, key: str) -> dict[str, bool]:
        """What a targeted layer gets, as `tuner_layer_cls` takes it."""
        return {}

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the only active one, the first of the others by name becomes active.

        Raises:
            ValueError: There is no such adapter.
        """
        was_active = adapter_name in self.active_adapters
        others = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:
            # PEFT lets every layer choose for itself, and layers choose differently if the adapters' targets differ.
            active = others or [min(self.peft_config)]
            self.set_adapter(active, inference_mode=self.peft_config[active[0]].inference_mode)

    def unload(self) -> nn.Module:
        """Take all adapters out again, and give back the base model exactly as it came.

        That includes the base's own task head: PEFT would leave the trained copies of `modules_to_save` in its place
        (and fails where such a module, a pooler for example, has no weight of its own).
        """
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.original_module)
            elif isinstance(module, BottleneckLayer):
                module.stop_listening()
        base: nn.Module = super().unload()
        return base

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # Without this check PEFT would drop `adapter_names` and run the active adapter on the whole batch.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "Bottleneck adapters do not support `adapter_names`, a batch with a different adapter for each sample. "
                "Choose one with `set_adapter` and run a batch for each adapter."
            )
        yield
