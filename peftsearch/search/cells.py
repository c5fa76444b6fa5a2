"""Cells: one (model, domain, method) each, with a search space and an equal share of the budget."""

from __future__ import annotations

from dataclasses import dataclass

from peftsearch.methods import MethodSpace, method_space
from peftsearch.spec import StudyError, StudySpec


@dataclass(frozen=True)
class Cell:
    """One model, domain and method.

    Attributes:
        model: The model's path as the study file writes it.
        domain: Name of the domain.
        space: The method and its search space.
    """

    model: str
    domain: str
    space: MethodSpace

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.space.method.name

    @property
    def key(self) -> str:
        """Unique within the study; names the cell's Optuna study."""
        return f"{self.domain}/{self.method}/{self.model}"


def study_cells(spec: StudySpec) -> list[Cell]:
    """All cells of a study, in the order of the study file: domains outermost, then models, then methods.

    Raises:
        StudyError: An unknown method or hyperparameter, or a value out of bounds.
    """
    spaces = [method_space(name, written.space) for name, written in spec.methods.items()]
    if not spaces:
        raise StudyError("no method is named", ("methods",))
    return [Cell(model.path, domain, space) for domain in spec.domains for model in spec.models for space in spaces]
