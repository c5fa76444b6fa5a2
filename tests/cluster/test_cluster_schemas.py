"""Every file of cluster/ is what the program that reads it expects: checked against its own schema or linter."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cluster_files import (
    CLUSTER,
    LAUNCHED,
    SCRIPTS,
    Document,
    compose,
    installed,
    kubernetes,
    launched,
    of_kind,
    pod_templates,
)

KUBERNETES = "1.34"


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_up_takes_the_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = launched(name)
    validate_config(copy.deepcopy(config))
    prepared = prepare_config(config)
    validate_config(prepared)
    # None of Ray's defaults came in: they start Ray without a token, its dashboard on every interface.
    for part in ("head_start_ray_commands", "worker_start_ray_commands", "setup_commands", "head_setup_commands"):
        assert set(prepared[part]) <= set(config["setup_commands"]) | set(config[part]), part


def test_a_typing_error_in_a_launcher_file_is_seen() -> None:
    from ray.autoscaler._private.util import validate_config

    config = launched("aws.yaml")
    config["available_node_types"]["l4"]["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)


def test_kubernetes_objects_meet_kubernetes_schema() -> None:
    from kubernetes_validate import validate

    core = [document for document in kubernetes() if not document["apiVersion"].startswith("ray.io")]
    assert len(core) > 10
    for document in core:
        validate(document, KUBERNETES, strict=True)


def test_pods_of_kuberay_objects_meet_kubernetes_schema() -> None:
    from kubernetes_validate import ValidationError, validate

    found = [item for document in of_kind(kubernetes(), "RayCluster", "RayJob") for item in pods(document)]
    assert len(found) == 6
    for place, template in found:
        try:
            validate(pod_template(template), KUBERNETES, strict=True)
        except ValidationError as error:
            raise AssertionError(f"{place}: {error}") from None
    autoscaler = dict(found)["RayCluster/peftsearch.spec.autoscalerOptions"]
    autoscaler["spec"]["containers"][0]["securityContext"]["runAsNonroot"] = True
    with pytest.raises(ValidationError, match="runAsNonroot"):
        validate(pod_template(autoscaler), KUBERNETES, strict=True)


def pods(document: Document) -> Iterator[tuple[str, Document]]:
    """Every pod template of KubeRay's object, and one for its autoscaler's container, with its place."""
    yield from pod_templates(document)
    if options := document["spec"].get("rayClusterSpec", document["spec"]).get("autoscalerOptions"):
        container = {key: copy.deepcopy(options[key]) for key in ("resources", "securityContext")}
        place = f"{document['kind']}/{document['metadata']['name']}.spec.autoscalerOptions"
        yield place, {"spec": {"containers": [{"name": "autoscaler", **container}]}}


def pod_template(template: Document) -> Document:
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}


def fields_of(kind: str) -> Document:
    fields = yaml.safe_load((Path(__file__).parent / "kuberay_fields.yaml").read_text())
    return {**fields, "$ref": f"#/$defs/{kind}"}


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberay_objects_use_only_fields_that_we_looked_up(kind: str) -> None:
    (document,) = of_kind(kubernetes(), kind)
    jsonschema.validate(document, fields_of(kind))


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_a_typing_error_in_any_field_of_a_kuberay_object_is_seen(kind: str) -> None:
    """Kubernetes drops fields that it does not know, in silence: a limit with a typing error is none."""
    (document,) = of_kind(kubernetes(), kind)
    validator = jsonschema.Draft202012Validator(fields_of(kind))
    places = list(own_fields(document))
    assert len(places) > 20
    unseen = []
    for *path, field in places:
        broken = copy.deepcopy(document)
        place: Any = broken
        for step in path:
            place = place[step]
        place[f"{field}s"] = place.pop(field)
        if validator.is_valid(broken):
            unseen.append((*path, field))
    assert not unseen


def own_fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every field that is KubeRay's: neither Kubernetes' (`pods`) nor a name of our own."""
    others = ("labels", "rayStartParams", "template", "submitterPodTemplate", "resources", "securityContext")
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from own_fields(item, (*path, number))
    elif isinstance(value, dict):
        for field, item in value.items():
            yield (*path, field)
            if field not in others:
                yield from own_fields(item, (*path, field))


def closed(schema: Any) -> Any:
    """A CRD's schema that refuses fields that it does not list, as ``kubectl --validate=strict`` does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and schema.get("type") == "object" and "additionalProperties" not in schema:
        made["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return made


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder with KubeRay's CRDs")
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberay_objects_meet_kuberays_schema(kind: str) -> None:
    definition = yaml.safe_load((Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{kind.lower()}s.yaml").read_text())
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    (document,) = of_kind(kubernetes(), kind)
    jsonschema.validate(document, schema)


def test_the_compose_file_meets_the_compose_specification(tmp_path: Path) -> None:
    def check(path: Path) -> int:
        command = [installed("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path)]
        return subprocess.run(command, capture_output=True).returncode

    assert check(CLUSTER / "compose.yaml") == 0
    broken = compose()
    broken["services"]["mlflow"]["port"] = ["127.0.0.1:5000:5000"]
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    assert check(tmp_path / "broken.yaml") != 0


def test_the_container_file_has_no_complaints() -> None:
    done = subprocess.run([installed("hadolint"), str(CLUSTER / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_have_no_complaints(name: str) -> None:
    script = CLUSTER / name
    assert os.access(script, os.X_OK)
    done = subprocess.run([installed("shellcheck"), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", LAUNCHED)
def test_commands_of_launcher_files_have_no_complaints(name: str, tmp_path: Path) -> None:
    config = launched(name)
    commands = [command for key, value in config.items() if key.endswith("_commands") for command in value]
    assert len(commands) > 5
    script = tmp_path / "commands.sh"
    # RAY_HEAD_IP: `ray up` sets it.
    script.write_text("#!/bin/bash\nRAY_HEAD_IP=$1\n" + "\n".join(commands) + "\n")
    # SC2086 wants quotes around $RAY_HEAD_IP, SC2088 fears for ~ (our `key=~/...` is for Ray, which expands it itself).
    done = subprocess.run([installed("shellcheck"), "-e", "SC2086,SC2088", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
