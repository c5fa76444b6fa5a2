"""The progress bar of predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def show_prediction(console: Console) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar on a terminal, and nothing elsewhere; gives functions that are told of the rows to do and of those done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("loading", total=None)
        yield (
            lambda rows: progress.update(bar, description="predicting", total=rows),
            lambda rows: progress.advance(bar, rows),
        )
