"""The commands. Their names and options are a contract: scripts of other people call them."""

from __future__ import annotations

from collections.abc import Callable

import typer

from peftsearch.cli.adapter_commands import evaluate, export, predict
from peftsearch.cli.machine_commands import doctor, schema
from peftsearch.cli.mlflow_commands import sync, ui
from peftsearch.cli.output import err
from peftsearch.cli.reading_commands import frontier, list_command, report, status, trials
from peftsearch.cli.running_commands import run, submit, validate
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

COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "validate": validate,
    "list": list_command,
    "status": status,
    "trials": trials,
    "frontier": frontier,
    "export": export,
    "report": report,
    "evaluate": evaluate,
    "predict": predict,
    "ui": ui,
    "submit": submit,
    "sync": sync,
    "schema": schema,
    "doctor": doctor,
}
"""Every command by its name, in the order of the help."""

for name, command in COMMANDS.items():
    app.command(name)(command)


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
