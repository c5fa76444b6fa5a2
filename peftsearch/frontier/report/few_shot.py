"""Few-shot curves: a domain with several sizes of its training split."""

from __future__ import annotations

from peftsearch.frontier.report import figures, words
from peftsearch.frontier.report.document import Document, Figure, Heading, Table, Text
from peftsearch.frontier.report.material import Material, metric_words


def few_shot(document: Document, study: Material) -> None:
    """Domains that differ in their number of training examples, as curves."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for name, domain in study.spec.domains.items():
        size = domain.data.limit.train
        stem, dash, end = name.rpartition("-")
        if name in study.facts.domains and dash and isinstance(size, int) and end == str(size):
            groups.setdefault(stem, []).append((study.facts.domains[name].rows.get("train", size), name))
    groups = {stem: sorted(members) for stem, members in groups.items() if len(members) > 1}
    if not groups:
        return
    document.add(Heading(2, "Accuracy against training examples"))
    for stem, members in groups.items():
        metric = metric_words(study.facts.domains[members[0][1]])
        on_test = any(result.test for _, name in members for result in study.results[name])
        curves: dict[str, list[tuple[int, float, float]]] = {}
        labels: dict[str, str] = {}
        rows = []
        for size, name in members:
            for result in study.results[name]:
                value = result.test if on_test else result.validation
                called = study.called(result.model, result.method)
                labels[called] = result.method
                if value is None:
                    continue
                curves.setdefault(called, []).append((size, value[0], value[1]))
                rows.append([called, words.count(size), words.spread(*value)])
                document.record(
                    "few_shot.csv",
                    domain=stem,
                    model=result.model,
                    method=result.method,
                    examples=size,
                    split="test" if on_test else "validation",
                    mean=value[0],
                    std=value[1] if value[2] > 1 else None,
                    seeds=value[2],
                )
        where = "test" if on_test else "validation (not confirmed)"
        order = {called: index for index, called in enumerate(labels)}
        rows.sort(key=lambda row: order[row[0]])
        document.add(Heading(3, stem))
        table = Table(
            f"{metric}, {where}",
            ["method", "training examples", metric],
            rows,
            notes=[
                "All seeds train on the same examples: the deviation is of initialisation, dropout and order, and not "
                "of which examples were drawn. Studies with another data.split.seed draw others."
            ],
            source="few_shot.csv",
        )
        if not curves:
            document.add(Text("No trial has reached the full budget yet."))
            continue
        png, svg = figures.few_shot_picture(curves, metric, list(labels))
        title = f"{stem}: {metric} against training examples, {where}"
        document.add(Figure(study.file("few_shot", stem), title, png, svg, table))
