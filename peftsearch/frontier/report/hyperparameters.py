"""A domain's hyperparameters: importance, and score against each of them."""

from __future__ import annotations

from peftsearch.frontier.front import complete
from peftsearch.frontier.report import figures, words
from peftsearch.frontier.report.document import Document, Figure, Heading, Table
from peftsearch.frontier.report.material import Material, metric_words
from peftsearch.frontier.report.results import (
    Result,
)
from peftsearch.frontier.report.sensitivity import (
    Importance,
    Sensitivity,
    importance,
    sensitivities,
)


def hyperparameters(document: Document, study: Material, name: str) -> None:
    """Which hyperparameters matter in a domain, and how."""
    direction = study.facts.domains[name].direction
    metric = metric_words(study.facts.domains[name])
    shown: list[tuple[Result, list[Sensitivity]]] = []
    weights: list[tuple[Result, Importance]] = []
    for result in study.results[name]:
        found = sensitivities(result.records, result.method, study.spec)
        if found:
            shown.append((result, found))
        if complete(result.records):
            weights.append((result, importance(result.records, result.method, study.spec, direction)))
    if weights:
        document.add(Heading(3, f"{name}: which hyperparameters matter"))
        _importance(document, study, name, weights)
    for result, found in shown:
        _sensitivity_figure(document, study, name, metric, result, found)


def _importance(document: Document, study: Material, name: str, weights: list[tuple[Result, Importance]]) -> None:
    rows = []
    for result, found in weights:
        called = study.called(result.model, result.method)
        shares = ", ".join(f"{key} {100 * share:.0f} %" for key, share in found.shares.items())
        rows.append(
            [
                called,
                f"{shares} ({found.why_not})" if shares and found.why_not else shares or found.why_not or "",
                words.count(found.trials),
            ]
        )
        for key, share in found.shares.items() or [(None, None)]:
            document.record(
                "importance.csv",
                domain=name,
                model=result.model,
                method=result.method,
                hyperparameter=key,
                importance=share,
                trials=found.trials,
                note=found.why_not,
            )
    table = Table(
        "Importance of each hyperparameter",
        ["method", "shares", "trials"],
        rows,
        2,
        notes=[
            "PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255) over the trials that reached the full budget: how much "
            "each hyperparameter decides whether a trial is among the best. Below some 20 trials this is a hint."
        ],
        source="importance.csv",
    )
    drawn = {
        study.called(result.model, result.method): found.shares
        for result, found in weights
        if found.shares and found.why_not is None
    }
    if not drawn:
        document.add(table)
        return
    methods = {study.called(result.model, result.method): result.method for result, _ in weights}
    png, svg = figures.importance_picture(drawn, methods, study.methods)
    document.add(Figure(study.file("importance", name), f"{name}: importance of hyperparameters", png, svg, table))


def _sensitivity_figure(
    document: Document, study: Material, name: str, metric: str, result: Result, found: list[Sensitivity]
) -> None:
    rows = []
    for item in found:
        for group in item.bins:
            span = (
                _setting(group.low) if group.low == group.high else f"{_setting(group.low)} to {_setting(group.high)}"
            )
            low, middle, high = group.quartiles
            rows.append(
                [
                    item.name,
                    span,
                    words.number(middle),
                    f"{words.number(low)} to {words.number(high)}",
                    str(group.trials),
                ]
            )
            document.record(
                "sensitivity.csv",
                domain=name,
                model=result.model,
                method=result.method,
                hyperparameter=item.name,
                low=group.low,
                high=group.high,
                trials=group.trials,
                quartile_1=low,
                median=middle,
                quartile_3=high,
            )
    called = study.called(result.model, result.method)
    table = Table(
        f"{called}: median and quartiles of trials that lie close together",
        ["hyperparameter", "values", "median", "quartiles", "trials"],
        rows,
        2,
        source="sensitivity.csv",
    )
    png, svg = figures.sensitivity_picture(
        found, metric, study.facts.domains[name].direction, study.methods.index(result.method)
    )
    pruned = "; pruned trials faint, at their last value" if any(item.pruned for item in found) else ""
    title = (
        f"{name}, {called}: {metric} (validation) against each hyperparameter; line and band: median, quartiles{pruned}"
    )
    parts = [result.model] if study.several_models else []
    document.add(Figure(study.file("sensitivity", name, result.method, *parts), title, png, svg, table))


def _setting(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.2e}"
