"""What the files of cluster/ promise: tokens, loopback, pinned images, no secrets, one version of everything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_files import (
    CLUSTER,
    LAUNCHED,
    ROOT,
    Document,
    compose,
    containers,
    kubernetes,
    launched,
    of_kind,
    pod_templates,
    project_version,
    requirement,
)
from packaging.specifiers import SpecifierSet

FILES = [path for path in CLUSTER.rglob("*") if path.is_file() and path.name not in (".env", ".gitignore")]


def ray_clusters(documents: list[Document]) -> Iterator[Document]:
    for document in of_kind(documents, "RayCluster"):
        yield document["spec"]
    for document in of_kind(documents, "RayJob"):
        yield document["spec"]["rayClusterSpec"]


def images() -> Iterator[tuple[str, str]]:
    for name, service in compose()["services"].items():
        yield f"compose {name}", service["image"]
    for document in kubernetes():
        for place, template in pod_templates(document):
            for container in containers(template):
                yield f"{place} {container['name']}", container["image"]
    for line in (CLUSTER / "Dockerfile").read_text().splitlines():
        if line.startswith("FROM "):
            yield "Dockerfile", line.split()[1]


# Tokens


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_starts_with_a_token(name: str) -> None:
    config = launched(name)
    for part in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[part] if "ray start" in command]
        assert len(starts) == 1
        assert re.search(r"(^|; )RAY_AUTH_MODE=token \S+/ray start ", starts[0])
    assert any(remote.endswith("/.ray/auth_token") for remote in config["file_mounts"])
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


def test_ray_on_kubernetes_starts_with_a_token() -> None:
    clusters = list(ray_clusters(kubernetes()))
    assert len(clusters) == 2
    for cluster in clusters:
        assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        # KubeRay refuses a token for a version that it does not know.
        assert cluster["rayVersion"] in SpecifierSet(requirement("ray"))


def test_ray_elsewhere_starts_with_a_token() -> None:
    assert re.search(r"^ENV RAY_AUTH_MODE=token", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    script = (CLUSTER / "slurm.sh").read_text()
    assert script.index("export RAY_AUTH_MODE=token") < script.index("symmetric-run \\")
    assert "export RAY_AUTH_MODE=token" in (CLUSTER / "install.sh").read_text()


# Loopback


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_dashboard_is_on_loopback(name: str) -> None:
    starts = [command for command in launched(name)["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in starts[0].split()


def test_compose_publishes_on_loopback_only() -> None:
    services = compose()["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert not any(service.get("network_mode") or service.get("privileged") for service in services.values())


def test_every_interface_is_listened_on_only_for_a_reason() -> None:
    for path in FILES:
        if path.suffix == ".md":
            continue
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if re.search(r"0\.0\.0\.0|\[::\]", line) and not line.lstrip().startswith("#"):
                near = "\n".join(lines[max(0, number - 3) : number])
                assert re.search(r"# .*(container|pod|others)", near, re.DOTALL), (
                    f"{path.name}:{number + 1} says not why"
                )


def test_no_service_is_reachable_from_outside_the_cluster() -> None:
    documents = kubernetes()
    for service in of_kind(documents, "Service"):
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
    assert not of_kind(documents, "Ingress", "Gateway", "HTTPRoute")
    for document in documents:
        for _, template in pod_templates(document):
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(template["spec"])
            assert not any("hostPort" in port for item in containers(template) for port in item.get("ports", []))


# Who may talk to whom


def selects(selector: Document, labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def admitted(policies: list[Document], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether the policies let a pod of this namespace with some labels call a port of another."""
    applying = [policy["spec"] for policy in policies if selects(policy["spec"]["podSelector"], target)]
    assert applying, f"nothing guards {target}"
    for rule in (rule for policy in applying for rule in policy.get("ingress", [])):
        ports = [item["port"] for item in rule.get("ports", [])]
        if (not ports or port in ports) and any(selects(peer.get("podSelector", {}), source) for peer in rule["from"]):
            return True
    return False


def test_network_policies_let_in_who_is_needed_and_nobody_else() -> None:
    documents = kubernetes()
    policies = of_kind(documents, "NetworkPolicy")
    name = "app.kubernetes.io/name"
    head = {name: "peftsearch-ray", "ray.io/node-type": "head"}
    worker = {name: "peftsearch-ray", "ray.io/node-type": "worker"}
    submitter, operator = {name: "peftsearch-submitter"}, {name: "kuberay-operator"}
    mlflow, postgres, objects, stranger = ({name: word} for word in ("mlflow", "postgres", "objects", "stranger"))
    pods: list[tuple[dict[str, str], int]] = [
        (head, 8265),
        (head, 6379),
        (mlflow, 5000),
        (postgres, 5432),
        (objects, 8333),
    ]
    expected = {
        "head": [True, True, True, True, True],
        "worker": [True, True, False, False, True],
        "submitter": [True, False, False, False, False],
        "operator": [True, False, False, False, False],
        "mlflow": [False, False, False, True, True],
        "stranger": [False] * 5,
    }
    sources = dict(zip(expected, (head, worker, submitter, operator, mlflow, stranger), strict=True))
    for who, allowed in expected.items():
        assert [admitted(policies, sources[who], *pod) for pod in pods] == allowed, who


