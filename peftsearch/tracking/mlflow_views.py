"""How MLflow's run table and charts of a study look when they are opened: its saved views.

MLflow opens the table of a new experiment without metrics and params, and without a way to set that. But it keeps saved
views (the menu *Views* above the table) as tags of the experiment: ``mlflow.sharedViewState.ID`` with a name, two
moments, and the table's state as JSON (read in MLflow 3.17's UI; opened by ``?viewStateShareKey=ID``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from peftsearch.spec import StudyFacts
from peftsearch.tracking.mlflow_runs import page_path

VIEW = "mlflow.sharedViewState."
"""Tags of an experiment that begin so are its saved views."""
WRITTEN = "peftsearch.written."
"""Before the name of a tag of an experiment: the digest of what we wrote there last."""
TRIALS, FRONT, METHODS = "peftsearch-trials", "peftsearch-front", "peftsearch-methods"
_SECTION = "peftsearch-methods"
# Scores of single classes: a chart for each would bury the others.
_PER_CLASS = ("f1", "precision", "recall", "support")


def saved_views(facts: StudyFacts) -> dict[str, str]:
    """The views that every study's experiment has, as tags of the experiment.

    - *Trials*: every trial. The best first, of what has ended, where the domains' metrics have one direction; where
      they do not, the largest number.
    - *Front*: the trials on a front, the smallest first.
    - *Methods*: each method's best trial in each domain (and for each model), as charts and as a table. Not as groups:
      MLflow would take each number's maximum over a group, and show trials that nobody has trained.
    """
    several = len(facts.models) > 1
    domains = ("domain",) if len(facts.domains) > 1 else ()
    names = (*domains, *(("model",) if several else ()), "method")
    columns = [
        # What is the same for all would push what is not out of sight: MLflow puts tags after metrics.
        *(_column("tags", name) for name in names),
        *(_column("metrics", name) for name in ("value", "trainable_parameters", "train_seconds")),
        *(_column("tags", name) for name in ("on_front", "pick")),
        *(_column("metrics", name) for name in ("confirmed_mean", "confirmed_std", "confirmed_test_mean")),
    ]
    ascending = {domain.direction for domain in facts.domains.values()} == {"minimize"}
    best_first = {"orderByKey": _column("metrics", "value"), "orderByAsc": ascending}
    with_state = [*columns[: len(names)], _column("tags", "state"), *columns[len(names) :]]
    trials = {"selectedColumns": with_state, "searchFilter": 'tags.state != ""', **best_first}
    front = {
        "selectedColumns": columns,
        "searchFilter": 'tags.on_front = "true"',
        "orderByKey": _column("metrics", "trainable_parameters"),
        "orderByAsc": True,
    }
    methods = {
        "selectedColumns": columns,
        "searchFilter": 'tags.method_best = "true"',
        **best_first,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,
        "compareRunSections": [
            _section(_SECTION, "Methods compared", display=True),
            *(_section(name, name, display=False) for name in _PER_CLASS),
        ],
        "compareRunCharts": [
            _chart("value", "BAR", metricKey="value"),
            _chart("parameters", "BAR", metricKey="trainable_parameters"),
            _chart("seconds", "BAR", metricKey="train_seconds"),
            _chart(
                "front",
                "SCATTER",
                xaxis={"key": "trainable_parameters", "type": "METRIC"},
                yaxis={"key": "value", "type": "METRIC"},
            ),
            _chart("loss", "LINE", metricKey="loss"),
            _chart(
                "coordinates",
                "PARALLEL",
                selectedParams=["learning_rate"],
                selectedMetrics=["trainable_parameters", "train_seconds", "value"],
                showAllRuns=False,
            ),
        ],
    }
    views = {TRIALS: ("Trials", trials), FRONT: ("Front", front), METHODS: ("Methods", methods)}
    return {f"{VIEW}{key}": _saved(name, state) for key, (name, state) in views.items()}


def unless_a_readers(key: str, value: str, have: Mapping[str, str]) -> dict[str, str]:
    """Tags that bring a description or a view up to date; none where a reader has changed it: it stays as they like it.

    Args:
        key: The tag's name.
        value: What it should be.
        have: The experiment's tags.
    """
    present, written = have.get(key), f"{WRITTEN}{key}"
    ours = present is None or present == value or have.get(written) == _digest(present)
    return {key: value, written: _digest(value)} if ours else {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def view_links(experiment: str, study: str) -> str:
    """The views and the Pareto page of a study, as a line of Markdown."""
    named = {"All trials": _address(experiment, TRIALS), "the front": _address(experiment, FRONT)}
    named["methods compared"] = f"{_address(experiment, METHODS)}&compareRunsMode=CHART"
    links = " · ".join(f"[{name}]({address})" for name, address in named.items())
    return f"{links} · [the Pareto page]({page_path(study)}), where `peftsearch ui` serves MLflow"


def trials_address(experiment: str) -> str:
    """Where MLflow shows a study's trials in their view, after the server's address: without a view it shows them
    without metrics and params."""
    return _address(quote(experiment, safe=""), TRIALS)


def _address(experiment: str, view: str) -> str:
    # Without the last part MLflow shows what it has for chats, and hides training runs behind a switch.
    return f"#/experiments/{experiment}/runs?viewStateShareKey={view}&workflowType=machine_learning"


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


def _section(key: str, name: str, *, display: bool) -> dict[str, Any]:
    return {"uuid": key, "name": name, "display": display, "isReordered": False, "deleted": False, "isGenerated": False}


def _chart(key: str, kind: str, **settings: Any) -> dict[str, Any]:
    common = {"uuid": f"peftsearch-{key}", "type": kind, "runsCountToCompare": 100, "metricSectionId": _SECTION}
    return {**common, "deleted": False, "isGenerated": False, **settings}


def _saved(name: str, state: Mapping[str, Any]) -> str:
    # The moments are those of the saved view, not of the study; the same ones, so that the tag is the same.
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})
