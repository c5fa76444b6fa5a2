"""What a study file says otherwise than it did when its study was begun, and whether the study can go on with it.

A study goes on where the trials that it has would be the same under the new file. More of the same extends it: more
trials, more seeds to confirm with, further domains, models and methods. New cells get the trials that every cell gets,
are seen at the full budget like every cell (`peftsearch.search.halving`), and their trials meet the recorded ones at
the rungs; so the front stays what it is: the best of all trials that reached the full budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftsearch.spec.errors import StudyError

_FREE = (("resources",), ("description",), ("tracking", "mlflow"), ("confirm", "prompted_examples"))
"""How and where a study is run and shown, which is no part of its question; and what each reading says of itself."""

_COMPUTED = frozenset({"evaluation_batch_size", "gradient_accumulation", "gradient_checkpointing", "compile"})
"""Of ``training``: how the same batches are computed, in less memory or time. Numbers differ by rounding, and dropout
draws other masks; so a study whose trials do not fit can go on."""

_GROWING = {("search", "trials"): "trials per cell", ("confirm", "seeds"): "seeds to confirm with"}

_WIDER = {"front": {"both", "all"}, "methods": {"both", "all"}, "both": {"all"}}
"""Of ``confirm.finalists``: what confirms the same trials and more."""

_SECTIONS = {"models": "model", "domains": "domain", "methods": "method"}

_ABSENT = object()

Key = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One setting.

    Attributes:
        key: Where it is.
        old: Its value when the study was begun; `ABSENT` where it was not there.
        new: What the file says now; `ABSENT` where it is not there any more.
    """

    key: Key
    old: Any
    new: Any

    @property
    def lines(self) -> list[str]:
        """As in a unified diff."""
        sides = (("-", self.old), ("+", self.new))
        return [f"  {sign} {written(self.key)}: {_value(value)}" for sign, value in sides if value is not _ABSENT]


@dataclass(frozen=True)
class Changes:
    """All of them.

    Attributes:
        extending: What the study gets more of, in words.
        refused: Settings under which recorded trials would not be what they are.
        fewer: Settings that would have fewer trials than there may be already.
    """

    extending: tuple[str, ...] = ()
    refused: tuple[Change, ...] = ()
    fewer: tuple[Change, ...] = ()

    def check(self, study: str) -> None:
        """Refuse a file that asks another question.

        Raises:
            StudyError: It does; with all that has changed, and what to do.
        """
        changes = [*self.refused, *self.fewer]
        if not changes:
            return
        lines = [f"the study {study!r} was begun with other settings than the file has now:"]
        lines += [line for change in changes for line in change.lines]
        for change in self.fewer:
            lines.append(f"{written(change.key)} can grow but not shrink: what was run stays in the ledger.")
        lines.append(
            "Put them back, or start a new study with --name NEW; "
            f"--name NEW --fork {study} takes over the trials of cells that have not changed"
        )
        raise StudyError("\n".join(lines))


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Compare two specifications, as JSON (``StudySpec.model_dump(mode="json")``)."""
    old, new = by_name(before), by_name(now)
    extending: list[str] = []
    added: set[Key] = set()
    for section, word in _SECTIONS.items():
        for name in new[section]:
            if name not in old[section]:
                added.add((section, name))
                extending.append(f"the {word} {name}")
    refused, fewer = [], []
    flat_old, flat_new = flat(old), flat(new)
    for key in [*flat_old, *(key for key in flat_new if key not in flat_old)]:
        change = Change(key, flat_old.get(key, _ABSENT), flat_new.get(key, _ABSENT))
        if change.old == change.new or key[:2] in added or _free(key):
            continue
        if key in _GROWING:
            if change.new > change.old:
                extending.append(f"{_GROWING[key]}: {change.new} instead of {change.old}")
            else:
                fewer.append(change)
        elif key == ("confirm", "finalists") and change.new in _WIDER.get(change.old, ()):
            extending.append(f"finalists: {change.new} instead of {change.old}")
        else:
            refused.append(change)
    return Changes(tuple(extending), tuple(refused), tuple(fewer))


def unchanged_cells(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[tuple[str, str, str]]:
    """The (model, domain, method) whose trials would be the same under both specifications, given the same data.

    That is where nothing has changed that shapes them: the model, the domain, the method's space and training, the
    study's ``training``, ``forgetting`` and ``search``, but for the number of trials, how batches are computed, and
    what prompts call the labels, which no trained model reads.
    """
    old, new = by_name(before), by_name(now)
    for side in (old, new):
        side["search"] = {key: value for key, value in side["search"].items() if key != "trials"}
        side["training"] = _deciding(side["training"])
        side["domains"] = {name: _without_names(domain) for name, domain in side["domains"].items()}
        side["methods"] = {
            name: {**method, "training": _deciding(method["training"])} for name, method in side["methods"].items()
        }
    if any(old[section] != new[section] for section in ("search", "training", "forgetting")):
        return set()

    def same(section: str) -> list[str]:
        return [name for name in new[section] if old[section].get(name) == new[section][name]]

    return {
        (model, domain, method) for model in same("models") for domain in same("domains") for method in same("methods")
    }


def _free(key: Key) -> bool:
    training = key[:1] == ("training",) or (key[:1] == ("methods",) and key[2:3] == ("training",))
    return any(key[: len(free)] == free for free in _FREE) or (training and key[-1] in _COMPUTED)


def _deciding(training: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if key not in _COMPUTED}


def _without_names(domain: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in domain["options"].items() if key != "names"}
    return {**domain, "options": options}


def by_name(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A specification whose models are a mapping by path, as domains and methods are by name."""
    models = {model["path"]: {key: value for key, value in model.items() if key != "path"} for model in spec["models"]}
    return {**{key: value for key, value in spec.items() if key != "name"}, "models": models}


def flat(value: Any, prefix: Key = ()) -> dict[Key, Any]:
    """Nested mappings as one, by the keys that lead to each value."""
    if not isinstance(value, Mapping) or (not value and prefix):
        return {prefix: value}
    found: dict[Key, Any] = {}
    for key, item in value.items():
        found |= flat(item, (*prefix, str(key)))
    return found


def written(key: Key) -> str:
    """A key as the study file has it: a method's hyperparameters stand beside its training."""
    if key[0] == "methods" and len(key) > 2 and key[2] == "space":
        key = (*key[:2], *key[3:])
    return ".".join(key)


def _value(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)
