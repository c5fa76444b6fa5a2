"""The bottleneck adapter of Houlsby et al. and Pfeiffer et al., as a PEFT method of its own."""

from __future__ import annotations


def register() -> None:
    """Make PEFT know bottleneck adapters, so that `get_peft_model` and `PeftModel.from_pretrained` take them.

    Does what `peft.utils.register_peft_method` does, which refuses names outside PEFT's own `PeftType`. May be called
    any number of times.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from peftsearch.methods.bottleneck.config import PEFT_TYPE, BottleneckConfig
    from peftsearch.methods.bottleneck.model import BottleneckModel

    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = BottleneckConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = BottleneckModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = BottleneckModel.prefix


# The end of `import peft` calls register() through peftsearch's import hook. So register() stands above this line, and
# none of our modules, which derive from PEFT's classes, begins to load before peft is complete.
import peft  # noqa: E402, F401

from peftsearch.methods.bottleneck.config import ACTIVATIONS, PEFT_TYPE, PLACEMENTS, BottleneckConfig  # noqa: E402
from peftsearch.methods.bottleneck.layer import BottleneckLayer  # noqa: E402
from peftsearch.methods.bottleneck.model import SUBLAYER_OUTPUTS, BottleneckModel, target_pattern  # noqa: E402

__all__ = [
    "ACTIVATIONS",
    "PEFT_TYPE",
    "PLACEMENTS",
    "SUBLAYER_OUTPUTS",
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "register",
    "target_pattern",
]
