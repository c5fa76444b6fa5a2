"""How numbers read in a report."""

from __future__ import annotations

import math

ABSENT = "\u2013"


def number(value: float | None) -> str:
    """A metric: three decimals near 1, four digits elsewhere (perplexities)."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}" if abs(value) < 1e5 else f"{value:.2e}"


def spread(mean: float | None, deviation: float | None, count: int) -> str:
    """``0.812 ± 0.004 (3)``; a single one has no deviation."""
    if mean is None or not math.isfinite(mean):
        return ABSENT
    if count < 2 or deviation is None:
        return f"{number(mean)} (1)"
    return f"{number(mean)} ± {number(deviation)} ({count})"


def signed(value: float | None) -> str:
    """A difference."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value:+.3f}" if abs(value) < 10 else f"{value:+.4g}"


def count(value: int | None) -> str:
    """A number of things."""
    return ABSENT if value is None else f"{value:,}"


def percent(part: int | None, total: int | None) -> str:
    """A share of the model's parameters."""
    if part is None or not total:
        return ABSENT
    share = 100 * part / total
    return f"{share:.3f} %" if share < 1 else f"{share:.1f} %"


def memory(value: float | None) -> str:
    """Bytes as MiB or GiB."""
    if value is None or not math.isfinite(value):
        return ABSENT
    mib = value / 2**20
    return f"{mib:,.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def seconds(value: float | None) -> str:
    """A time that people can compare."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if value < 120:
        return f"{value:.1f} s"
    if value < 7200:
        return f"{value / 60:.1f} min"
    return f"{value / 3600:.1f} h"


def rate(value: float | None) -> str:
    """Examples per second."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value:,.0f}/s" if value >= 100 else f"{value:.3g}/s"


def probability(value: float | None) -> str:
    """A p value."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
