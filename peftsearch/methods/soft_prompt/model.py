"""The tuner that puts soft tokens in front of a model's text."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftsearch.methods.deep_prompt.model import CANNOT_MERGE
from peftsearch.methods.module_names import short_names
from peftsearch.methods.soft_prompt.config import SoftPromptConfig
from peftsearch.methods.soft_prompt.layer import SoftPromptLayer

CHILD = "soft_prompt"


def stacks(model: nn.Module) -> list[str]:
    """Paths of the transformer stacks below a task head: one, or an encoder-decoder's encoder and decoder.

    Raises:
        ValueError: The model has none or more.
    """
    models = {path: module for path, module in model.named_modules() if path and isinstance(module, PreTrainedModel)}
    found = [path for path, module in models.items() if not any(isinstance(m, PreTrainedModel) for m in _below(module))]
    if not 1 <= len(found) <= 2:
        raise ValueError(
            f"{type(model).__name__} cannot have soft prompts: it has {len(found)} transformer stacks, not one or two"
        )
    return found


class SoftPromptModel(BaseTuner):  # type: ignore[misc]
    """A model with soft tokens in front of its text (Lester et al. 2021, arXiv:2104.08691; Liu et al. 2021,
    arXiv:2103.10385).

    No module is replaced: each transformer stack gets its soft tokens as a child. Built by `peft.get_peft_model` and
    `peft.PeftModel.from_pretrained`.
    """

    prefix = "soft_prompt_"
    tuner_layer_cls = SoftPromptLayer

    @staticmethod
    def _prepare_adapter_config(peft_config: SoftPromptConfig, model_config: dict[str, Any]) -> SoftPromptConfig:
        # The stacks are looked for in the model, see _prepare_model.
        return peft_config

    def _prepare_model(self, peft_config: SoftPromptConfig, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = short_names(model, stacks(model))

    def _create_and_replace(
        self,
        peft_config: SoftPromptConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = getattr(target, CHILD, None)
        if layer is None:
            if not isinstance(target, PreTrainedModel):
                raise ValueError(f"{current_key} cannot have soft tokens: it is no transformer stack")
            found = stacks(self.model)
            layer = SoftPromptLayer(target, keep=len(found) == 2 and current_key == found[0])
            target.add_module(CHILD, layer)
        layer.update_layer(adapter_name, peft_config)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SoftPromptConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What is saved: the soft tokens, with the encoder computed away."""
        return {
            f"{path}.soft_prompt_embedding.{adapter_name}": module.prompt(adapter_name).detach().contiguous()
            for path, module in model.named_modules()
            if isinstance(module, SoftPromptLayer) and module.has(adapter_name)
        }

    def unload(self) -> nn.Module:
        """Take all soft tokens out again, and give back the base model."""
        for module in self.model.modules():
            layer = getattr(module, CHILD, None)
            if isinstance(layer, SoftPromptLayer):
                layer.detach_from_stack()
                delattr(module, CHILD)
        base: nn.Module = super().unload()
        return base

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)


def _below(module: nn.Module) -> list[nn.Module]:
    return [other for other in module.modules() if other is not module]
