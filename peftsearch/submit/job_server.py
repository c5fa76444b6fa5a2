"""A Ray cluster's job server, and the jobs that it knows."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from peftsearch.ray_access import HOW_TO_SWITCH_ON, check_access, refused, token_of_the_user
from peftsearch.spec import StudyError, hide_secrets, note_secrets

_REQUEST_SECONDS = 60.0
_HEARTBEAT_SECONDS = 20.0
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}

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

        # Requests' errors, and ours about them, may quote a login that an address holds.
        note_secrets(address)
        self.address = hide_secrets(address)
        with token_of_the_user():
            url, is_open = _job_server_url(address)
            try:
                # Ray prefers these variables to an address that it is given.
                with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
                    self._client = Client(url)
            except Exception as error:
                _explain(error, f"the Ray cluster at {address!r}")
        if is_open:
            told(f"anybody who reaches the Ray cluster at {self.address} can run code on it: {HOW_TO_SWITCH_ON}")

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
        """Ask a job to stop; its driver ends when the running trials have written their state."""
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
            raise ConnectionError(f"the Ray cluster at {self.address!r} does not answer: {reason(error)}") from None
        except Exception as error:
            _explain(error, f"the Ray cluster at {self.address!r}")


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        exit_status=details.driver_exit_code,
        message=details.message or "",
        files=(details.metadata or {}).get("peftsearch_files", ""),
    )


def _job_server_url(address: str) -> tuple[str, bool]:
    """The job server's URL, and whether it answers those who show no token."""
    import requests

    if address.startswith("ray://"):
        raise StudyError(
            f"cannot reach a Ray cluster at {address!r}: Ray Client (ray://) is not used; write the dashboard's URL, "
            "such as http://127.0.0.1:8265"
        )
    candidates = [address] if "://" in address else [f"http://{address}"] if ":" in address else []
    for url in candidates:
        try:
            answer = requests.get(f"{url.rstrip('/')}/api/jobs/", timeout=_REQUEST_SECONDS)
        except requests.RequestException as error:
            if "://" in address:
                raise StudyError(f"cannot reach a Ray cluster at {address!r}: {reason(error)}") from None
            continue  # not HTTP: the port of the cluster itself
        return url, answer.ok
    is_open = check_access(address)
    from ray.dashboard.utils import get_address_for_submission_client

    try:
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            return get_address_for_submission_client(address), is_open
    except Exception as error:
        raise StudyError(
            f"the Ray cluster at {address!r} names no job server ({reason(error)}): install ray[default] on its "
            "nodes and start its head with --include-dashboard=true"
        ) from None


def _explain(error: Exception, who: str) -> NoReturn:
    """Raise a job server's complaint as one sentence.

    Raises:
        ConnectionError: It may do better the next time.
        StudyError: It will not.
    """
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
    if re.search(r"status code 5\d\d", str(error)):
        # A proxy before it, or the server itself while it starts: it may do better the next time.
        raise ConnectionError(f"{who} does not answer: {reason(error)}") from None
    raise StudyError(f"{who} refuses: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """An error in one line, without passwords."""
    return one_line(hide_secrets(str(error))) or type(error).__name__


def one_line(text: str) -> str:
    """The first line that says something, cut where it is long; empty where there is none."""
    return next((line.strip()[:300] for line in text.splitlines() if line.strip()), "")


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hide environment variables within the block."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
