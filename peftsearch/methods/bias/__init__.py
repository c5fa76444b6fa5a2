"""Trained biases (BitFit), as a PEFT method of our own."""

from __future__ import annotations


def register() -> None:
    """Make PEFT know trained biases, so that `get_peft_model` and `PeftModel.from_pretrained` take them.

    May be called any number of times.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from peftsearch.methods.bias.config import PEFT_TYPE, BiasConfig
    from peftsearch.methods.bias.model import BiasModel

    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = BiasConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = BiasModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = BiasModel.prefix
