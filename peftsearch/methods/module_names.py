"""Names of modules, as PEFT's ``target_modules`` wants them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def inside(path: str, roots: Iterable[str]) -> bool:
    """Whether a module's path is one of the roots or lies below one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def short_names(model: nn.Module, paths: Collection[str]) -> list[str]:
    """The shortest ends of names by which PEFT finds exactly these modules: what belongs in ``target_modules``.

    Args:
        model: The model.
        paths: Full paths of modules in it.

    Returns:
        Sorted names; each stands for every module whose path is the name or ends with a dot and the name.
    """
    every = [path for path, _ in model.named_modules()]
    wanted = set(paths)
    exact: dict[str, bool] = {}
    names = set()
    for path in paths:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[-length:])
            if name not in exact:
                exact[name] = {other for other in every if other == name or other.endswith(f".{name}")} <= wanted
            if exact[name]:
                names.add(name)
                break
    return sorted(names)
