"""Configuration of deep prompts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from peft.config import PeftConfig


class DeepPromptType(StrEnum):
    """The method's name in PEFT's mappings and in ``adapter_config.json``."""

    DEEP_PROMPT = "DEEP_PROMPT"


PEFT_TYPE = DeepPromptType.DEEP_PROMPT


@dataclass
class DeepPromptConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of deep prompts: `num_virtual_tokens` trained keys and values in front of every attention.

    Without projection these are parameters themselves (P-tuning v2, Liu et al. 2022, arXiv:2110.07602). With it they
    are computed from a small matrix by a two-layer MLP (prefix tuning, Li and Liang 2021, arXiv:2101.00190), which
    trains more stably; only the keys and values that come out are saved.

    Raises:
        ValueError: A field has a value that cannot work.
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "Keys and values per attention, at least 1."})
    projection: bool = field(
        default=False, metadata={"help": "Whether a two-layer MLP, shared by all layers, computes keys and values."}
    )
    projection_size: int = field(default=512, metadata={"help": "Hidden size of that MLP, at least 1."})
    init_std: float = field(
        default=0.02,
        metadata={"help": "Standard deviation of the keys and values at the start, where there is no projection."},
    )
    folded: bool = field(
        default=False,
        metadata={"help": "Whether the projection has been computed away, as it is in every saved adapter."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names (or ends of names) of the attention modules; None: every attention of the model."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or ends of names) of attention modules to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of the base model to train in full and save with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name in ("num_virtual_tokens", "projection_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``; what is saved beside it no longer has a projection."""
        written = copy.copy(self)
        written.folded = True
        super(DeepPromptConfig, written).save_pretrained(save_directory, **kwargs)
