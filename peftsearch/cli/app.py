"""The commands. Their names and options are a contract: scripts of other people call them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from peftsearch.spec import StudyError, hide_secrets

app = typer.Typer(
    name="peftsearch",
    help="Hyperparameter studies for parameter-efficient fine-tuning: accuracy against parameters.",
    epilog="Begin with `peftsearch run studies/quickstart.yaml`. Every command explains itself with `--help`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

StorageOption = Annotated[
    str | None,
    typer.Option(help="Folder, or s3://BUCKET/PREFIX, gs://... (default: $PEFTSEARCH_STORAGE or ~/peftsearch)"),
]
StudyFileArgument = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file")]


def _studies(context: typer.Context, incomplete: str) -> list[str]:
    """For the shell's completion: the studies of the storage. Nothing where it cannot be read: no place for errors."""
    from peftsearch.storage import list_studies, storage_folder

    try:
        return [
            name for name in list_studies(storage_folder(context.params.get("storage"))) if name.startswith(incomplete)
        ]
    except (StudyError, OSError):
        return []


NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a study in the storage", autocompletion=_studies)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the study file; repeatable")
]
NameOption = Annotated[str | None, typer.Option("--name", help="Another name than the file's")]
DomainOption = Annotated[str | None, typer.Option(help="Only this domain")]

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@app.command()
def run(
    study: StudyFileArgument,
    name: NameOption = None,
    storage: StorageOption = None,
    address: Annotated[str | None, typer.Option(help="Address of a Ray cluster (default: this machine)")] = None,
    fork: Annotated[
        str | None,
        typer.Option(
            metavar="OLD", help="A new study that takes over the trials of OLD, where their cells are the same"
        ),
    ] = None,
    settings: SetOption = None,
) -> None:
    """Run a study, or continue it; ends with the fronts.

    Ctrl-C stops it after the running segment; the same command continues it, and nothing that has finished runs again.

    A file with more trials or seeds, further domains, models or methods, or other resources extends its study; any
    other change is refused with a diff, and wants another --name, with or without --fork.

    Example: `peftsearch run studies/quickstart.yaml --set search.trials=4`
    """
    from peftsearch.cli.progress import Progress
    from peftsearch.study import Study
    from peftsearch.submit import check_arrival

    chosen = Study.from_file(study, name=name, storage=storage, overrides=settings or ())
    check_arrival(chosen)
    option = f" --storage {storage}" if storage else ""
    again = ["peftsearch", "run", str(study)]
    for flag, value in (("--name", name), ("--storage", storage), ("--address", address), ("--fork", fork)):
        again += [flag, str(value)] if value else []
    for setting in settings or ():
        again += ["--set", hide_secrets(setting)]
    stopped = f"Stopped. Everything so far is recorded; continue with:\n  {shlex.join(again)}\n"

    def end_at_once() -> None:
        # As SIGKILL would: an exception in the middle of Ray's calls, and Ray's shutdown after it, have crashed the
        # process (seen: SIGSEGV). Ray's processes end with this one, and the ledger is written at every event.
        os.write(2, ("\n\x1b[?25h" if err.is_terminal else "\n").encode() + stopped.encode())
        os._exit(130)

    try:
        with Progress(err, chosen) as progress:
            fronts = chosen.run(address=address, events=progress, fork=fork, at_once=end_at_once)
    except KeyboardInterrupt:
        err.print(stopped, markup=False, end="")
        raise typer.Exit(130) from None
    _print_fronts(chosen, fronts)
    out.print(f"Trials in MLflow:   peftsearch ui{option}", markup=False)
    out.print(f"The front as JSON:  peftsearch frontier {chosen.name} --json{option}", markup=False)
    out.print(f"Export adapters:    peftsearch export {chosen.name} --to adapters{option}", markup=False)


@app.command()
def validate(
    study: StudyFileArgument,
    name: NameOption = None,
    storage: StorageOption = None,
    settings: SetOption = None,
) -> None:
    """Check a study file and print the plan.

    The plan: domains, models, cells with their trials and trainable parameters, and an estimate of memory and time.
    Tokenises the data; trains nothing.

    Example: `peftsearch validate studies/quickstart.yaml`
    """
    from peftsearch.cli.plan import print_plan
    from peftsearch.study import Study

    chosen = Study.from_file(study, name=name, storage=storage, overrides=settings or ())
    print_plan(out, chosen, chosen.validate())


