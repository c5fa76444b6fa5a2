"""What ``validate`` could not check where it ran, and what it planned with instead."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftsearch.spec import DataSpec, ModelSpec, StudyError, UnreachableError, first_line, suggest
from peftsearch.training.segment import ModelPlace


class Unchecked:
    """Collects what is not at hand; or refuses it.

    Args:
        allowed: Whether a plan may do without it.
    """

    def __init__(self, *, allowed: bool) -> None:
        self._allowed = allowed
        self._sentences: dict[tuple[str, str], str] = {}

    @property
    def models(self) -> frozenset[str]:
        """Paths of the models that cannot be read."""
        return frozenset(name for kind, name in self._sentences if kind == "model")

    @property
    def sentences(self) -> tuple[str, ...]:
        """Which, why, and what it means; one sentence each."""
        return tuple(self._sentences.values())

    def model(self, model: ModelSpec, error: UnreachableError, cells: int) -> None:
        """A model cannot be read.

        Args:
            model: The model.
            error: Why.
            cells: Cells of it.
        """
        if model.config is None:
            meaning = f"its {cells} cells are not in this plan; write its sizes under 'config' to count them"
        else:
            meaning = "planned with the 'config' of the study file; its weights and tokenizer are unchecked"
        self._add("model", model.path, error, meaning)

    def tokenizer(self, model: str, error: UnreachableError) -> None:
        """A model's configuration can be read, and its tokenizer cannot."""
        self._add("tokenizer", model, error, "lengths of texts are expected ones, not counted")

    def data(self, domain: str, data: DataSpec, error: UnreachableError) -> None:
        """A domain's data is not at hand."""
        parts = [data] if data.join is None else list(data.join.values())
        known = all(part.expected is not None for part in parts)
        meaning = (
            "planned with what 'expected' says of it; its rows, columns and labels are unchecked"
            if known
            else "planned with 1,000 rows of full length, for want of 'expected' in the study file"
        )
        self._add("data", domain, error, meaning)

    def general_text(self, source: str, error: UnreachableError) -> None:
        """The text on which forgetting is to be measured is not at hand."""
        self._add("general text", source, error, "its column is unchecked")

    def _add(self, kind: str, name: str, error: UnreachableError, meaning: str) -> None:
        if not self._allowed:
            raise error
        subject = {
            "model": f"Model {name}",
            "tokenizer": f"Tokenizer of {name}",
            "data": f"Data of {name}",
            "general text": f"General text {name}",
        }[kind]
        self._sentences.setdefault((kind, name), f"{subject}: {error.why}; {meaning}.")


def planned_place(config: Mapping[str, Any], cache: Path, loc: tuple[str | int, ...]) -> ModelPlace:
    """A folder with no more than a configuration, for a model that cannot be read here: enough to count parameters.

    Args:
        config: ``model_type`` and sizes.
        cache: Such folders are kept in ``configs`` there.
        loc: Where the configuration stands in the study file.

    Raises:
        StudyError: `transformers` has no such architecture, or it has no such setting.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    kind = config["model_type"]
    if kind not in CONFIG_MAPPING:
        raise StudyError(
            f"transformers has no architecture {kind!r}{suggest(kind, CONFIG_MAPPING)}", (*loc, "model_type")
        )
    cls: type[PreTrainedConfig] = CONFIG_MAPPING[kind]
    known = cls()
    for key in config:
        if not hasattr(known, key):
            raise StudyError(f"a {kind} has no setting {key!r}{suggest(key, vars(known))}", (*loc, key))
    try:
        built = cls(**{key: value for key, value in config.items() if key != "model_type"})
    except Exception as error:  # transformers validates configurations with errors of many kinds
        raise StudyError(f"not a configuration of {kind}: {first_line(error)}", loc) from None
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    folder = cache / "configs" / digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    built.save_pretrained(folder)
    return ModelPlace(str(folder.resolve()), None)
