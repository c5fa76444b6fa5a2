"""The part of a deep prompt that belongs to one attention module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peftsearch.methods.deep_prompt.config import DeepPromptConfig


class PrefixEncoder(nn.Module):
    """The first half of the projection, shared by all attention modules: ``tanh(W P + b)``.

    Args:
        config: Number of tokens, and the hidden size.
        width: Width of the small matrix P, of shape (tokens, width).
        device: Where the parameters live.
    """

    def __init__(self, config: DeepPromptConfig, width: int, device: torch.device) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(config.num_virtual_tokens, width, device=device))
        self.hidden = nn.Linear(width, config.projection_size, device=device)

    def forward(self) -> Tensor:
        """The hidden layer, of shape (tokens, hidden size)."""
        hidden: Tensor = self.hidden(self.embedding)
        return torch.tanh(hidden)


class DeepPromptLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """Keys and values of the prompts of one attention module, as parameters or as a projection's output.

    Args:
        heads: Number of key-value heads.
        size: Size of a head.
        device: Where the parameters live.
    """

    adapter_layer_names = ("deep_prompt_key", "deep_prompt_value", "deep_prompt_projection")

    # PEFT is untyped; these are the parts of BaseTunerLayer that are used here.
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]

    def __init__(self, heads: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.heads, self.size, self.device = heads, size, device
        self.deep_prompt_key = nn.ParameterDict()
        self.deep_prompt_value = nn.ParameterDict()
        self.deep_prompt_projection = nn.ModuleDict()
        # Plain references: the encoders belong to the whole model.
        self.encoders: dict[str, PrefixEncoder] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []

    def update_layer(self, adapter_name: str, config: DeepPromptConfig, encoder: PrefixEncoder | None) -> None:
        """Add a freshly initialised prompt under this name; with an encoder, as a projection of its output."""
        if encoder is not None:
            self.encoders[adapter_name] = encoder
            self.deep_prompt_projection[adapter_name] = nn.Linear(
                config.projection_size, 2 * self.heads * self.size, device=self.device
            )
        else:
            for part in (self.deep_prompt_key, self.deep_prompt_value):
                start = torch.randn(self.heads, config.num_virtual_tokens, self.size, device=self.device)
                part[adapter_name] = nn.Parameter(start * config.init_std)

    def forward(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the active prompts, each of shape (heads, tokens, size); None where there are none."""
        if self.disable_adapters:
            return None
        prompts = [self.prompt(name) for name in self.active_adapters if self.has(name)]
        if not prompts:
            return None
        keys, values = zip(*prompts, strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def has(self, adapter_name: str) -> bool:
        """Whether there is a prompt under this name."""
        return adapter_name in self.deep_prompt_key or adapter_name in self.deep_prompt_projection

    def prompt(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Keys and values of one prompt, each of shape (heads, tokens, size)."""
        if adapter_name in self.deep_prompt_key:
            return self.deep_prompt_key[adapter_name], self.deep_prompt_value[adapter_name]
        projected: Tensor = self.deep_prompt_projection[adapter_name](self.encoders[adapter_name]())
        key, value = projected.view(-1, 2, self.heads, self.size).permute(1, 2, 0, 3)
        return key, value
