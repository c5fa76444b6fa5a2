"""Commands around MLflow."""

from __future__ import annotations

from typing import Annotated

import typer

from peftsearch.cli.options import NameArgument, StorageOption
from peftsearch.cli.output import out


def ui(
    storage: StorageOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; loopback unless you say otherwise")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on")] = 5000,
    names: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", metavar="NAME", help="A further name by which browsers reach it; repeatable"),
    ] = None,
) -> None:
    """Open MLflow's UI and the studies' live Pareto pages.

    The pages are under /peftsearch/ of the same address, and follow running studies by themselves. A storage in an
    object store has pages alone: its studies' runs are on the MLflow server that they name.

    Example: `peftsearch ui --port 5001`
    """
    from peftsearch.storage import storage_folder
    from peftsearch.tracking.ui import serve_ui

    raise typer.Exit(serve_ui(storage_folder(storage), host=host, port=port, names=names or ()))


def sync(name: NameArgument, storage: StorageOption = None) -> None:
    """Bring MLflow up to date from the ledger.

    Example: `peftsearch sync quickstart`
    """
    from peftsearch.study import Study

    chosen = Study.open(name, storage)
    count = chosen.sync()
    out.print(f"MLflow at {chosen.public_tracking_uri} holds all {count} trials of {chosen.name}", markup=False)
