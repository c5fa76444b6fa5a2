"""What one gets without tuning the model: guesses from the data alone, and linear models on frozen features."""

from __future__ import annotations

import functools
import gc
import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from peftsearch.domains import PreparedDomain
from peftsearch.domains.tasks.base import first_rows
from peftsearch.domains.tasks.token_classification import LOST, OUTSIDE
from peftsearch.training.asking import balanced
from peftsearch.training.base_model import FrozenBase
from peftsearch.training.distributed import PeerError, WorkerGroup
from peftsearch.training.evaluate import evaluate
from peftsearch.training.frozen_features import FrozenFeatures
from peftsearch.training.memory import out_of_memory
from peftsearch.training.prompting import FEW_SHOT, SHOTS, ZERO_SHOT, Prompting
from peftsearch.training.segment import PROMPTED, ProbeResult
from peftsearch.training.session import LeavingError
from peftsearch.training.span_probe import SpanProbe

log = logging.getLogger(__name__)

GUESSES = "guesses"
"""What a failure of the guesses from the data is noted as."""
LINEAR_PROBE, COSINE = "linear model on frozen features", "cosine of frozen embeddings"

_OF_THE_MODEL = frozenset({"zero_shot", "few_shot", "linear_probe", "cosine"})
"""Baselines that compute with the frozen base."""

# Words, or choices, that a probe of them is trained on at most: more do not help a linear model much, and cost memory.
WORDS = 50_000


def probe(
    base: FrozenBase,
    domain: PreparedDomain,
    batch_size: int,
    group: WorkerGroup,
    split: str = "validation",
    names: Collection[str] | None = None,
    prompted: int | None = PROMPTED,
    leaving: Callable[[], bool] = lambda: False,
) -> ProbeResult:
    """Score the domain's baselines, each by itself: one that fails is noted with its reason, and the others are there.

    Args:
        base: The frozen base.
        domain: Its task says which baselines there are.
        batch_size: Texts per forward pass.
        group: Only rank 0 computes, and the others wait at the next collective; where each holds a part of the base,
            all compute the same.
        split: What is scored. What a baseline has to choose is chosen on validation, whatever is scored.
        names: Those that are wanted; all where None.
        prompted: Examples that are prompted at most; the whole split where None.
        leaving: Asked now and then by a worker that is a group of its own: whether it has to leave.

    Raises:
        LeavingError: It has.
        OSError: The data cannot be read.
        Exception: A baseline failed on one of several workers that compute it together.
    """
    read_at = datetime.now(UTC).isoformat(timespec="milliseconds") if split == "test" else None
    result = ProbeResult(read_at=read_at)

    def compute(goes_on: Callable[[], None]) -> None:
        def pause() -> None:
            goes_on()
            # A group's other workers could not be told.
            if group.size == 1 and leaving():
                raise LeavingError

        _add_all(_Attempts(result, group, names, pause), base, domain, batch_size, split, prompted)

    if group.sharded:
        compute(lambda: None)
    else:
        group.first_alone(compute)
    if base.form is not None:
        for name in _OF_THE_MODEL & set(result.details):
            result.details[name] += f"; its base stored as {base.form}"
    return result


def _add_all(
    attempt: _Attempts, base: FrozenBase, domain: PreparedDomain, batch_size: int, split: str, prompted: int | None
) -> None:
    task, labels = domain.task, domain.labels
    result, group = attempt.result, attempt.group
    train, scored = domain.split("train")[:], domain.split(split)[:]
    references = _references(domain, split)

    def guess() -> None:
        for name, found in task.guesses(train, scored, labels).items():
            if attempt.wanted(name):
                scores = task.score(found.predictions, references, labels)
                result.add(name, found.title, found.detail, scores, domain.rows[split])

    attempt(GUESSES, "guesses from the data", guess)
    if Prompting.possible(domain):
        prompting = functools.cache(
            lambda: Prompting(base, domain, batch_size, group.device, split, prompted, attempt.pause)
        )
        attempt("zero_shot", ZERO_SHOT, lambda: prompting().add(result, 0))
        attempt("few_shot", FEW_SHOT, lambda: prompting().add(result, SHOTS))
    if task.name == "language_modeling":
        attempt("zero_shot", "zero-shot", lambda: _untuned(result, base, domain, batch_size, group, split))
    if task.probe is None or domain.architecture != "encoder":
        return
    encoder = functools.cache(lambda: FrozenFeatures(base, domain, batch_size, group.device, attempt.pause))
    if task.probe == "pair" and "first" in train:
        pairs = functools.cache(lambda: _pairs(encoder(), domain, split))
        attempt("cosine", COSINE, lambda: _add_cosine(result, domain, split, pairs()))
        attempt("linear_probe", LINEAR_PROBE, lambda: _pair_probe(result, domain, split, pairs()))
    else:
        train_probe = {"token": _word_probe, "choice": _choice_probe, "span": _span_probe}.get(task.probe, _text_probe)
        attempt("linear_probe", LINEAR_PROBE, lambda: train_probe(result, encoder(), domain, split))


