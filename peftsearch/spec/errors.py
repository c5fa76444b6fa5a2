"""The one error that means "the person who typed this can mend it"."""

from __future__ import annotations

from typing import Any, Self

from peftsearch.spec.secrets import hide_secrets

_LONGEST = 1200
"""Characters of one sentence."""


def first_line(error: BaseException) -> str:
    """What an error says, on one line: its first that is not empty, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class StudyError(ValueError):
    """A study file, option or data set is wrong: one sentence that says what, where, and what to do.

    Passwords and tokens do not appear in it, whatever it quotes (`hide_secrets`).

    Args:
        message: The sentence.
        loc: Keys that lead to the place in the study file, for example ``("domains", "legal", "metric")``; whoever has
            the file at hand adds its line number (`peftsearch.spec.StudyFile.explain`).
    """

    def __init__(self, message: str, loc: tuple[str | int, ...] = ()) -> None:
        # What it quotes must not command the terminal, either.
        message = "".join(c if c.isprintable() or c == "\n" else " " for c in hide_secrets(message))
        if len(message) > _LONGEST and "\n" not in message:
            # It quotes a whole text: how it begins and what to do are enough.
            message = f"{message[: _LONGEST * 2 // 3]} ... {message[-_LONGEST // 3 :]}"
        super().__init__(message)
        self.message = message
        self.loc = loc

    def __reduce__(self) -> tuple[type[StudyError], tuple[Any, ...]]:
        return type(self), (self.message, self.loc)

    def at(self, loc: tuple[str | int, ...]) -> Self:
        """The same error, about another place in the study file."""
        return type(self)(self.message, loc)


class UnreachableError(StudyError):
    """Something that a study names is not at hand here, and may well be elsewhere: without a network, without access
    to a gated model, without one's own copy of data that cannot be shared.

    ``validate`` says what it could not check; a run stops.

    Args:
        message: As for every `StudyError`.
        loc: As for every `StudyError`.
        why: The reason alone, for lists that name the thing themselves.
    """

    def __init__(self, message: str, loc: tuple[str | int, ...] = (), why: str | None = None) -> None:
        super().__init__(message, loc)
        self.why = why or message

    def __reduce__(self) -> tuple[type[StudyError], tuple[Any, ...]]:
        return type(self), (self.message, self.loc, self.why)

    def at(self, loc: tuple[str | int, ...]) -> Self:
        """The same error, about another place in the study file."""
        return type(self)(self.message, loc, self.why)
