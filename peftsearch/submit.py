"""A study as a job of a Ray cluster: sent there, followed from here, and going on without us.

The study file travels with the job, and so do the files that it names relative to itself. Everything else is read on
the cluster as the study file says: absolute paths, URIs, Hub ids and resources of installed packages. The driver runs
on the cluster's head. A job is found again by the study's name and its storage, so that submitting twice follows the
job that runs, and a study that has ended, for whatever reason, is continued by a new job.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import shlex
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from peftsearch.ray_access import HOW_TO_SWITCH_ON, check_access, refused, token_of_the_user
from peftsearch.saved import SUBMITTED_FROM
from peftsearch.spec import DataSpec, StudyError, StudyFile, model_location, without_passwords
from peftsearch.storage import ENVIRONMENT_VARIABLE
from peftsearch.study import Study
from peftsearch.tracking.provenance import SUBMITTED_COMMIT, study_commit

SHIPPED_BYTES = 200 * 2**20
"""What may travel with a job: Ray keeps it in the memory of the cluster's head, and takes no more than 512 MB."""
STOP_SECONDS = 180
"""How long a job that was asked to stop may take; Ray's 3 seconds cut off the driver while it writes."""
STOPPED = 130
"""Exit status of a study that was asked to stop."""
STORAGE_MARK = "PEFTSEARCH_STORAGE_MARK"
"""Environment variable of a job: a file in the storage that the machine that has submitted it left there."""

_REQUEST_SECONDS = 60.0
_HEARTBEAT_SECONDS = 20.0
_MARK_SECONDS = 24 * 3600.0
"""A mark that a job has not found in so long is not looked for any more."""
_NO_SUCH_COMMAND = 127
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)

