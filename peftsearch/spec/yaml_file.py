"""Reading YAML so that every later complaint can name the line it is about."""

from __future__ import annotations

import re
from typing import Any

import yaml

from peftsearch.spec.errors import StudyError

Loc = tuple[str | int, ...]


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
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[Loc, int] = {}
        _index(node, (), lines, where, set())
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}" if mark else where
        raise StudyError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, StudyError):
            raise
        raise StudyError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None
    finally:
        loader.dispose()


def _index(node: yaml.Node, loc: Loc, lines: dict[Loc, int], where: str, open_nodes: set[int]) -> None:
    if id(node) in open_nodes:
        raise StudyError(f"{where}, line {node.start_mark.line + 1}: an alias contains itself")
    open_nodes.add(id(node))
    lines.setdefault(loc, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise StudyError(f"{where}, line {key_node.start_mark.line + 1}: a key must be a plain word")
            key_loc = (*loc, str(key_node.value))
            if key_loc in lines and key_node.tag != "tag:yaml.org,2002:merge":
                raise StudyError(
                    f"{where}, line {key_node.start_mark.line + 1}: {key_node.value!r} stands twice; keep one of them"
                )
            lines[key_loc] = key_node.start_mark.line + 1
            _index(value_node, key_loc, lines, where, open_nodes)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _index(item, (*loc, position), lines, where, open_nodes)
    open_nodes.discard(id(node))
