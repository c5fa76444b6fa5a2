"""The same battery for every method, task and kind of model: count, train, leave the base alone, export, reload, score.

What cannot be is listed in `REFUSED` with the sentence that says why; nothing is left out silently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from card_code import code_of, run_card
from task_data import task_domain
from tiny_models import SAMPLES, tiny_biased_decoder, tiny_decoder, tiny_encoder, tiny_encoder_decoder

from peftsearch.domains import TASKS
from peftsearch.export.trial_folders import StudyToExport, write_folders
from peftsearch.export.verify import Job, Score, score_folders
from peftsearch.methods import METHODS
from peftsearch.preparing import plan_facts
from peftsearch.search.counts import ParameterCount
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import THREADS, Rung, StudyError, StudyFile, TrialRecord, TrialState
from peftsearch.storage import study_folder
from peftsearch.study import Study
from peftsearch.training.base_model import count_exported, count_trainable, trainable
from peftsearch.training.checkpoint import WEIGHTS, read_checkpoint, trial_folder
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import Segment, SegmentResult, TrialPlan
from peftsearch.training.session import build_model
from peftsearch.training.worker import Worker

pytestmark = pytest.mark.slow

BASES = {
    "encoder": ("encoder", tiny_encoder),
    "encoder-decoder": ("encoder-decoder", tiny_encoder_decoder),
    "decoder": ("decoder", tiny_decoder),
    "biased-decoder": ("decoder", tiny_biased_decoder),
}
"""Base model -> its architecture, and who writes it."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora-dora": ("lora", {"variant": "dora"}),
    "lora-rslora": ("lora", {"variant": "rslora"}),
    "qlora-int8": ("qlora", {"quantization": "int8"}),
    "adapter-nf4": ("adapter", {"quantization": "nf4"}),
    "adapter-parallel": ("adapter", {"placement": "parallel"}),
    "hybrid-nf4": ("hybrid", {"quantization": "nf4"}),
    "prompt-random": ("prompt", {"init": "random"}),
    "prompt-vocabulary": ("prompt", {"init": "vocabulary"}),
}
"""A method under other words than its sample has: its name here -> the method, and what differs."""

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, SAMPLES[method]) for method in METHODS},
    **{name: (method, {**SAMPLES[method], **words}) for name, (method, words) in VARIANTS.items()},
}

NO_BIASES = "no bias"
REFUSED: dict[tuple[str, str, str], str] = {
    **{("bitfit", task, base): NO_BIASES for task in TASKS for base in ("encoder-decoder", "decoder")},
}
"""(method, task, base) -> what the sentence of its refusal must say."""

VARIED = {
    "encoder": ("classification", "token_classification"),
    "encoder-decoder": ("summarization",),
    "decoder": ("instruction",),
}
"""Base -> the tasks that the variants do: they meet a model as their methods do, so not every task again."""

BIASED = dict.fromkeys(("summarization", "instruction"), ("bitfit", "lora", "hybrid"))
"""What the model that writes text and has biases does: bitfit, which the others refuse, and layers of another class."""

NOTHING_TO_SHOW = {
    ("question_answering", "encoder-decoder"),
    ("question_answering", "decoder"),
    ("language_modeling", "encoder"),
}
"""Uses that take more than a card can show: its code loads the model, and no more."""


def names_of(base: str, task: str) -> list[str]:
    """The configurations that a base learns a task with."""
    if base == "biased-decoder":
        return list(BIASED.get(task, ()))
    if BASES[base][0] not in TASKS[task].heads:
        return []
    methods = [method for method in METHODS if (method, task, base) not in REFUSED]
    return methods + (list(VARIANTS) if task in VARIED[base] else [])


CASES = [(base, task, name) for base in BASES for task in TASKS for name in names_of(base, task)]
IDS = {case: "-".join(case) for case in CASES}


def test_every_method_does_every_task_on_some_model() -> None:
    done = {(name, task) for _, task, name in CASES}
    assert {(method, task) for method in METHODS for task in TASKS} - done == set()
    assert set(VARIANTS) <= {name for name, _ in done}


@dataclass
class Outcome:
    """What the battery found for one configuration, task and base."""

    results: list[SegmentResult]
    counted: ParameterCount
    built: ParameterCount
    score: Score | None = None
    error: str | None = None
    still: list[str] = field(default_factory=list)
    """Trainable tensors that training has left as they were."""


