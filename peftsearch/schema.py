"""The study file as a JSON Schema (https://json-schema.org, draft 2020-12), for editors that complete, explain and
check YAML while it is written.

``study.schema.json`` beside this file is what `study_schema` returns, as ``peftsearch schema`` prints it. An editor
knows one file and one key at a time: what depends on the data or on the model, `peftsearch validate` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peftsearch.domains.tasks.registry import TASKS
from peftsearch.methods import METHODS
from peftsearch.methods.base import Hyperparameter
from peftsearch.spec import Range, Space, StudySpec
from peftsearch.spec.study import NAME_PATTERN

_NAMES = {"pattern": f"^{NAME_PATTERN}$"}

Json = dict[str, Any]


def study_schema() -> Json:
    """The schema of a study file: keys with their meaning and default, methods with their hyperparameters and bounds,
    tasks with their options.

    It accepts every study file that `peftsearch.spec.StudyFile` accepts, except numbers written as texts (``"3"``).
    """
    schema = _without_titles(StudySpec.model_json_schema(mode="validation"))
    defs: Json = schema["$defs"]
    # What the specification makes of short forms before it checks them (`StudySpec`), a file may write.
    defs["ModelSpec"] = {"anyOf": [{"type": "string", "minLength": 1}, defs["ModelSpec"]]}
    defs["DataSpec"]["properties"]["limit"] = {
        "anyOf": [
            {"$ref": "#/$defs/LimitSpec"},
            {"type": "integer", "minimum": 1},
            {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "uniqueItems": True},
        ],
        "description": defs["LimitSpec"].pop("description")
        + " A number, or a list for a few-shot curve, limits train.",
    }
    defs["DomainSpec"] = _domain(defs["DomainSpec"], defs)
    del defs["MethodSpec"], defs["Range"]
    properties: Json = schema["properties"]
    properties["name"] |= _NAMES
    properties["domains"] |= {"propertyNames": _NAMES, "description": "A data set with a task, under a name of yours"}
    properties["methods"] = {
        "type": "object",
        "description": properties["methods"]["description"],
        "minProperties": 1,
        "additionalProperties": False,
        "properties": {name: _method(name) for name in METHODS},
    }
    model = {"$ref": "#/$defs/ModelSpec", "description": "The base model: a Hub id, a folder or package:NAME/FOLDER"}
    schema["properties"] = {"name": properties.pop("name"), "model": model, **properties}
    schema["required"] = [key for key in schema["required"] if key != "models"]
    schema["oneOf"] = [{"required": ["model"]}, {"required": ["models"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A peftsearch study", **schema}


def _method(name: str) -> Json:
    method = METHODS[name]
    spaces = {key: _space(hyperparameter) for key, hyperparameter in method.hyperparameters.items()}
    training = {"$ref": "#/$defs/MethodTraining"}
    return {
        "description": f"{method.title}: {method.source}",
        # A name without anything behind it takes all defaults, as {} does.
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {**spaces, "training": training},
    }


def _space(hyperparameter: Hyperparameter) -> Json:
    """A fixed value, a list of choices, or a range."""
    value: Json = {
        "type": {"int": "integer", "float": "number", "str": "string", "bool": "boolean"}[hyperparameter.kind]
    }
    for bound, limit in (("minimum", hyperparameter.minimum), ("maximum", hyperparameter.maximum)):
        if hyperparameter.kind in ("int", "float") and math.isfinite(limit):
            value[bound] = limit
    if hyperparameter.choices is not None:
        value["enum"] = list(hyperparameter.choices)
    forms: list[Json] = [value, {"type": "array", "items": value, "minItems": 1, "uniqueItems": True}]
    if hyperparameter.kind in ("int", "float"):
        fields = _without_titles(Range.model_json_schema())
        ends = {key: {**value, "description": fields["properties"][key]["description"]} for key in ("low", "high")}
        forms.append({**fields, "properties": {**fields["properties"], **ends}})
    return {"description": hyperparameter.meaning, "default": _plain(hyperparameter.space), "anyOf": forms}


def _domain(domain: Json, defs: Json) -> Json:
    """A domain whose options, and the metrics that an editor proposes, are those of its task."""
    cases = []
    for name, task in TASKS.items():
        options = _without_titles(task.Options.model_json_schema(ref_template="#/$defs/{model}"))
        defs |= options.pop("$defs", {})
        metrics = [*task.metrics, *task.optional_metrics, *(f"{kind}/LABEL" for kind in task.label_metrics)]
        given: Json = {"properties": {"task": {"const": name}}}
        if name != domain["properties"]["task"]["default"]:
            given["required"] = ["task"]
        cases.append({"if": given, "then": {"properties": {"options": options, "metric": {"examples": metrics}}}})
    domain["properties"]["task"]["enum"] = list(TASKS)
    return {**domain, "allOf": cases}


def _plain(space: Space) -> Any:
    if isinstance(space, Range):
        return space.model_dump(exclude_defaults=True)
    return list(space) if isinstance(space, tuple) else space


def _without_titles(value: Any, *, names: bool = False) -> Any:
    """Without the titles that pydantic makes of the keys' names: editors would show them as if they said something.

    Args:
        value: A part of a schema.
        names: Whether its keys are names of a study file rather than words of JSON Schema.
    """
    if isinstance(value, list):
        return [_without_titles(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: _without_titles(item, names=not names and key in ("properties", "$defs"))
        for key, item in value.items()
        if names or key != "title"
    }
