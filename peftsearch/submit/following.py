"""What a job prints and how it ends, seen from here, over connections that may break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from peftsearch.submit.job_server import Job, JobServer, Told, one_line, reason

STOPPED = 130
"""Exit status of a study that was asked to stop."""

_NO_SUCH_COMMAND = 127


def follow(server: JobServer, job: Job, write: Callable[[str], None], told: Told) -> int:
    """Pass on what a job prints until it has ended; a connection that is lost is made again.

    Args:
        server: The cluster's.
        job: The job.
        write: Takes the output as it comes.
        told: Called with what a person should know.

    Returns:
        The exit status of the study: 0, what its driver ended with, or 130 where the job was stopped.

    Raises:
        StudyError: The cluster does not know the job any more.
        KeyboardInterrupt: Ctrl-C; the job goes on.
    """
    passed, lost, pause = 0, False, 1.0
    while True:
        position = 0

        def received(text: str) -> None:
            # A new connection begins with the first line again.
            nonlocal position, passed
            new = text[max(0, passed - position) :]
            position += len(text)
            if new:
                passed = position
                write(new)

        try:
            asyncio.run(server.log(job, received))
        except BrokenPipeError:  # nobody reads what is written
            raise
        except Exception as error:  # whatever has become of the connection, the job's state says how to go on
            why = reason(error)
        else:
            why = "the connection was closed"
        try:
            job = server.job(job)
            if job.ended:
                return _exit_status(job, told)
            lost, pause = False, 1.0
        except ConnectionError as error:
            if not lost:
                told(f"{error} ({why}); the job goes on, and it is tried again until Ctrl-C")
            lost, pause = True, min(30.0, pause * 2)
        time.sleep(pause)


def _exit_status(job: Job, told: Told) -> int:
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        told(f"the job {job.id} was stopped; everything so far is recorded, and submitting again continues it")
        return STOPPED
    if job.exit_status is None:
        told(f"the job {job.id} has failed: {one_line(job.message)}")
        return 1
    if job.exit_status == _NO_SUCH_COMMAND:
        told("the cluster's head has no command 'peftsearch': install this package on all of its nodes")
        return 2
    if job.exit_status < 0:
        told(f"the job {job.id} was killed (signal {-job.exit_status}); submitting again continues it")
    return job.exit_status if 0 < job.exit_status < 256 else 1