class Battery:
    """All that one base does: trained in this process, reloaded and scored in another."""

    def __init__(self, base: str, folder: Path) -> None:
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        self.changed: list[str] = []
        self.folders: dict[tuple[str, str], Path] = {}
        self._jobs: dict[tuple[str, str], Job] = {}
        self.model = BASES[base][1](folder / "model")
        for task in TASKS:
            names = names_of(base, task)
            if names:
                self._train(task, names, folder / task)
        for key, score in zip(self._jobs, score_folders(list(self._jobs.values())), strict=True):
            self.outcomes[key].score = score

    def _train(self, task: str, names: list[str], folder: Path) -> None:
        study, plan = planned(self.model, task, names, folder)
        worker = Worker(plan.for_workers(study.folder.path, threads=1), WorkerGroup())
        (model,) = plan.models
        base, domain = worker.base(model), worker.domain(model, "d")
        records: dict[str, TrialRecord] = {}
        for number, name in enumerate(names):
            method, hyperparameters = CONFIGURATIONS[name]
            cell = next(item.cell for item in plan.cells if item.cell.method == method)
            built = build_model(base, domain, method, hyperparameters, seed=3)
            outcome = Outcome(
                [], plan.count(cell, hyperparameters), ParameterCount(count_trainable(built), count_exported(built))
            )
            self.outcomes[name, task] = outcome
            before = {key: value.detach().clone() for key, value in trainable(built).items()}
            steps = plan.budgets["d", method].evaluation_steps
            for step in steps:
                found = worker.do(
                    Segment(TrialPlan(number, model, "d", method, hyperparameters, 3), step, final=step == steps[-1])
                )
                if not isinstance(found, SegmentResult):
                    outcome.error = str(found)
                    break
                outcome.results.append(found)
            else:
                records[name] = _record(number, model, method, hyperparameters, outcome, domain.metric)
                after, _ = read_checkpoint(trial_folder(study.folder.path, f"{number:05d}") / WEIGHTS)
                assert after.keys() == before.keys()
                outcome.still = [key for key, value in before.items() if torch.equal(value, after[key])]
        self._check_base(plan, worker, model, task)
        self._export(study, plan, records, task, folder / "out")

    def _check_base(self, plan: StudyPlan, worker: Worker, model: str, task: str) -> None:
        """A base that has trained everything is, bit for bit, one that was loaded just now."""
        fresh = Worker(plan.for_workers(Path("unused"), threads=1), WorkerGroup()).base(model)
        fresh.template(plan.prepared[model, "d"])
        used = worker.base(model).fingerprint()
        self.changed += [f"{task}: {name}" for name, value in fresh.fingerprint().items() if used[name] != value]

    def _export(self, study: Study, plan: StudyPlan, records: dict[str, TrialRecord], task: str, to: Path) -> None:
        facts = plan_facts(study, plan)
        facts.provenance[THREADS] = "1"
        known = StudyToExport(
            spec=study.spec,
            facts=facts,
            records=list(records.values()),
            folder=study.folder.path,
            data_folder=to.parent,
            cache=study.folder.cache,
            ledger="",
        )
        for name, record in records.items():
            target, staging = to / name, to / f"staging-{name}"
            staging.mkdir(parents=True)
            self.folders[name, task] = target
            try:
                ((job, _),) = write_folders(known, to, staging, [target], [target], [record], "adapter")
                self._jobs[name, task] = job
            except StudyError as error:
                self.outcomes[name, task].error = error.message


def planned(model: Path, task: str, names: list[str], folder: Path) -> tuple[Study, StudyPlan]:
    """A checked study of one task, whose search spaces hold all the configurations."""
    folder.mkdir(parents=True, exist_ok=True)
    methods: dict[str, dict[str, Any]] = {}
    for name in names:
        method, chosen = CONFIGURATIONS[name]
        for key, value in chosen.items():
            values = methods.setdefault(method, {}).setdefault(key, [])
            values += [value] if value not in values else []
    document: dict[str, Any] = {
        "name": "battery",
        "model": str(model),
        "domains": {"d": task_domain(task, folder)},
        "methods": {
            method: {key: values if len(values) > 1 else values[0] for key, values in space.items()}
            for method, space in methods.items()
        },
        "search": {"trials": 1, "scheduler": "none", "seed": 3},
        "training": {"epochs": 2, "evaluations": 2, "batch_size": 12, "max_length": 48, "precision": "fp32"},
        "tracking": {"mlflow": "off"},
    }
    file = StudyFile(document, folder=folder)
    study = Study(file.spec, study_folder("battery", folder / "storage"), file)
    plan = plan_study(file, study.folder.cache)
    study.folder.create()
    return study, plan


