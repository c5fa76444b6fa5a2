"""What cannot be trained on a base in parts (``resources.strategy: fsdp``), refused before work starts."""

from __future__ import annotations

from collections.abc import Iterable

from peftsearch.search.cells import Cell
from peftsearch.spec import StudyError, StudySpec


def check_strategy(spec: StudySpec, cells: Iterable[Cell]) -> None:
    """Refuse configurations that FSDP2 cannot train.

    Raises:
        StudyError: With one sentence.
    """
    if spec.resources.strategy != "fsdp":
        return
    for cell in cells:
        quantization = cell.space.space.get("quantization")
        if "int8" in (quantization if isinstance(quantization, tuple) else (quantization,)):
            # bitsandbytes keeps its int8 weights outside of the module's parameters, where FSDP2 does not see them.
            raise StudyError(
                "an int8 base cannot be divided among workers: let quantization be nf4, or write strategy: ddp",
                ("methods", cell.method, "quantization"),
            )
        if cell.space.method.trains_copy and spec.training_of(cell.method).optimizer == "adamw_8bit":
            raise StudyError(
                f"adamw_8bit cannot step on weights that are divided among workers, as {cell.method} trains them under "
                "strategy: fsdp: write optimizer: adamw for that method, or strategy: ddp",
                ("training", "optimizer"),
            )
