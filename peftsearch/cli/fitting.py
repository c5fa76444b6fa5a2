"""Tables on a terminal, and in a file."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement


class Fitted:
    """Fits its content to a terminal's width, and gives it all the width it wants where nobody looks at a screen.

    For consoles that never wrap lines of text: a table would not wrap its cells there either.

    Args:
        content: What to show.
    """

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        options = options.update(no_wrap=False, overflow=None)
        if not console.is_terminal:
            wide = options.update(max_width=10_000)
            wanted = Measurement.get(console, wide, self._content).maximum
            options = options.update(max_width=max(options.max_width, wanted))
        yield from console.render(self._content, options)
