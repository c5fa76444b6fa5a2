"""The tuner that gives every attention of a model a deep prompt."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from peftsearch.methods.deep_prompt.attention import CHILD, PromptedConfig, heads_and_size, is_attention
from peftsearch.methods.deep_prompt.config import DeepPromptConfig
from peftsearch.methods.deep_prompt.layer import DeepPromptLayer, PrefixEncoder
from peftsearch.methods.module_names import short_names

CANNOT_MERGE = "A prompt cannot be merged into the base weights; call `unload()` to get the base model back."


class DeepPromptModel(BaseTuner):  # type: ignore[misc]
    """A model with trained keys and values in front of those of every attention (Li and Liang 2021,
    arXiv:2101.00190; Liu et al. 2022, arXiv:2110.07602): self-attention and cross-attention, of encoder and decoder.

    No module is replaced: an attention module gets its prompt as a child. Built by `peft.get_peft_model` and
    `peft.PeftModel.from_pretrained`.
    """

    prefix = "deep_prompt_"
    tuner_layer_cls = DeepPromptLayer
    uses_shared_state = True

    @staticmethod
    def _prepare_adapter_config(peft_config: DeepPromptConfig, model_config: dict[str, Any]) -> DeepPromptConfig:
        # The attention modules are looked for in the model, see _prepare_model.
        return peft_config

    def _prepare_model(self, peft_config: DeepPromptConfig, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            paths = [path for path, module in model.named_modules() if is_attention(module)]
            if not paths:
                raise ValueError(
                    f"{type(model).__name__} cannot have deep prompts: none of its modules uses transformers' "
                    "attention interface"
                )
            peft_config.target_modules = short_names(model, paths)

    def _create_and_replace(
        self,
        peft_config: DeepPromptConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = getattr(target, CHILD, None)
        if layer is None:
            if not is_attention(target):
                raise ValueError(f"{current_key} cannot have a deep prompt: {type(target).__name__} is no attention")
            layer = DeepPromptLayer(*heads_and_size(target), next(target.parameters()).device)
            target.add_module(CHILD, layer)
            target.config = PromptedConfig(target.config)  # type: ignore[assignment]
        layer.update_layer(adapter_name, peft_config, self._encoder(peft_config, adapter_name, layer))
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _encoder(self, config: DeepPromptConfig, adapter_name: str, layer: DeepPromptLayer) -> PrefixEncoder | None:
        if not config.projection or config.folded:
            return None
        if not hasattr(self, "deep_prompt_encoder"):
            self.deep_prompt_encoder = nn.ModuleDict()
        if adapter_name not in self.deep_prompt_encoder:
            width = self.model.config.hidden_size
            self.deep_prompt_encoder[adapter_name] = PrefixEncoder(config, width, layer.device)
        encoder = self.deep_prompt_encoder[adapter_name]
        assert isinstance(encoder, PrefixEncoder)
        return encoder

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: DeepPromptConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What is saved: keys and values, with the projection computed away."""
        found = {}
        for path, module in model.named_modules():
            if isinstance(module, DeepPromptLayer) and module.has(adapter_name):
                for part, tensor in zip(("key", "value"), module.prompt(adapter_name), strict=True):
                    found[f"{path}.deep_prompt_{part}.{adapter_name}"] = tensor.detach().contiguous()
        return found

    def unload(self) -> nn.Module:
        """Take all prompts out again, and give back the base model."""
        for module in self.model.modules():
            if isinstance(getattr(module, CHILD, None), DeepPromptLayer):
                delattr(module, CHILD)
                module.config = module.config.prompted_config
        base: nn.Module = super().unload()
        return base

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)
