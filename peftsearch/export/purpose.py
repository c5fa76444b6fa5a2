"""What an exported adapter is for: its task, its labels, and which columns of a table it reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from peftsearch.domains import Task
from peftsearch.domains.models import Architecture, architecture_of, model_config
from peftsearch.domains.tasks import Head, get_task
from peftsearch.export.folder import PROVENANCE, ExportedFolder
from peftsearch.spec import ColumnsSpec, DomainSpec, StudyError, suggest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROLES: dict[str, tuple[str, ...]] = {
    "classification": ("text", "text_pair"),
    "relation": ("text", "text_pair"),
    "multi_label": ("text", "text_pair"),
    "similarity": ("text", "text_pair"),
    "summarization": ("text", "text_pair"),
    "instruction": ("text", "text_pair"),
    "language_modeling": ("text",),
    "token_classification": ("tokens",),
    "question_answering": ("question", "context"),
    "multiple_choice": ("question", "context", "choices"),
}
"""What each task reads of an example, in the study file's words."""


@dataclass(frozen=True)
class Purpose:
    """What an adapter was trained to do, as its folder says.

    Attributes:
        domain: Name of its domain.
        task: With the domain's options.
        architecture: Kind of the base model.
        head: How that kind does the task.
        max_length: Tokens of a text that it sees.
        columns: The column of the study's data for each role, or several (choices); roles that the data did not have
            are absent.
        decoder_start_token_id: What an encoder-decoder's decoder begins with.
    """

    domain: str
    task: Task
    architecture: Architecture
    head: Head
    max_length: int
    columns: Mapping[str, str | tuple[str, ...]]
    decoder_start_token_id: int | None = None

    @classmethod
    def read(cls, exported: ExportedFolder, *, trust_remote_code: bool = False) -> Purpose:
        """What the folder's provenance says.

        Raises:
            StudyError: It is missing or damaged, or the base model cannot be read.
        """
        path = exported.folder / PROVENANCE
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            name, facts = str(known["domain"]["name"]), known["domain"]
            domain = known["specification"]["domains"][name]
            options, data = dict(domain.get("options") or {}), domain["data"]
            # Of data sets that were joined the first one's names stand for all.
            parts = list((data.get("join") or {}).values())
            columns = ColumnsSpec.model_validate((parts[0] if parts else data)["columns"])
            max_length, task_name = int(facts["max_length"]), str(facts["task"])
        except FileNotFoundError:
            raise StudyError(
                f"{str(exported.folder)!r} holds no {PROVENANCE}, which says what the adapter is for: export the trial "
                "again"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ValidationError) as error:
            raise StudyError(
                f"{str(path)!r} does not say what the adapter is for ({type(error).__name__}): export the trial again"
            ) from None
        if task_name == "language_modeling":
            # Each text by itself, so that each has a number of its own.
            options["pack"] = False
        task = get_task(task_name, options=options)
        config = model_config(
            exported.base or str(exported.folder), exported.revision, trust_remote_code=trust_remote_code
        )
        architecture = architecture_of(config)
        if architecture not in task.heads:
            raise StudyError(
                f"the base model of {str(exported.folder)!r} cannot do {task_name}: export the trial again"
            )
        return cls(
            name,
            task,
            architecture,
            task.heads[architecture],
            max_length,
            _mapped(task_name, columns),
            getattr(config, "decoder_start_token_id", None),
        )

    def chosen(self, overrides: Sequence[str], names: Sequence[str]) -> dict[str, str | tuple[str, ...]]:
        """The columns to read, with what the user says.

        Args:
            names: The columns that there are.
            overrides: ``ROLE=COLUMN``, or ``COLUMN`` alone for the task's first role; ``choices=A,B,C`` for several.

        Raises:
            StudyError: The adapter reads no such role, or one is given twice.
        """
        # The context of a question with choices is the one role that data may have or lack, row by row.
        optional = {"context"} if self.task.name == "multiple_choice" else set()
        known = ROLES[self.task.name]
        roles = [role for role in known if role in self.columns or role in optional]
        found = dict(self.columns)
        given: set[str] = set()
        for text in overrides:
            role, equals, column = text.partition("=")
            if not equals:
                role, column = roles[0], text
            role = role.strip()
            if role in known and role not in roles:
                raise StudyError(
                    f"--column {text!r}: the adapter was trained without a {role}: write --column ROLE=NAME with "
                    f"{' or '.join(roles)}"
                )
            if role not in roles:
                raise StudyError(
                    f"{self.task.name} reads no {role!r}{suggest(role, roles)}: write --column ROLE=NAME with one of "
                    f"{', '.join(roles)}"
                )
            if role in given:
                raise StudyError(f"--column names the {role} twice: leave one of them out")
            given.add(role)
            if not column.strip():
                raise StudyError(f"--column {text!r} names no column: write {role}=NAME")
            if role == "choices" and "," in column:
                found[role] = tuple(name.strip() for name in column.split(","))
            else:
                found[role] = column.strip()
        if self.task.name == "multiple_choice" and found["context"] == ColumnsSpec().context not in names:
            # Optional there.
            del found["context"]
        return found


def columns_read(domain: DomainSpec) -> dict[str, str | tuple[str, ...]]:
    """The column (or several) of a domain's data for each role that its task reads; see `Purpose.columns`."""
    parts = list((domain.data.join or {}).values())
    return _mapped(domain.task, (parts[0] if parts else domain.data).columns)


def markers_of(task: Task) -> tuple[str, ...]:
    """What marks the two things in the texts of a relation, where the study file says so; () for other tasks."""
    markers: tuple[str, ...] = task.options.markers if task.name == "relation" else ()
    return markers


def marking(markers: Sequence[str]) -> str:
    """Words for `markers_of`."""
    return f"{' and '.join(map(repr, markers))}, which mark{'s' if len(markers) == 1 else ''} the two things"


def _mapped(task: str, columns: ColumnsSpec) -> dict[str, str | tuple[str, ...]]:
    found: dict[str, str | tuple[str, ...]] = {}
    for role in ROLES[task]:
        name: Any = getattr(columns, role)
        if name is not None:
            found[role] = tuple(name) if isinstance(name, list) else name
    return found
