"""Where a study stands: once, or again and again until it is finished."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from peftsearch.cli.fitting import Fitted
from peftsearch.cli.words import duration

if TYPE_CHECKING:
    from peftsearch.frontier import DomainFront
    from peftsearch.study import Study


def status_lines(found: Mapping[str, Any]) -> dict[str, str]:
    """A status, in the shape of ``status --json``, as titles and texts."""
    counts = ", ".join(f"{number} {state}" for state, number in found["counts"].items())
    return {
        "study": found["study"],
        "state": found["state"] + (f" ({found['error']})" if found["error"] else ""),
        "trials": f"{counts} of {found['planned']} planned",
        **_confirmations(found["confirmations"]),
        "elapsed": f"{found['elapsed_seconds']:.0f} s",
        "folder": found["folder"],
        "ledger": found["ledger"],
        "MLflow": f"{found['mlflow_tracking_uri'] or 'off'}, experiment {found['mlflow_experiment']}",
    }


def _confirmations(counts: Mapping[str, int | None]) -> dict[str, str]:
    if counts["planned"] == 0 and not counts["done"]:
        return {}
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    planned = "after the search" if counts["planned"] is None else f"of {counts['planned']} planned"
    return {"confirmed": f"{counts['done']} re-trainings{failed} {planned}"}


def watch(
    study: Study,
    console: Console,
    interval: float,
    *,
    as_json: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show where a study stands until it is finished.

    A terminal shows one view, drawn anew; elsewhere a line follows whenever something has changed. As JSON it is one
    object per line (JSON Lines), in the shape of ``status --json``, at first and whenever something has changed beside
    the time; nothing else is printed.

    Args:
        study: The study.
        console: Where to show it.
        interval: Seconds between two looks at the ledger.
        as_json: Print JSON Lines on standard output instead.
        sleep: Waits so many seconds.
    """
    before: Any = None
    live = None if as_json or not console.is_interactive else Live(console=console, auto_refresh=False)
    if live is not None:
        live.start()
    try:
        while True:
            found = study.status()
            now = {key: value for key, value in found.items() if key != "elapsed_seconds"}
            if live is not None:
                live.update(Fitted(_view(found, study.frontier(), interval)), refresh=True)
            elif now != before:
                line = json.dumps(found, ensure_ascii=False) if as_json else _line(found)
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
            before = now
            if found["state"] == "finished":
                break
            sleep(interval)
    finally:
        if live is not None:
            # What was seen last stays on the screen.
            live.stop()


def _line(found: Mapping[str, Any]) -> str:
    lines = status_lines(found)
    shown = [lines["study"], lines["state"], lines["trials"], lines.get("confirmed"), lines["elapsed"]]
    return "; ".join(text for text in shown if text)


def _view(found: Mapping[str, Any], fronts: Mapping[str, DomainFront], interval: float) -> RenderableType:
    counts, planned = found["counts"], found["planned"]
    ended = sum(counts[state] for state in ("complete", "pruned", "failed"))
    head = Table.grid(padding=(0, 2))
    style = {"running": "green", "interrupted": "yellow"}.get(found["state"], "")
    head.add_row(
        Text(found["study"], style="bold"), Text(found["state"], style=style), Text(duration(found["elapsed_seconds"]))
    )
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        ProgressBar(total=max(1, planned), completed=ended, width=24),
        Text(f"{ended} of {planned} trials"),
        Text(
            ", ".join(f"{counts[state]} {state}" for state in ("running", "pruned", "complete", "failed")), style="dim"
        ),
    )
    parts: list[RenderableType] = [head, bar, _domains(fronts)]
    if confirmed := _confirmations(found["confirmations"]):
        parts.append(Text(f"confirmed: {confirmed['confirmed']}"))
    if found["error"]:
        parts.append(Text(str(found["error"]), style="red"))
    if found["state"] == "interrupted":
        parts.append(Text("Nobody runs it now: 'peftsearch run' with its study file continues it.", style="yellow"))
    if found["state"] != "finished":
        parts.append(Text(f"every {interval:g} s; Ctrl-C ends this view and not the study", style="dim"))
    return Group(*parts)


def _domains(fronts: Mapping[str, DomainFront]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("domain", "complete", "best so far", "", "trainable", "front", "hypervolume"):
        table.add_column(column, justify="left" if column in ("domain", "best so far", "") else "right", no_wrap=True)
    for name, front in fronts.items():
        best = front.best
        table.add_row(
            Text(name),
            str(front.counts["complete"]),
            Text(f"{front.facts.metric} {best.value:.4f}" if best else "-", style="bold" if best else "dim"),
            Text(best.method if best else ""),
            f"{best.trainable_parameters:,}" if best else "",
            str(len(front.front)) if front.front else "",
            f"{front.hypervolume:.4f}" if front.front else "",
        )
    return table
