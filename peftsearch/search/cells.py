"""Cells: one (model, domain, method) each, with a search space and an equal share of the budget."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from peftsearch.methods import MethodSpace, Quantization, method_space
from peftsearch.search.proposals import Grid
from peftsearch.spec import Range, Scalar, SearchSpec, StudyError, StudySpec


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
        StudyError: An unknown method or hyperparameter, a value out of bounds, or a grid without end.
    """
    spaces = [method_space(name, written.space) for name, written in spec.methods.items()]
    if not spaces:
        raise StudyError("no method is named", ("methods",))
    if spec.search.sampler == "grid":
        if spec.search.allocation == "joint":
            raise StudyError(
                "sampler: grid tries every cell's own grid: allocation: joint leaves nothing to share",
                ("search", "allocation"),
            )
        if spec.search.warm_start is not None:
            raise StudyError(
                "sampler: grid tries what is listed, in order: warm_start has no place in it", ("search", "warm_start")
            )
        for space in spaces:
            Grid(space).check()
    return [Cell(model.path, domain, space) for domain in spec.domains for model in spec.models for space in spaces]


def trials_of(search: SearchSpec, space: MethodSpace) -> int:
    """Trials that a cell is to have: ``search.trials``, or its whole grid where that is smaller."""
    return min(search.trials, Grid(space).size) if search.sampler == "grid" else search.trials


def planned_trials(spec: StudySpec) -> int:
    """Trials of the whole study."""
    return sum(trials_of(spec.search, cell.space) for cell in study_cells(spec))


def corners(cell: Cell, varied: Collection[str] | None = None) -> list[dict[str, Scalar]]:
    """Every combination of the extremes of some hyperparameters, the others at one value each.

    Args:
        cell: The cell.
        varied: Names; those that shape the parameters where absent.
    """
    found: list[dict[str, Scalar]] = [{}]
    for name, dimension in cell.space.space.items():
        hyperparameter = cell.space.method.hyperparameters[name]
        values: list[Scalar]
        if isinstance(dimension, Range):
            ends = [dimension.low, dimension.high]
            values = [int(end) for end in ends] if hyperparameter.kind == "int" else list(ends)
        elif isinstance(dimension, tuple):
            values = list(dimension)
        else:
            values = [dimension]
        several = hyperparameter.shapes_parameters if varied is None else name in varied
        found = [{**corner, name: value} for corner in found for value in (values if several else values[:1])]
    return found


def base_forms(cells: Iterable[Cell]) -> set[tuple[str, Quantization | None]]:
    """The models of some cells, each in every form that a trial may want its base stored in."""
    found: set[tuple[str, Quantization | None]] = set()
    for cell in cells:
        space, method = cell.space.space, cell.space.method
        # How a base is stored is chosen by words, which are listed: a value of each other hyperparameter is enough.
        for values in corners(cell, {name for name, chosen in space.items() if isinstance(chosen, tuple)}):
            found.add((cell.model, method.quantization(values)))
    return found
