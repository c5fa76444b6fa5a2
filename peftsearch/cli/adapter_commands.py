"""Commands around adapters: exported, scored again, and used."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftsearch.cli.options import DomainOption, JsonOption, NameArgument, SetOption, StorageOption
from peftsearch.cli.output import err, out, print_json
from peftsearch.spec import StudyError


def export(
    name: NameArgument,
    to: Annotated[
        str | None,
        typer.Option(
            help="Folder for the adapters, one folder each; or a URI of pyarrow.fs: s3://BUCKET/PREFIX, gs://..."
        ),
    ] = None,
    domain: DomainOption = None,
    method: Annotated[
        str | None, typer.Option(help="Only trials of this method: its own front, whatever other methods do")
    ] = None,
    pick: Annotated[
        Literal["frontier", "best", "knee", "smallest"],
        typer.Option(
            help="All of the front, its best metric, where further parameters stop paying, or its fewest parameters"
        ),
    ] = "frontier",
    max_parameters: Annotated[
        int | None, typer.Option(help="Only trials with at most so many trainable parameters")
    ] = None,
    min_metric: Annotated[
        float | None,
        typer.Option(help="Only trials whose metric is at least so good: of errors and perplexity, at most so much"),
    ] = None,
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

    What the limits or the form leave out, where other trials are exported, is said and stands in `left_out` of --json;
    the exit status is 0.

    Example: `peftsearch export quickstart --to adapters --domain legal --pick knee`
    """
    from peftsearch.domains.tasks import get_task
    from peftsearch.export.purpose import columns_read, markers_of, marking
    from peftsearch.study import Study

    if merge and as_lora:
        raise StudyError("--merge and --as-lora exclude each other: a merged model has no adapter left")
    chosen = Study.open(name, storage)
    left_out: list[str] = []
    exported = chosen.export(
        to,
        domain=domain,
        method=method,
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
        left_out=left_out.append,
    )
    if as_json:
        items = [item.as_json() for item in exported]
        print_json({"study": chosen.name, "exported": items, "left_out": left_out})
        return
    for item in exported:
        out.print(str(item.folder or item.repository), markup=False)
    folder = exported[0].folder
    if isinstance(folder, Path):
        command = shlex.join(
            ["peftsearch", "predict", str(folder), "--input", "YOURS.csv", "--output", "predicted.csv"]
        )
        of = chosen.spec.domains[exported[0].record.domain]
        read = columns_read(of)
        # Where the choices of a question are a column each, there are several names for one role.
        names = [name for of_role in read.values() for name in ([of_role] if isinstance(of_role, str) else of_role)]
        columns = f"column{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
        markers = markers_of(get_task(of.task, options=of.options))
        marked = f"; its texts must hold {marking(markers)}" if markers else ""
        err.print(
            f"Predict your own file; it reads the {columns}, or what --column names{marked}:\n  {command}", markup=False
        )


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
        print_json(result)
        return
    for key, value in result["scores"].items():
        out.print(f"{key:>40}  {value:.4f}", markup=False)


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
        print_json({**found.__dict__, "output": str(found.output)})
    else:
        rate = found.rows / max(found.seconds, 1e-9)
        err.print(
            f"{found.rows:,} rows in {found.seconds:.1f} s on {found.device} ({rate:,.0f} a second)", markup=False
        )
        out.print(str(found.output), markup=False)
    if found.unpredicted:
        raise typer.Exit(1)
