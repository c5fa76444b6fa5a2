"""What the data needs to know of a base model: its configuration, and what kind of transformer it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from peftsearch.domains.hub import hub_reachable, out_of_reach
from peftsearch.spec import StudyError, UnreachableError

Architecture = Literal["encoder", "encoder-decoder", "decoder"]


def model_config(location: str, revision: str | None, **kwargs: Any) -> Any:
    """A model's configuration.

    Args:
        location: Folder or Hub id.
        revision: Hub revision.
        kwargs: Fields of the configuration to set.

    Raises:
        UnreachableError: It is a model of the Hub that cannot be read here.
        StudyError: There is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    on_hub = not Path(location).is_dir()
    if on_hub:
        hub_reachable()
    try:
        return AutoConfig.from_pretrained(location, revision=revision, **kwargs)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, hub errors, JSON errors, ...
        why = out_of_reach(error) if on_hub else None
        reason = why or (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = (
            f"cannot load the model {location!r}: {reason} (name a folder with config.json and model.safetensors, "
            "package:NAME/FOLDER, or a Hub id that this machine can reach)"
        )
        raise (UnreachableError(message, (), why) if why else StudyError(message)) from None


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
