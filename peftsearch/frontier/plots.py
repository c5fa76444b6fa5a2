"""Pictures of the front: interactive (plotly), and as a PNG (matplotlib).

Imports of plotly and matplotlib take a second each, so they wait until a picture is wanted.
"""

from __future__ import annotations

import html
import io
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from peftsearch.frontier.front import DomainFront, complete, domain_fronts
from peftsearch.spec import Confirmed, StudyError, StudyFacts, TrialRecord, TrialState, suggest
from peftsearch.tracking.names import configuration_text, shorten

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes

# Okabe and Ito 2008, "Color Universal Design": told apart with every common colour vision. Its yellow is too faint for
# white paper and left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_PLOTLY_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "pentagon", "hexagon")
_MATPLOTLIB_SYMBOLS = ("o", "s", "D", "^", "*", "p", "h")
_STEP_COLOUR = "#6b7280"
_BASELINE_COLOUR = "#6b7280"


def method_colour(index: int) -> str:
    """Colour of the study's method number ``index``."""
    return _COLOURS[index % len(_COLOURS)]


def method_marker(index: int) -> str:
    """Matplotlib's symbol of the study's method number ``index``."""
    return _MATPLOTLIB_SYMBOLS[method_symbol(index)]


def method_symbol(index: int) -> int:
    """Number of the symbol of the study's method number ``index``: circle, square, diamond, triangle, star, pentagon,
    hexagon. From the eighth method on, colours come back with another symbol."""
    return (index + index // len(_COLOURS)) % len(_COLOURS)


def front_figure(records: Iterable[TrialRecord], domain: str, facts: StudyFacts) -> go.Figure:
    """One domain's metric against trainable parameters (logarithmic).

    The front is a step line: at each number of parameters, the best metric that so many can buy. Dominated trials are
    faint, pruned ones small crosses at their last evaluation; baselines are horizontal lines.

    Raises:
        StudyError: The study has no such domain.
    """
    return _figure(_domain(records, domain, facts), facts)


def front_png(records: Iterable[TrialRecord], facts: StudyFacts, domain: str | None = None, *, dpi: int = 150) -> bytes:
    """The fronts as a picture, one panel per domain (or of one domain). Needs neither a display nor a browser.

    Args:
        records: All trials of the study.
        facts: The study.
        domain: Name of the domain; all where None.
        dpi: Pixels per inch; a panel is 6.6 inches wide.

    Raises:
        StudyError: The study has no such domain.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(records)
    fronts = list(domain_fronts(records, facts).values()) if domain is None else [_domain(records, domain, facts)]
    columns = min(2, max(1, len(fronts)))
    lines = max(1, math.ceil(len(fronts) / columns))
    with rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.parse_math": False}):
        figure = Figure(figsize=(6.6 * columns, 4.3 * lines + 0.5), dpi=dpi, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for axis in axes[len(fronts) :]:
            axis.set_axis_off()
        for axis, front in zip(axes, fronts, strict=False):
            draw_front(axis, front, facts)
        handles = front_legend(fronts, facts)
        if handles:
            figure.legend(
                handles=handles, loc="outside lower center", ncols=min(len(handles), 4 * columns), frameon=False
            )
        out = io.BytesIO()
        with warnings.catch_warnings():
            # A name in letters that the font lacks is drawn as boxes; that is for no reader of a command's output.
            warnings.filterwarnings("ignore", r"Glyph \d+|Matplotlib currently does not support", UserWarning)
            # Without the software's version in it, equal fronts give equal files.
            figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


# --- what both kinds of picture share ---


@dataclass(frozen=True)
class _Group:
    """Trials that are drawn alike: COMPLETE ones of one method, on the front or dominated."""

    method: str
    on_front: bool
    records: list[TrialRecord]


def _domain(records: Iterable[TrialRecord], domain: str, facts: StudyFacts) -> DomainFront:
    fronts = domain_fronts(records, facts)
    if domain not in fronts:
        raise StudyError(f"the study {facts.study!r} has no domain {domain!r}{suggest(domain, fronts)}")
    return fronts[domain]


def methods_in_order(fronts: Iterable[DomainFront], facts: StudyFacts) -> list[str]:
    """In the order of the study file, so that a method looks the same in every picture of the study."""
    return list(dict.fromkeys([*facts.methods, *(record.method for front in fronts for record in front.records)]))


def _groups(front: DomainFront, facts: StudyFacts) -> list[_Group]:
    chosen = {record.number for record in front.front}
    groups = []
    for on_front in (False, True):
        for method in methods_in_order([front], facts):
            mine = [
                record
                for record in complete(front.records)
                if record.method == method and (record.number in chosen) == on_front
            ]
            if mine:
                groups.append(_Group(method, on_front, mine))
    return groups


def _pruned(front: DomainFront) -> list[TrialRecord]:
    return [
        record
        for record in front.records
        if record.state is TrialState.PRUNED and record.value is not None and math.isfinite(record.value)
    ]


def _x(record: TrialRecord) -> int:
    return max(record.trainable_parameters, 1)


def _x_range(front: DomainFront) -> tuple[float, float]:
    """Ends of the axis, with room beside the outermost trials; at least one decade."""
    logs = [math.log10(_x(record)) for record in [*complete(front.records), *_pruned(front)]]
    low, high = (min(logs), max(logs)) if logs else (3.0, 6.0)
    margin = max(0.07 * (high - low), (1 - (high - low)) / 2, 0.1)
    return 10 ** (low - margin), 10 ** (high + margin)


def is_log(front: DomainFront) -> bool:
    """Whether the metric needs a logarithmic axis: perplexities of failed configurations would press all others
    together."""
    return front.facts.direction == "minimize" and far_apart(
        [record.value for record in [*complete(front.records), *_pruned(front)] if record.value is not None]
        + [value for _, value in baseline_lines(front)]
    )


def far_apart(values: Sequence[float]) -> bool:
    """Whether values need a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 20


def log_y(axis: Axes) -> None:
    """Make matplotlib's vertical axis logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _y_range(front: DomainFront) -> tuple[float, float]:
    values = [record.value for record in [*complete(front.records), *_pruned(front)] if record.value is not None]
    values += [value for _, value in baseline_lines(front)]
    for item in _confirmed(front):
        values += [item.mean - item.std, item.mean + item.std]
    if is_log(front):
        values = [value for value in values if value > 0]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if is_log(front):
        room = (high / low) ** 0.06
        return low / room, high * room
    margin = max(0.08 * (high - low), 0.005)
    return low - margin, high + margin


def _steps(front: DomainFront, right: float) -> tuple[list[float], list[float]]:
    """Corners of the front's step line, up to the right edge."""
    points: list[tuple[float, float]] = []
    for record in front.front:
        assert record.value is not None
        if points:
            points.append((_x(record), points[-1][1]))
        points.append((_x(record), record.value))
    if points:
        points.append((right, points[-1][1]))
    return [x for x, _ in points], [y for _, y in points]


def baseline_lines(front: DomainFront) -> list[tuple[str, float]]:
    """Titles and values of a domain's baselines, on validation; the model's name is added where there are several, and
    how many examples a value rests on where that is a sample."""
    by_model = list(front.facts.baselines.items())
    found: dict[str, float] = {}
    for model, named in by_model:
        for name, baseline in list(named.items()):
            # What knows only the labels is the same for every model.
            title = baseline.title if len(by_model) == 1 or name == "majority" else f"{baseline.title}, {model}"
            rows = front.facts.rows.get("validation", 0)
            if baseline.examples is not None and baseline.examples < rows:
                title += f" ({baseline.examples:,} of {rows:,} examples)"
            if math.isfinite(baseline.value):
                found.setdefault(title, baseline.value)
    return list(found.items())


def _label_sides(front: DomainFront, low: float, high: float) -> list[bool]:
    """For each baseline whether its label stands above its line; of two close lines the lower one's stands below."""
    values = [value for _, value in baseline_lines(front)]
    if is_log(front):
        values, low, high = [math.log(value) for value in values], math.log(low), math.log(high)
    above = [True] * len(values)
    order = sorted(range(len(values)), key=lambda index: values[index])
    for lower, upper in pairwise(order):
        if values[upper] - values[lower] < 0.07 * (high - low):
            above[lower] = False
    return above


def _confirmed_trials(front: DomainFront) -> list[TrialRecord]:
    return [record for record in complete(front.records) if record.confirmed and math.isfinite(record.confirmed.mean)]


def _confirmed(front: DomainFront) -> list[Confirmed]:
    return [record.confirmed for record in _confirmed_trials(front) if record.confirmed]


def _metric(front: DomainFront) -> str:
    return front.facts.metric.replace("_", " ")


# --- plotly ---


def _figure(front: DomainFront, facts: StudyFacts) -> go.Figure:
    import plotly.graph_objects as go

    methods = methods_in_order([front], facts)
    low, high = _x_range(front)
    bottom, top = _y_range(front)
    figure = go.Figure()
    pruned = _pruned(front)
    if pruned:
        figure.add_trace(
            go.Scatter(
                x=[_x(record) for record in pruned],
                y=[record.value for record in pruned],
                mode="markers",
                name=f"pruned ({len(pruned)})",
                marker={"symbol": "x-thin", "size": 6, "color": "#9ca3af", "line": {"width": 1.2, "color": "#9ca3af"}},
                opacity=0.6,
                legendrank=3000,
                text=[_hover(record, front, facts) for record in pruned],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    if front.front:
        x, y = _steps(front, high)
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                name="front",
                line={"color": _STEP_COLOUR, "width": 1.6},
                hoverinfo="skip",
                legendrank=2000,
            )
        )
    shown: set[str] = set()
    for group in sorted(_groups(front, facts), key=lambda group: (not group.on_front, methods.index(group.method))):
        style = methods.index(group.method)
        figure.add_trace(
            go.Scatter(
                x=[_x(record) for record in group.records],
                y=[record.value for record in group.records],
                mode="markers",
                name=html.escape(group.method),
                legendgroup=group.method,
                legendrank=1000 + style,
                showlegend=group.method not in shown,
                marker={
                    "symbol": _PLOTLY_SYMBOLS[method_symbol(style)],
                    "size": 12 if group.on_front else 8,
                    "color": method_colour(style),
                    "opacity": 1.0 if group.on_front else 0.4,
                    "line": {"width": 1.2 if group.on_front else 0, "color": "white"},
                },
                text=[_hover(record, front, facts) for record in group.records],
                hovertemplate="%{text}<extra></extra>",
            )
        )
        shown.add(group.method)
    confirmed = _confirmed(front)
    if confirmed:
        figure.add_trace(
            go.Scatter(
                x=[_x(record) for record in _confirmed_trials(front)],
                y=[item.mean for item in confirmed],
                error_y={"type": "data", "array": [item.std for item in confirmed], "width": 5, "thickness": 1.2},
                mode="lines",
                line={"width": 0, "color": _STEP_COLOUR},
                name="confirmed: mean ± deviation over seeds",
                legendrank=2500,
                hoverinfo="skip",
            )
        )
    baselines, log = baseline_lines(front), is_log(front)
    sides = _label_sides(front, bottom, top)
    for (title, value), above in zip(baselines, sides, strict=True):
        figure.add_hline(
            y=value,
            line={"color": _BASELINE_COLOUR, "width": 1, "dash": "dot"},
            annotation={
                "text": f"{html.escape(title)} {value:.3f}",
                "font": {"size": 11},
                "x": 0,
                "xanchor": "left",
                "yanchor": "bottom" if above else "top",
            },
        )
        if log:
            # Of all that stands on a logarithmic axis, plotly wants the logarithm of annotations only.
            figure.layout.annotations[-1].y = math.log10(value)
    if not front.front and not pruned:
        figure.add_annotation(
            text="no finished trial yet", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font={"size": 16}
        )
    figure.update_layout(
        template="plotly_white",
        title={"text": html.escape(front.domain), "x": 0.01, "font": {"size": 17}},
        margin={"l": 62, "r": 16, "t": 46, "b": 56},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "right", "x": 1.0},
        hoverlabel={"align": "left"},
        xaxis={
            "type": "log",
            "title": {"text": "trainable parameters"},
            "range": [math.log10(low), math.log10(high)],
            "dtick": 1,
            "exponentformat": "SI",
        },
        yaxis={
            "title": {"text": html.escape(_metric(front))},
            "type": "log" if log else "linear",
            "range": [math.log10(bottom), math.log10(top)] if log else [bottom, top],
        },
    )
    return figure


