"""Pareto fronts: what is on them, how good they are, which trial to pick, and how they are shown."""

from peftsearch.frontier.front import (
    Choice,
    DomainFront,
    Pick,
    choose,
    complete,
    domain_fronts,
    front,
    hypervolume,
    pick,
)
from peftsearch.frontier.mlflow_report import domain_report
from peftsearch.frontier.notebook import Frontier, Trials
from peftsearch.frontier.page import front_html
from peftsearch.frontier.plots import front_figure, front_png
from peftsearch.frontier.tables import (
    Verdict,
    domain_json,
    escape_markdown,
    front_markdown,
    front_renderables,
    front_table,
    frontier_json,
    trials_arrow,
    trials_csv,
    trials_frame,
    trials_json,
    trials_parquet,
    trials_table,
    verdict,
)

__all__ = [
    "Choice",
    "DomainFront",
    "Frontier",
    "Pick",
    "Trials",
    "Verdict",
    "choose",
    "complete",
    "domain_fronts",
    "domain_json",
    "domain_report",
    "escape_markdown",
    "front",
    "front_figure",
    "front_html",
    "front_markdown",
    "front_png",
    "front_renderables",
    "front_table",
    "frontier_json",
    "hypervolume",
    "pick",
    "trials_arrow",
    "trials_csv",
    "trials_frame",
    "trials_json",
    "trials_parquet",
    "trials_table",
    "verdict",
]
