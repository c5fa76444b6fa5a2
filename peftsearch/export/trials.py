"""From chosen trials of a study to verified folders: all of them, or none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftsearch.export.card import CardFacts, model_card, published_card, speed_section
from peftsearch.export.contents import missing_weights, note_verified
from peftsearch.export.convert import Form, check_form
from peftsearch.export.folder import CARD
from peftsearch.export.hub import HubRepo, check_repo, push_folder
from peftsearch.export.noted import EXPORTED, PUSHED
from peftsearch.export.places import check_targets, put, staging, writing
from peftsearch.export.published import publish
from peftsearch.export.registry import Registered, Registry, aliases_of, check_registry, register, renew_aliases
from peftsearch.export.speed import Speed
from peftsearch.export.trial_folders import StudyToExport, weights_of, write_folders
from peftsearch.export.verify import Score, score_folders
from peftsearch.files import Place, exists
from peftsearch.frontier.front import Choice, Pick, choose, complete, domain_fronts
from peftsearch.spec import StudyError, TrialRecord, suggest
from peftsearch.tracking.provenance import provenance

_ENDINGS: dict[Form, str] = {"adapter": "", "merged": "-merged", "lora": "-as-lora"}
LOSS_TOLERANCE = 0.01
"""Allowed relative difference of the mean loss. A wrong model that answers the majority class scores what a trial that
does so too scores; their losses tell them apart."""


@dataclass(frozen=True)
class ExportedAdapter:
    """A verified folder.

    Attributes:
        folder: Where it is; None where it was only pushed to the Hub.
        record: The trial, as in the ledger.
        score: The domain's metric that a fresh process found for the folder.
        form: What became of the adapter: ``adapter``, ``merged`` or ``lora``.
        speed: How fast it is on this machine.
        reason: Why it was picked rather than another trial, where error bars decided.
        repository: Address of the repository of the Hub, where it was pushed.
        registered: Its version in MLflow's registry, where it was registered.
    """

    folder: Place | None
    record: TrialRecord
    score: float
    form: Form = "adapter"
    speed: Speed | None = None
    reason: str | None = None
    repository: str | None = None
    registered: Registered | None = None

    def tags(self) -> dict[str, str]:
        """Where it is, as tags of the trial's run in MLflow."""
        found = {EXPORTED: self.folder, PUSHED: self.repository}
        return {f"{key}{_ENDINGS[self.form]}": str(where) for key, where in found.items() if where is not None}

    def as_json(self) -> dict[str, Any]:
        """What ``export --json`` prints of it."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "repository": self.repository,
            "registered": self.registered.as_json() if self.registered else None,
            "domain": self.record.domain,
            "trial": self.record.number,
            "method": self.record.method,
            "form": self.form,
            "trainable_parameters": self.record.trainable_parameters,
            "score": self.score,
            "ledger_score": self.record.value,
            "speed": self.speed.as_json() if self.speed else None,
            "reason": self.reason,
        }


def export_trials(
    study: StudyToExport,
    to: Place | None,
    *,
    domain: str | None = None,
    method: str | None = None,
    pick: Pick | str = "frontier",
    max_parameters: int | None = None,
    min_metric: float | None = None,
    max_latency: float | None = None,
    form: Form = "adapter",
    push: str | None = None,
    private: bool = True,
    registry: Registry | None = None,
    tolerance: float | None = None,
    told: Callable[[str], None] | None = None,
    left_out: Callable[[str], None] | None = None,
) -> list[ExportedAdapter]:
    """Write trials of the front as folders ``TO/DOMAIN/NUMBER-METHOD``, and score each again in a fresh process.

    The folders appear when all of them are verified; until then, and after an error, nothing is to be seen of them. A
    folder that is an earlier export of the same trial is replaced.

    Args:
        study: The study.
        to: Folder for the adapters, or a place in an object store; made where it does not exist. None with ``push``.
        domain: Only this domain.
        method: Only trials of this method: of those whose weights are there, its own front, whatever other methods do.
        pick: ``frontier``, ``best``, ``knee`` or ``smallest`` of each domain, see `peftsearch.frontier.choose`.
        max_parameters: Only trials with at most so many trainable parameters.
        min_metric: Only trials whose metric is at least this good.
        max_latency: Only trials that take at most so many milliseconds for one example by itself, in the form that is
            exported, on this machine (`Speed.latency_ms`): whatever the other limits leave is loaded and measured.
        form: ``adapter``; ``merged``: a complete model, which needs nothing but `transformers` (folders end in
            ``-merged``); ``lora``: a plain LoRA, made by PEFT (``-as-lora``).
        push: ``OWNER/NAME`` of a repository of the Hub that the one exported trial goes to.
        private: Whether only its owner sees a repository that is new.
        registry: MLflow's registry, where to register what is exported; see `peftsearch.export.registry`.
        tolerance: Allowed difference between the score of the folder and the ledger's; 1e-6 where absent, and 1e-3 for
            merged and converted ones, whose weights are rounded anew.
        told: Told of progress, in sentences.
        left_out: Told what was asked for and is not exported, and why, as some other trial is: of a domain that has
            nothing under the limits, and of a trial that cannot have the form. Each once; ``told`` is told of it too.

    Returns:
        By domain, then trainable parameters.

    Raises:
        StudyError: No trial is left to export, or none can have the form; the folder cannot be written or is taken; the
            same of the repository; weights, data or base model are gone or damaged, or a folder does not score what the
            ledger says.
        RuntimeError: The fresh process died.
    """
    told = told or (lambda _: None)
    missing: list[str] = []

    def miss(sentence: str) -> None:
        # With a latency the trials are chosen twice.
        if sentence not in missing:
            missing.append(sentence)
            told(f"Left out: {sentence}")
            if left_out is not None:
                left_out(sentence)

    allowed = tolerance if tolerance is not None else 1e-6 if form == "adapter" else 1e-3
    if not allowed >= 0:
        raise StudyError(f"the tolerance must be at least 0, not {allowed:g}")
    if max_latency is not None and not max_latency > 0:
        raise StudyError(f"the latency must be above 0 ms, not {max_latency:g}")
    if to is None and push is None:
        raise StudyError("say where to export to: a folder or a URI with --to, or a repository of the Hub with --push")
    if isinstance(to, Path):
        to = to.expanduser().absolute()
    repo = HubRepo(push) if push is not None else None
    limits: dict[str, Any] = {"max_parameters": max_parameters, "min_metric": min_metric}
    chosen, refused = _by_form(_choose(study, domain, method, pick, miss, **limits), form)
    if chosen or max_latency is not None:
        for error in refused:
            miss(error.message)
    if max_latency is not None:
        # What is fast enough is known later. Nobody asked for all of these: missed are, of those that cannot have the
        # form, the ones above, which would be picked whatever they take.
        chosen, refused = _by_form(_choose(study, domain, method, "frontier", lambda _: None, **limits), form)
    if not chosen:
        raise refused[0]
    records = [choice.record for choice in chosen]
    if repo is not None:
        # A latency may leave one of several.
        if max_latency is None or pick == "frontier" or len({record.domain for record in records}) > 1:
            _check_one(repo, records)
        check_repo(repo, study.facts.study, records[0].domain)
    if registry is not None:
        check_registry(registry, study.facts.study, records, study_id=study.facts.id)

    named = [f"{record.domain}/{_name_of(record, form)}" for record in records]
    if to is not None:
        check_targets(to, [to / name for name in named], records, study.facts.study)
    for record in records:
        if not exists(weights_of(study, record)):
            raise StudyError(missing_weights(record, weights_of(study, record)))

    with staging(to) as (work, local):
        places = [(to or local) / name for name in named]
        staged = [work / name for name in named]
        shown: list[Place | HubRepo] = [repo if to is None and repo is not None else place for place in places]
        told(f"Exporting {len(records)} trial{'s' if len(records) != 1 else ''} to {to or repo}")
        written = write_folders(study, to or local, work, staged, shown, records, form)
        told("Verifying in a fresh process")
        jobs = [replace(job, measure=True) for job, _ in written]
        scores = score_folders(jobs, lambda index, score: told(_account(records[index], study, score)))
        kept = list(range(len(records)))
        if max_latency is not None:
            for record, score in zip(records, scores, strict=True):
                # It has no latency, and would be passed over without a word.
                if score.error is not None:
                    miss(_unloadable(record, score.error))
            latencies = {
                record.number: score.measured["latency_ms"]
                for record, score in zip(records, scores, strict=True)
                if score.measured is not None
            }
            fast = {"max_latency": max_latency, "latencies": latencies}
            chosen = _choose(study, domain, method, pick, miss, **limits, **fast)
            kept = [[record.number for record in records].index(choice.record.number) for choice in chosen]
            if repo is not None:
                _check_one(repo, [records[index] for index in kept])
        for choice in chosen:
            if choice.reason is not None:
                told(f"{choice.record.domain}: {choice.reason}")
        for index in kept:
            record = records[index]
            _check_score(record, study.facts.domains[record.domain].metric, scores[index], allowed)
        environment = provenance(study.data_folder)
        exported = []
        with writing(to or local):
            for index, choice in zip(kept, chosen, strict=True):
                record, score = records[index], scores[index]
                value = score.scores[study.facts.domains[record.domain].metric]
                speed = Speed(**score.measured) if score.measured is not None else None
                note_verified(staged[index], value, score.loss, score.examples, speed, environment)
                place = None if to is None else places[index]
                exported.append(ExportedAdapter(place, record, value, form, speed, choice.reason))
            if to is not None:
                for index in kept:
                    put(staged[index], places[index], work / "replaced")
        if repo is not None:
            (index,) = kept
            source = places[index] if isinstance(to, Path) else staged[index]
            assert isinstance(source, Path)
            address = _push(source, repo, written[index][1], exported[0], work, private)
            told(f"Pushed to {address}")
            exported = [replace(exported[0], repository=address)]
        if registry is not None:
            aliases = aliases_of(study.records, study.facts, _ENDINGS[form])
            for position, (index, item) in enumerate(zip(kept, exported, strict=True)):
                source = places[index] if isinstance(to, Path) else staged[index]
                assert isinstance(source, Path)
                mine = aliases.get(item.record.number, ())
                version = register(
                    registry, study.facts.study, item.record, source, form, mine, study_id=study.facts.id
                )
                told(f"Registered as {' and '.join(version.uris)}")
                exported[position] = replace(item, registered=version)
            for name in dict.fromkeys(item.record.domain for item in exported):
                of_domain = {record.number for record in study.records if record.domain == name}
                now = {number: found for number, found in aliases.items() if number in of_domain}
                ending, identity = _ENDINGS[form], study.facts.id
                for sentence in renew_aliases(registry, study.facts.study, name, now, form, ending, study_id=identity):
                    told(sentence)
    return exported


def _check_one(repo: HubRepo, records: Sequence[TrialRecord]) -> None:
    if len(records) != 1:
        numbers = ", ".join(f"{record.number} ({record.domain}, {record.method})" for record in records[:5])
        more = ", ..." if len(records) > 5 else ""
        raise StudyError(
            f"a repository of the Hub holds one adapter, and {len(records)} trials are picked: {numbers}{more}; pick "
            f"the one for {repo.id} with --domain and --pick best, knee or smallest"
        )


def _push(folder: Path, repo: HubRepo, card: CardFacts, item: ExportedAdapter, staging: Path, private: bool) -> str:
    """Upload a folder, with a card that loads it from there, and nothing in its texts of where it was made."""
    copy = Path(shutil.copytree(folder, staging / "pushed"))
    text = model_card(published_card(card, repo))
    if item.speed is not None:
        text += f"\n{speed_section(item.speed)}"
    (copy / CARD).write_text(text, encoding="utf-8")
    publish(copy)
    message = f"Trial {item.record.number} ({item.record.method}) of the peftsearch study {card.facts.study}"
    return push_folder(copy, repo, private=private, message=message)


def _name_of(record: TrialRecord, form: Form) -> str:
    return f"{record.number:05d}-{record.method}{_ENDINGS[form]}"


def _by_form(chosen: Sequence[Choice], form: Form) -> tuple[list[Choice], list[StudyError]]:
    """The trials that can have that form, and why others cannot."""
    able: list[Choice] = []
    refused: list[StudyError] = []
    for choice in chosen:
        try:
            check_form(form, choice.record)
            able.append(choice)
        except StudyError as error:
            refused.append(error)
    return able, refused


def _choose(
    study: StudyToExport,
    domain: str | None,
    method: str | None,
    how: str,
    miss: Callable[[str], None],
    **limits: Any,
) -> list[Choice]:
    facts, records = study.facts, study.records
    if domain is not None and domain not in facts.domains:
        raise StudyError(f"the study {facts.study!r} has no domain {domain!r}{suggest(domain, facts.domains)}")
    if method is not None:
        known = list(dict.fromkeys(record.method for record in records))
        if method not in known:
            raise StudyError(f"the study {facts.study!r} has no trial of a method {method!r}{suggest(method, known)}")
        records = [record for record in records if record.method == method]
        gone = _without_weights(study, records)
        for front in domain_fronts(records, facts).values():
            for record in front.front if domain in (None, front.domain) else ():
                if record.number in gone:
                    miss(f"the weights of trial {record.number} ({front.domain}, {method}) are not there any more")
        records = [record for record in records if record.number not in gone]
    chosen: list[Choice] = []
    refused: list[str] = []
    for name, front in domain_fronts(records, facts).items():
        if domain not in (None, name):
            continue
        if method is not None and not front.front:
            refused.append(f"{name}: no trial of {method} that has its weights has reached the full budget")
            continue
        try:
            chosen += choose(front.front, how, front.facts.direction, **limits)
        except StudyError as error:
            refused.append(f"{name}: {error.message}")
    if not chosen:
        raise StudyError(f"there is nothing to export ({'; '.join(refused) or 'the study has no domain'})")
    for sentence in refused:
        miss(sentence)
    return chosen


def _without_weights(study: StudyToExport, records: Sequence[TrialRecord]) -> set[int]:
    """The finished trials whose weights are gone: earlier versions kept those of the front alone, and a fork takes over
    what its origin had left."""
    return {record.number for record in complete(records) if not exists(weights_of(study, record))}


def _account(record: TrialRecord, study: StudyToExport, score: Score) -> str:
    metric = study.facts.domains[record.domain].metric
    named = f"Trial {record.number} ({record.domain}, {record.method})"
    if score.error is not None:
        return f"{named}: {score.error}"
    speed = f"; {Speed(**score.measured).sentence()}" if score.measured is not None else ""
    return f"{named}: {metric} {score.scores[metric]:.4f} from disk{speed}"


def _unloadable(record: TrialRecord, error: str) -> str:
    trial = f"trial {record.number} ({record.domain}, {record.method})"
    return f"{trial} is not exported, as a fresh process could not load its folder: {error}"


def _check_score(record: TrialRecord, metric: str, score: Score, tolerance: float) -> None:
    trial = f"trial {record.number} ({record.domain}, {record.method})"
    if score.error is not None:
        raise StudyError(_unloadable(record, score.error))
    assert record.value is not None
    found = score.scores[metric]
    advice = (
        "the base model, the libraries or the machine are not those that trained it, or its weights were changed: "
        "restore them"
    )
    # "not <=", so that a score that is no number is refused too.
    if not abs(found - record.value) <= tolerance:
        raise StudyError(
            f"{trial} is not exported: its folder scores {metric} {found:.6f} and the ledger says {record.value:.6f}; "
            f"{advice}, or allow the difference with --tolerance"
        )
    loss = record.rungs[-1].loss
    if not abs(score.loss - loss) <= LOSS_TOLERANCE * max(abs(loss), 1e-3) + tolerance:
        raise StudyError(
            f"{trial} is not exported: its folder scores the ledger's {metric} {record.value:.6f}, but with the loss "
            f"{score.loss:.6f} and not {loss:.6f}; {advice}"
        )
