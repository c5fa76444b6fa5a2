"""What a running study tells, and a listener that says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from peftsearch.spec import Baseline, TrialRecord

if TYPE_CHECKING:
    from peftsearch.search.run import StudyRun


class StudyEvents(Protocol):
    """Told of a study's progress, from the driver's main thread and from its helpers' threads."""

    def phase(self, text: str) -> None:
        """Something that takes a while begins."""

    def planned(self, run: StudyRun) -> None:
        """The search begins, or goes on."""

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial was started, evaluated or ended."""

    def confirmations(self, done: int, failed: int, planned: int) -> None:
        """So many re-trainings of finalists are done, could not be done, and are planned."""

    def baselines(self, domain: str, baselines: dict[str, Baseline]) -> None:
        """A domain's baselines are known."""

    def warning(self, text: str) -> None:
        """Something that a person should know, and that does not stop the study."""

    def stopping(self) -> None:
        """Somebody asked the study to stop."""


class SilentEvents:
    """Listens and says nothing."""

    def phase(self, text: str) -> None:
        """See `StudyEvents`."""

    def planned(self, run: StudyRun) -> None:
        """See `StudyEvents`."""

    def trial_changed(self, record: TrialRecord) -> None:
        """See `StudyEvents`."""

    def confirmations(self, done: int, failed: int, planned: int) -> None:
        """See `StudyEvents`."""

    def baselines(self, domain: str, baselines: dict[str, Baseline]) -> None:
        """See `StudyEvents`."""

    def warning(self, text: str) -> None:
        """See `StudyEvents`."""

    def stopping(self) -> None:
        """See `StudyEvents`."""