Told = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A study's job on a cluster.

    Attributes:
        id: Its submission id: ``peftsearch-NAME-DIGEST-N``, with a digest of the storage, and N counting up from 1.
        status: Ray's word for where it stands.
        exit_status: Of the study's driver, where it has ended by itself.
        message: What Ray says of it.
        files: Digest of the files that came with it, and of the overrides.
    """

    id: str
    status: str = "PENDING"
    exit_status: int | None = None
    message: str = ""
    files: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.status in _ENDED


class JobServer:
    """The job server of a Ray cluster, which its dashboard brings along.

    Args:
        address: The dashboard's URL (``http://127.0.0.1:8265``), or an address as for ``ray.init``.
        told: Called with what a person should know.

    Raises:
        StudyError: It cannot be reached, or refuses us.
    """

    def __init__(self, address: str, told: Told) -> None:
        from ray.job_submission import JobSubmissionClient

        # They say what they upload, in a log's form and on standard error.
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)

        class Client(JobSubmissionClient):  # type: ignore[misc]
            """Ray's client, which would wait for ever where a network is lost."""

            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                return super()._do_request(method, endpoint, **{"timeout": _REQUEST_SECONDS, **options})

        self.address = address
        with token_of_the_user():
            url, is_open = _job_server_url(address)
            try:
                # Ray prefers these variables to an address that it is given.
                with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
                    self._client = Client(url)
            except Exception as error:
                _explain(error, f"the Ray cluster at {address!r}")
        if is_open:
            told(f"anybody who reaches the Ray cluster at {address} can run code on it: {HOW_TO_SWITCH_ON}")

    def jobs(self, prefix: str) -> list[Job]:
        """The jobs with ids that begin so, whatever their state, in the order of their numbers.

        Raises:
            ConnectionError: The server does not answer.
        """
        found = [_job(item) for item in self._asked(self._client.list_jobs) if item.submission_id]
        own = [job for job in found if job.id.startswith(prefix) and job.id.removeprefix(prefix).isdigit()]
        return sorted(own, key=lambda job: int(job.id.removeprefix(prefix)))

    def job(self, job: Job) -> Job:
        """The job as it is now.

        Raises:
            ConnectionError: The server does not answer.
            StudyError: It does not know the job (any more).
        """
        return _job(self._asked(self._client.get_job_info, job.id))

    def submit(self, job: Job, entrypoint: str, package: Path, environment: dict[str, str]) -> Job:
        """Start a job; where one of this id has been started meanwhile, that one is meant."""
        try:
            self._asked(
                self._client.submit_job,
                entrypoint=entrypoint,
                submission_id=job.id,
                runtime_env={"working_dir": str(package), "env_vars": environment},
                metadata={"peftsearch_files": job.files},
            )
        except (StudyError, ConnectionError):
            # Somebody was quicker, or the answer got lost.
            if not any(other.id == job.id for other in self.jobs(job.id.rpartition("-")[0] + "-")):
                raise
        return job

    def stop(self, job: Job) -> None:
        """Ask a job to stop; it does so after its running segment."""
        self._asked(self._client.stop_job, job.id)

    async def log(self, job: Job, received: Callable[[str], None]) -> None:
        """Receive a job's output from its beginning, in pieces, until the job ends or the connection is lost."""
        import aiohttp

        url = f"{self._client._address}/api/jobs/{job.id}/logs/tail"
        # Ray's own method does not notice a connection that has silently died; a heartbeat does.
        async with (
            aiohttp.ClientSession(headers=self._client._headers) as session,
            session.ws_connect(url, heartbeat=_HEARTBEAT_SECONDS, max_msg_size=0) as socket,
        ):
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    received(message.data)

    def _asked(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        import requests

        try:
            return method(*arguments, **options)
        except (requests.RequestException, ConnectionError) as error:
            raise ConnectionError(f"the Ray cluster at {self.address!r} does not answer: {_reason(error)}") from None
        except Exception as error:
            _explain(error, f"the Ray cluster at {self.address!r}")


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
        StudyError: The cluster cannot be reached or refuses us, or the study cannot be sent or holds a password.
        KeyboardInterrupt: Ctrl-C while following; the job goes on.
    """
    assert study.file is not None
    _refuse_passwords(study.file, overrides)
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
    told(f"Stopping the job {job.id}: its driver records what it has, which may take a while")
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
        _pack(root, names, package)
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
        mark = _mark_storage(study, told)
        entrypoint = _entrypoint(study, names[0], overrides)
        return server.submit(job, entrypoint, package, _environment(file, mark)), False


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
            reason = _reason(error)
        else:
            reason = "the connection was closed"
        try:
            job = server.job(job)
            if job.ended:
                return _exit_status(job, told)
            lost, pause = False, 1.0
        except ConnectionError as error:
            if not lost:
                told(f"{error} ({reason}); the job goes on, and it is tried again until Ctrl-C")
            lost, pause = True, min(30.0, pause * 2)
        time.sleep(pause)


def job_prefix(study: Study) -> str:
    """What the ids of a study's jobs begin with; a study of the same name in another storage is another one."""
    place = hashlib.sha256(str(study.folder.storage).encode()).hexdigest()[:8]
    return f"peftsearch-{study.name}-{place}-"


def shipped_files(file: StudyFile) -> tuple[Path, list[str]]:
    """The study file, and the files and folders of files that it names relative to itself.

    Returns:
        A folder that holds them all, and their paths below it, the study file's first.

    Raises:
        StudyError: One of them is missing, or they are too large together.
    """
    folder = file.folder
    own = folder / file.where
    named = [own]
    for reference, loc in _references(file):
        path = Path(reference)
        if path.is_absolute() or reference.startswith("~"):
            continue
        path = Path(os.path.normpath(folder / path))
        if not path.exists():
            raise StudyError(
                file.explain(
                    StudyError(f"no file or folder {reference!r} (looked for {str(path)!r}): check the path", loc)
                )
            )
        named.append(path)
    root = Path(os.path.commonpath([str(path if path.is_dir() else path.parent) for path in named]))
    files: dict[str, int] = {}
    for path in named:
        for item in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if item.is_file():
                files.setdefault(item.relative_to(root).as_posix(), item.stat().st_size)
    total = sum(files.values())
    if total > SHIPPED_BYTES:
        largest = max(files, key=lambda name: files[name])
        raise StudyError(
            f"{file.where} names {total / 2**20:.0f} MiB of files relative to itself (the largest: {largest}), and at "
            f"most {SHIPPED_BYTES / 2**20:.0f} MiB travel with a job: put them where the cluster's machines read them, "
            "and name them by absolute path"
        )
    return root, list(files)


def _refuse_passwords(file: StudyFile, overrides: Sequence[str]) -> None:
    """Ray keeps a job's command and files, and shows them to everybody who may see its jobs.

    Raises:
        StudyError: A setting or the study file, be it in a comment, holds a password or token.
    """
    message = (
        "holds a password or token, which everybody who may see the cluster's jobs could read: leave it out, and have "
        "the environment of the cluster's head bring it (PGPASSWORD or ~/.pgpass for PostgreSQL, "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for MLflow, HF_TOKEN for the Hub)"
    )
    for setting in overrides:
        key, _, value = setting.partition("=")
        if without_passwords(value) != value:
            raise StudyError(f"--set {key.strip()}: {message}")
    for text, loc in _texts(file.spec.model_dump(mode="json")):
        if without_passwords(text) != text:
            raise StudyError(file.explain(StudyError(message, loc)))
    for number, line in enumerate((file.text or "").splitlines(), 1):
        if without_passwords(line) != line:
            raise StudyError(f"{file.where}, line {number}: {message}")


