"""The dashboard asks for what studies tell, for all of it, and its files are what their readers expect."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from dashboard_files import DASHBOARDS, PROMETHEUS, dashboard, panels, queries, series

from peftsearch.training.segment import Failure, Segment, TrialPlan
from peftsearch.workers.metrics import METRICS, DispatcherMeter, Meter, Metric, SlotMeter


def told(metric: Metric) -> set[str]:
    """What a query may name of a metric."""
    return set(metric.exported)


def test_every_metric_of_a_panel_is_told_by_somebody_and_every_metric_has_a_panel() -> None:
    asked = {name for _, query in queries() for name in series(query)}
    assert asked - {name for metric in METRICS for name in told(metric)} == set()
    assert [metric.name for metric in METRICS if not told(metric) & asked] == []


def test_queries_use_labels_that_the_metrics_have() -> None:
    labels = {name: {"study", "le", *metric.labels} for metric in METRICS for name in told(metric)}
    for panel, query in queries():
        known = set.intersection(*(labels[name] for name in series(query)))
        named = {label for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for label in group.split(", ")}
        matched = {label for group in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)[=!]", group)}
        # Of a quotient, each side has labels of its own.
        known = known if "/" not in query else set.union(*(labels[name] for name in series(query)))
        assert named | matched <= known, panel


def test_legends_use_labels_that_the_queries_keep() -> None:
    for panel in panels():
        for target in panel["targets"]:
            (outer,) = re.findall(r"\bby \(([^)]*)\)", target["expr"])[:1]
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= set(outer.split(", ")), panel["title"]


def test_every_query_is_of_the_studies_that_are_chosen() -> None:
    (variable,) = dashboard()["templating"]["list"]
    assert variable["name"] == "study"
    (source,) = series(variable["query"]["query"])
    assert source in {name for metric in METRICS for name in told(metric)}
    for panel, query in queries():
        assert query.count('study=~"$study"') == len(re.findall(r"\bray_peftsearch_\w+", query)), panel


def test_names_say_their_units() -> None:
    units = ("seconds", "bytes", "ratio", "value", "trials", "segments", "entries", "slots", "retries")
    for metric in METRICS:
        assert metric.name.startswith("peftsearch_")
        assert metric.name.endswith(units), metric.name
        assert metric.help
        assert bool(metric.buckets) == (metric.kind == "histogram")


def test_panels_lie_side_by_side_and_name_the_provisioned_source() -> None:
    document = dashboard()
    provisioned = yaml.safe_load((DASHBOARDS / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    (source,) = provisioned["datasources"]
    ids = [panel["id"] for panel in document["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["description"], panel["title"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": source["type"], "uid": source["uid"]}
    for one, other in combinations([panel["gridPos"] for panel in document["panels"]], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart
        assert one["x"] + one["w"] <= 24


def test_compose_starts_pinned_images_on_loopback_and_mounts_what_is_there() -> None:
    path = DASHBOARDS / "compose.yaml"
    checker = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    services: dict[str, Any] = yaml.safe_load(path.read_text())["services"]
    assert services["prometheus"]["network_mode"] == services["grafana"]["network_mode"] == "host"
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    targets = {}
    for service in services.values():
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
        assert "ports" not in service
        for volume in service["volumes"]:
            if isinstance(volume, str) and volume.startswith("./"):
                source, target, mode = volume.split(":")
                assert (DASHBOARDS / source).exists()
                assert mode == "ro"
                targets[target] = DASHBOARDS / source
    provider = yaml.safe_load((DASHBOARDS / "grafana/provisioning/dashboards/peftsearch.yaml").read_text())
    (found,) = provider["providers"]
    assert list(targets[found["options"]["path"]].glob("*.json"))
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (targets[found["options"]["path"]] / Path(home).name).exists()
    (job,) = yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]
    (files,) = job["file_sd_configs"][0]["files"]
    mounted = [volume["target"] for volume in services["prometheus"]["volumes"] if isinstance(volume, dict)]
    assert str(Path(files).parent) in mounted


def test_what_ends_the_servers_needs_no_password() -> None:
    """Compose asks for every required variable before it does anything with a file, even to end what runs."""
    compose = (DASHBOARDS / "compose.yaml").read_text()
    assert "${GRAFANA_PASSWORD:?" in compose
    readme = (DASHBOARDS / "README.md").read_text()
    ends = re.findall(r"docker compose ([^`\n]*)\bdown\b", readme)
    assert ends == [f"-p {yaml.safe_load(compose)['name']} "]
    assert not list(DASHBOARDS.parent.glob("*compose*.y*ml")), "Compose would read that one"


def test_nothing_is_told_where_nobody_listens() -> None:
    work = Segment(TrialPlan(0, "m", "d", "lora", {}, 0), 4)
    meter = Meter()
    assert not meter.on
    SlotMeter(meter, 0).answered(work, Failure("no"))
    with SlotMeter(meter, 0).watching(None):
        pass
    DispatcherMeter(meter).look(1, 0, {0: (True, 1)})
    DispatcherMeter(meter).retried("its worker died")


def test_the_readme_lists_every_metric_as_it_is() -> None:
    text = (DASHBOARDS / "README.md").read_text()
    for metric in METRICS:
        name = metric.name + ("_total" if metric.kind == "counter" else "")
        row = f"| `{name}` | {metric.kind} | {', '.join(metric.labels) or '—'} | {metric.help} |"
        assert row in text, row
