"""What MLflow shows of a domain: the note that a person reads first, the pictures, and the tables as files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from urllib.parse import quote

from peftsearch.frontier.front import DomainFront, Pick, domain_fronts, method_bests
from peftsearch.frontier.marginal_cost import costs_between_picks
from peftsearch.frontier.page import front_html
from peftsearch.frontier.plots import front_png
from peftsearch.frontier.tables import (
    LINEAR_PROBE,
    MAJORITY,
    domain_json,
    escape_markdown,
    front_markdown,
    trials_parquet,
    verdict,
)
from peftsearch.spec import StudyError, StudyFacts, TrialRecord, TrialState, suggest
from peftsearch.tracking.mlflow_runs import NOTE_LENGTH, THIS_RUN, DomainReport, page_path
from peftsearch.tracking.names import configuration_text, shorten

_NOTE_ROWS = 40
# A long text to begin a prompt with leaves less room for the front's table.
_CONFIGURATION = 200
# MLflow shows a note's pictures in their own size (its sanitiser drops everything but their address), and one that is
# wider than the note's column pushes whatever is beside it out of the window: 554 pixels fit into a window of 1280.
_PICTURE_DPI = 84
_MEANINGS: dict[Pick, str] = {
    "best": "best {metric}",
    "knee": "knee: where further parameters stop paying",
    "smallest": "smallest",
}


def domain_report(
    records: Iterable[TrialRecord], facts: StudyFacts, domain: str, storage: str | None = None
) -> DomainReport:
    """Render everything that a domain's MLflow run holds beside its trials.

    Args:
        records: Trials of the whole study.
        facts: The study.
        domain: Name of the domain.
        storage: What ``--storage`` the commands in it need; the default storage where absent.

    Raises:
        StudyError: The study has no such domain.
    """
    fronts = domain_fronts(records, facts)
    if domain not in fronts:
        raise StudyError(f"the study {facts.study!r} has no domain {domain!r}{suggest(domain, fronts)}")
    front = fronts[domain]
    content = {"study": facts.study, "domains": {domain: domain_json(front)}}
    metrics = {"hypervolume": front.hypervolume} | {f"trials_{state}": float(n) for state, n in front.counts.items()}
    if front.best is not None and front.best.value is not None:
        metrics[f"best_{front.facts.metric}"] = front.best.value
    for model, named in list(front.facts.baselines.items()):
        for name in (MAJORITY, LINEAR_PROBE):
            if name in named:
                # One model is the rule, and then the plain name is what people look for.
                suffix = "" if len(facts.models) == 1 else f"/{model}"
                metrics[f"baseline_{name}{suffix}"] = named[name].value
    return DomainReport(
        note=_note(front, facts, storage),
        files={
            "front.html": front_html(front.records, facts, domain, storage=storage).encode(),
            "front.png": front_png(front.records, facts, domain, dpi=_PICTURE_DPI),
            "front.json": (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(),
            "front.parquet": trials_parquet(front.front),
            "trials.parquet": trials_parquet(front.records),
        },
        metrics=metrics,
        on_front={record.number for record in front.front},
        picks=picks_of(front),
        method_best={record.number for record in method_bests(front.records, front.facts.direction)},
        step=sum(record.state is not TrialState.RUNNING for record in front.records),
    )


def picks_of(front: DomainFront) -> dict[int, str]:
    """For what each trial would be picked, by its number: ``best``, ``knee``, ``smallest``, apart by spaces."""
    found: dict[int, list[str]] = {}
    for how, choice in front.picks().items():
        found.setdefault(choice.record.number, []).append(how)
    return {number: " ".join(names) for number, names in found.items()}


def _note(front: DomainFront, facts: StudyFacts, storage: str | None) -> str:
    rows = _NOTE_ROWS
    while len(note := _markdown(front, facts, rows, storage)) > NOTE_LENGTH and rows > 1:
        rows //= 2
    return shorten(note, NOTE_LENGTH)


def _markdown(front: DomainFront, facts: StudyFacts, rows: int, storage: str | None) -> str:
    metric = escape_markdown(front.facts.metric)
    lines = [f"# {escape_markdown(facts.study)}: {escape_markdown(front.domain)}", "", f"**{_text(front)}**", ""]
    if front.front:
        lines += [_picture(front), "", f"## Which configuration to use ({metric} on the validation split)", ""]
        for how, choice in front.picks().items():
            record, meaning = choice.record, _MEANINGS[how].format(metric=metric)
            assert record.value is not None
            lines.append(
                f"- **{meaning}**: {record.value:.3f} with {record.trainable_parameters:,} "
                f"trainable parameters: {_linked(record)}, {escape_markdown(record.method)}, "
                f"{escape_markdown(shorten(configuration_text(record.hyperparameters), _CONFIGURATION))}"
            )
            if choice.reason is not None:
                lines.append(f"  ({escape_markdown(choice.reason)})")
        costs = [f"- {escape_markdown(cost.sentence(front.facts.metric))}" for cost in costs_between_picks(front)]
        if costs:
            lines += ["", "What a further point costs:", "", *costs]
        lines += [
            "",
            "Take the knee home as a PEFT folder (or `--pick best`, `--pick smallest`, `--pick frontier`):",
            "",
            f"    {_export(front, facts, storage)}",
            "",
            "## The front",
            "",
            "No other trial has a better metric with fewer trainable parameters (task head included).",
            "",
            front_markdown(front, facts, rows),
            "",
            f"Hypervolume {front.hypervolume:.4f}. The Pareto page is the artifact `front.html` "
            f"([live]({_live(front, facts)}) "
            "where `peftsearch ui` serves MLflow), the picture `front.png`; tables are `front.json`, "
            "`front.parquet` and `trials.parquet`.",
        ]
    counts = ", ".join(f"{count} {state}" for state, count in front.counts.items())
    rows_text = ", ".join(f"{count:,} {split}" for split, count in front.facts.rows.items())
    lines += ["", "## What this rests on", "", f"- Trials: {counts}", f"- Texts: {rows_text}"]
    lines.append(f"- Labels: {len(front.facts.labels)}; data: {escape_markdown(front.facts.source)}")
    lines += [f"- Note: {escape_markdown(warning)}" for warning in front.facts.warnings]
    return "\n".join(lines) + "\n"


def _picture(front: DomainFront) -> str:
    """The run's own artifact, as MLflow's server serves it; the address is relative, so that a proxy's path stays."""
    alternative = f"The front of {escape_markdown(front.domain)}"
    return f"![{alternative}](get-artifact?path=front.png&run_uuid={THIS_RUN})"


def _export(front: DomainFront, facts: StudyFacts, storage: str | None) -> str:
    command = ["peftsearch", "export", facts.study, "--to", "adapters", "--domain", front.domain, "--pick", "knee"]
    return shlex.join(command if storage is None else [*command, "--storage", storage])


def _linked(record: TrialRecord) -> str:
    run = record.mlflow_run_id
    return f"trial {record.number}" if run is None else f"[trial {record.number}](#/runs/{quote(run, safe='')})"


def _live(front: DomainFront, facts: StudyFacts) -> str:
    """Where the page is beside MLflow, see `peftsearch.live`; nothing in the names is Markdown any more."""
    return f"{page_path(facts.study)}#{quote(front.domain, safe='')}"


def _text(front: DomainFront) -> str:
    return escape_markdown(verdict(front).sentence)
