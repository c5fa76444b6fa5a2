"""An exported folder as a repository of the Hugging Face Hub, or of a server that speaks its protocol (HF_ENDPOINT).

The token comes from the environment (``HF_TOKEN``, or what ``hf auth login`` left) and is shown nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsearch.domains.hub import out_of_reach
from peftsearch.export.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, COMPLETE_CONFIG, PROVENANCE
from peftsearch.export.published import PUSHED, digest
from peftsearch.spec import StudyError, hide_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MODELS = (
    *(ADAPTER_CONFIG, ADAPTER_WEIGHTS, COMPLETE_CONFIG, "generation_config.json"),
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
)
"""What our formats call a model's files: those of an earlier push that did not list them yet."""
_OF_THE_HUB = ".gitattributes"
"""The file that the Hub puts into every repository."""


@dataclass(frozen=True)
class HubRepo:
    """A repository of the Hub.

    Attributes:
        id: ``OWNER/NAME``.
    """

    id: str

    def __str__(self) -> str:
        return self.id

    @property
    def name(self) -> str:
        """Without the owner."""
        return self.id.rpartition("/")[2]


def check_repo(repo: HubRepo, study: str, domain: str) -> None:
    """See that a repository may be written: it is new, empty, or holds an earlier export of the study's domain.

    A card is somebody's work: one that is not as we pushed it is not replaced.

    Raises:
        StudyError: The name is no repository's or is taken, or the Hub cannot be reached, or does not know the token.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if "/" not in repo.id:
        raise StudyError(f"--push {repo.id!r} does not say whose repository it is: write OWNER/{repo.id}")
    with _answering(repo):
        api = HfApi(library_name="peftsearch")
        _check_token(api)
        try:
            there = set(api.list_repo_files(repo.id)) - {_OF_THE_HUB}
        except RepositoryNotFoundError:
            return
        except HFValidationError:
            raise StudyError(f"--push {repo.id!r} is no name of a repository: write OWNER/NAME") from None
        if not there:
            return
        known: Any = _provenance(repo) if PROVENANCE in there else {}
        try:
            found = (known["study"], known["domain"]["name"])
        except (KeyError, TypeError):
            found = None
        card = _listed(known).get("card")
        changed = card is not None and CARD in there and digest(_read(repo, CARD)) != card
    if found != (study, domain):
        what = f"an adapter of the study {found[0]!r} for {found[1]!r}" if found else "something else"
        raise StudyError(f"the repository {repo.id!r} is taken: it holds {what}; choose another name with --push")
    if changed:
        raise StudyError(
            f"the {CARD} of {repo.id!r} was changed since it was pushed, and would be replaced: keep a copy and delete "
            "it there, or choose another name with --push"
        )


def _check_token(api: HfApi) -> None:
    """See that there is a token, and that the Hub knows it; whether it may write there is known when it does.

    Raises:
        LocalTokenNotFoundError: There is none.
        HfHubHTTPError: The Hub does not know it.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.whoami()
    except HfHubHTTPError as error:
        if _status(error) in (401, 403):
            raise
        # A server that speaks of repositories alone.


def push_folder(folder: Path, repo: HubRepo, *, private: bool, message: str) -> str:
    """Upload a folder as one commit; the repository is made where it is new. The files of an earlier export that are
    not written again go; what others have put beside them stays.

    Returns:
        The repository's address.

    Raises:
        StudyError: The Hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    new = sorted(file.name for file in folder.iterdir())
    with _answering(repo), disable_progress_bars():
        api = HfApi(library_name="peftsearch")
        address = api.create_repo(repo.id, private=private, exist_ok=True)
        there = set(api.list_repo_files(repo.id))
        old = sorted(_ours(repo, there) - {*new}) if PROVENANCE in there else []
        # Not upload_folder: that makes several commits of what it finds much, and nobody wants half an adapter.
        operations = [CommitOperationAdd(name, str(folder / name)) for name in new]
        api.create_commit(repo.id, [*operations, *map(CommitOperationDelete, old)], commit_message=message)
    return str(address)


def _ours(repo: HubRepo, there: Iterable[str]) -> set[str]:
    """Which files of a repository an earlier push has put there."""
    listed = _listed(_provenance(repo)).get("files")
    if isinstance(listed, list):
        return {name for name in there if name in listed}
    return {name for name in there if any(fnmatch(name, pattern) for pattern in _MODELS)}


def _provenance(repo: HubRepo) -> Any:
    """What an earlier push says of itself; nothing where that cannot be read."""
    try:
        return json.loads(_read(repo, PROVENANCE))
    except ValueError:
        return {}


def _listed(provenance: Any) -> dict[str, Any]:
    found = provenance.get(PUSHED) if isinstance(provenance, dict) else None
    return found if isinstance(found, dict) else {}


def _read(repo: HubRepo, name: str) -> bytes:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo.id, name)).read_bytes()


@contextmanager
def _answering(repo: HubRepo) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except StudyError:
        raise
    except OfflineModeIsEnabled:
        raise StudyError("nothing can be pushed with HF_HUB_OFFLINE=1 in the environment: unset it") from None
    except LocalTokenNotFoundError:
        raise StudyError(_refused(repo)) from None
    except HfHubHTTPError as error:
        if _status(error) in (401, 403):
            raise StudyError(_refused(repo)) from None
        raise StudyError(f"the Hub did not take {repo.id!r}: {_line(error)}") from None
    except Exception as error:  # missing networks and refused cards raise differently, by version
        raise StudyError(f"cannot push to {repo.id!r}: {out_of_reach(error) or _line(error)}") from None


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _refused(repo: HubRepo) -> str:
    return f"the Hub does not let you write {repo.id!r}: set HF_TOKEN to a token that may (or run 'hf auth login')"


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return hide_secrets(" ".join(lines).rstrip(".") if lines else type(error).__name__)
