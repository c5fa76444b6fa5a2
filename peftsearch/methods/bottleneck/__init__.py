"""Bottleneck adapters (Houlsby et al., Pfeiffer et al., He et al.) and their hybrid with LoRA, as PEFT methods."""

from __future__ import annotations


def register() -> None:
    """Make PEFT know both, so that `get_peft_model` and `PeftModel.from_pretrained` take them.

    Does what `peft.utils.register_peft_method` does, which refuses names outside PEFT's own `PeftType`. May be called
    any number of times.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from peftsearch.methods.bottleneck.config import PEFT_TYPE, BottleneckConfig
    from peftsearch.methods.bottleneck.hybrid import HYBRID_TYPE, HybridConfig, HybridModel
    from peftsearch.methods.bottleneck.model import BottleneckModel

    for peft_type, config, model in (
        (PEFT_TYPE, BottleneckConfig, BottleneckModel),
        (HYBRID_TYPE, HybridConfig, HybridModel),
    ):
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model
        PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model.prefix


# The end of `import peft` calls register() through peftsearch's import hook. So register() stands above this line, and
# none of our modules, which derive from PEFT's classes, begins to load before peft is complete.
import peft  # noqa: E402, F401

from peftsearch.methods.bottleneck.config import ACTIVATIONS, PEFT_TYPE, PLACEMENTS, BottleneckConfig  # noqa: E402
from peftsearch.methods.bottleneck.hybrid import HYBRID_TYPE, HybridConfig, HybridLayer, HybridModel  # noqa: E402
from peftsearch.methods.bottleneck.layer import BottleneckLayer  # noqa: E402
from peftsearch.methods.bottleneck.model import BottleneckModel, target_pattern  # noqa: E402

__all__ = [
    "ACTIVATIONS",
    "HYBRID_TYPE",
    "PEFT_TYPE",
    "PLACEMENTS",
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "HybridConfig",
    "HybridLayer",
    "HybridModel",
    "register",
    "target_pattern",
]
