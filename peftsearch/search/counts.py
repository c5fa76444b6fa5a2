"""Trainable parameters of a configuration, before it is trained: built on the meta device, where it costs no memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftsearch.domains import CheckedDomain, Head, PreparedDomain
from peftsearch.methods import METHODS, MethodSpace
from peftsearch.training.segment import ModelPlace


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters, the task head included."""

    trainable: int
    exported: int


class ParameterCounter:
    """Counts for the cells of one study; each structure (rank, targets, ...) is built once.

    Args:
        models: Where each model is.
        domains: The domains, which decide the heads.
    """

    def __init__(self, models: Mapping[str, ModelPlace], domains: Mapping[str, CheckedDomain | PreparedDomain]) -> None:
        self._models = models
        # Only what decides a head: a checked domain holds its whole text.
        self._heads = {name: (domain.task, domain.labels) for name, domain in domains.items()}
        self._bare: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}
        self._counts: dict[tuple[Any, ...], ParameterCount] = {}
        self._configs: dict[str, Any] = {}

    def count(self, model: str, domain: str, space: MethodSpace, hyperparameters: Mapping[str, Any]) -> ParameterCount:
        """Parameters of one configuration.

        Raises:
            ValueError: The configuration does not fit the model.
        """
        kind, fresh = self._head_key(model, domain)[:3], self._fresh(model, domain)
        key = (kind, space.method.name, space.structure(hyperparameters))
        if key not in self._counts:
            built = self._build(model, domain, space.method.name, hyperparameters)
            self._counts[key] = ParameterCount(built.trainable - fresh, built.exported - fresh)
        # Every method trains and exports a head whole: heads of one kind differ by their own parameters alone.
        without = self._counts[key]
        return ParameterCount(without.trainable + fresh, without.exported + fresh)

    def total(self, model: str, domain: str) -> int:
        """Parameters of the whole model with the domain's head."""
        return sum(parameter.numel() for parameter in self._meta(model, domain)[0].parameters())

    def never_quantised(self, model: str) -> int:
        """Weights that keep their format in a quantised base, though they are multiplied with."""
        from peftsearch.training.quantised import never_quantised

        bare, _ = self._meta(model, next(iter(self._heads)))
        return sum(bare.get_submodule(name).weight.numel() for name in never_quantised(bare))

    def architecture(self, model: str, domain: str) -> str:
        """Class of the model."""
        return type(self._meta(model, domain)[0]).__name__

    def _fresh(self, model: str, domain: str) -> int:
        """Parameters that the checkpoint does not hold, of modules of which it holds none."""
        bare, modules = self._meta(model, domain)
        return sum(parameter.numel() for path in modules for parameter in bare.get_submodule(path).parameters())

    def _head(self, model: str, domain: str) -> Head:
        from peftsearch.domains.models import architecture_of, model_config

        if model not in self._configs:
            place = self._models[model]
            self._configs[model] = model_config(
                place.location, place.revision, trust_remote_code=place.trust_remote_code
            )
        task, _ = self._heads[domain]
        return task.heads[architecture_of(self._configs[model])]

    def _head_key(self, model: str, domain: str) -> tuple[Any, ...]:
        """What decides the model's parameters: domains that need the same head share one model.

        Its kind (the first three) and its size.
        """
        head, (task, labels) = self._head(model, domain), self._heads[domain]
        return (model, head.auto_model, head.peft_task_type, task.config_kwargs(labels).get("num_labels"))

    def _meta(self, model: str, domain: str) -> tuple[Any, tuple[str, ...]]:
        """The model on the meta device, and its modules to save."""
        from peftsearch.training.base_model import meta_model

        key = self._head_key(model, domain)
        if key not in self._bare:
            place, (task, labels) = self._models[model], self._heads[domain]
            self._bare[key] = meta_model(
                place.location,
                place.revision,
                task,
                self._head(model, domain),
                labels,
                trust_remote_code=place.trust_remote_code,
            )
        return self._bare[key]

    def _build(self, model: str, domain: str, method: str, hyperparameters: Mapping[str, Any]) -> ParameterCount:
        import copy

        import torch

        from peftsearch.methods import AttachContext
        from peftsearch.training.base_model import count_exported, count_trainable

        chosen, (_, labels) = METHODS[method], self._heads[domain]
        chosen.check(hyperparameters)
        place, head = self._models[model], self._head(model, domain)
        bare, modules_to_save = self._meta(model, domain)
        context = AttachContext(head.peft_task_type, place.location, labels, modules_to_save)
        with torch.device("meta"):
            attached = chosen.attach(copy.deepcopy(bare), hyperparameters, context)
        return ParameterCount(count_trainable(attached), count_exported(attached))
