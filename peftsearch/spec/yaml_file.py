"""Reading YAML so that every later complaint can name the line it is about."""

from __future__ import annotations

import re
from typing import Any

import yaml

from peftsearch.spec.errors import StudyError, first_line

Loc = tuple[str | int, ...]

MERGE = "tag:yaml.org,2002:merge"
# Aliases can make a short text arbitrarily large.
MOST_KEYS = 100_000


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers and booleans.

    PyYAML follows YAML 1.1, where ``1e-4`` is a string and ``off`` is a boolean; both would surprise in a study file
    (https://github.com/yaml/pyyaml/issues/173).
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> tuple[Any, dict[Loc, int]]:
    """Parse YAML text into plain Python values.

    Args:
        text: The document.
        where: What to call it in errors, usually the file's name.

    Returns:
        The value, and the line number (from 1) at which the value of each key path begins.

    Raises:
        StudyError: The text is not YAML, or a key stands twice.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise StudyError(f"{where}, line {line}: not valid YAML: {error.reason}") from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[Loc, int] = {}
        _index(loader, node, (), lines, where, set())
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}" if mark else where
        problem = error.problem or error.context
        if error.context and str(problem).startswith("but "):
            problem = f"{error.context}, {problem}"
        raise StudyError(f"{place}: not valid YAML: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, StudyError):
            raise
        raise StudyError(f"{where}: not valid YAML: {first_line(error)}") from None
    finally:
        loader.dispose()


def _index(loader: _Loader, node: yaml.Node, loc: Loc, lines: dict[Loc, int], where: str, open_nodes: set[int]) -> None:
    if len(lines) > MOST_KEYS:
        raise StudyError(f"{where}: more than {MOST_KEYS} entries: no study is that large (look at its aliases)")
    if id(node) in open_nodes:
        raise StudyError(f"{where}, line {node.start_mark.line + 1}: an alias contains itself")
    open_nodes.add(id(node))
    lines.setdefault(loc, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise StudyError(f"{where}, line {key_node.start_mark.line + 1}: a key must be a plain word")
            key_loc = (*loc, str(key_node.value))
            if key_loc in lines and key_node.tag != MERGE:
                raise StudyError(
                    f"{where}, line {key_node.start_mark.line + 1}: {key_node.value!r} stands twice; keep one of them"
                )
            if not _is_unicode(key_node.value):
                raise StudyError(
                    f"{where}, line {key_node.start_mark.line + 1}: broken Unicode (half of a surrogate pair)"
                )
            lines[key_loc] = key_node.start_mark.line + 1
            if key_node.tag != MERGE:
                # A key is a name, also where it looks like a number or a truth value: a domain may be called 2024.
                key_node.tag = "tag:yaml.org,2002:str"
            _index(loader, value_node, key_loc, lines, where, open_nodes)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _index(loader, item, (*loc, position), lines, where, open_nodes)
    elif isinstance(node, yaml.ScalarNode):
        if not _is_unicode(node.value):
            raise StudyError(f"{where}, line {node.start_mark.line + 1}: broken Unicode (half of a surrogate pair)")
        try:
            loader.construct_object(node)
        except yaml.YAMLError:
            raise
        except Exception:
            # What a value under a tag such as !!int raises depends on the tag.
            kind, place = node.tag.rpartition(":")[2], f"{where}, line {node.start_mark.line + 1}"
            raise StudyError(f"{place}: not valid YAML: {node.value[:60]!r} is not a value of type {kind}") from None
    open_nodes.discard(id(node))


def _is_unicode(text: str) -> bool:
    """Whether the text can be written to a file: YAML's escapes can make what no encoding has."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