def _record(
    number: int, model: str, method: str, hyperparameters: dict[str, Any], outcome: Outcome, metric: str
) -> TrialRecord:
    last = outcome.results[-1]
    rung = Rung(
        step=last.step,
        epoch=2.0,
        value=last.scores[metric],
        loss=last.loss,
        train_loss=last.train_loss,
        scores=last.scores,
    )
    return TrialRecord(
        number=number,
        model=model,
        domain="d",
        method=method,
        state=TrialState.COMPLETE,
        seed=3,
        value=rung.value,
        trainable_parameters=outcome.counted.trainable,
        exported_parameters=outcome.counted.exported,
        hyperparameters=hyperparameters,
        rungs=[rung],
        checkpoint=f"trials/{number:05d}",
    )


@pytest.fixture(scope="module")
def battery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Battery]]:
    """The battery of a base, made when the first test asks for it (a parameter of the fixture would make it anew)."""
    threads = torch.get_num_threads()
    try:
        yield functools.cache(lambda base: Battery(base, tmp_path_factory.mktemp("battery")))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("base", "task", "name"), CASES, ids=IDS.values())
def test_method_and_task(base: str, task: str, name: str, battery: Callable[[str], Battery]) -> None:
    outcome = battery(base).outcomes[name, task]
    assert outcome.error is None
    assert outcome.counted == outcome.built, "what is counted on the meta device is what is trained and exported"
    first, last = outcome.results
    assert last.train_loss != first.train_loss
    assert outcome.still == []
    assert outcome.score is not None
    assert outcome.score.error is None, outcome.score.error
    same = "what a fresh process reads from the folder scores the same"
    assert outcome.score.scores == pytest.approx(last.scores, rel=1e-5, abs=1e-6), same
    assert outcome.score.loss == pytest.approx(last.loss, rel=1e-5)


def _has_pipeline(task: str, architecture: str, method: str) -> bool:
    if task == "token_classification":
        return architecture != "decoder" and method not in ("prompt", "p_tuning")
    if task in ("summarization", "instruction"):
        return architecture == "decoder"
    return task in ("classification", "relation", "multi_label")


WHOLE_CARDS = ("lora", "qlora", "prompt", "full")
"""Methods whose cards are run for every task; the others differ in how they are loaded, which is so for all tasks."""
CARDS = [
    case for case in CASES if case[2] in WHOLE_CARDS or (case[2] in METHODS and case[1] in VARIED[BASES[case[0]][0]])
]


def test_every_methods_card_is_run() -> None:
    assert {name for _, _, name in CARDS} >= set(METHODS)


@pytest.mark.parametrize(("base", "task", "name"), CARDS, ids=[IDS[case] for case in CARDS])
def test_the_code_of_a_card_runs_as_it_stands(
    base: str, task: str, name: str, battery: Callable[[str], Battery]
) -> None:
    folder = battery(base).folders[name, task]
    card = (folder / "README.md").read_text()
    assert str(folder) in code_of(card)
    printed, names = run_card(card)
    shown = (task, base) not in NOTHING_TO_SHOW
    assert bool(printed.strip()) == shown
    assert ("pipe" in names) == _has_pipeline(task, BASES[base][0], name)
    if "written" in names:
        assert names["written"][0]["generated_text"].strip() == names["write"]("A text.")


@pytest.mark.parametrize("base", BASES)
def test_the_base_is_bit_identical_after_everything(base: str, battery: Callable[[str], Battery]) -> None:
    assert battery(base).changed == []


@pytest.mark.parametrize(("combination", "sentence"), list(REFUSED.items()), ids=["-".join(key) for key in REFUSED])
def test_what_cannot_be_is_refused_before_work_starts(
    combination: tuple[str, str, str], sentence: str, tmp_path: Path
) -> None:
    method, task, base = combination
    architecture, build = BASES[base]
    if architecture not in TASKS[task].heads:
        pytest.skip(f"{task} is not for this kind of model: {architecture}")
    model = build(tmp_path / "model")
    with pytest.raises(StudyError, match=sentence):
        planned(model, task, [method], tmp_path)
