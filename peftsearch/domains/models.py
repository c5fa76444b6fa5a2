"""What the data needs to know of a base model: its configuration, and what kind of transformer it is."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftsearch.domains.hub import hub_reachable, out_of_reach
from peftsearch.spec import StudyError, UnreachableError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Architecture = Literal["encoder", "encoder-decoder", "decoder"]


def model_config(location: str, revision: str | None, *, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """A model's configuration.

    Args:
        location: Folder or Hub id.
        revision: Hub revision.
        trust_remote_code: Whether code that the model brings along may run.
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
        # Said in so many words: left out, transformers asks on the terminal.
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code, **kwargs)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, hub errors, JSON errors, ...
        if needs_custom_code(error):
            raise StudyError(custom_code_refused(location)) from None
        why = out_of_reach(error) if on_hub else None
        reason = why or first_line(error)
        message = (
            f"cannot load the model {location!r}: {reason} (name a folder with config.json and model.safetensors, "
            "package:NAME/FOLDER, or a Hub id that this machine can reach)"
        )
        raise (UnreachableError(message, (), why) if why else StudyError(message)) from None
    if not trust_remote_code and "/" in str(attention := getattr(config, "_attn_implementation", None)):
        # A configuration may name a kernel on the Hub (transformers.integrations.hub_kernels): compiled code.
        raise StudyError(
            f"the model {location!r} asks for the attention kernel {attention!r} of the Hub, which is code that is not "
            "run: take 'attn_implementation' out of its config.json, or trust the model (trust_remote_code)"
        )
    return config


def model_commit(location: str, revision: str | None) -> str | None:
    """The commit that a revision of a Hub model is, once its configuration has been read; None for a folder."""
    if Path(location).is_dir():
        return None
    from huggingface_hub import hf_hub_download

    try:
        # .../snapshots/COMMIT/config.json, in the cache that the configuration was read into.
        commit = Path(hf_hub_download(location, "config.json", revision=revision)).parent.name
    except Exception:  # hub errors, network errors: a model is as good without
        return None
    return commit if is_commit(commit) else None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit's hash, which stays what it is."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def needs_custom_code(error: BaseException) -> bool:
    """Whether `transformers` refused to run code that a model brings along.

    It raises a plain ValueError for that (`transformers.dynamic_module_utils.resolve_trust_remote_code`).
    """
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def custom_code_refused(location: str) -> str:
    """The sentence about such a model."""
    return (
        f"the model {location!r} needs Python code that it brings along, which is not run: read the code, and then "
        "write {path: ..., trust_remote_code: true} as the model, at a pinned revision"
    )


def architecture_of(config: Any) -> Architecture:
    """What kind of transformer a configuration describes.

    A model that `transformers` can train to fill in masks is an encoder, although most of these also exist as a (hardly
    used) left-to-right variant; other models that continue a text are decoders.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    kind = config.model_type
    if kind not in CONFIG_MAPPING_NAMES and "AutoModelForMaskedLM" not in (auto_map := _auto_map(config)):
        # An architecture that brings its own code says which classes it has.
        return "decoder" if "AutoModelForCausalLM" in auto_map else "encoder"
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "decoder"
    return "encoder"


def has_relative_positions(config: Any) -> bool:
    """Whether a model takes texts of any length: T5 and its kin know how far words are apart, and not where they stand.

    Their tokenizers say 512 all the same, which is what T5 was pretrained with (Raffel et al. 2020, arXiv:1910.10683);
    Flan-T5 is fine-tuned on longer texts.
    """
    return getattr(config, "relative_attention_num_buckets", None) is not None


def positions_of(model: PreTrainedModel) -> int | None:
    """How many positions a model has embeddings for; None where positions are computed."""
    from torch import nn

    # GPT-2 and its kin call their table wpe.
    tables = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in path or path.split(".")[-1] == "wpe")
    ]
    # RoBERTa's positions begin after that of the padding.
    sizes = [table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1) for table in tables]
    said = getattr(model.config, "max_position_embeddings", None)
    return min(sizes if said is None else [*sizes, said]) if sizes else None


def positions_said(config: Any) -> tuple[int | None, int | None]:
    """As `positions_of`, of the model that a configuration describes: of its encoder (or only stack) and its decoder.

    None where positions are computed, and for models that `transformers` cannot build without their own code.
    """
    # One that sees as well as reads has tables for images, too.
    config = config if getattr(config, "is_encoder_decoder", False) else config.get_text_config()
    kind: Any = type(config)
    return _positions_said(kind, config.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=64)
def _positions_said(kind: type[Any], written: str) -> tuple[int | None, int | None]:
    """Built on the meta device: a tenth of a second to a second for the largest models, once."""
    import torch
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            # Unless told, `transformers` asks on the terminal whether to run a model's own code.
            model = AutoModel.from_config(kind.from_dict(json.loads(written)), trust_remote_code=False)
    except Exception:  # what cannot be built is refused where it is built for good, with its reason
        return None, None
    if not getattr(model.config, "is_encoder_decoder", False):
        return positions_of(model), None
    return positions_of(model.get_encoder()), positions_of(model.get_decoder())


def _auto_map(config: Any) -> Mapping[str, Any]:
    written = getattr(config, "auto_map", None)
    return written if isinstance(written, Mapping) else {}
