"""From a path, a text or a mapping to a checked `StudySpec`, with errors that name the line and the fix."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from peftsearch.spec.errors import StudyError
from peftsearch.spec.space import Range
from peftsearch.spec.study import MethodTraining, StudySpec
from peftsearch.spec.yaml_file import Loc, parse_yaml

MOST_BYTES = 10_000_000
"""No study file is larger; a device file such as /dev/zero has no end."""


class StudyFile:
    """A study as it was written: the specification, and where each part of it stands.

    Args:
        data: The parsed document.
        where: What to call it in errors: the file's name.
        lines: Line of each key path, where known.
        folder: Relative paths in the study are relative to it.
        text: The file's text, where there is one.
    """

    def __init__(
        self,
        data: Any,
        where: str = "study",
        lines: Mapping[Loc, int] | None = None,
        folder: Path | None = None,
        text: str | None = None,
    ) -> None:
        self.where = where
        self.text = text
        self.lines = dict(lines or {})
        self.folder = folder or Path.cwd()
        if not isinstance(data, Mapping):
            raise StudyError(f"{where}: expected a study (keys such as 'name', 'model', 'domains', 'methods')")
        try:
            self.spec = StudySpec.model_validate(data)
        except ValidationError as error:
            raise self._translate(error) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> StudyFile:
        """Read and check a study file.

        Args:
            path: The YAML file.
            overrides: ``key=value`` settings with dotted keys, for example ``search.trials=4``; values are YAML.

        Raises:
            StudyError: The file cannot be read, or something in it (or in an override) is wrong.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = file.read(MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                raise StudyError(f"{str(path)!r} is larger than {MOST_BYTES // 10**6} MB: no study file is")
            # As text files are read: a line may end in \r\n.
            text = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except FileNotFoundError:
            raise StudyError(f"no study file {str(path)!r}: check the path") from None
        except IsADirectoryError:
            raise StudyError(f"{str(path)!r} is a folder: name the study's YAML file in it") from None
        except StudyError:
            raise
        except (OSError, ValueError) as error:
            raise StudyError(f"cannot read the study file {str(path)!r}: {error}") from None
        return cls.parse(text, where=path.name, folder=path.resolve().parent, overrides=overrides)

    @classmethod
    def parse(
        cls, text: str, where: str = "study", folder: Path | None = None, overrides: Iterable[str] = ()
    ) -> StudyFile:
        """As `load`, from the file's text."""
        data, lines = parse_yaml(text, where)
        if isinstance(data, dict):
            for override in overrides:
                _apply_override(data, override)
        return cls(data, where, lines, folder, text)

    def explain(self, error: StudyError) -> str:
        """The error's sentence, with the place in the file in front where the error knows its place."""
        if not error.loc:
            return error.message
        return f"{self._place(error.loc)}: {error.message}"

    def _place(self, loc: Loc) -> str:
        loc = self._as_written(loc)
        known = list(loc)
        while known and tuple(known) not in self.lines:
            known.pop()
        line = f", line {self.lines[tuple(known)]}" if known else ""
        dotted = ".".join(" ".join(str(part).split())[:80] for part in loc)
        return f"{self.where}{line}: {dotted}" if dotted else f"{self.where}{line}"

    def _translate(self, error: ValidationError) -> StudyError:
        problems = error.errors()
        # One sentence, about the first problem in the order of the file. That a list came out too short only follows
        # from what is wrong with its items, where there is such a thing.
        first = min(
            problems, key=lambda item: (item["type"] == "too_short", self.lines.get(self._visible(item["loc"]), 10**9))
        )
        loc = self._visible(first["loc"])
        if first["type"] == "extra_forbidden":
            message = f"unknown key{suggest(str(loc[-1]), _keys_at(loc[:-1]))}"
        else:
            message = problem(first)
        return StudyError(f"{self._place(loc)}: {message}")

    def _visible(self, loc: tuple[int | str, ...]) -> Loc:
        """Drop what pydantic adds to a location: names of union members and validators."""
        parts: list[int | str] = []
        for part in loc:
            if isinstance(part, str) and (
                part.startswith(("function-", "constrained-", "literal[")) or part in ("Range", "int", "[key]")
            ):
                break
            parts.append(part)
        parts = list(self._as_written(tuple(parts)))
        if parts[:2] == ["models", 0] and ("models",) not in self.lines:
            parts = ["model", *parts[2:]]
        if parts[-1:] == ["path"] and tuple(parts[:-1]) in self.lines and not self._is_section(tuple(parts[:-1])):
            # A model that was written as a plain string.
            parts.pop()
        return tuple(parts)

    def _as_written(self, loc: Loc) -> Loc:
        """Where a place of the specification stands in the file: search spaces have no section of their own there, and
        the domains of a few-shot curve stand there once."""
        parts = list(loc)
        if parts[:1] == ["methods"] and parts[2:3] == ["space"]:
            del parts[2]
        if parts[:1] == ["domains"] and len(parts) > 1 and tuple(parts[:2]) not in self.lines:
            name, _, size = str(parts[1]).rpartition("-")
            if size.isdigit() and ("domains", name) in self.lines:
                parts[1] = name
        return tuple(parts)

    def _is_section(self, loc: Loc) -> bool:
        return any(len(known) > len(loc) and known[: len(loc)] == loc for known in self.lines)


def problem(details: Mapping[str, Any]) -> str:
    """What pydantic found wrong with a value, in the words of a study file, to stand behind its place.

    Args:
        details: One of `pydantic.ValidationError.errors`.
    """
    kind, value = details["type"], details.get("input")
    if kind == "missing":
        return "is missing"
    if kind in ("value_error", "assertion_error"):
        return str(details.get("ctx", {}).get("error", details["msg"]))
    if kind in ("literal_error", "enum"):
        return f"{_brief(value)} is not one of {details['ctx']['expected']}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "string_type" and isinstance(value, bool | int | float):
        # YAML reads false, no and 3 as other things than words.
        return f"must be a text, not {_brief(value)}: write it in quotes"
    return f"must be {_expected(kind, details['msg'])}, not {_brief(value)}"


def _expected(kind: str, message: str) -> str:
    """What pydantic wanted, in the words of a study file."""
    words = {
        "model_type": "a section of keys and values",
        "model_attributes_type": "a section of keys and values",
        "dict_type": "a section of keys and values",
        "list_type": "a list",
        "tuple_type": "a list",
        "string_type": "a text",
        "bool_type": "true or false",
        "bool_parsing": "true or false",
        "int_type": "a whole number",
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "float_parsing": "a number",
    }
    return words.get(kind, message.removeprefix("Input should be "))


def _keys_at(loc: Loc) -> list[str]:
    if loc[:1] == ("methods",):
        if loc[2:] == ("training",):
            return list(MethodTraining.model_fields)
        return list(Range.model_fields) if len(loc) == 3 else []
    model: Any = StudySpec
    for part in loc:
        if part == "domains" or part == "methods" or part == "models" or part == "model":
            model = {"domains": "domain", "methods": None}.get(str(part), "model")
            continue
        if model == "domain":
            from peftsearch.spec.study import DomainSpec

            model = DomainSpec
            continue
        if isinstance(model, type) and issubclass(model, BaseModel) and str(part) in model.model_fields:
            model = model.model_fields[str(part)].annotation
    if model == "model":
        from peftsearch.spec.study import ModelSpec

        model = ModelSpec
    if isinstance(model, type) and issubclass(model, BaseModel):
        return [*model.model_fields, *(["model"] if model is StudySpec else [])]
    return []


def suggest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` or ``"; known: a, b"``, to end a sentence about an unknown word."""
    names = sorted(known)
    if not names:
        return ""
    # Letter case is the likeliest slip: "LoRA".
    lower = {name.casefold(): name for name in reversed(names)}
    close = difflib.get_close_matches(word.casefold(), lower, n=1)
    if close:
        return f"; did you mean {lower[close[0]]!r}?"
    listed = ", ".join(names[:25])
    return f"; known: {listed}" + (f" and {len(names) - 25} more" if len(names) > 25 else "")


def _brief(value: Any) -> str:
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise StudyError(f"--set {override!r}: write key=value, for example --set search.trials=4")
    shown = " ".join(override.split())
    value, _ = parse_yaml(text, f"--set {shown}" if len(shown) <= 80 else f"--set {shown[:77]}...")
    place = data
    for part in path[:-1]:
        child = place.setdefault(part, {})
        if child is None:
            child = place[part] = {}
        if not isinstance(child, dict):
            raise StudyError(f"--set {override!r}: {part!r} holds a value, not a section")
        place = child
    place[path[-1]] = value
