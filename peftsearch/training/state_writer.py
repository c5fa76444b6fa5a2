"""Writing a trial's state while the next segment trains.

A segment is answered once its state is handed over here, not once it is in the storage. Whoever goes on with the trial
elsewhere waits for that state (`wait_for_state`). Where the process died in between, the trial goes on from the state
before: the lost segment is trained again (`TrialSession.catch_up`), with the same result where it is trained alone, and
what was answered stays true. A state that could not be written is told at the next one, and stops the study as it would
have done at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftsearch.files import Place, StorageError, exists, is_local, persist
from peftsearch.training.checkpoint import WEIGHTS, delete_states, saved_steps, write_state

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

AT_ONCE = 8 * 2**20
"""Bytes that are written to a local disk without a thread: that takes a few milliseconds, and copying them some too."""

STATE_SECONDS = 15.0
"""How long another worker's state is waited for: longer than a large one takes to a network drive, and less than the
training that it saves."""


def wait_for_state(folder: Place, step: int) -> None:
    """Return once a trial's state after a step, or a later one, is in its folder; or after `STATE_SECONDS` without.

    Raises:
        OSError: The storage cannot be read.
    """
    deadline = time.monotonic() + STATE_SECONDS
    while max(saved_steps(folder), default=0) < step and time.monotonic() < deadline:
        time.sleep(0.2)


class StateWriter:
    """Writes one state at a time, in a thread where it is large or goes over a network.

    A process has one (`WRITER`): at most one copy of a state is in memory at a time. The thread is no daemon: a process
    that ends in order ends after its last state is written.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: StorageError | None = None

    def write(self, folder: Place, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Write a state, or begin to; the tensors may be changed afterwards.

        Raises:
            StorageError: This state, or the one before it, could not be written.
        """
        self.wait()
        if is_local(folder) and sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) < AT_ONCE:
            write_state(folder, step, tensors, meta)
            return
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self._thread = threading.Thread(
            target=self._write, args=(folder, step, copies, meta), name=f"state of {folder.name}", daemon=False
        )
        self._thread.start()

    def wait(self) -> None:
        """Return once everything that was handed over is in its storage.

        Raises:
            StorageError: It could not be written; said once.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, folder: Place, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        try:
            write_state(folder, step, tensors, meta)
            if exists(folder / WEIGHTS):
                # Another worker was faster with what is left of the trial.
                persist(folder, lambda: delete_states(folder))
        except StorageError as error:
            log.warning("the state of trial folder %s after step %d is not written: %s", folder.name, step, error)
            self._error = error
        except Exception as error:
            # It is told in the middle of another trial's work, which must not be blamed for it.
            log.exception("the state of trial folder %s after step %d is not written", folder.name, step)
            self._error = StorageError(f"cannot write the state of trial folder {folder}: {error!r}")


WRITER = StateWriter()
"""This process's."""
