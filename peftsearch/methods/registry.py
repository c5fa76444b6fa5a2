"""The methods by name: an explicit list, so that a reader sees what there is."""

from __future__ import annotations

from collections.abc import Mapping

from peftsearch.methods.adapter import BottleneckAdapter
from peftsearch.methods.base import Method, MethodSpace
from peftsearch.methods.bitfit import BitFit
from peftsearch.methods.full import FullFineTuning
from peftsearch.methods.hybrid import Hybrid
from peftsearch.methods.ia3 import IA3
from peftsearch.methods.layer_norm import LayerNormTuning
from peftsearch.methods.lora import Lora
from peftsearch.methods.p_tuning import PTuning
from peftsearch.methods.p_tuning_v2 import PTuningV2
from peftsearch.methods.prefix import PrefixTuning
from peftsearch.methods.prompt import PromptTuning
from peftsearch.methods.qlora import QLora
from peftsearch.spec import Space, StudyError, suggest

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Lora(),
        QLora(),
        BottleneckAdapter(),
        Hybrid(),
        PromptTuning(),
        PrefixTuning(),
        PTuning(),
        PTuningV2(),
        IA3(),
        BitFit(),
        LayerNormTuning(),
        FullFineTuning(),
    )
}


def method_space(name: str, written: Mapping[str, Space]) -> MethodSpace:
    """A method with its search space as a study file writes it, defaults filled in.

    Raises:
        StudyError: An unknown method or hyperparameter, or a value out of bounds.
    """
    method = METHODS.get(name)
    if method is None:
        raise StudyError(f"unknown method {name!r}{suggest(name, METHODS)}", ("methods", name))
    for key in written:
        if key not in method.hyperparameters:
            raise StudyError(
                f"{name} has no hyperparameter {key!r}{suggest(key, method.hyperparameters)}", ("methods", name, key)
            )
    space = {
        key: hyperparameter.check(written.get(key, hyperparameter.space), ("methods", name, key))
        for key, hyperparameter in method.hyperparameters.items()
    }
    return MethodSpace(method, space)
