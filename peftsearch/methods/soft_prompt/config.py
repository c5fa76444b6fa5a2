"""Configuration of soft prompts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from peft.config import PeftConfig


class SoftPromptType(StrEnum):
    """The method's name in PEFT's mappings and in ``adapter_config.json``."""

    SOFT_PROMPT = "SOFT_PROMPT"


PEFT_TYPE = SoftPromptType.SOFT_PROMPT

ENCODERS = ("none", "mlp", "lstm")


@dataclass
class SoftPromptConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of soft prompts: `num_virtual_tokens` trained embeddings in front of the text, in an
    encoder-decoder in front of both texts.

    Without encoder these are parameters themselves (prompt tuning, Lester et al. 2021, arXiv:2104.08691). With one
    they are the output of a small network (P-tuning, Liu et al. 2021, arXiv:2103.10385), and only that is saved.

    Raises:
        ValueError: A field has a value that cannot work.
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "Number of soft tokens, at least 1."})
    encoder: str = field(
        default="none", metadata={"help": "The network that computes the soft tokens: none, mlp or lstm."}
    )
    encoder_hidden_size: int = field(default=128, metadata={"help": "Its hidden size, at least 1."})
    folded: bool = field(
        default=False, metadata={"help": "Whether the encoder has been computed away, as in every saved adapter."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the transformer stacks that get soft tokens; None: all of the model's."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of transformer stacks to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of the base model to train in full and save with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name in ("num_virtual_tokens", "encoder_hidden_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, not {self.encoder!r}.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``; what is saved beside it no longer has an encoder."""
        written = copy.copy(self)
        written.folded = True
        super(SoftPromptConfig, written).save_pretrained(save_directory, **kwargs)
