"""A worker that dies or leaves while the test split is read: the evaluations are made again, and no step is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lone_worker import new_worker, numbers
from task_data import task_domain
from tiny_models import SAMPLES

from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training import session
from peftsearch.training.checkpoint import WEIGHTS, saved_steps, trial_folder
from peftsearch.training.crew import Crew
from peftsearch.training.segment import HandedBack, Outcome, Segment, SegmentResult, TrialPlan
from peftsearch.training.session import TrialSession


class DiedError(BaseException):
    """As if the process were gone: nothing here catches it."""


def planned(base: Path, folder: Path, **training: Any) -> StudyPlan:
    folder.mkdir(parents=True)
    document = {
        "name": "reading",
        "model": str(base),
        "domains": {"d": task_domain("classification", folder)},
        "methods": {"lora": {}},
        "training": {
            "epochs": 6,
            "evaluations": 3,
            "batch_size": 12,
            "max_length": 48,
            "precision": "fp32",
            **training,
        },
    }
    return plan_study(StudyFile(document, folder=folder), folder / "cache")


def segments(plan: StudyPlan) -> list[Segment]:
    # At this rate the last evaluation is not the best one.
    values = SAMPLES["lora"] | {"dropout": 0.2, "learning_rate": 0.03}
    trial = TrialPlan(0, next(iter(plan.models)), "d", "lora", values, seed=4)
    steps = plan.budgets["d", "lora"].evaluation_steps
    return [Segment(trial, step, final=step == steps[-1], read_test=True) for step in steps]


def last(do: Callable[[Segment], Outcome], plan: StudyPlan) -> Outcome:
    """The outcome of a trial's last segment, where early stopping may end it sooner."""
    found: Outcome = HandedBack()
    for segment in segments(plan):
        found = do(segment)
        if not isinstance(found, SegmentResult) or found.stopped:
            break
    return found


def interrupt(monkeypatch: pytest.MonkeyPatch, what: Callable[[], None]) -> None:
    """Let something happen before the second batch of the test split is read."""
    evaluate = session.evaluate

    def interrupted(
        model: Any, domain: Any, split: str, *args: Any, between: Any = lambda: None, **options: Any
    ) -> Any:
        batches = iter(range(1000))

        def before() -> None:
            if split == "test" and next(batches) == 1:
                what()
            between()

        return evaluate(model, domain, split, *args, between=before, **options)

    monkeypatch.setattr(session, "evaluate", interrupted)


PATIENCE = {"whole": {}, "early": {"patience": 1}, "best": {"patience": 9}}
"""All of the budget; stopped early, and at the full budget, where the best weights are scored."""


@pytest.mark.parametrize("training", PATIENCE.values(), ids=PATIENCE)
@pytest.mark.parametrize("leaves", [False, True], ids=["dies", "leaves"])
def test_no_step_is_made_twice(
    training: dict[str, Any], leaves: bool, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny_base, tmp_path / "study", evaluation_batch_size=4, **training)
    whole = last(new_worker(plan, tmp_path / "undisturbed").do, plan)
    assert isinstance(whole, SegmentResult)
    assert whole.stopped == (training == {"patience": 1})
    assert whole.test is not None

    worker = new_worker(plan, tmp_path / "disturbed")
    folder = trial_folder(tmp_path / "disturbed", "00000")

    def happens() -> None:
        if not leaves:
            raise DiedError
        worker.must_leave = lambda: True
        next(iter(worker._sessions.values())).must_leave = worker.must_leave

    with monkeypatch.context() as patched:
        interrupt(patched, happens)
        if leaves:
            assert last(worker.do, plan) == HandedBack()
        else:
            with pytest.raises(DiedError):
                last(worker.do, plan)
    worker.close()
    assert max(saved_steps(folder)) == whole.step

    def trained(*_: object) -> None:
        raise AssertionError("a step was made again")

    with monkeypatch.context() as patched:
        patched.setattr(TrialSession, "_loaded", trained)
        segment = next(segment for segment in segments(plan) if segment.to_step == whole.step)
        again = new_worker(plan, tmp_path / "disturbed").do(segment)
    assert numbers(again) == numbers(whole)
    assert isinstance(again, SegmentResult)
    assert again.test is not None
    assert again.test.scores == whole.test.scores
    assert [file.name for file in folder.iterdir() if file.suffix == ".safetensors"] == [WEIGHTS]


def test_one_of_a_pack_goes_on_alone(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tiny_base, tmp_path / "study", evaluation_batch_size=4)

    def alone(task: Crew) -> Callable[[Segment], Outcome]:
        def do(segment: Segment) -> Outcome:
            task.join(0, segment)
            found: dict[int, Outcome] = {}
            while not found:
                found = task.advance()
            return found[0]

        return do

    def silent(*_: object) -> None:
        raise AssertionError

    whole = last(alone(Crew(new_worker(plan, tmp_path / "undisturbed"), silent)), plan)

    def dies() -> None:
        raise DiedError

    with monkeypatch.context() as patched:
        interrupt(patched, dies)
        with pytest.raises(DiedError):
            last(alone(Crew(new_worker(plan, tmp_path / "disturbed"), silent)), plan)
    monkeypatch.setattr(TrialSession, "_loaded", lambda *_: pytest.fail("a step was made again"))
    again = new_worker(plan, tmp_path / "disturbed").do(segments(plan)[-1])
    assert numbers(again) == numbers(whole)
