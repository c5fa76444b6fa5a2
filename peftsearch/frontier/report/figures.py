"""The report's pictures, with matplotlib: each as PNG on white, and as SVG in the colours of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from peftsearch.frontier.front import DomainFront, complete
from peftsearch.frontier.plots import draw_front, far_apart, front_legend, log_y, method_colour, method_marker
from peftsearch.frontier.report.results import tested
from peftsearch.frontier.report.sensitivity import Sensitivity
from peftsearch.spec import Direction, StudyFacts, TrialRecord, TrialState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

_INK, _FAINT, _LINE = "#374151", "#9ca3af", "#e5e7eb"
# Matplotlib's own ink and those above become the page's, so that a picture follows light and dark.
_PAGE_COLOURS = {
    "#000000": "var(--ink)",
    _INK: "var(--ink)",
    "#6b7280": "var(--faint)",
    _FAINT: "var(--faint)",
    _LINE: "var(--line)",
    "#ffffff": "var(--paper)",
}

Picture = tuple[bytes, str]
"""PNG and SVG."""


def front_picture(front: DomainFront, facts: StudyFacts, methods: Sequence[str]) -> Picture:
    """Validation metric against trainable parameters; beside it, where trials are confirmed, the test metric."""
    confirmed = [record for record in complete(front.records) if tested(record)]

    def draw(figure: MatplotlibFigure) -> None:
        axes = figure.subplots(1, 2 if confirmed else 1, squeeze=False).ravel()
        draw_front(axes[0], front, facts)
        axes[0].set_title("validation, all trials", loc="left", fontweight="bold")
        if confirmed:
            _tidy(axes[1])
            axes[1].set_xscale("log")
            axes[1].set_xlim(axes[0].get_xlim())
            axes[1].xaxis.set_major_formatter(axes[0].xaxis.get_major_formatter())
            for record in confirmed:
                value = tested(record)
                assert value is not None
                index = methods.index(record.method)
                axes[1].errorbar(
                    [max(record.trainable_parameters, 1)],
                    [value[0]],
                    yerr=[value[1]],
                    color=method_colour(index),
                    marker=method_marker(index),
                    markersize=7,
                    capsize=3,
                    linewidth=1.2,
                )
            axes[1].set_title("test, confirmed trials: mean ± std over seeds", loc="left", fontweight="bold")
            axes[1].set_xlabel("trainable parameters")
            axes[1].set_ylabel(_words(front.facts.metric))
        _legend(figure, front_legend([front], facts))

    return _render(draw, 11.5 if confirmed else 6.6, 4.4)


def sensitivity_picture(found: Sequence[Sensitivity], metric: str, direction: Direction, method: int) -> Picture:
    """One panel for each hyperparameter: trials as points, pruned ones faint, medians with quartiles."""
    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)

    def draw(figure: MatplotlibFigure) -> None:
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axis in axes[len(found) :]:
            axis.set_axis_off()
        for axis, item in zip(axes, found, strict=False):
            _tidy(axis)
            if item.log:
                _log_x(axis, [value for value, _ in [*item.points, *item.pruned]])
            axis.scatter(*_columns(item.pruned), marker="x", s=14, linewidths=0.8, color=_FAINT, alpha=0.6, zorder=2)
            axis.scatter(
                *_columns(item.points),
                marker=method_marker(method),
                s=22,
                color=method_colour(method),
                alpha=0.55,
                edgecolors="none",
                zorder=3,
            )
            centres = [bin.centre for bin in item.bins]
            axis.fill_between(
                centres,
                [bin.quartiles[0] for bin in item.bins],
                [bin.quartiles[2] for bin in item.bins],
                color=method_colour(method),
                alpha=0.18,
                linewidth=0,
                zorder=1,
            )
            axis.errorbar(
                centres,
                [bin.quartiles[1] for bin in item.bins],
                yerr=[
                    [bin.quartiles[1] - bin.quartiles[0] for bin in item.bins],
                    [bin.quartiles[2] - bin.quartiles[1] for bin in item.bins],
                ],
                color=_INK,
                linewidth=1.3,
                capsize=2.5,
                zorder=4,
            )
            axis.set_xlabel(_words(item.name))
        axes[0].set_ylabel(_words(metric))
        if direction == "minimize" and far_apart(
            [score for item in found for _, score in [*item.points, *item.pruned]]
        ):
            for axis in axes[: len(found)]:
                log_y(axis)

    return _render(draw, 3.9 * columns + 0.4, 3.1 * lines + 0.2)


def importance_picture(
    shares: Mapping[str, Mapping[str, float]], method_of: Mapping[str, str], methods: Sequence[str]
) -> Picture:
    """A bar for each hyperparameter.

    Args:
        shares: By label (a method, or method and model), the importance of each hyperparameter.
        method_of: The method of each label.
        methods: All methods in the order of their colours.
    """
    bars = [(label, name, share) for label, own in shares.items() for name, share in own.items()]

    def draw(figure: MatplotlibFigure) -> None:
        axis = figure.subplots()
        _tidy(axis, grid="x")
        axis.barh(
            range(len(bars)),
            [share for _, _, share in bars],
            color=[method_colour(methods.index(method_of[label])) for label, _, _ in bars],
            height=0.7,
        )
        axis.set_yticks(range(len(bars)), [f"{label}: {_words(name)}" for label, name, _ in bars])
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("share of importance")

    return _render(draw, 6.6, 0.9 + 0.26 * len(bars))


def curves_picture(
    records: Sequence[TrialRecord],
    chosen: Sequence[TrialRecord],
    metric: str,
    direction: Direction,
    methods: Sequence[str],
) -> Picture:
    """Validation metric against steps: every trial faint, the one that stands for its method bold."""
    bold = {record.number for record in chosen}

    def draw(figure: MatplotlibFigure) -> None:
        axis = figure.subplots()
        _tidy(axis)
        for record in records:
            points = [(rung.step, rung.value) for rung in record.rungs if math.isfinite(rung.value)]
            if not points:
                continue
            index = methods.index(record.method)
            strong = record.number in bold
            axis.plot(
                *_columns(points),
                color=method_colour(index),
                linewidth=2.2 if strong else 0.7,
                alpha=1.0 if strong else (0.15 if record.state is TrialState.PRUNED else 0.3),
                marker=method_marker(index) if strong else None,
                markersize=5,
                zorder=4 if strong else 2,
                label=record.method if strong else None,
            )
        if direction == "minimize" and far_apart([rung.value for record in records for rung in record.rungs]):
            log_y(axis)
        axis.set_xlabel("optimiser steps")
        axis.set_ylabel(_words(metric))
        _legend(figure, *axis.get_legend_handles_labels())

    return _render(draw, 6.6, 4.4)


def few_shot_picture(
    curves: Mapping[str, Sequence[tuple[int, float, float]]], metric: str, methods: Sequence[str]
) -> Picture:
    """Metric against training examples (logarithmic), a line for each label with mean and deviation.

    Args:
        curves: By label (a method, or model and method), ``(examples, mean, std)``.
        metric: Name of the metric.
        methods: Labels in the order of their colours.
    """

    def draw(figure: MatplotlibFigure) -> None:
        axis = figure.subplots()
        _tidy(axis)
        sizes = sorted({size for points in curves.values() for size, _, _ in points})
        _log_x(axis, [float(size) for size in sizes])
        for label, points in curves.items():
            index = methods.index(label)
            axis.errorbar(
                [size for size, _, _ in points],
                [mean for _, mean, _ in points],
                yerr=[std for _, _, std in points],
                color=method_colour(index),
                marker=method_marker(index),
                markersize=5.5,
                capsize=3,
                linewidth=1.5,
                label=label,
            )
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.set_xlabel("training examples")
        axis.set_ylabel(_words(metric))
        _legend(figure, *axis.get_legend_handles_labels())

    return _render(draw, 6.6, 4.4)


# --- inside ---


def _render(draw: Callable[[MatplotlibFigure], None], width: float, height: float) -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _settings():
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        png, svg = io.BytesIO(), io.BytesIO()
        # Without versions and dates in them, equal reports give equal files.
        figure.savefig(png, format="png", metadata={"Software": None}, facecolor="white")
        # The places that were found hold for both; finding them takes half the time of a picture.
        figure.set_layout_engine("none")
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(svg, format="svg", metadata=nothing, transparent=True)
    return png.getvalue(), svg.getvalue().decode()


def _settings() -> AbstractContextManager[None]:
    from matplotlib import rc_context

    return rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "axes.titlesize": 10,
            "text.parse_math": False,
            # Text stays text: it can be searched, read aloud, and is in the page's ink.
            "svg.fonttype": "none",
            "svg.hashsalt": "peftsearch",
        }
    )


def page_svg(svg: str, title: str, prefix: str) -> tuple[str, float]:
    """An SVG that can stand inside a page: in the page's colours, ids of its own, scaled to the room there is.

    Args:
        svg: As matplotlib wrote it.
        title: For who cannot see it; escaped already.
        prefix: What to put before its ids, different for every picture of the page.

    Returns:
        The SVG, and its natural width in pixels.
    """
    svg = svg[svg.index("<svg") :]
    # A style element inside a page is the whole page's; this one's line joins stand in the page's own style.
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    for colour, ink in _PAGE_COLOURS.items():
        svg = svg.replace(f": {colour}", f": {ink}")
    # The reader's machine may lack matplotlib's font.
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    # Text without a colour of its own is black, whatever the page is.
    svg = svg.replace("<text ", '<text fill="var(--ink)" ')
    width = re.search(r'<svg[^>]*?\bwidth="([\d.]+)pt"', svg)
    assert width is not None
    # On a phone a wide picture is scrolled rather than shrunk until nobody can read it.
    natural = float(width.group(1)) * 4 / 3
    size = f' style="max-width:{natural:.0f}px;min-width:{max(300, 0.6 * natural):.0f}px"'
    svg = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}"{size} ', 1), natural


def _tidy(axis: Axes, grid: Any = "both") -> None:
    axis.grid(axis=grid, color=_LINE, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_FAINT)
    axis.tick_params(colors=_INK, which="both")


def _log_x(axis: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    low, high = min(values), max(values)
    narrow = high / low < 100
    # Powers of two tell ranks apart where powers of ten would be one tick.
    axis.xaxis.set_major_locator(LogLocator(base=2 if narrow and low >= 1 else 10, subs=(1.0,), numticks=9))
    if narrow and low < 1:
        axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0), numticks=9))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlim(low / 1.15, high * 1.15)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _legend(figure: MatplotlibFigure, handles: Sequence[Any], labels: Sequence[str] | None = None) -> None:
    if not handles:
        return
    named = [str(handle.get_label()) for handle in handles] if labels is None else list(labels)
    width = figure.get_figwidth()
    longest = max(len(label) for label in named)
    columns = max(1, min(len(named), int(width / (0.55 + 0.085 * longest))))
    figure.legend(handles, named, loc="outside lower center", ncols=columns, frameon=False)
