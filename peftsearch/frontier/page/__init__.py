"""The Pareto page: one file that shows a study's fronts, opens offline, and asks nobody for anything."""

from peftsearch.frontier.page.data import page_data
from peftsearch.frontier.page.document import document, front_html, policy
from peftsearch.frontier.page.studies import studies_html

__all__ = ["document", "front_html", "page_data", "policy", "studies_html"]
