"""Whether the Hugging Face Hub can be asked, found out once per process and quickly."""

from __future__ import annotations

import functools
import sys
import threading
from pathlib import Path

PATIENCE = 4.0
"""Seconds after which a Hub that has not answered counts as out of reach."""


@functools.cache
def hub_reachable() -> bool:
    """Whether the Hub answers; asked at the first call.

    Where it does not, Hugging Face's libraries are told to use what they have downloaded before and nothing else: left
    to themselves they try again for about half a minute, for each file of each model.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        except Exception:  # whatever a network, a proxy or a name server may raise
            return
        answered.set()

    # In a thread: no timeout of the client covers the look-up of the host's name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if answered.is_set():
        return True
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        # It copied the constant when it was imported.
        import datasets

        datasets.config.HF_HUB_OFFLINE = True
    return False


def cached_commit(dataset: str, revision: str) -> str | None:
    """The commit that a data set's branch or tag was when this machine last asked the Hub; None where it never did.

    The cache's layout is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    from huggingface_hub import constants

    ref = Path(constants.HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}" / "refs" / revision
    try:
        return ref.read_text().strip()
    except (OSError, ValueError):
        return None


def out_of_reach(error: BaseException) -> str | None:
    """Why something of the Hub could not be read here though it may well be there; None for every other error."""
    from huggingface_hub.errors import GatedRepoError

    if not hub_reachable():
        return "the Hub cannot be reached from here"
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, GatedRepoError):
            return (
                "access to it must be asked for on its page of the Hub, and this machine be logged in (hf auth login)"
            )
        chain = chain.__cause__ or chain.__context__
    return None