def test_policies_select_the_pods_that_there_are() -> None:
    documents = kubernetes()
    labels = [template["metadata"]["labels"] for document in documents for _, template in pod_templates(document)]
    for policy in of_kind(documents, "NetworkPolicy"):
        # KubeRay adds ray.io/node-type to what we say.
        wanted = {
            key: value
            for key, value in policy["spec"]["podSelector"].get("matchLabels", {}).items()
            if not key.startswith("ray.io/")
        }
        assert any(wanted.items() <= item.items() for item in labels), policy["metadata"]["name"]
    for service in of_kind(documents, "Service"):
        assert any(service["spec"]["selector"].items() <= item.items() for item in labels), service["metadata"]["name"]


# Users and rights


def test_pods_run_as_a_user_without_rights() -> None:
    for document in kubernetes():
        for place, template in pod_templates(document):
            pod = template["spec"].get("securityContext", {})
            assert pod.get("runAsNonRoot") is True, place
            assert pod["runAsUser"] >= 999, place
            assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, place
            for container in containers(template):
                own = container["securityContext"]
                assert own["allowPrivilegeEscalation"] is False, place
                assert own["capabilities"] == {"drop": ["ALL"]}, place
                assert "privileged" not in own, place
                assert container["resources"]["requests"]["memory"], place
                assert container["resources"]["limits"]["memory"], place


def test_containers_of_the_container_file_are_no_root() -> None:
    stages = re.split(r"^FROM ", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    for stage in stages:
        if not stage.splitlines()[0].endswith("AS wheel"):
            assert re.findall(r"^USER (\d+)$", stage, re.MULTILINE)[-1] == "1000"


# Images and versions


def test_images_are_pinned() -> None:
    found = dict(images())
    assert len(found) > 8
    for place, image in found.items():
        tag = image.partition(":")[2]
        assert re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-[a-z0-9-]+)?", tag), f"{place}: {image}"


def test_there_is_one_version_of_peftsearch() -> None:
    version = project_version()
    text = "\n".join(path.read_text() for path in FILES)
    assert set(re.findall(r"peftsearch-([\d.]+)-py3", text)) == {version}
    assert set(re.findall(r"peftsearch(?:-mlflow)?:(\d+\.[\w.]*)", text)) == {version}
    assert set(re.findall(r"newTag: (\S+)", text)) == {version}


@pytest.mark.parametrize(
    ("distribution", "pattern"), [("mlflow", r'"mlflow==([\d.]+)"'), ("torch", r"ARG TORCH=([\d.]+)")]
)
def test_versions_in_images_are_those_of_the_project(distribution: str, pattern: str) -> None:
    (version,) = re.findall(pattern, (CLUSTER / "Dockerfile").read_text())
    assert version in SpecifierSet(requirement(distribution))


# Secrets and variables


def test_no_file_holds_a_secret() -> None:
    assert (CLUSTER / ".gitignore").read_text().split() == [".env"]
    for path in FILES:
        for name, value in re.findall(
            r"(?i)\b(\w*(?:password|secret_key|token))\b[=:][ \t]*[\"']?([\w./+-]{6,})", path.read_text()
        ):
            assert value.startswith(("/", "$", "token")) or "REPLACE" in value, f"{path.name}: {name}={value}"
    assert not of_kind(kubernetes(), "Secret")


def test_variables_of_the_compose_file_are_those_of_the_example() -> None:
    used = set(re.findall(r"\$\{(\w+)", (CLUSTER / "compose.yaml").read_text()))
    assert used == set(re.findall(r"^(\w+)=$", (CLUSTER / "env.example").read_text(), re.MULTILINE))
    assert not re.findall(r"\$\{\w+\}", (CLUSTER / "compose.yaml").read_text()), "an unset variable would be empty"