def _references(domain: PreparedDomain, split: str) -> list[Any]:
    """What is right: one for each example, also where an example makes several rows."""
    rows = domain.split(split)[:]
    references = domain.task.references(rows)
    return [references[row] for row in first_rows(rows)]


class _Attempts:
    """Computes baselines one after another, whatever becomes of the ones before.

    Args:
        result: Gets them.
        group: The workers.
        names: Those that are wanted; all where None.
        pause: Called now and then while they are computed.
    """

    def __init__(
        self, result: ProbeResult, group: WorkerGroup, names: Collection[str] | None, pause: Callable[[], None]
    ) -> None:
        self.result = result
        self.group = group
        self.names = names
        self.pause = pause

    def wanted(self, name: str) -> bool:
        return self.names is None or name == GUESSES or name in self.names

    def __call__(self, name: str, title: str, score: Callable[[], None]) -> None:
        """Have a baseline added to the result, or note why it could not be."""
        if not self.wanted(name):
            return
        failed = self._failed(score)
        if failed is not None:
            # Only now: while an error is handled, its traceback holds on to what was in memory.
            gc.collect()
            if self.group.device.type == "cuda":
                torch.cuda.empty_cache()
            self.result.fail(name, title, failed)

    def _failed(self, score: Callable[[], None]) -> str | None:
        try:
            score()
        except (OSError, LeavingError):
            raise
        except PeerError as error:
            # Where all compute together, the worker that failed notes it, too, and all go on to the next one.
            return str(error)
        except Exception as error:
            # Where all compute together, the others may wait in a collective: only a new worker group is safe then.
            if self.group.sharded and not self.group.told(error):
                raise
            if out_of_memory(error):
                return "out of memory; training.evaluation_batch_size and training.max_length decide how much it needs"
            log.exception("baseline failed")
            return f"{type(error).__name__}: {error}"
        return None


def _untuned(
    result: ProbeResult, base: FrozenBase, domain: PreparedDomain, batch_size: int, group: WorkerGroup, split: str
) -> None:
    """The frozen model does the task as it is, where its checkpoint brings the head."""
    if base.template(domain, base.form).modules_to_save:
        return
    model = base.common_model(domain).eval()
    found = evaluate(model, domain, split, batch_size, group if group.sharded else WorkerGroup(device=group.device))
    detail = f"the frozen model as it is, on the whole {split} split"
    result.add("zero_shot", "zero-shot", detail, found.scores, domain.rows[split])


def _text_probe(result: ProbeResult, encoder: FrozenFeatures, domain: PreparedDomain, split: str) -> None:
    """A linear model on mean-pooled, L2-normalised hidden states of the last layer."""
    train = domain.split("train")[:]
    features = {name: encoder.texts(domain.split(name)[:]) for name in {"validation", split}}
    targets = np.asarray(domain.task.references(train))

    def predict(model: Any, name: str) -> list[Any]:
        # Of a single column scikit-learn makes none.
        found: list[Any] = model.predict(features[name]).reshape(len(features[name]), *targets.shape[1:]).tolist()
        return found

    _add_best(result, domain, split, encoder.texts(train), targets, predict, "mean-pooled frozen features")


@dataclass(frozen=True)
class _Pairs:
    """By split: features of pairs whose texts are embedded each by itself, shape (pairs, features); their cosines."""

    features: dict[str, np.ndarray]
    cosines: dict[str, np.ndarray]