def _texts(value: Any, loc: tuple[str | int, ...] = ()) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """Every text in a specification, keys included, with its place."""
    if isinstance(value, str):
        yield value, loc
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key), loc
            yield from _texts(item, (*loc, key))
    elif isinstance(value, Sequence):
        for number, item in enumerate(value):
            yield from _texts(item, (*loc, number))


def _references(file: StudyFile) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """Every path in a study that may be a local one, with its place."""
    for number, model in enumerate(file.spec.models):
        loc: tuple[str | int, ...] = ("models", number, "path") if ("models",) in file.lines else ("model",)
        try:
            location = model_location(model.path, file.folder)
        except StudyError as error:
            if Path(model.path).is_absolute() or model.path.startswith(("~", "package:")):
                continue
            raise StudyError(file.explain(StudyError(error.message, loc))) from None
        if Path(location).is_absolute() and not model.path.startswith("package:"):
            yield model.path, loc
    for name, domain in file.spec.domains.items():
        parts: list[tuple[DataSpec, tuple[str | int, ...]]] = [(domain.data, ("domains", name, "data"))]
        parts += [(part, ("domains", name, "data", "join", key)) for key, part in (domain.data.join or {}).items()]
        for data, place in parts:
            for key in ("source", "train", "validation", "test"):
                reference = getattr(data, key)
                if reference is not None and not _is_elsewhere(reference):
                    yield reference, (*place, key)


def _is_elsewhere(reference: str) -> bool:
    return reference.startswith(("hub:", "recipe:", "package:")) or "://" in reference


def _pack(root: Path, names: Sequence[str], package: Path) -> None:
    """Write the files into an archive that depends on nothing but their names and contents, so that Ray, which knows
    archives by their digest, keeps one of each. Given a folder, Ray would leave out what a .gitignore in it names."""
    try:
        with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name in names:
                # Readable for everybody: Ray restores what stands here.
                entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
                entry.external_attr = 0o644 << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                with (root / name).open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                    while block := source.read(2**20):
                        target.write(block)
    except OSError as error:
        raise StudyError(f"cannot read {error.filename or root}: {error.strerror or error}") from None


def _mark_storage(study: Study, told: Told) -> Path | None:
    """Leave a file in the storage that the job looks for: a folder of the same name may be another one there.

    None where there is nothing to look for: an object store, or a folder that this machine does not have.
    """
    storage = study.folder.storage
    if not isinstance(storage, Path):
        return None
    if not storage.is_dir() and not storage.parent.is_dir():
        told(
            f"this machine does not have the folder {storage}: 'status', 'frontier' and 'export' of {study.name} work "
            "where it is mounted"
        )
        return None
    mark = storage / f".submitted-{uuid.uuid4().hex}"
    try:
        storage.mkdir(exist_ok=True)
        for old in storage.glob(".submitted-*"):
            if time.time() - old.stat().st_mtime > _MARK_SECONDS:
                old.unlink(missing_ok=True)
        mark.touch()
    except OSError as error:
        raise StudyError(
            f"cannot write to the storage {storage}: {error.strerror or error} (choose another with --storage)"
        ) from None
    return mark


