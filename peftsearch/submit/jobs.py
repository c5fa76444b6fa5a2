"""A study's jobs on a cluster: starting one unless one runs, and stopping it."""

from __future__ import annotations

import hashlib
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from peftsearch.preparing import check_databases
from peftsearch.saved import SUBMITTED_FROM
from peftsearch.spec import StudyError, StudyFile
from peftsearch.study import Study
from peftsearch.submit.following import follow
from peftsearch.submit.job_server import Job, JobServer, Told
from peftsearch.submit.package import pack, shipped_files
from peftsearch.submit.passwords import refuse_passwords
from peftsearch.submit.storage_mark import STORAGE_MARK, mark_storage
from peftsearch.tracking.provenance import SUBMITTED_COMMIT, study_commit

STOP_SECONDS = 180
"""How long a job that was asked to stop may take; Ray's 3 seconds cut off the driver while it writes."""


def run_as_job(
    study: Study,
    address: str,
    overrides: Sequence[str],
    *,
    following: bool,
    write: Callable[[str], None],
    told: Told,
) -> int:
    """Run a study on a cluster, or follow the job that does; the work of ``peftsearch submit``.

    Args:
        study: The study, from its file and with the overrides.
        address: The dashboard's URL, or an address as for ``ray.init``.
        overrides: ``key=value`` settings, as with ``--set``.
        following: Whether to wait for the job's end.
        write: Takes the job's output as it comes.
        told: Called with what a person should know.

    Returns:
        The exit status of the study; 0 where it is not followed.

    Raises:
        StudyError: The cluster cannot be reached or refuses us, the study cannot be sent or holds a password, or its
            storage cannot hold its databases.
        KeyboardInterrupt: Ctrl-C while following; the job goes on.
    """
    assert study.file is not None
    refuse_passwords(study.file, overrides)
    check_databases(study)
    server = JobServer(address, told)
    try:
        job, before = submit(study, overrides, server, told)
    except ConnectionError as error:
        raise StudyError(str(error)) from None
    told(f"Following the job {job.id}, which runs already" if before else f"Submitted the job {job.id}")
    return follow(server, job, write, told) if following else 0


def stop_job(study: Study, address: str, told: Told) -> None:
    """Ask the job that runs a study to stop, and wait until it has; submitting again continues it.

    Raises:
        StudyError: The cluster cannot be reached or refuses us, or no job of the study runs on it.
    """
    server = JobServer(address, told)
    try:
        job = next((job for job in reversed(server.jobs(job_prefix(study))) if not job.ended), None)
        if job is None:
            raise StudyError(f"no job of the study {study.name!r} runs on the Ray cluster at {address!r}")
        server.stop(job)
    except ConnectionError as error:
        raise StudyError(str(error)) from None
    told(f"Stopping the job {job.id}: its trials write their state, which may take a while")
    follow(server, job, lambda _: None, told)


def submit(study: Study, overrides: Sequence[str], server: JobServer, told: Told) -> tuple[Job, bool]:
    """Have the cluster run the study, unless a job of its does so already.

    Args:
        study: The study, from its file and with the overrides.
        overrides: ``key=value`` settings, as with ``--set``.
        server: The cluster's.
        told: Called with what a person should know.

    Returns:
        The job, and whether it ran before.

    Raises:
        StudyError: A file that the study names is missing, or there is too much to send.
        ConnectionError: The server does not answer.
    """
    file = study.file
    assert file is not None
    root, names = shipped_files(file)
    prefix = job_prefix(study)
    with tempfile.TemporaryDirectory(prefix="peftsearch-submit-") as folder:
        package = Path(folder) / "study.zip"
        pack(root, names, package)
        digest = hashlib.sha256(package.read_bytes() + repr([study.name, *overrides]).encode()).hexdigest()[:16]
        before = server.jobs(prefix)
        running = next((job for job in reversed(before) if not job.ended), None)
        if running is not None:
            if running.files != digest:
                told(
                    f"the job {running.id} runs this study as it was submitted then; the file, its data or --set have "
                    "changed since: stop it with --stop and submit again"
                )
            return running, True
        number = int(before[-1].id.removeprefix(prefix)) + 1 if before else 1
        job = Job(f"{prefix}{number}", files=digest)
        mark = mark_storage(study, told)
        command = job_command(study, names[0], overrides)
        return server.submit(job, command, package, job_environment(file, mark)), False


def job_prefix(study: Study) -> str:
    """What the ids of a study's jobs begin with; a study of the same name in another storage is another one."""
    place = hashlib.sha256(str(study.folder.storage).encode()).hexdigest()[:8]
    return f"peftsearch-{study.name}-{place}-"


def job_command(study: Study, name: str, overrides: Sequence[str]) -> str:
    """The job's command, for a shell on the cluster's head."""
    command = ["peftsearch", "run", f"./{name}", "--name", study.name, "--address", "auto"]
    command += ["--storage", str(study.folder.storage)]
    for setting in overrides:
        command += ["--set", setting]
    # In the shell's place: a signal to stop is for the driver.
    return f"exec {shlex.join(command)}"


def job_environment(file: StudyFile, mark: Path | None) -> dict[str, str]:
    """Environment variables of the job: what only this machine knows."""
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), SUBMITTED_FROM: str(file.folder)}
    if commit := study_commit(file.folder):
        environment[SUBMITTED_COMMIT] = commit
    if mark is not None:
        environment[STORAGE_MARK] = str(mark)
    return environment
