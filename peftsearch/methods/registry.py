"""The methods by name: an explicit list, so that a reader sees what there is."""

from __future__ import annotations

from collections.abc import Mapping

from peftsearch.methods.adapter import BottleneckAdapter
from peftsearch.methods.base import Method, MethodSpace
from peftsearch.methods.full import FullFineTuning
from peftsearch.methods.lora import Lora
from peftsearch.methods.prompt import PromptTuning
from peftsearch.spec import Space, StudyError, suggest

METHODS: dict[str, Method] = {
    method.name: method for method in (Lora(), BottleneckAdapter(), PromptTuning(), FullFineTuning())
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