def test_secrets_config_maps_and_claims_that_pods_name_are_made_by_somebody() -> None:
    documents = kubernetes()
    readme = (CLUSTER / "README.md").read_text()
    made: dict[str, set[str]] = {
        "secret": set(re.findall(r"create secret generic ([\w-]+)", readme)),
        "config map": {item["metadata"]["name"] for item in of_kind(documents, "ConfigMap")}
        | set(re.findall(r"create configmap ([\w-]+)", readme)),
        "claim": {item["metadata"]["name"] for item in of_kind(documents, "PersistentVolumeClaim")},
    }
    keys = {
        name: set(re.findall(r"--from-literal=([\w-]+)=", block))
        for name, block in re.findall(r"create secret generic ([\w-]+)((?:.*\\\n)*.*)", readme)
    }

    def named(value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            if "secretKeyRef" in value:
                yield "secret", value["secretKeyRef"]["name"]
                assert value["secretKeyRef"]["key"] in keys[value["secretKeyRef"]["name"]], value
            if "secretName" in value:
                yield "secret", value["secretName"]
            if isinstance(value.get("configMap"), dict):
                yield "config map", value["configMap"]["name"]
            if "claimName" in value:
                yield "claim", value["claimName"]
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from named(item)

    found = {item for document in documents for item in named(document)}
    assert len(found) == 6
    for kind, name in found:
        assert name in made[kind], f"{kind} {name}"


def test_volumes_and_anchors_are_complete() -> None:
    for document in kubernetes():
        claims = (
            {item["metadata"]["name"] for item in document["spec"].get("volumeClaimTemplates", [])}
            if "spec" in document
            else set()
        )
        for place, template in pod_templates(document):
            volumes = {volume["name"] for volume in template["spec"].get("volumes", [])} | claims
            for container in containers(template):
                assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes, place


# What a study needs


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_clouds_have_an_on_demand_head_spot_gpus_and_an_end(name: str) -> None:
    config = launched(name)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "scheduling" not in head["node_config"]
    assert len(types) >= 3
    for node in types.values():
        spot = node["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert spot or node["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
        assert node["min_workers"] == 0
        assert node["max_workers"] >= 1
    assert config["idle_timeout_minutes"] <= 30
    assert any("/shared" in command for command in config["initialization_commands"])


def test_gpus_shared_storage_and_the_end_of_the_job_on_kubernetes() -> None:
    documents = kubernetes()
    (claim,) = of_kind(documents, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for cluster in ray_clusters(documents):
        for group in cluster["workerGroupSpecs"]:
            (container,) = group["template"]["spec"]["containers"]
            assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
            assert any("spot" in item["key"] for item in group["template"]["spec"]["tolerations"])
            assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        head = cluster["headGroupSpec"]
        assert head["rayStartParams"]["num-gpus"] == "0"
        assert "tolerations" not in head["template"]["spec"], "the head on a spot node would end the study's cluster"
    (job,) = of_kind(documents, "RayJob")
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    assert job["spec"]["backoffLimit"] > 0
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    # Kueue reserves what it sees: no more pods may come.
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False


def test_one_service_name_for_mlflow_and_its_host_check() -> None:
    (deployment,) = of_kind(kubernetes(), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (allowed,) = [item.partition("=")[2].split(",") for item in container["args"] if item.startswith("--allowed-hosts")]
    assert {"mlflow:5000", "mlflow.peftsearch:5000", "localhost:*", "127.0.0.1:*"} <= set(allowed)
    assert "*" not in allowed
    (job,) = of_kind(kubernetes(), "RayJob")
    assert "http://mlflow:5000" in job["spec"]["entrypoint"]


def test_compose_and_kubernetes_run_the_same_services() -> None:
    services = compose()["services"]
    pods = {
        document["metadata"]["name"]: template["spec"]["containers"][0]
        for document in of_kind(kubernetes(), "StatefulSet", "Deployment")
        for _, template in pod_templates(document)
    }
    assert pods["postgres"]["image"] == services["postgres"]["image"]
    assert pods["objects"]["image"] == services["objects"]["image"]
    assert pods["objects"]["args"] == services["objects"]["command"]

    def without_hosts(arguments: list[str]) -> list[str]:
        return [item for item in arguments if not item.startswith("--allowed-hosts")]

    assert without_hosts(pods["mlflow"]["args"]) == without_hosts(services["mlflow"]["command"])


@pytest.mark.parametrize("name", LAUNCHED)
def test_files_that_are_mounted_are_there(name: str) -> None:
    for local in launched(name)["file_mounts"].values():
        # The wheel is built first, the token is the user's.
        assert local.startswith(("dist/", "~/")) or (ROOT / local).is_file(), local


def test_everything_that_is_to_be_filled_in_is_said() -> None:
    readme = (CLUSTER / "README.md").read_text()
    for name in ("aws.yaml", "gcp.yaml"):
        for word in set(re.findall(r"\b[\w-]*-REPLACE\b", (CLUSTER / name).read_text())):
            assert word in readme or word == "project-REPLACE", f"{name}: {word}"


def test_yaml_files_are_yaml() -> None:
    for path in FILES:
        if path.suffix == ".yaml":
            assert list(yaml.safe_load_all(Path(path).read_text()))
