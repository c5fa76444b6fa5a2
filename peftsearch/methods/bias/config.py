"""Configuration of trained biases."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from peft.config import PeftConfig


class BiasType(StrEnum):
    """The method's name in PEFT's mappings and in ``adapter_config.json``."""

    BITFIT = "BITFIT"


PEFT_TYPE = BiasType.BITFIT


@dataclass
class BiasConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): the biases of chosen layers are trained.

    What is trained and saved is each bias's difference from the base model's, which starts at zero: the base's own
    biases are never written to.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names (or ends of names) of layers with a bias; None: all of the model's."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or ends of names) of layers to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of the base model to train in full and save with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