def _entrypoint(study: Study, name: str, overrides: Sequence[str]) -> str:
    """The job's command, for a shell on the cluster's head."""
    command = ["peftsearch", "run", f"./{name}", "--name", study.name, "--address", "auto"]
    command += ["--storage", str(study.folder.storage)]
    for setting in overrides:
        command += ["--set", setting]
    # In the shell's place: a signal to stop is for the driver.
    return f"exec {shlex.join(command)}"


def _environment(file: StudyFile, mark: Path | None) -> dict[str, str]:
    """Environment variables of the job: what only this machine knows."""
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), SUBMITTED_FROM: str(file.folder)}
    if commit := study_commit(file.folder):
        environment[SUBMITTED_COMMIT] = commit
    if mark is not None:
        environment[STORAGE_MARK] = str(mark)
    return environment


def check_arrival(study: Study) -> None:
    """In a job, before its study runs: see that the storage is the one that the submitting machine means.

    Raises:
        StudyError: It is another folder of the same name.
    """
    if not (mark := os.environ.get(STORAGE_MARK)):
        return
    if not Path(mark).exists():
        storage = os.environ.get(ENVIRONMENT_VARIABLE)
        own = f" (the cluster's own is {storage})" if storage else ""
        raise StudyError(
            f"the cluster does not see the folder {study.folder.storage} of the machine that has submitted the study: "
            f"name a storage that both see with --storage, a shared folder or a URI such as s3://bucket/folder{own}"
        )
    with contextlib.suppress(OSError):
        Path(mark).unlink()


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        exit_status=details.driver_exit_code,
        message=details.message or "",
        files=(details.metadata or {}).get("peftsearch_files", ""),
    )


def _exit_status(job: Job, told: Told) -> int:
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        told(f"the job {job.id} was stopped; everything so far is recorded, and submitting again continues it")
        return STOPPED
    if job.exit_status is None:
        told(f"the job {job.id} has failed: {_first_line(job.message)}")
        return 1
    if job.exit_status == _NO_SUCH_COMMAND:
        told("the cluster's head has no command 'peftsearch': install this package on all of its nodes")
        return 2
    if job.exit_status < 0:
        told(f"the job {job.id} was killed (signal {-job.exit_status}); submitting again continues it")
    return job.exit_status if 0 < job.exit_status < 256 else 1


def _job_server_url(address: str) -> tuple[str, bool]:
    """The job server's URL, and whether it answers those who show no token."""
    import requests

    candidates = [address] if "://" in address else [f"http://{address}"] if ":" in address else []
    if not address.startswith("ray://"):
        for url in candidates:
            try:
                answer = requests.get(f"{url.rstrip('/')}/api/jobs/", timeout=_REQUEST_SECONDS)
            except requests.RequestException as error:
                if "://" in address:
                    raise StudyError(f"cannot reach a Ray cluster at {address!r}: {_reason(error)}") from None
                continue  # not HTTP: the port of the cluster itself
            return url, answer.ok
    is_open = check_access(address) if not address.startswith("ray://") else False
    from ray.dashboard.utils import get_address_for_submission_client

    try:
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            return get_address_for_submission_client(address), is_open
    except Exception as error:
        raise StudyError(
            f"the Ray cluster at {address!r} names no job server ({_reason(error)}): install ray[default] on its "
            "nodes and start its head with --include-dashboard=true"
        ) from None


def _explain(error: Exception, who: str) -> NoReturn:
    """Raise a job server's complaint as one sentence."""
    from ray.exceptions import AuthenticationError

    if isinstance(error, AuthenticationError):
        with token_of_the_user():
            raise StudyError(refused(who)) from None
    if isinstance(error, StudyError):
        raise error
    if re.search(r"(status code|returned) 404", str(error)):
        raise StudyError(
            f"{who} knows nothing of jobs (or not of this one): see that its address is that of a Ray dashboard, and "
            "that ray[default] is installed on its head"
        ) from None
    raise StudyError(f"{who} refuses: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    return _first_line(str(error)) or type(error).__name__


def _first_line(text: str) -> str:
    return next((line.strip()[:300] for line in text.splitlines() if line.strip()), "")


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hide environment variables within the block."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
