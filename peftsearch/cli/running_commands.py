"""Commands that check and run a study: here, and as a job of a cluster."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from peftsearch.cli.options import NameOption, SetOption, StorageOption, StudyFileArgument
from peftsearch.cli.output import err, out, print_fronts
from peftsearch.spec import TrialRecord, TrialState, hide_secrets


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

    Ctrl-C stops it: running trials write their state, and the same command continues them from there. Nothing that has
    finished runs again.

    A file with more trials or seeds, further domains, models or methods, or other resources extends its study; any
    other change is refused with a diff, and wants another --name, with or without --fork.

    Example: `peftsearch run studies/quickstart.yaml --set search.trials=4`
    """
    from peftsearch.cli.progress import Progress
    from peftsearch.study import Study
    from peftsearch.submit import check_arrival

    chosen = Study.from_file(study, name=name, storage=storage, overrides=settings or ())
    check_arrival(chosen)
    option = f" --storage {shlex.quote(hide_secrets(storage))}" if storage else ""
    again = ["peftsearch", "run", str(study)]
    for flag, value in (("--name", name), ("--storage", storage), ("--address", address), ("--fork", fork)):
        again += [flag, hide_secrets(value)] if value else []
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
    print_fronts(chosen, fronts)
    _check_any_scored(chosen.trials())
    out.print(f"Trials in MLflow:   peftsearch ui{option}", markup=False)
    out.print(f"The front as JSON:  peftsearch frontier {chosen.name} --json{option}", markup=False)
    out.print(f"Export adapters:    peftsearch export {chosen.name} --to adapters{option}", markup=False)


def _check_any_scored(records: Sequence[TrialRecord]) -> None:
    """Not every trial has failed.

    Raises:
        RuntimeError: All have; says why the first one did.
    """
    failed = [record for record in records if record.state is TrialState.FAILED]
    if failed and len(failed) == len(records):
        why = " ".join((failed[0].error or "for a reason that is not known").split())
        count = f"all {len(failed)} trials" if len(failed) > 1 else "the only trial"
        raise RuntimeError(
            f"{count} failed, and there is no front; trial {failed[0].number} ({failed[0].method}): {why}"
        )


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
        err.print(hide_secrets(text), markup=False)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    chosen = Study.from_file(study, name=name, storage=storage, overrides=settings or ())
    if stop:
        stop_job(chosen, address, told)
        return
    again = ["peftsearch", "submit", str(study), "--address", hide_secrets(address)]
    for flag, value in (("--name", name), ("--storage", storage)):
        again += [flag, hide_secrets(value)] if value else []
    for setting in settings or ():
        again += ["--set", hide_secrets(setting)]
    how = f"Follow it with:  {shlex.join(again)}\nStop it with:    {shlex.join([*again, '--stop'])}"
    try:
        status = run_as_job(chosen, address, settings or (), following=follow, write=write, told=told)
    except KeyboardInterrupt:
        told(f"The job goes on. {how}")
        raise typer.Exit(130) from None
    if not follow:
        told(how)
    raise typer.Exit(status)
