"""The tuner that puts bottleneck adapters into a model, and its knowledge of architectures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import nn

from peftsearch.methods.bottleneck.config import PLACEMENTS, BottleneckConfig
from peftsearch.methods.bottleneck.layer import CANNOT_MERGE, BottleneckLayer


class SublayerOutputs(NamedTuple):
    """Regular expressions for the ends of the names of the linear layers that end a block's sublayers."""

    attention: str
    feed_forward: str


# "output.dense" alone would match "attention.output.dense" too, hence the number of the layer before it.
_BERT = SublayerOutputs(r"(cross)?attention\.output\.dense", r"layer\.\d+\.output\.dense")
_T5 = SublayerOutputs(r"(SelfAttention|EncDecAttention)\.o", r"DenseReluDense\.wo")
_BART = SublayerOutputs(r"(self_attn|encoder_attn)\.out_proj", r"layers\.\d+\.fc2")
_LLAMA = SublayerOutputs(r"self_attn\.o_proj", r"mlp\.down_proj")

SUBLAYER_OUTPUTS: dict[str, SublayerOutputs] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "xlm-roberta-xl": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "deberta": _BERT,
    "deberta-v2": _BERT,
    "mpnet": SublayerOutputs(r"attention\.attn\.o", _BERT.feed_forward),
    "distilbert": SublayerOutputs(r"attention\.out_lin", r"ffn\.lin2"),
    "modernbert": SublayerOutputs(r"attn\.Wo", r"mlp\.Wo"),
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "bart": _BART,
    "mbart": _BART,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "smollm3": _LLAMA,
    "phi3": _LLAMA,
    "glm": _LLAMA,
    "glm4": _LLAMA,
    "chatglm": SublayerOutputs(r"self_attention\.dense", r"mlp\.dense_4h_to_h"),
    "gpt2": SublayerOutputs(r"(attn|crossattention)\.c_proj", r"mlp\.c_proj"),
    "gpt_neox": SublayerOutputs(r"attention\.dense", r"mlp\.dense_4h_to_h"),
    "opt": SublayerOutputs(r"self_attn\.out_proj", r"layers\.\d+\.fc2"),
    "phi": SublayerOutputs(r"self_attn\.dense", r"mlp\.fc2"),
}
"""``model_type`` of a `transformers` configuration -> where its sublayers end."""


def target_pattern(model_type: str | None, placement: str) -> str:
    """The regular expression for the full names of the modules that a placement adapts.

    Args:
        model_type: As in the `transformers` configuration, for example ``bert``; None where the model has none.
        placement: A key of `PLACEMENTS`.

    Raises:
        ValueError: The architecture is not known.
    """
    outputs = SUBLAYER_OUTPUTS.get(model_type or "")
    if outputs is None:
        raise ValueError(
            f"Where the sublayers of the architecture {model_type!r} end is not known. Set `target_modules` to the "
            "names of the linear layers to adapt, for example ['self_attn.o_proj', 'mlp.down_proj']. "
            f"Known architectures: {', '.join(SUBLAYER_OUTPUTS)}."
        )
    return rf"(.*\.)?({'|'.join(getattr(outputs, sublayer) for sublayer in PLACEMENTS[placement])})"


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """A model with bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021,
    arXiv:2005.00247).

    Every targeted linear layer becomes a `BottleneckLayer`; the base's own parameters are frozen and never written to.
    Several adapters may be attached under different names; several active ones act one after another, in the order
    given to `set_adapter`. Built by `peft.get_peft_model` and `peft.PeftModel.from_pretrained`.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    @staticmethod
    def _prepare_adapter_config(peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = target_pattern(model_config.get("model_type"), peft_config.placement)
        return peft_config

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
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{current_key} cannot be adapted: nn.MultiheadAttention reads its weights without calling it."
            )
        try:
            layer = BottleneckLayer(target, adapter_name, peft_config)
        except ValueError as error:
            raise ValueError(f"{current_key} cannot be adapted. {error}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

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

        That includes the base's own task head: PEFT would leave the trained copies of `modules_to_save` in its place.
        """
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.set_adapter([])
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