def _pairs(encoder: FrozenFeatures, domain: PreparedDomain, split: str) -> _Pairs:
    """The features u, v, |u - v| and u * v are those of Conneau et al. 2017 (InferSent, arXiv:1705.02364)."""
    found = _Pairs({}, {})
    for name in {"train", "validation", split}:
        rows = domain.split(name)[:]
        u, v = (encoder.texts({"input_ids": rows[column]}) for column in ("first", "second"))
        found.features[name] = np.concatenate([u, v, np.abs(u - v), u * v], axis=1)
        found.cosines[name] = (u * v).sum(axis=1)
    return found


def _add_cosine(result: ProbeResult, domain: PreparedDomain, split: str, pairs: _Pairs) -> None:
    """The cosine of two embeddings, untrained."""
    task = domain.task
    train, scored = domain.split("train")[:], domain.split(split)[:]
    low, high = task.options.range or (min(train["labels"]), max(train["labels"]))
    predictions = (low + pairs.cosines[split] * (high - low)).tolist()
    result.add(
        "cosine",
        COSINE,
        f"cosine of the two mean-pooled texts, 0 and 1 taken for {low:g} and {high:g}; nothing is trained",
        task.score(predictions, task.references(scored), domain.labels),
        domain.rows[split],
    )


def _pair_probe(result: ProbeResult, domain: PreparedDomain, split: str, pairs: _Pairs) -> None:
    """A linear model on the embeddings of pairs."""
    _add_best(
        result,
        domain,
        split,
        pairs.features["train"],
        np.asarray(domain.task.references(domain.split("train")[:])),
        lambda model, name: model.predict(pairs.features[name]).tolist(),
        "the frozen embeddings u, v of the two texts, |u - v| and u * v",
    )


def _choice_probe(result: ProbeResult, encoder: FrozenFeatures, domain: PreparedDomain, split: str) -> None:
    """A linear model that scores each choice by itself, trained to score the right one above each of the others.

    That is a logistic regression without intercept on the differences of their features (Bradley and Terry 1952): the
    scores of a question's choices are compared with one another and nothing else.
    """
    train = domain.split("train")
    train = train[_some(list(map(len, train["input_ids"])))]

    def embedded(rows: Mapping[str, Any]) -> list[np.ndarray]:
        flat = {
            column: [tokens for choices in rows[column] for tokens in choices]
            for column in ("input_ids", "token_type_ids")
            if column in rows
        }
        ends = np.cumsum([len(choices) for choices in rows["input_ids"]])
        return np.split(encoder.texts(flat), ends[:-1])

    features = {name: embedded(domain.split(name)[:]) for name in {"validation", split}}
    differences = np.concatenate(
        [
            np.delete(own[right] - own, right, axis=0)
            for own, right in zip(embedded(train), train["labels"], strict=True)
        ]
    )
    # Both ways round: a model of one class cannot be fitted.
    targets = np.repeat([1, 0], len(differences))

    def predict(model: Any, name: str) -> list[int]:
        return [int((own @ model.coef_[0]).argmax()) for own in features[name]]

    _add_best(
        result,
        domain,
        split,
        np.concatenate([differences, -differences]),
        targets,
        predict,
        "mean-pooled frozen features of each choice with its question",
        biases=False,
    )


def _word_probe(result: ProbeResult, encoder: FrozenFeatures, domain: PreparedDomain, split: str) -> None:
    """A linear model on the hidden states of words, trained on at most about `WORDS` words of train."""
    held_out = {name: domain.split(name)[:] for name in {"validation", split}}
    train = domain.split("train")[_some(domain.lengths("train"))]

    def seen(columns: Mapping[str, Sequence[Any]]) -> list[int]:
        return [
            int(tag)
            for places, tags in zip(columns["positions"], columns["tags"], strict=True)
            for place, tag in zip(places, tags, strict=True)
            if place != LOST
        ]

    features = {name: np.concatenate(encoder.words(columns)) for name, columns in held_out.items()}

    def predict(model: Any, name: str) -> list[list[int]]:
        tags = iter(model.predict(features[name]).tolist())
        return [
            [OUTSIDE if place == LOST else next(tags) for place in places] for places in held_out[name]["positions"]
        ]

    _add_best(
        result,
        domain,
        split,
        np.concatenate(encoder.words(train)),
        np.asarray(seen(train)),
        predict,
        f"frozen features of {len(seen(train))} words",
    )


