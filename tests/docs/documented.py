"""What the documentation says to type: its code blocks, the commands in its sentences and tables, and the examples of
``--help``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from peftsearch.cli.app import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    *("README.md", "studies/README.md", "cluster/README.md", "dashboards/README.md"),
    "tests/benchmarks/README.md",
)
_PROGRAM: Any = typer.main.get_command(app)
VERBS: dict[str, Any] = _PROGRAM.commands

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        document: The file, from the repository's root.
        line: Where its text begins.
        language: The word behind the fence; empty where there is none.
        text: What stands in it, without the indentation of the fence.
        marker: The word of the comment on the line before (``<!-- quickstart -->``), which `.ci/run` looks for.
    """

    document: str
    line: int
    language: str
    text: str
    marker: str | None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def lines(self) -> Iterator[str]:
        """The shell's lines, continued ones joined, without comments and empty ones."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.strip().startswith("#"):
                yield line.strip()


def blocks(document: str) -> list[Block]:
    """All fenced blocks of a document."""
    text = (ROOT / document).read_text()
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].rstrip("\n").rsplit("\n", 1)[-1]
        marker = re.fullmatch(r"<!-- (\w+) -->", before)
        indent = len(match[1])
        inside = "".join(line[indent:] if line.strip() else line for line in match[3].splitlines(keepends=True))
        found.append(
            Block(document, text.count("\n", 0, match.start()) + 2, match[2], inside, marker[1] if marker else None)
        )
    # Each fence opens or closes a block that was found.
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(found), document
    return found


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]


def spans() -> list[tuple[str, str]]:
    """Every piece of code inside a sentence or a table, with its document."""
    found = []
    for document in DOCUMENTS:
        text = _FENCE.sub("", (ROOT / document).read_text())
        found += [(document, " ".join(span.split())) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    return found


def named_commands() -> list[tuple[str, str]]:
    """The calls of peftsearch in sentences (``peftsearch VERB ...``) and in the README's table (``VERB NAME ...``)."""
    found = []
    for document, span in spans():
        words = span.split()
        if words[0] == "peftsearch" and len(words) > 1:
            found.append((document, span))
        elif words[0] in VERBS and len(words) > 1 and not words[1].startswith("-"):
            found.append((document, f"peftsearch {span}"))
    return found


def examples() -> list[str]:
    """The example of every command's help."""
    found = []
    for name, command in VERBS.items():
        shown = re.findall(r"Example: `(.+?)`", " ".join(command.help.split()))
        assert len(shown) == 1, name
        found += shown
    return found


def programs(line: str) -> list[str]:
    """The programs that a line of shell calls, substitutions outside quotes included."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found, expected = [], True
    for word in lexer:
        if set(word) <= set("();<>|&"):
            # A word behind a redirection is a file; behind () a function's body begins.
            expected = word[-1] in "(;|&" or word == "()"
        elif expected and word not in ("{", "}") and not re.match(r"\w+=", word):
            found.append(word)
            expected = False
    return found


def alternatives(line: str) -> list[str]:
    """What a synopsis stands for: each ``a|b`` once, everything in brackets given."""
    line = re.sub(r"\[(ROLE)=\]", r"\1=", line.replace("\\|", "|")).replace("...", " ")
    line = re.sub(r"\[|\]", " ", line)
    choices = re.findall(r"\S+\|\S+", line)
    count = max((choice.count("|") + 1 for choice in choices), default=1)
    found = []
    for index in range(count):
        text = line
        for choice in choices:
            several = choice.split("|")
            text = text.replace(choice, several[min(index, len(several) - 1)], 1)
        found.append(" ".join(text.split()))
    return found


def is_call(line: str) -> bool:
    """Whether a line calls a command, and does not only name it: it has arguments, or its command needs none."""
    verb, *arguments = shlex.split(line.removesuffix("..."), comments=True)[1:]
    return bool(arguments) or (verb in VERBS and not any(parameter.required for parameter in VERBS[verb].params))


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """A call of peftsearch as its real command line understands it.

    Returns:
        The command and its parameters.

    Raises:
        typer.TyperException: There is no such command or option, or a value is none.
    """
    program, verb, *arguments = shlex.split(line, comments=True)
    assert Path(program).name == "peftsearch", line
    if verb.startswith("-"):
        # An option of the program itself, such as --install-completion.
        assert verb in {option for parameter in _PROGRAM.params for option in parameter.opts}, line
        return verb, {}
    assert verb in VERBS, f"{line}: no command {verb!r}"
    context = VERBS[verb].make_context(verb, arguments)
    return verb, context.params
