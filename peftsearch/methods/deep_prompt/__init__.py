"""Trained keys and values in front of every attention (prefix tuning, P-tuning v2), as a PEFT method of our own.

PEFT's prefix tuning hands its prefixes over as a key-value cache, which encoders of `transformers` 5 no longer take.
"""

from __future__ import annotations


def register() -> None:
    """Make PEFT know deep prompts, so that `get_peft_model` and `PeftModel.from_pretrained` take them.

    May be called any number of times.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from peftsearch.methods.deep_prompt.config import PEFT_TYPE, DeepPromptConfig
    from peftsearch.methods.deep_prompt.model import DeepPromptModel

    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = DeepPromptConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = DeepPromptModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = DeepPromptModel.prefix
