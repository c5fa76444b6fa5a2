"""The one error that means "the person who typed this can mend it"."""

from __future__ import annotations


class StudyError(ValueError):
    """A study file, option or data set is wrong: one sentence that says what, where, and what to do.

    Args:
        message: The sentence.
        loc: Keys that lead to the place in the study file, for example ``("domains", "legal", "metric")``; whoever has
            the file at hand adds its line number (`peftsearch.spec.StudyFile.explain`).
    """

    def __init__(self, message: str, loc: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.loc = loc

    def __reduce__(self) -> tuple[type[StudyError], tuple[str, tuple[str | int, ...]]]:
        return type(self), (self.message, self.loc)


class UnreachableError(StudyError):
    """Something that a study names is not at hand here, and may well be elsewhere: without a network, without access
    to a gated model, without one's own copy of data that cannot be shared.

    ``validate`` says what it could not check; a run stops.
    """
