"""The soft tokens of one transformer stack, and how they get in front of its text and out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft import PromptEncoder, PromptEncoderConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftsearch.domains.models import positions_of
from peftsearch.methods.soft_prompt.config import SoftPromptConfig


class SoftPromptLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """The soft tokens of a transformer stack: a child of the stack, which it watches with two hooks.

    On the way in, text becomes embeddings with the soft tokens in front, and mask and positions grow with it. On the
    way out, the soft tokens' outputs are cut off again, so that heads see one output for each token of the text; the
    stack's pooler, if it has one, is applied to what is then the first. In generation only the first step inserts soft
    tokens: they stay in the cache.

    Args:
        stack: The stack.
        keep: Leave the soft tokens' outputs in: an encoder's, for the cross-attention of its decoder.
    """

    adapter_layer_names = ("soft_prompt_embedding", "soft_prompt_encoder")

    # PEFT is untyped; these are the parts of BaseTunerLayer that are used here.
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]

    def __init__(self, stack: PreTrainedModel, keep: bool) -> None:
        super().__init__()
        weight = stack.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        self.width, self.device = weight.shape[1], weight.device
        self.keep = keep
        self.positions = positions_of(stack)
        self.soft_prompt_embedding = nn.ParameterDict()
        self.soft_prompt_encoder = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._inserted = 0
        self._hooks = [
            stack.register_forward_pre_hook(self._insert, with_kwargs=True),
            stack.register_forward_hook(self._remove),
        ]

    def update_layer(self, adapter_name: str, config: SoftPromptConfig) -> None:
        """Add a freshly initialised prompt under this name."""
        if config.encoder == "none" or config.folded:
            # The range of Lester et al.
            start = torch.empty(config.num_virtual_tokens, self.width, device=self.device).uniform_(-0.5, 0.5)
            self.soft_prompt_embedding[adapter_name] = nn.Parameter(start)
            return
        described = PromptEncoderConfig(
            num_virtual_tokens=config.num_virtual_tokens,
            token_dim=self.width,
            num_transformer_submodules=1,
            encoder_reparameterization_type=config.encoder.upper(),
            encoder_hidden_size=config.encoder_hidden_size,
        )
        self.soft_prompt_encoder[adapter_name] = PromptEncoder(described).to(self.device)

    def has(self, adapter_name: str) -> bool:
        """Whether there is a prompt under this name."""
        return adapter_name in self.soft_prompt_embedding or adapter_name in self.soft_prompt_encoder

    def prompt(self, adapter_name: str) -> Tensor:
        """The soft tokens of one prompt, of shape (tokens, width)."""
        if adapter_name in self.soft_prompt_embedding:
            embedding: Tensor = self.soft_prompt_embedding[adapter_name]
            return embedding
        encoder: Any = self.soft_prompt_encoder[adapter_name]
        tokens = encoder.total_virtual_tokens
        if encoder.embedding.weight.is_meta:
            # Not every encoder can be computed without data, and the shape is all that is known there.
            return torch.empty(tokens, self.width, device="meta")
        output: Tensor = encoder(torch.arange(tokens, device=encoder.embedding.weight.device)[None])
        return output[0]

    def forward(self) -> Tensor | None:
        """The soft tokens of the active prompts, of shape (tokens, width); None where there are none."""
        prompts = [self.prompt(name) for name in self.active_adapters if self.has(name)]
        return torch.cat(prompts) if prompts and not self.disable_adapters else None

    def detach_from_stack(self) -> None:
        """Stop watching the stack."""
        for hook in self._hooks:
            hook.remove()

    def _insert(
        self, stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._inserted = 0
        kwargs = dict(zip(inspect.signature(stack.forward).parameters, args, strict=False)) | kwargs
        _fit_cross_attention(kwargs)
        prompt = self()
        if prompt is None:
            return (), kwargs
        tokens = len(prompt)
        if _cached(kwargs.get("past_key_values")) == 0:
            text = kwargs.get("inputs_embeds")
            if text is None:
                text = stack.get_input_embeddings()(kwargs["input_ids"])
            check_length(tokens, text.shape[1], self.positions)
            kwargs["input_ids"] = None
            kwargs["inputs_embeds"] = torch.cat([prompt.to(text.dtype).expand(len(text), -1, -1), text], dim=1)
            if kwargs.get("token_type_ids") is not None:
                kwargs["token_type_ids"] = _in_front(kwargs["token_type_ids"], tokens, 0)
            if kwargs.get("position_ids") is not None:
                given = kwargs["position_ids"]
                first = torch.arange(tokens, device=given.device, dtype=given.dtype).expand(len(given), -1)
                kwargs["position_ids"] = torch.cat([first, given + tokens], dim=1)
            self._inserted = tokens
        elif kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + tokens
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise ValueError("soft prompts need attention masks of shape (batch, tokens)")
            kwargs["attention_mask"] = _in_front(mask, tokens, 1)
        return (), kwargs

    def _remove(self, stack: PreTrainedModel, args: tuple[Any, ...], output: Any) -> Any:
        if self.keep or not self._inserted:
            return output
        hidden = output[0][:, self._inserted :]
        if isinstance(output, tuple):
            pooled = pooled_again(stack, hidden, output[1] if len(output) > 1 else None)
            return (hidden, *output[1:]) if pooled is None else (hidden, pooled, *output[2:])
        output.last_hidden_state = hidden
        pooled = pooled_again(stack, hidden, output.get("pooler_output"))
        if pooled is not None:
            output.pooler_output = pooled
        return output


def check_length(tokens: int, text: int, positions: int | None) -> None:
    """Refuse a text that soft tokens leave no room for: on a GPU, an index out of range would end the process.

    Raises:
        ValueError: There are too few positions.
    """
    if positions is not None and tokens + text > positions:
        raise ValueError(
            f"{tokens} soft tokens and a text of {text} tokens exceed the model's {positions} positions: "
            "lower max_length or the number of soft tokens"
        )


def pooled_again(stack: PreTrainedModel, hidden: Tensor, pooled: Any) -> Tensor | None:
    """The pooler's output without soft tokens, which pooled the first of them; None for a stack without pooler.

    A pooler that is but one layer of the pooling (as in ALBERT) cannot be asked again: there the first soft token's
    output serves for the whole text, as in PEFT's prompt tuning.
    """
    pooler: Any = getattr(stack, "pooler", None)
    if pooler is None or not isinstance(pooled, Tensor):
        return None
    again: Tensor = pooler(hidden)
    return again if again.shape == pooled.shape else None


def _cached(cache: Any) -> int:
    """Number of tokens in a key-value cache."""
    return int(cache.get_seq_length()) if cache is not None else 0


def _in_front(tensor: Tensor, columns: int, value: int) -> Tensor:
    return torch.cat([tensor.new_full((len(tensor), columns), value), tensor], dim=1)


def _fit_cross_attention(kwargs: dict[str, Any]) -> None:
    """Widen the encoder's mask to the encoder's output, which the encoder's soft tokens have made longer."""
    hidden, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
    if hidden is not None and mask is not None and hidden.shape[1] > mask.shape[1]:
        kwargs["encoder_attention_mask"] = _in_front(mask, hidden.shape[1] - mask.shape[1], 1)
