"""What a trial's model adds to the frozen base, read from its modules: low-rank updates, bottlenecks, soft tokens and
modules of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peftsearch.methods.bottleneck.hybrid import HybridLayer
from peftsearch.methods.bottleneck.layer import BottleneckLayer
from peftsearch.methods.soft_prompt.layer import SoftPromptLayer

if TYPE_CHECKING:
    from peft import PeftModel

    from peftsearch.training.session import TrialSession

ADAPTER = "default"
"""Name that PEFT gives to the only adapter of a model."""


class NotPackableError(RuntimeError):
    """A trial, or these trials together, can only be trained alone; nothing is wrong with them.

    Attributes:
        session: The trial that does not go with any others; None where it is not for one of them.
    """

    session: TrialSession | None = None


@dataclass(frozen=True)
class LowRank:
    """``y + scale * up(down(dropout(x)))``: ``down`` has shape (rank, in), ``up`` (out, rank)."""

    down: Tensor
    up: Tensor
    scale: float
    dropout: float


@dataclass(frozen=True)
class Bottleneck:
    """``y + scale * up(activation(down(dropout(y))))``; of ``x``, the sublayer's input, where it is parallel."""

    down: nn.Linear
    up: nn.Linear
    activation: str
    scale: float
    dropout: float
    parallel: bool


@dataclass(frozen=True)
class Prompt:
    """Soft tokens in front of a stack's text, of shape (tokens, width)."""

    tokens: Tensor
    keep: bool
    """Whether their outputs stay in: an encoder's, for the cross-attention of its decoder."""


@dataclass
class Parts:
    """A trial's change of the base, by path of the changed module in the base."""

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    bottlenecks: dict[str, Bottleneck] = field(default_factory=dict)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    own: dict[str, nn.Module] = field(default_factory=dict)
    """Modules that the trial has instead of the base's: the task head."""
    frozen: dict[str, nn.Parameter] = field(default_factory=dict)
    """The base's own parameters, by their names in the base."""

    def parameters(self) -> Iterator[Tensor]:
        """All that is trained here."""
        for low in self.low_rank.values():
            yield from (low.down, low.up)
        for bottleneck in self.bottlenecks.values():
            yield from (*bottleneck.down.parameters(), *bottleneck.up.parameters())
        for prompt in self.prompts.values():
            yield prompt.tokens
        for module in self.own.values():
            yield from module.parameters()


def read_parts(model: nn.Module) -> Parts:
    """The parts of a trial's model.

    Raises:
        NotPackableError: It trains something else.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        raise NotPackableError(f"{type(model).__name__} is not packed")
    parts = Parts()
    _read("", _base_of(model), parts)
    packed = {id(parameter) for parameter in parts.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in packed:
            raise NotPackableError(f"{name} is not packed")
    return parts


def _base_of(model: PeftModel) -> nn.Module:
    base: nn.Module = model.get_base_model()
    return base


def _read(path: str, module: nn.Module, parts: Parts) -> None:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        parts.own[path] = module.modules_to_save[ADAPTER]
        return
    if isinstance(module, SoftPromptLayer):
        if ADAPTER not in module.soft_prompt_embedding:
            raise NotPackableError(f"{path} computes its soft tokens")
        tokens = module.soft_prompt_embedding[ADAPTER]
        parts.prompts[path.rpartition(".")[0]] = Prompt(tokens, module.keep)
        return
    if isinstance(module, BaseTunerLayer):
        if isinstance(module, LoraLayer):
            parts.low_rank[path] = _lora(path, module)
        elif isinstance(module, BottleneckLayer):
            _bottleneck(path, module, parts)
        else:
            raise NotPackableError(f"{type(module).__name__} is not packed")
        base: Any = module.base_layer
        if isinstance(base, BaseTunerLayer) or any(True for _ in base.children()):
            raise NotPackableError(f"{path} is adapted more than once, or is no single layer")
        _note_frozen(path, base, parts)
        return
    _note_frozen(path, module, parts)
    for name, child in module.named_children():
        _read(f"{path}.{name}" if path else name, child, parts)


def _note_frozen(path: str, module: nn.Module, parts: Parts) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            parts.frozen[f"{path}.{name}" if path else name] = parameter


def _lora(path: str, layer: Any) -> LowRank:
    if ADAPTER not in layer.lora_A or ADAPTER not in layer.lora_B:
        raise NotPackableError(f"{path} has no low-rank update")
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    plain = ADAPTER not in layer.lora_variant and not layer.lora_bias.get(ADAPTER, False) and not layer.merged
    if not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear) and plain):
        raise NotPackableError(f"{path} has no plain low-rank update")
    dropout: Any = layer.lora_dropout[ADAPTER]
    return LowRank(down.weight, up.weight, float(layer.scaling[ADAPTER]), float(getattr(dropout, "p", 0.0)))


def _bottleneck(path: str, layer: BottleneckLayer, parts: Parts) -> None:
    dropout = layer.bottleneck_dropout[ADAPTER]
    if isinstance(layer, HybridLayer) and ADAPTER in layer.bottleneck_lora_A:
        down, up = layer.bottleneck_lora_A[ADAPTER], layer.bottleneck_lora_B[ADAPTER]
        assert isinstance(down, nn.Linear)
        assert isinstance(up, nn.Linear)
        parts.low_rank[path] = LowRank(down.weight, up.weight, layer.bottleneck_lora_scaling[ADAPTER], dropout)
    if ADAPTER in layer.bottleneck_down:
        down, up = layer._projections(ADAPTER)
        scale = layer.bottleneck_scale.get(ADAPTER)
        parts.bottlenecks[path] = Bottleneck(
            down, up, layer.bottleneck_activation[ADAPTER], 1.0 if scale is None else scale, dropout, scale is not None
        )
