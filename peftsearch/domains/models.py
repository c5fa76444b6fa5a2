"""What the data needs to know of a base model: its configuration, and what kind of transformer it is."""

from __future__ import annotations

from typing import Any, Literal

from peftsearch.spec import StudyError

Architecture = Literal["encoder", "encoder-decoder", "decoder"]


def model_config(location: str, revision: str | None, **kwargs: Any) -> Any:
    """A model's configuration.

    Args:
        location: Folder or Hub id.
        revision: Hub revision.
        kwargs: Fields of the configuration to set.

    Raises:
        StudyError: There is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(location, revision=revision, **kwargs)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, hub errors, JSON errors, ...
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StudyError(
            f"cannot load the model {location!r}: {reason} (name a folder with config.json and model.safetensors, "
            "package:NAME/FOLDER, or a Hub id that this machine can reach)"
        ) from None


def architecture_of(config: Any) -> Architecture:
    """What kind of transformer a configuration describes.

    A model that `transformers` can train to fill in masks is an encoder, although most of these also exist as a (hardly
    used) left-to-right variant; other models that continue a text are decoders.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    kind = config.model_type
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "decoder"
    return "encoder"
