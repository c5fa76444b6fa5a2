"""Commands that show what studies have found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftsearch.cli.options import DomainOption, JsonOption, NameArgument, StorageOption
from peftsearch.cli.output import err, out, print_fronts, print_json, show, write


def list_command(storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """List the studies in a storage.

    A study that cannot be read is listed as such, with the reason.

    Example: `peftsearch list --storage /data/peftsearch`
    """
    from rich.table import Table

    from peftsearch.storage import storage_folder
    from peftsearch.study import read_statuses

    folder = storage_folder(storage)
    statuses, unreadable = read_statuses(folder)
    if as_json:
        broken = [{"study": name, "error": reason} for name, reason in unreadable.items()]
        print_json({"storage": str(folder), "studies": statuses, "unreadable": broken})
        return
    if not statuses and not unreadable:
        out.print(f"No study in {folder} yet: start one with 'peftsearch run STUDY.yaml'", markup=False)
        return
    table = Table("study", "state", "complete", "pruned", "failed", "running", "planned", title=str(folder))
    for status in statuses:
        counts = status["counts"]
        table.add_row(
            status["study"],
            status["state"],
            *(str(counts[key]) for key in ("complete", "pruned", "failed", "running")),
            str(status["planned"]),
        )
    for name in unreadable:
        table.add_row(name, "unreadable")
    show(table)
    for name, reason in unreadable.items():
        err.print(f"{name}: {reason}", markup=False)


def status(
    name: NameArgument,
    storage: StorageOption = None,
    as_json: JsonOption = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Until the study is finished; with --json, one object per line and change")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between two looks")] = 2.0,
) -> None:
    """Say where a study stands.

    With --watch a terminal shows it anew until the study is finished or Ctrl-C is pressed; a file gets a line for
    every change.

    Example: `peftsearch status quickstart --watch`
    """
    from peftsearch.cli.status import status_lines
    from peftsearch.cli.status import watch as watch_study
    from peftsearch.study import Study

    chosen = Study.open(name, storage)
    if watch:
        watch_study(chosen, out, interval, as_json=as_json)
        return
    found = chosen.status()
    if as_json:
        print_json(found)
        return
    for key, value in status_lines(found).items():
        out.print(f"{key:>9}  {value}", markup=False)


def trials(
    name: NameArgument,
    storage: StorageOption = None,
    as_json: JsonOption = False,
    csv: Annotated[Path | None, typer.Option(help="Write a CSV file")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write a Parquet file")] = None,
) -> None:
    """Show every trial of the ledger, whatever its state.

    Example: `peftsearch trials quickstart --csv trials.csv`
    """
    from peftsearch.frontier import trials_csv, trials_json, trials_parquet, trials_table
    from peftsearch.study import Study

    chosen = Study.open(name, storage)
    records = chosen.trials()
    if csv:
        write(csv, trials_csv(records))
    if parquet:
        write(parquet, trials_parquet(records))
    if as_json:
        print_json(trials_json(records, chosen.name))
    elif not (csv or parquet):
        show(trials_table(records))


def frontier(
    name: NameArgument,
    domain: DomainOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
    csv: Annotated[Path | None, typer.Option(help="Write the front as CSV")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one interactive, self-contained page")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture")] = None,
) -> None:
    """Show the front of each domain, or write it to a file.

    The front: the finished trials that no other beats in the metric without training more parameters.

    Example: `peftsearch frontier quickstart --html front.html`
    """
    from peftsearch.frontier import front_html, front_png, frontier_json, trials_csv
    from peftsearch.study import Study

    chosen = Study.open(name, storage)
    fronts = chosen.frontier(domain)
    records, facts = chosen.trials(), chosen.facts()
    chosen_facts = facts.model_copy(update={"domains": {key: facts.domains[key] for key in fronts}})
    if csv:
        write(csv, trials_csv([record for front in fronts.values() for record in front.front]))
    if html:
        standing = chosen.status()
        # Of one domain alone it is not known.
        planned = standing["planned"] if domain is None else None
        # The page may be opened in another folder, or by somebody without this shell's environment.
        option = chosen.folder.option
        page = front_html(records, chosen_facts, state=standing["state"], planned=planned, storage=option)
        write(html, page.encode())
    if png:
        write(png, front_png(records, chosen_facts))
    if as_json:
        print_json(frontier_json(records, chosen_facts))
    elif not (csv or html or png):
        print_fronts(chosen, fronts)


def report(
    name: NameArgument,
    to: Annotated[Path, typer.Option(help="Folder for the report")],
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write tables with deviations, significance and plots.

    Markdown, one self-contained page, a CSV file per table and a PNG per plot, from what the ledger holds by now.

    Example: `peftsearch report quickstart --to report`
    """
    from peftsearch.study import Study

    chosen = Study.open(name, storage)
    files = chosen.report(to)
    if as_json:
        print_json({"study": chosen.name, "files": [str(file) for file in files]})
        return
    for file in files[:2]:
        out.print(str(file), markup=False)
    err.print(f"Wrote {len(files)} files to {to}: the tables as CSV and the plots as PNG beside them", markup=False)
