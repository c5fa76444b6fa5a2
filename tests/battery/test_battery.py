"""The same battery for every method, task and architecture: count, train, leave the base alone, export, reload, score.

What cannot be is listed in `REFUSED` with the sentence that says why; nothing is left out silently.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from task_data import task_domain
from tiny_models import SAMPLES, tiny_decoder, tiny_encoder, tiny_encoder_decoder

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
from peftsearch.training.base_model import count_exported, count_trainable
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.segment import Segment, SegmentResult, TrialPlan
from peftsearch.training.session import build_model
from peftsearch.training.worker import Worker

pytestmark = pytest.mark.slow

BUILDERS = {"encoder": tiny_encoder, "encoder-decoder": tiny_encoder_decoder, "decoder": tiny_decoder}

NO_BIASES = "no bias"
REFUSED: dict[tuple[str, str, str], str] = {
    **{("bitfit", task, kind): NO_BIASES for task in TASKS for kind in ("encoder-decoder", "decoder")},
}
"""(method, task, architecture) -> what the sentence of its refusal must say."""

NOTHING_TO_SHOW = {
    ("question_answering", "encoder-decoder"),
    ("question_answering", "decoder"),
    ("language_modeling", "encoder"),
}
"""Uses that take more than a card can show: its code loads the model, and no more."""

COMBINATIONS = [
    (method, task, architecture)
    for architecture in BUILDERS
    for task, kind in TASKS.items()
    if architecture in kind.heads
    for method in METHODS
]


def test_every_method_does_every_task_on_some_architecture() -> None:
    done = {
        (method, task) for method, task, architecture in COMBINATIONS if (method, task, architecture) not in REFUSED
    }
    missing = {(method, task) for method in METHODS for task in TASKS} - done
    # Tagging with biases, for example, is done by the encoder; a model that writes text and has biases is not here.
    assert {pair for pair in missing if pair[0] != "bitfit"} == set()
    assert {task for method, task in missing} <= {"summarization", "instruction"}


@dataclass
class Outcome:
    """What the battery found for one method, task and architecture."""

    results: list[SegmentResult]
    counted: ParameterCount
    built: ParameterCount
    score: Score | None = None
    error: str | None = None


class Battery:
    """Every task and method on one architecture: trained in this process, reloaded and scored in another."""

    def __init__(self, architecture: str, folder: Path) -> None:
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        self.changed: list[str] = []
        self.folders: dict[tuple[str, str], Path] = {}
        self._jobs: dict[tuple[str, str], Job] = {}
        self.model = BUILDERS[architecture](folder / "model")
        for task, kind in TASKS.items():
            if architecture in kind.heads:
                methods = [method for method in METHODS if (method, task, architecture) not in REFUSED]
                self._train(task, methods, folder / task)
        for key, score in zip(self._jobs, score_folders(list(self._jobs.values())), strict=True):
            self.outcomes[key].score = score

    def _train(self, task: str, methods: list[str], folder: Path) -> None:
        study, plan = planned(self.model, task, methods, folder)
        worker = Worker(plan.for_workers(study.folder.path, threads=1), WorkerGroup())
        (model,) = plan.models
        base, domain = worker.base(model), worker.domain(model, "d")
        records = []
        for number, method in enumerate(methods):
            hyperparameters = SAMPLES[method]
            cell = next(item.cell for item in plan.cells if item.cell.method == method)
            built = build_model(base, domain, method, hyperparameters, seed=3)
            outcome = Outcome(
                [], plan.count(cell, hyperparameters), ParameterCount(count_trainable(built), count_exported(built))
            )
            self.outcomes[method, task] = outcome
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
                records.append(_record(number, model, method, hyperparameters, outcome, domain.metric))
        self._check_base(plan, worker, model, task)
        self._export(study, plan, records, task, folder / "out")

    def _check_base(self, plan: StudyPlan, worker: Worker, model: str, task: str) -> None:
        """A base that has trained everything is, bit for bit, one that was loaded just now."""
        fresh = Worker(plan.for_workers(Path("unused"), threads=1), WorkerGroup()).base(model)
        fresh.template(plan.prepared[model, "d"])
        used = worker.base(model).fingerprint()
        self.changed += [f"{task}: {name}" for name, value in fresh.fingerprint().items() if used[name] != value]

    def _export(self, study: Study, plan: StudyPlan, records: list[TrialRecord], task: str, to: Path) -> None:
        facts = plan_facts(study, plan)
        facts.provenance[THREADS] = "1"
        known = StudyToExport(
            spec=study.spec,
            facts=facts,
            records=records,
            folder=study.folder.path,
            data_folder=to.parent,
            cache=study.folder.cache,
            ledger="",
        )
        for record in records:
            target, staging = to / record.method, to / f"staging-{record.method}"
            staging.mkdir(parents=True)
            self.folders[record.method, task] = target
            try:
                ((job, _),) = write_folders(known, to, staging, [target], [target], [record], "adapter")
                self._jobs[record.method, task] = job
            except StudyError as error:
                self.outcomes[record.method, task].error = error.message


def planned(model: Path, task: str, methods: list[str], folder: Path) -> tuple[Study, StudyPlan]:
    """A checked study of one task."""
    folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "name": "battery",
        "model": str(model),
        "domains": {"d": task_domain(task, folder)},
        "methods": {method: SAMPLES[method] for method in methods},
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


@pytest.fixture(scope="module", params=list(BUILDERS))
def battery(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Battery]]:
    threads = torch.get_num_threads()
    try:
        yield request.param, Battery(request.param, tmp_path_factory.mktemp("battery"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("method", list(METHODS))
def test_method_and_task(method: str, task: str, battery: tuple[str, Battery]) -> None:
    architecture, done = battery
    if architecture not in TASKS[task].heads:
        pytest.skip(f"{task} is not for this kind of model: {architecture}")
    if (method, task, architecture) in REFUSED:
        pytest.skip("refused: see the test of refusals")
    outcome = done.outcomes[method, task]
    assert outcome.error is None
    assert outcome.counted == outcome.built, "what is counted on the meta device is what is trained and exported"
    first, last = outcome.results
    assert last.train_loss != first.train_loss
    assert outcome.score is not None
    assert outcome.score.error is None, outcome.score.error
    same = "what a fresh process reads from the folder scores the same"
    assert outcome.score.scores == pytest.approx(last.scores, rel=1e-5, abs=1e-6), same
    assert outcome.score.loss == pytest.approx(last.loss, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "qlora", "prompt", "full"])
@pytest.mark.parametrize("task", list(TASKS))
def test_the_code_of_a_card_runs_as_it_stands(task: str, method: str, battery: tuple[str, Battery]) -> None:
    architecture, done = battery
    if architecture not in TASKS[task].heads:
        pytest.skip(f"{task} is not for this kind of model: {architecture}")
    card = (done.folders[method, task] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    written = str(done.folders[method, task].parent / method)
    assert written in code
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "card", "exec"), {})
    shown = (task, architecture) not in NOTHING_TO_SHOW
    assert bool(printed.getvalue().strip()) == shown


def test_the_base_is_bit_identical_after_everything(battery: tuple[str, Battery]) -> None:
    assert battery[1].changed == []


@pytest.mark.parametrize(("combination", "sentence"), list(REFUSED.items()), ids=["-".join(key) for key in REFUSED])
def test_what_cannot_be_is_refused_before_work_starts(
    combination: tuple[str, str, str], sentence: str, tmp_path: Path
) -> None:
    method, task, architecture = combination
    if architecture not in TASKS[task].heads:
        pytest.skip(f"{task} is not for this kind of model: {architecture}")
    model = BUILDERS[architecture](tmp_path / "model")
    with pytest.raises(StudyError, match=sentence):
        planned(model, task, [method], tmp_path)
