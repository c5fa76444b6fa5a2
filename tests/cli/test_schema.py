"""``peftsearch schema``: what editors are told about study files is what the study file's model says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_study import Result
from jsonschema import Draft202012Validator

from peftsearch.methods import METHODS
from peftsearch.schema import study_schema
from peftsearch.spec import StudyError, StudyFile
from peftsearch.spec.yaml_file import parse_yaml

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "peftsearch" / "study.schema.json"
STUDIES = sorted((ROOT / "studies").rglob("*.yaml"))
SMALL = """
name: small
model: some/model
domains: {legal: {data: {source: a.csv}}}
methods: {lora: {rank: [1, 2]}, full: }
"""


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(study_schema())
    return Draft202012Validator(study_schema())


def test_the_shipped_file_is_what_the_command_prints(peftsearch: Callable[..., Result]) -> None:
    result = peftsearch("schema")
    assert (result.status, result.err) == (0, "")
    assert result.out == SHIPPED.read_text(), "write it anew: peftsearch schema > peftsearch/study.schema.json"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_file_of_ours_fits(path: Path, validator: Draft202012Validator) -> None:
    document, _ = parse_yaml(path.read_text(), path.name)
    assert not [f"{list(error.path)}: {error.message}" for error in validator.iter_errors(document)]


def test_files_that_name_a_schema_name_this_one() -> None:
    named = [path for path in STUDIES if "yaml-language-server" in path.read_text()]
    assert ROOT / "studies" / "quickstart.yaml" in named
    for path in named:
        first = path.read_text().splitlines()[0]
        head, _, place = first.partition("$schema=")
        assert head == "# yaml-language-server: "
        assert (path.parent / place).resolve() == SHIPPED


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"models": ["a/b", {"path": "c", "revision": "main"}], "model": None},
        {"domains": {"legal": {"data": {"source": "a.csv", "limit": [16, 64]}}}},
        {"domains": {"legal": {"data": {"source": "a.csv", "limit": 16}}}},
        {"domains": {"s": {"task": "summarization", "data": {"source": "a"}, "options": {"generation": {"beams": 4}}}}},
        {"methods": {"lora": {"rank": {"low": 1, "high": 64, "log": True}, "training": {"epochs": 2}}}},
        {"methods": {name: {} for name in METHODS}},
        {"search": {"trials": 4, "max_parameters": None}},
        # Refused, by both.
        {"serch": {"trials": 4}},
        {"search": {"trials": 0}},
        {"search": {"sampler": "best"}},
        {"name": "a/b"},
        {"model": None},
        {"methods": {}},
        {"methods": {"lora": {"rank": []}}},
        {"methods": {"lora": {"rank": {"low": 1, "hihg": 2}}}},
        {"methods": {"lora": {"training": {"epoch": 2}}}},
        {"domains": {"le gal": {"data": {"source": "a.csv"}}}},
        {"domains": {"legal": {"data": {"source": "a.csv", "format": "xlsx"}}}},
        {"domains": {}},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_it_accepts_what_the_study_file_accepts(change: dict[str, Any], validator: Draft202012Validator) -> None:
    document, _ = parse_yaml(SMALL, "small")
    document = {key: value for key, value in {**document, **change}.items() if value is not None}
    try:
        StudyFile(document)
        accepted = True
    except StudyError:
        accepted = False
    assert validator.is_valid(document) == accepted


@pytest.mark.parametrize(
    "change",
    [
        {"methods": {"lorra": {}}},
        {"methods": {"lora": {"ranks": 4}}},
        {"methods": {"lora": {"rank": 0}}},
        {"methods": {"lora": {"variant": "dorra"}}},
        {"domains": {"legal": {"task": "classify", "data": {"source": "a.csv"}}}},
        {"domains": {"legal": {"data": {"source": "a.csv"}, "options": {"beams": 4}}}},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_it_knows_methods_and_tasks(change: dict[str, Any], validator: Draft202012Validator) -> None:
    """What `peftsearch validate` refuses when it plans, an editor marks already."""
    assert not validator.is_valid({**parse_yaml(SMALL, "small")[0], **change})


def test_an_editor_can_explain_every_key() -> None:
    schema = study_schema()
    for name, method in METHODS.items():
        keys = schema["properties"]["methods"]["properties"][name]["properties"]
        assert set(keys) == {*method.hyperparameters, "training"}
        assert all("description" in keys[key] and "default" in keys[key] for key in method.hyperparameters)
    for section in ("SearchSpec", "TrainingSpec", "ResourcesSpec", "TrackingSpec", "ConfirmSpec"):
        assert all("description" in key for key in schema["$defs"][section]["properties"].values()), section