def _hover(record: TrialRecord, front: DomainFront, facts: StudyFacts) -> str:
    state = "" if record.state is TrialState.COMPLETE else f" ({record.state.value.lower()})"
    lines = [
        f"<b>trial {record.number}: {html.escape(record.method)}</b>{state}",
        f"{html.escape(_metric(front))} {record.value:.4f}",
        f"{record.trainable_parameters:,} trainable parameters",
    ]
    if record.confirmed:
        lines.append(f"confirmed {record.confirmed.mean:.4f} ± {record.confirmed.std:.4f}")
    if len(facts.models) > 1:
        lines.append(html.escape(shorten(record.model, 80)))
    texts = [configuration_text({name: value}) for name, value in record.hyperparameters.items()]
    lines += [html.escape(shorten(text, 80)) for text in texts if text]
    return "<br>".join([*lines, f"trained {record.train_seconds:.1f} s"])


# --- matplotlib ---


def draw_front(axis: Axes, front: DomainFront, facts: StudyFacts) -> None:
    """Draw one domain's front with matplotlib; confirmed trials carry the mean and deviation over their seeds."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    methods = methods_in_order([front], facts)
    low, high = _x_range(front)
    bottom, top = _y_range(front)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    if is_log(front):
        log_y(axis)
    axis.set_ylim(bottom, top)
    axis.xaxis.set_major_locator(LogLocator(base=10, numticks=12))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _si(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#9ca3af")
    axis.tick_params(colors="#374151", which="both")
    axis.set_title(f"{front.domain}", loc="left", fontweight="bold")
    axis.set_xlabel("trainable parameters")
    axis.set_ylabel(_metric(front))

    baselines = baseline_lines(front)
    sides = _label_sides(front, bottom, top)
    for (title, value), above in zip(baselines, sides, strict=True):
        axis.axhline(value, color=_BASELINE_COLOUR, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        axis.annotate(
            f"{title} {value:.3f}",
            (0.005, value),
            xycoords=axis.get_yaxis_transform(),
            xytext=(0, 2 if above else -2),
            textcoords="offset points",
            va="bottom" if above else "top",
            fontsize=8,
            color="#374151",
            zorder=6,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
    pruned = _pruned(front)
    axis.scatter(
        [_x(record) for record in pruned],
        [float(record.value or 0) for record in pruned],
        marker="x",
        s=16,
        linewidths=0.9,
        color="#9ca3af",
        alpha=0.6,
        zorder=2,
    )
    if front.front:
        axis.plot(*_steps(front, high), color=_STEP_COLOUR, linewidth=1.4, zorder=3)
    elif not pruned:
        axis.text(0.5, 0.5, "no finished trial yet", transform=axis.transAxes, ha="center", color="#374151")
    for group in _groups(front, facts):
        style = methods.index(group.method)
        marker = method_marker(style)
        axis.scatter(
            [_x(record) for record in group.records],
            [float(record.value or 0) for record in group.records],
            marker=marker,
            s=(75 if group.on_front else 30) * (1.9 if marker == "*" else 1),
            color=method_colour(style),
            alpha=1.0 if group.on_front else 0.35,
            edgecolors="white" if group.on_front else "none",
            linewidths=1.0,
            zorder=5 if group.on_front else 2,
        )
    confirmed = _confirmed(front)
    if confirmed:
        axis.errorbar(
            [_x(record) for record in _confirmed_trials(front)],
            [item.mean for item in confirmed],
            yerr=[item.std for item in confirmed],
            fmt="_",
            color="#374151",
            markersize=7,
            capsize=2.5,
            linewidth=1.1,
            zorder=6,
        )


def front_legend(fronts: Sequence[DomainFront], facts: StudyFacts) -> list[Any]:
    """Handles for matplotlib's legend of `draw_front`."""
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    methods = methods_in_order(fronts, facts)
    present = {record.method for front in fronts for record in complete(front.records)}
    for style, method in enumerate(methods):
        if method in present:
            handles.append(
                Line2D(
                    [],
                    [],
                    linestyle="none",
                    marker=method_marker(style),
                    color=method_colour(style),
                    markersize=8,
                    label=method,
                )
            )
    if any(front.front for front in fronts):
        handles.append(Line2D([], [], color=_STEP_COLOUR, linewidth=1.4, label="front"))
        handles.append(
            Line2D(
                [], [], linestyle="none", marker="o", color=_STEP_COLOUR, alpha=0.3, markersize=5.5, label="dominated"
            )
        )
    if any(_confirmed(front) for front in fronts):
        handles.append(
            Line2D([], [], linestyle="none", marker="_", color="#374151", markersize=8, label="mean ± std over seeds")
        )
    if any(_pruned(front) for front in fronts):
        handles.append(
            Line2D([], [], linestyle="none", marker="x", color="#9ca3af", markersize=5, label="pruned (last value)")
        )
    return handles


def _si(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"