@app.command(name="list")
def list_command(storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """List the studies in a storage.

    A study that cannot be read is listed as such, with the reason.

    Example: `peftsearch list --storage /data/peftsearch`
    """
    from rich.table import Table

    from peftsearch.storage import list_studies, storage_folder
    from peftsearch.study import Study

    folder = storage_folder(storage)
    statuses: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    for name in list_studies(folder):
        try:
            statuses.append(Study.open(name, folder).status())
        except Exception as error:  # whatever is wrong with one study, the others are still there
            unreadable[name] = (str(error).splitlines() or [type(error).__name__])[0]
    if as_json:
        broken = [{"study": name, "error": reason} for name, reason in unreadable.items()]
        _print_json({"storage": str(folder), "studies": statuses, "unreadable": broken})
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
    _show(table)
    for name, reason in unreadable.items():
        err.print(f"{name}: {reason}", markup=False)


@app.command()
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
        _print_json(found)
        return
    for key, value in status_lines(found).items():
        out.print(f"{key:>9}  {value}", markup=False)


@app.command()
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
        _write(csv, trials_csv(records))
    if parquet:
        _write(parquet, trials_parquet(records))
    if as_json:
        _print_json(trials_json(records, chosen.name))
    elif not (csv or parquet):
        _show(trials_table(records))


@app.command()
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
        _write(csv, trials_csv([record for front in fronts.values() for record in front.front]))
    if html:
        standing = chosen.status()
        page = front_html(records, chosen_facts, state=standing["state"], planned=standing["planned"], storage=storage)
        _write(html, page.encode())
    if png:
        _write(png, front_png(records, chosen_facts))
    if as_json:
        _print_json(frontier_json(records, chosen_facts))
    elif not (csv or html or png):
        _print_fronts(chosen, fronts)


@app.command()
def export(
    name: NameArgument,
    to: Annotated[
        str | None, typer.Option(help="Folder for the adapters, one folder each; or s3://BUCKET/PREFIX, gs://...")
    ] = None,
    domain: DomainOption = None,
    pick: Annotated[
        Literal["frontier", "best", "knee", "smallest"],
        typer.Option(
            help="All of the front, its best metric, where further parameters stop paying, or its fewest parameters"
        ),
    ] = "frontier",
    max_parameters: Annotated[
        int | None, typer.Option(help="Only trials with at most so many trainable parameters")
    ] = None,
    min_metric: Annotated[float | None, typer.Option(help="Only trials with at least this metric")] = None,
    max_latency: Annotated[
        float | None,
        typer.Option(help="Only trials that take at most so many milliseconds for one example, measured here"),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Complete models, which transformers loads by itself")] = False,
    as_lora: Annotated[bool, typer.Option("--as-lora", help="Plain LoRA adapters, converted by PEFT")] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Push the one that is picked to a repository of the Hub")
    ] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Who sees a repository that --push makes")] = True,
    register: Annotated[
        bool, typer.Option("--register", help="Also in MLflow's registry: models:/DOMAIN@best, @knee, @smallest")
    ] = False,
    register_as: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name in the registry, where it is not the domain's")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Allowed difference between the reloaded score and the ledger's (default: 1e-6; 1e-3 with --merge and "
            "--as-lora)"
        ),
    ] = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write Pareto-optimal adapters as PEFT folders.

    Each is reloaded in a fresh process, scored again and timed; one whose score differs from the ledger's is refused.
    Trials that are tied within their error bars count as equal: the cheaper one is picked.

    Example: `peftsearch export quickstart --to adapters --domain legal --pick knee`
    """
    from peftsearch.export.purpose import columns_read
    from peftsearch.study import Study

    if merge and as_lora:
        raise StudyError("--merge and --as-lora exclude each other: a merged model has no adapter left")
    chosen = Study.open(name, storage)
    exported = chosen.export(
        to,
        domain=domain,
        pick=pick,
        max_parameters=max_parameters,
        min_metric=min_metric,
        max_latency=max_latency,
        form="merged" if merge else "lora" if as_lora else "adapter",
        push=push,
        private=private,
        register=register,
        register_as=register_as,
        tolerance=tolerance,
        told=lambda text: err.print(text, markup=False),
    )
    if as_json:
        _print_json({"study": chosen.name, "exported": [item.as_json() for item in exported]})
        return
    for item in exported:
        out.print(str(item.folder or item.repository), markup=False)
    folder = exported[0].folder
    if isinstance(folder, Path):
        command = shlex.join(
            ["peftsearch", "predict", str(folder), "--input", "YOURS.csv", "--output", "predicted.csv"]
        )
        read = columns_read(chosen.spec.domains[exported[0].record.domain])
        # Where the choices of a question are a column each, there are several names for one role.
        names = [name for of_role in read.values() for name in ([of_role] if isinstance(of_role, str) else of_role)]
        columns = f"column{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
        err.print(f"Predict your own file; it reads the {columns}, or what --column names:\n  {command}", markup=False)


@app.command()
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
        _print_json({"study": chosen.name, "files": [str(file) for file in files]})
        return
    for file in files[:2]:
        out.print(str(file), markup=False)
    err.print(f"Wrote {len(files)} files to {to}: the tables as CSV and the plots as PNG beside them", markup=False)


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="An exported adapter")],
    study: Annotated[Path, typer.Option(help="The study file that describes the data")],
    domain: Annotated[str, typer.Option(help="Domain of the study to score on")],
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Split of the domain's data")] = "test",
    storage: StorageOption = None,
    as_json: JsonOption = False,
    settings: SetOption = None,
) -> None:
    """Score an exported adapter from disk.

    Example: `peftsearch evaluate adapters/legal/00012-lora --study studies/quickstart.yaml --domain legal`
    """
    from peftsearch.export import evaluate_adapter
    from peftsearch.spec import StudyFile
    from peftsearch.storage import cache_folder, storage_folder

    file = StudyFile.load(study, settings or ())
    try:
        result = evaluate_adapter(adapter, file, domain, split, cache_folder(storage_folder(storage)))
    except StudyError as error:
        raise StudyError(file.explain(error)) from None
    if as_json:
        _print_json(result)
        return
    for key, value in result["scores"].items():
        out.print(f"{key:>40}  {value:.4f}", markup=False)


@app.command()
def predict(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="An exported adapter")],
    source: Annotated[Path, typer.Option("--input", help="CSV, JSON Lines or Parquet, by its suffix")],
    output: Annotated[Path, typer.Option(help="The same; the input's columns, and the predictions after them")],
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="[ROLE=]NAME",
            help="Column with the text where it is called otherwise than in the study's data; repeatable",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Column of the predictions")] = "prediction",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per forward pass")] = 64,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to predict; auto: on a GPU where there is one")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output where it exists")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the base model brings along")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Predict every row of a file with an exported adapter.

    Rows without a text get an empty prediction and are reported (exit status 1); none is left out.

    Example: `peftsearch predict adapters/legal/00012-lora --input clauses.csv --output predicted.csv --column clause`
    """
    from peftsearch.cli.prediction import show_prediction
    from peftsearch.export import predict_file

    with show_prediction(err) as (begun, done):
        found = predict_file(
            adapter,
            source,
            output,
            columns=columns or (),
            name=name,
            batch_size=batch_size,
            device=device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            begun=begun,
            done=done,
        )
    for sentence in found.sentences():
        err.print(sentence, markup=False)
    if as_json:
        _print_json({**found.__dict__, "output": str(found.output)})
    else:
        rate = found.rows / max(found.seconds, 1e-9)
        err.print(
            f"{found.rows:,} rows in {found.seconds:.1f} s on {found.device} ({rate:,.0f} a second)", markup=False
        )
        out.print(str(found.output), markup=False)
    if found.unpredicted:
        raise typer.Exit(1)


@app.command()
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

    The pages are under /peftsearch/ of the same address, and follow running studies by themselves.

    Example: `peftsearch ui --port 5001`
    """
    from peftsearch.storage import mlflow_folder, storage_folder
    from peftsearch.tracking.ui import serve_ui

    raise typer.Exit(serve_ui(mlflow_folder(storage_folder(storage)), host=host, port=port, names=names or ()))


@app.command()
def submit(
    study: StudyFileArgument,
    address: Annotated[str, typer.Option(help="The Ray dashboard's URL, such as http://127.0.0.1:8265")],
    name: NameOption = None,
    storage: StorageOption = None,
    settings: SetOption = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Pass on the job's output until it ends")] = True,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the study's job instead; what it has is kept")] = False,
) -> None:
    """Run a study as a job of a Ray cluster, and follow it.

    The job goes on without this command: after Ctrl-C or a lost terminal, the same command follows it again. The
    storage must be one that the cluster sees too.

    Example: `peftsearch submit study.yaml --address http://127.0.0.1:8265 --storage /shared/peftsearch`
    """
    from peftsearch.study import Study
    from peftsearch.submit import run_as_job, stop_job

    def told(text: str) -> None:
        err.print(text, markup=False)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    chosen = Study.from_file(study, name=name, storage=storage, overrides=settings or ())
    if stop:
        stop_job(chosen, address, told)
        return
    again = ["peftsearch", "submit", str(study), "--address", address]
    for flag, value in (("--name", name), ("--storage", storage)):
        again += [flag, str(value)] if value else []
    for setting in settings or ():
        again += ["--set", setting]
    how = f"Follow it with:  {shlex.join(again)}\nStop it with:    {shlex.join([*again, '--stop'])}"
    try:
        status = run_as_job(chosen, address, settings or (), following=follow, write=write, told=told)
    except KeyboardInterrupt:
        told(f"The job goes on. {how}")
        raise typer.Exit(130) from None
    if not follow:
        told(how)
    raise typer.Exit(status)


@app.command()
def sync(name: NameArgument, storage: StorageOption = None) -> None:
    """Bring MLflow up to date from the ledger.

    Example: `peftsearch sync quickstart`
    """
    from peftsearch.study import Study

    chosen = Study.open(name, storage)
    count = chosen.sync()
    out.print(f"MLflow at {chosen.public_tracking_uri} holds all {count} trials of {chosen.name}", markup=False)


@app.command()
def schema() -> None:
    """Print the study file's JSON Schema, for editors.

    An editor with a YAML language server then completes, explains and checks study files that begin with
    "# yaml-language-server: $schema=study.schema.json".

    Example: `peftsearch schema > study.schema.json`
    """
    from peftsearch.schema import study_schema

    _print_json(study_schema())


@app.command()
def doctor(storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """Say what works on this machine, and how to mend what does not.

    Looks at the processors, the libraries, the storage, the quickstart's packages, and access to the Hub.

    Example: `peftsearch doctor`
    """
    from peftsearch.cli.doctor import examine
    from peftsearch.storage import storage_folder

    findings = examine(storage_folder(storage))
    works = all(item.ok or item.optional for item in findings)
    if as_json:
        _print_json({"ok": works, "findings": [item.__dict__ for item in findings]})
    else:
        for item in findings:
            mark = "ok" if item.ok else ("no" if item.optional else "FAIL")
            out.print(f"{mark:<4}  {item.what:<18} {item.detail}", markup=False)
    if not works:
        raise typer.Exit(1)


def run_app(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status.

    Bad input is one sentence on standard error and status 2; a defect of ours keeps its traceback.
    """
    try:
        result = app(arguments, standalone_mode=False, prog_name="peftsearch")
    except StudyError as error:
        err.print(f"Error: {error}", style="bold red", markup=False)
        return 2
    except typer.TyperException as error:
        return _usage_error(error)
    except (typer.Abort, KeyboardInterrupt):
        err.print("Interrupted.")
        return 130
    except BrokenPipeError:
        return 0
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        err.print(f"Error: {hide_secrets(str(error))}", style="bold red", markup=False)
        return 1
    return result if isinstance(result, int) else 0


def _usage_error(error: typer.TyperException) -> int:
    """A wrong command or option, in one sentence; without any command, the help (which typer has printed)."""
    context = getattr(error, "ctx", None)
    if sentence := " ".join(error.format_message().split()):
        command = context.command_path if context else "peftsearch"
        err.print(f"Error: {sentence.rstrip('.')} (see '{command} --help')", style="bold red", markup=False)
    return 2


def _print_fronts(chosen: Any, fronts: Any) -> None:
    from peftsearch.frontier import front_renderables

    for renderable in front_renderables(chosen.trials(), chosen.facts(), list(fronts)):
        _show(renderable)


def _show(renderable: Any) -> None:
    from peftsearch.cli.fitting import Fitted

    out.print(Fitted(renderable))


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise StudyError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
    err.print(f"Wrote {path}", markup=False)