def _span_probe(result: ProbeResult, encoder: FrozenFeatures, domain: PreparedDomain, split: str) -> None:
    """Linear scores of the answer's first and last token, trained on windows with at most about `WORDS` tokens.

    Where not all windows can be taken, as many with an answer as without: in long contexts few have one.
    """
    data, lengths = domain.split("train"), domain.lengths("train")
    answered = [start != null for start, null in zip(list(data["start"]), list(data["null"]), strict=True)]
    order = balanced(answered, len(answered))
    reached = int(np.searchsorted(np.cumsum([lengths[row] for row in order]), WORDS)) + 1
    chosen = sorted(order[:reached])
    probe = SpanProbe(domain, data[chosen], encoder)
    answers = {name: probe.answers(domain.split(name)[:], encoder) for name in {"validation", split}}

    def predict(strength: float, name: str) -> list[Any]:
        return answers[name][strength]

    fitted = [(f"L2 = {strength:g}", functools.partial(predict, strength)) for strength in probe.weights]
    windows = f"{len(chosen)} windows, {sum(answered[row] for row in chosen)} of them with an answer"
    what = f"linear scores of first and last token on frozen features of {windows}"
    _add_picked(result, domain, split, fitted, what, probe.parameters)


def _some(sizes: Sequence[int]) -> list[int]:
    """Rows, the same ones every time, that hold about `WORDS` words or choices; all where these are fewer."""
    order = np.random.default_rng(0).permutation(len(sizes)).tolist()
    reached = int(np.searchsorted(np.cumsum([sizes[row] for row in order]), WORDS)) + 1
    return sorted(order[:reached])


def _add_best(
    result: ProbeResult,
    domain: PreparedDomain,
    split: str,
    features: np.ndarray,
    targets: np.ndarray,
    predict: Callable[[Any, str], list[Any]],
    what: str,
    *,
    biases: bool = True,
) -> None:
    """Fit the task's linear models and add the best of them on the validation split, where the trials' are picked too.

    Args:
        result: Gets the baseline ``linear_probe``.
        domain: Its objective decides.
        split: What is scored.
        features: Of the training examples, shape (examples, features).
        targets: What they should give.
        predict: Predictions of a fitted model for the validation split, and for the one that is scored.
        what: The features, in words.
        biases: Whether the models have them.
    """
    fitted: list[tuple[str, Callable[[str], list[Any]]]] = []
    kind = ""
    for setting, model in domain.task.probes():
        with warnings.catch_warnings():
            # A probe that has not quite converged is a probe with a little more regularisation; and a label that few
            # examples left out of train has nothing to learn.
            warnings.simplefilter("ignore")
            try:
                model.fit(features, targets)
            except ValueError:
                # A limit on the examples may leave a single class.
                continue
        kind = type(model[-1] if hasattr(model, "steps") else model).__name__
        fitted.append((setting, functools.partial(predict, model)))
    outputs = targets.shape[1] if targets.ndim > 1 else max(len(domain.labels), 1)
    _add_picked(result, domain, split, fitted, f"{kind} on {what}", (features.shape[1] + biases) * outputs)


def _add_picked(
    result: ProbeResult,
    domain: PreparedDomain,
    split: str,
    fitted: Sequence[tuple[str, Callable[[str], list[Any]]]],
    what: str,
    parameters: int,
) -> None:
    """Add the best of some fitted linear models on the validation split.

    Args:
        result: Gets the baseline ``linear_probe``; nothing where there are no models.
        domain: Its objective decides.
        split: What is scored.
        fitted: Of each the setting that tells it from the others, and its predictions for a split.
        what: The models, in words.
        parameters: Of each.
    """
    if not fitted:
        return
    task, metric = domain.task, domain.metric
    sign = 1.0 if domain.direction == "maximize" else -1.0
    references = _references(domain, "validation")
    scored = [
        (task.score(predict("validation"), references, domain.labels), setting, predict) for setting, predict in fitted
    ]
    scores, setting, predict = max(scored, key=lambda found: sign * found[0][metric])
    if split != "validation":
        scores = task.score(predict(split), _references(domain, split), domain.labels)
    detail = f"{what}, {setting} picked on validation"
    result.add("linear_probe", LINEAR_PROBE, detail, scores, domain.rows[split], parameters)
