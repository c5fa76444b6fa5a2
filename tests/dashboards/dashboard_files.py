"""What dashboards/ holds, as its readers see it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
PROMETHEUS = DASHBOARDS / "prometheus" / "prometheus.yml"
STUDIES = DASHBOARDS / "grafana" / "dashboards" / "studies.json"


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(STUDIES.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    """The panels that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """Panel and query of everything that the dashboard asks Prometheus."""
    return [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]


def series(query: str) -> set[str]:
    """Names of our series in a query."""
    return set(re.findall(r"\bray_peftsearch_\w+", query))
