"""Which trials' files stay in a study's storage: those that can be exported, or may still turn out so.

A trial that is dominated stays so, whatever is tried later, and a pruned one is never continued. Without this a study
keeps a copy of the model for every trial of full fine-tuning, with its moments where it was pruned.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from peftsearch.files import Place, delete_tree
from peftsearch.frontier.front import exportable
from peftsearch.spec import StudyFacts, TrialRecord, TrialState
from peftsearch.training.checkpoint import trial_folder

log = logging.getLogger(__name__)


class KeptWeights:
    """Deletes, while a study runs, files of trials that nobody will ask for again: a `peftsearch.search.run.Observer`.

    What stays: running trials, and what is `exportable`. Files are deleted in a thread: an object store may take its
    time.

    Args:
        folder: The study's folder.
        facts: The study.
        records: Its trials so far.
    """

    def __init__(self, folder: Place, facts: StudyFacts, records: Iterable[TrialRecord]) -> None:
        self._folder = folder
        self._facts = facts
        self._kept: dict[tuple[str, str], dict[int, TrialRecord]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        for record in records:
            self._choose(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=error is not None)

    def trial_changed(self, record: TrialRecord) -> None:
        """A trial was started, evaluated, ended or confirmed."""
        for number in self._choose(record):
            self._thread.submit(self._delete, number)

    def sweep(self, records: Iterable[TrialRecord]) -> None:
        """Delete what is left when the search is over: a slot may have written a state after its trial was pruned."""
        records = list(records)
        kept = {record.number for record in records if record.state is TrialState.RUNNING}
        for name, domain in self._facts.domains.items():
            own = [record for record in records if record.domain == name]
            kept |= {record.number for record in exportable(own, domain.direction)}
        for record in records:
            if record.number not in kept:
                self._delete(record.number)

    def _choose(self, record: TrialRecord) -> list[int]:
        """Numbers of the trials that are of no use since this one changed."""
        if record.state is TrialState.RUNNING or record.domain not in self._facts.domains:
            return []
        if record.state is not TrialState.COMPLETE:
            return [record.number]
        direction = self._facts.domains[record.domain].direction
        known = self._kept.setdefault((record.domain, record.model), {})
        candidates = {**known, record.number: record}
        chosen = {item.number: item for item in exportable(candidates.values(), direction)}
        self._kept[record.domain, record.model] = chosen
        return [number for number in candidates if number not in chosen]

    def _delete(self, number: int) -> None:
        try:
            delete_tree(trial_folder(self._folder, f"{number:05d}"))
        except Exception as error:  # an object store that is away, say: what is left goes at the end, or with the study
            log.warning("the files of trial %d could not be deleted: %s", number, error)
