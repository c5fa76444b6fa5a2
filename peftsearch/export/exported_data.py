"""A domain's data as an exported tokenizer makes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peftsearch.domains import prepare_domain
from peftsearch.domains.models import architecture_of, model_config

if TYPE_CHECKING:
    from peftsearch.domains import PreparedDomain
    from peftsearch.spec import StudySpec


def prepare_with(
    tokenizer: Path,
    domain: str,
    spec: StudySpec,
    *,
    folder: Path,
    cache: Path,
    base: str,
    revision: str | None,
    trust_remote_code: bool,
) -> PreparedDomain:
    """The tokenised data; where the tokenizer is the base's, it is in the study's cache already.

    Args:
        tokenizer: Folder of the tokenizer.
        domain: The domain's name.
        spec: The study that describes it.
        folder: Relative paths in the study start there.
        cache: Where tokenised data is kept.
        base: Folder or Hub id of the model whose configuration counts.
        revision: Its Hub revision.
        trust_remote_code: Whether code that the model brings along may run.

    Raises:
        StudyError: The data is wrong or gone, or the configuration cannot be read.
    """
    config = model_config(base, revision, trust_remote_code=trust_remote_code)
    return prepare_domain(
        domain,
        spec,
        folder=folder,
        model_location=str(tokenizer),
        revision=None,
        cache=cache,
        architecture=architecture_of(config),
        config=config,
    )
