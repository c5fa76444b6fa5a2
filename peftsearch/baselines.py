"""Which baselines a study still lacks, and how what its slots found is recorded: each value once, each failure once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from peftsearch.spec import ALL_BASELINES, Baseline, DomainFacts, FailedBaseline, StudyFacts
from peftsearch.training.segment import Failure, ProbeResult

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """Baselines of a domain on a model that are still to be computed.

    Attributes:
        domain: The domain.
        model: The model's path.
        names: Which; None for all that the task has.
    """

    domain: str
    model: str
    names: tuple[str, ...] | None


def missing_baselines(facts: StudyFacts, models: Iterable[str], *, read_test: bool = False) -> list[Wanted]:
    """The baselines that nobody has computed, and that have not failed.

    Args:
        facts: What is known.
        models: Paths of the study's models.
        read_test: Whether their scores on the test split are asked about: of those that have one on validation, and
            have not read it.
    """
    wanted = []
    for domain, item in facts.domains.items():
        for model in models:
            if not read_test:
                if model not in item.baselines and model not in item.failed_baselines:
                    wanted.append(Wanted(domain, model, None))
            elif "test" in item.rows and (names := _unread(item, model)):
                wanted.append(Wanted(domain, model, names))
    return wanted


def record_baselines(
    item: DomainFacts, wanted: Wanted, outcome: ProbeResult | Failure, *, read_test: bool = False
) -> None:
    """Add what a slot found, or why it found nothing, to what is known of the domain.

    Args:
        item: Gets it.
        wanted: What was asked for.
        outcome: What came back.
        read_test: Whether the test split was scored.
    """
    if isinstance(outcome, Failure):
        if outcome.of_study:
            # The storage is to blame: the next run computes them.
            log.warning("baselines of %s: %s", wanted.domain, outcome.error)
        else:
            _record_failure(item, wanted, outcome.error, read_test)
        return
    outcome = _defined(outcome, item.metric)
    if read_test:
        _record_test(item, wanted, outcome)
    else:
        item.baselines[wanted.model] = {
            name: Baseline(
                title=outcome.titles[name],
                value=scores[item.metric],
                scores=scores,
                examples=outcome.examples[name],
                trainable_parameters=outcome.parameters[name],
                detail=outcome.details[name],
            )
            for name, scores in outcome.scores.items()
        }
    known = item.baselines.get(wanted.model, {})
    for name, error in outcome.failures.items():
        if not read_test or name in known:
            _fail(item, wanted, name, known[name].title if read_test else outcome.titles[name], error, read_test)


def _defined(outcome: ProbeResult, metric: str) -> ProbeResult:
    """What came back, its baselines without a score as failures: prompts are scored on some examples of a split."""
    undefined = {
        name: f"{metric} is undefined on the {outcome.examples[name]} examples that it was scored on"
        for name, scores in outcome.scores.items()
        if metric not in scores
    }
    scores = {name: scores for name, scores in outcome.scores.items() if name not in undefined}
    return dataclasses.replace(outcome, scores=scores, failures=outcome.failures | undefined)


def _unread(item: DomainFacts, model: str) -> tuple[str, ...]:
    failed = item.failed_baselines.get(model, {})
    return tuple(
        name for name, found in item.baselines.get(model, {}).items() if not found.test_scores and name not in failed
    )


def _record_test(item: DomainFacts, wanted: Wanted, outcome: ProbeResult) -> None:
    known = item.baselines[wanted.model]
    for name in wanted.names or ():
        if name in outcome.scores:
            scores = outcome.scores[name]
            reading = {
                "test_value": scores[item.metric],
                "test_scores": scores,
                "test_examples": outcome.examples[name],
                "test_read_at": outcome.read_at,
            }
            known[name] = known[name].model_copy(update=reading)
        elif name not in outcome.failures:
            # It would come out so again, and read the test split every time.
            error = "it cannot be made there: no training example fits beside the longest text"
            if name != "few_shot":
                error = outcome.failures.get("guesses", "it does not come out there")
            _fail(item, wanted, name, known[name].title, error, read_test=True)


def _record_failure(item: DomainFacts, wanted: Wanted, error: str, read_test: bool) -> None:
    if not read_test:
        _fail(item, wanted, ALL_BASELINES, "all baselines", error, read_test)
        return
    for name in wanted.names or ():
        _fail(item, wanted, name, item.baselines[wanted.model][name].title, error, read_test)


def _fail(item: DomainFacts, wanted: Wanted, name: str, title: str, error: str, read_test: bool) -> None:
    failed = FailedBaseline(title=title, split="test" if read_test else "validation", error=error)
    log.warning("baseline of %s, %s, failed on the %s split: %s", wanted.domain, title, failed.split, error)
    item.failed_baselines.setdefault(wanted.model, {})[name] = failed
