"""A worker that trains several trials at once gives each what it gives it alone, whenever the others come and go."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_worker import new_worker
from test_packing import MIXED, planned

from peftsearch.search.plan import StudyPlan
from peftsearch.spec import Range
from peftsearch.training.checkpoint import WEIGHTS, read_checkpoint, saved_steps, trial_folder
from peftsearch.training.crew import Crew
from peftsearch.training.packing import measure
from peftsearch.training.packing.host import Host
from peftsearch.training.segment import Failure, HandedBack, Outcome, Segment, SegmentResult, SetAside, TrialPlan
from peftsearch.training.session import TrialSession
from peftsearch.workers.dispatcher import Order
from peftsearch.workers.slot import _begin, _Link


@pytest.fixture
def plan(tmp_path: Path) -> StudyPlan:
    return planned(tmp_path, "encoder", "classification")


def segments(plan: StudyPlan, number: int, kind: int | None = None, **changes: Any) -> list[Segment]:
    method, values = MIXED[number if kind is None else kind]
    trial = TrialPlan(number, next(iter(plan.models)), "d", method, values | changes, seed=number)
    steps = plan.budgets["d", method].evaluation_steps
    return [Segment(trial, step, final=step == steps[-1]) for step in steps]


def drain(crew: Crew) -> dict[int, Outcome]:
    found: dict[int, Outcome] = {}
    while not crew.idle:
        found |= crew.advance()
    return found


def silent(_: Hashable, size: int, text: str) -> None:
    raise AssertionError(text)


def assert_alike(mine: Outcome, own: Outcome, tolerance: float = 1e-4) -> None:
    assert isinstance(mine, SegmentResult), mine
    assert isinstance(own, SegmentResult), own
    assert (mine.step, mine.stopped) == (own.step, own.stopped)
    assert (mine.loss, mine.train_loss) == pytest.approx((own.loss, own.train_loss), rel=tolerance)


def assert_same_weights(first: Path, second: Path, number: int) -> None:
    mine, own = (read_checkpoint(trial_folder(folder, f"{number:05d}") / WEIGHTS)[0] for folder in (first, second))
    assert mine.keys() == own.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-3)


def test_trials_that_come_and_go_have_their_own_results(plan: StudyPlan, tmp_path: Path) -> None:
    expected = {n: [new_worker(plan, tmp_path / "alone").do(s) for s in segments(plan, n)] for n in range(4)}
    crew = Crew(new_worker(plan, tmp_path / "packed"), silent)
    left = {number: list(enumerate(segments(plan, number))) for number in range(4)}
    found: dict[int, list[Outcome]] = {number: [] for number in left}
    begin = [0, 1]
    for number in begin:
        crew.join(number, left[number].pop(0)[1])
    steps = 0
    while not crew.idle or any(left.values()):
        for number, outcome in crew.advance().items():
            found[number].append(outcome)
            if left[number]:
                crew.join(number, left[number].pop(0)[1])
        steps += 1
        # Others join in the middle of the first ones' segments.
        if steps in (2, 7):
            number = 2 if steps == 2 else 3
            crew.join(number, left[number].pop(0)[1])
    for number, outcomes in found.items():
        for mine, own in zip(outcomes, expected[number], strict=True):
            assert_alike(mine, own)
        assert_same_weights(tmp_path / "packed", tmp_path / "alone", number)
    together = [outcome.together for outcomes in found.values() for outcome in outcomes]
    assert max(together) > 3
    assert min(together) >= 1


def test_a_worker_that_must_leave_writes_everybodys_state(plan: StudyPlan, tmp_path: Path) -> None:
    expected = {n: new_worker(plan, tmp_path / "alone").do(segments(plan, n)[0]) for n in range(3)}
    worker = new_worker(plan, tmp_path / "packed")
    asked = iter(range(100))
    worker.must_leave = lambda: next(asked) >= 3
    crew = Crew(worker, silent)
    for number in range(3):
        crew.join(number, segments(plan, number)[0])
    assert drain(crew) == {number: HandedBack() for number in range(3)}
    for number in range(3):
        assert saved_steps(trial_folder(tmp_path / "packed", f"{number:05d}")) == [3]
    # One goes on alone, two in another pack; the training loss is over the whole segment.
    other = new_worker(plan, tmp_path / "packed")
    assert_alike(other.do(segments(plan, 0)[0]), expected[0])
    crew = Crew(other, silent)
    crew.join(1, segments(plan, 1)[0])
    crew.join(2, segments(plan, 2)[0])
    for number, outcome in drain(crew).items():
        assert_alike(outcome, expected[number])


def test_where_one_that_is_trained_alone_is_handed_back_so_are_the_others(plan: StudyPlan, tmp_path: Path) -> None:
    worker = new_worker(plan, tmp_path)
    crew = Crew(worker, silent)
    for number in range(2):
        crew.join(number, segments(plan, number)[0])
    for _ in range(3):
        assert crew.advance() == {}
    worker.must_leave = lambda: True
    crew.done(2, worker.do(segments(plan, 2)[0]))
    assert crew.advance() == {number: HandedBack() for number in range(3)}
    assert crew.idle
    assert [saved_steps(trial_folder(tmp_path, f"{number:05d}")) for number in range(3)] == [[3], [3], [0]]


def test_a_worker_that_must_leave_before_an_evaluation_makes_it_elsewhere(plan: StudyPlan, tmp_path: Path) -> None:
    expected = {n: new_worker(plan, tmp_path / "alone").do(segments(plan, n)[0]) for n in range(2)}
    worker = new_worker(plan, tmp_path / "packed")
    crew = Crew(worker, silent)
    for number in range(2):
        crew.join(number, segments(plan, number)[0])
    while not crew._ended:
        assert crew.advance() == {}
    # Asked once more between the trials' steps, and then by the evaluation.
    asked = iter(range(100))
    worker.must_leave = crew.members[0].session.must_leave = lambda: next(asked) >= 1
    assert drain(crew) == {number: HandedBack() for number in range(2)}
    to_step = segments(plan, 0)[0].to_step
    for number in range(2):
        assert saved_steps(trial_folder(tmp_path / "packed", f"{number:05d}")) == [to_step]
    other = new_worker(plan, tmp_path / "packed")
    assert_alike(other.do(segments(plan, 0)[0]), expected[0])
    crew = Crew(other, silent)
    crew.join(1, segments(plan, 1)[0])
    assert_alike(drain(crew)[1], expected[1])


def test_whoever_fails_leaves_alone(plan: StudyPlan, tmp_path: Path) -> None:
    expected = new_worker(plan, tmp_path / "alone").do(segments(plan, 0)[0])
    crew = Crew(new_worker(plan, tmp_path / "packed"), silent)
    crew.join(0, segments(plan, 0)[0])
    # A learning rate that no number survives, more soft tokens than the text leaves room for, and no such layer.
    crew.join(1, segments(plan, 1, kind=0, learning_rate=1e38)[0])
    crew.join(2, segments(plan, 2, tokens=120)[0])
    crew.join(3, segments(plan, 3, targets="elsewhere")[0])
    found = drain(crew)
    assert_alike(found[0], expected)
    sentences = {1: "loss became nan", 2: "exceed the model's 128 positions", 3: "no linear layer named 'elsewhere'"}
    for number, sentence in sentences.items():
        outcome = found[number]
        assert isinstance(outcome, Failure), outcome
        assert sentence in outcome.error


def test_a_trial_that_cannot_be_packed_is_trained_alone_and_the_others_together(
    plan: StudyPlan, tmp_path: Path
) -> None:
    """A change of the model that a pack does not know must not go unnoticed: here, a base that is another one."""
    worker = new_worker(plan, tmp_path / "packed")
    expected = {n: new_worker(plan, tmp_path / "alone").do(segments(plan, n)[0]) for n in range(3)}
    worker.at_once = 3
    crew = Crew(worker, silent)
    for number in range(3):
        crew.join(number, segments(plan, number)[0])
    session = worker.opened(segments(plan, 1)[0])
    assert isinstance(session, TrialSession)
    frozen: Any = next(module for name, module in session.model.named_modules() if name.endswith("word_embeddings"))
    frozen.weight = torch.nn.Parameter(frozen.weight.detach().clone(), requires_grad=False)
    found = drain(crew)
    assert found[1] == SetAside(alone=True)
    for number in (0, 2):
        outcome = found[number]
        assert_alike(outcome, expected[number])
        assert isinstance(outcome, SegmentResult)
        assert outcome.together == 2.0
    assert_alike(worker.do(segments(plan, 1)[0]), expected[1])


def test_what_breaks_over_one_trial_says_nothing_of_its_kind(plan: StudyPlan, tmp_path: Path) -> None:
    worker = new_worker(plan, tmp_path)
    crew = Crew(worker, silent)
    crew.join(0, segments(plan, 0)[0])
    session = worker.opened(segments(plan, 0)[0])
    assert isinstance(session, TrialSession)

    def broken(module: torch.nn.Module, inputs: Any) -> None:
        raise RuntimeError("this head is broken")

    head = next(module for name, module in session.model.named_modules() if name.endswith("modules_to_save.default"))
    head.register_forward_pre_hook(broken)
    assert drain(crew) == {0: Failure("RuntimeError: this head is broken")}


def test_a_model_that_no_pack_can_run_is_said_so(plan: StudyPlan, tmp_path: Path) -> None:
    worker = new_worker(plan, tmp_path / "packed")
    expected = {n: new_worker(plan, tmp_path / "alone").do(segments(plan, n)[0]) for n in range(2)}
    told: list[tuple[int, str]] = []
    crew = Crew(worker, lambda key, size, text: told.append((size, text)))
    # As of a model that works on its tokens one after another, for all texts at once.
    host: Any = crew._host(segments(plan, 0)[0]).model
    layer = next(module for name, module in host.named_modules() if name.endswith("encoder.layer.0"))
    layer.register_forward_hook(lambda module, args, output: output.roll(1, 0))
    for number in range(2):
        crew.join(number, segments(plan, number)[0])
    found = drain(crew)
    assert [size for size, _ in told] == [1]
    assert "one at a time" in told[0][1]
    assert_alike(found[0], expected[0])
    assert found[1] == SetAside()
    assert_alike(worker.do(segments(plan, 1)[0]), expected[1])


def test_early_stopping_is_each_trials_own(tmp_path: Path) -> None:
    plan = planned(tmp_path, "encoder", "classification", patience=1, epochs=6, evaluations=6)
    alone = new_worker(plan, tmp_path / "alone")
    expected: dict[int, list[Outcome]] = {}
    for number in range(3):
        for segment in segments(plan, number):
            outcome = alone.do(segment)
            expected.setdefault(number, []).append(outcome)
            if isinstance(outcome, SegmentResult) and outcome.stopped:
                break
    crew = Crew(new_worker(plan, tmp_path / "packed"), silent)
    left = {number: segments(plan, number) for number in range(3)}
    found: dict[int, list[Outcome]] = {number: [] for number in left}
    for number, own in left.items():
        crew.join(number, own.pop(0))
    while not crew.idle:
        for number, outcome in crew.advance().items():
            found[number].append(outcome)
            assert isinstance(outcome, SegmentResult)
            if left[number] and not outcome.stopped:
                crew.join(number, left[number].pop(0))
    assert any(len(outcomes) < 6 for outcomes in expected.values())
    for number, outcomes in found.items():
        for mine, own in zip(outcomes, expected[number], strict=True):
            assert_alike(mine, own)
    # The same at an evaluation that is only passed by.
    crew = Crew(new_worker(plan, tmp_path / "passing"), silent)
    for number in left:
        crew.join(number, segments(plan, number)[-1])
    passed = drain(crew)
    for number, outcomes in expected.items():
        assert_alike(passed[number], outcomes[-1])
    assert crew.worker.held() == []


def test_evaluations_that_are_recorded_already_are_passed_by(plan: StudyPlan, tmp_path: Path) -> None:
    """A trial whose states were lost is asked for its third evaluation and is trained from its start."""
    alone = new_worker(plan, tmp_path / "alone")
    expected = {number: [alone.do(segment) for segment in segments(plan, number)] for number in range(2)}
    crew = Crew(new_worker(plan, tmp_path / "packed"), silent)
    crew.join(0, segments(plan, 0)[2])
    crew.join(1, segments(plan, 1)[1])
    found = drain(crew)
    assert_alike(found[0], expected[0][2])
    assert_alike(found[1], expected[1][1])


def test_a_trial_that_is_handed_out_twice_is_trained_once(plan: StudyPlan, tmp_path: Path) -> None:
    """Its lease ran out while it was in training, and its slot was given it again."""
    expected = {n: new_worker(plan, tmp_path / "alone").do(segments(plan, n)[0]) for n in range(2)}
    crew = Crew(new_worker(plan, tmp_path / "packed"), silent)
    for number in range(2):
        crew.join(number, segments(plan, number)[0])
    assert crew.advance() == {}
    crew.join(2, segments(plan, 0)[0])
    found = drain(crew)
    assert found[0] == SetAside()
    assert_alike(found[2], expected[0])
    assert_alike(found[1], expected[1])
    # The same where it is now to be done alone.
    crew.join(3, segments(plan, 2)[0])
    assert crew.advance() == {}
    _begin(crew, crew.worker, _Link(None, 0), Order(4, segments(plan, 2)[0], at_once=1))
    assert_alike(drain(crew)[4], new_worker(plan, tmp_path / "alone").do(segments(plan, 2)[0]))
    assert crew.idle


def test_trials_of_another_kind_do_not_join(plan: StudyPlan, tmp_path: Path) -> None:
    worker = new_worker(plan, tmp_path / "packed")
    own = worker.plan.training["adapter"].model_copy(update={"batch_size": 4})
    worker.plan = replace(worker.plan, training={**worker.plan.training, "adapter": own})
    crew = Crew(worker, silent)
    crew.join(0, segments(plan, 0)[0])
    crew.join(1, segments(plan, 1)[0])
    assert crew.advance() == {1: SetAside()}
    assert isinstance(drain(crew)[0], SegmentResult)


def test_a_pack_of_one_model_does_not_change_its_base(plan: StudyPlan, tmp_path: Path) -> None:
    worker = new_worker(plan, tmp_path)
    (model,) = plan.models
    worker.base(model).template(worker.domain(model, "d"))
    before = worker.base(model).fingerprint()
    crew = Crew(worker, silent)
    for number in range(len(MIXED)):
        crew.join(number, segments(plan, number)[0])
    drain(crew)
    assert worker.base(model).fingerprint() == before


def test_sizes_are_measured_with_trials_as_the_study_may_draw_them(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_worker(plan, tmp_path)
    built: list[TrialPlan] = []
    new_session = worker.new_session

    def noted(segment: Segment) -> TrialSession:
        session = new_session(segment)
        built.append(session.plan)
        return session

    monkeypatch.setattr(worker, "new_session", noted)
    # As fast as there are trials: as many as are tried at most.
    monkeypatch.setattr(measure, "_rate", lambda sessions, host, device: (float(len(sessions)), 0, 0))
    own = segments(plan, 0)[0]
    assert Crew(worker, silent).size(own) == measure.LARGEST == len(built)
    assert (built[0].method, built[0].hyperparameters) == (own.trial.method, own.trial.hyperparameters)
    assert {trial.method for trial in built} == {name for name, _ in MIXED}
    for trial in built[1:]:
        for name, value in trial.hyperparameters.items():
            space = worker.plan.spaces[trial.method].space[name]
            if isinstance(space, Range):
                assert space.low <= value <= space.high
    assert len({trial.hyperparameters["rank"] for trial in built if trial.method == "lora"}) > 1


def test_a_trial_that_cannot_be_in_a_pack_does_not_stop_the_measuring_of_another(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_worker(plan, tmp_path)
    # The model has 128 positions, of which every prompt that can be drawn takes too many.
    prompts = worker.plan.spaces["prompt"]
    long = replace(prompts, space={**prompts.space, "tokens": 120})
    worker.plan = replace(worker.plan, spaces={"prompt": long})
    packs: list[list[str]] = []
    rate = measure._rate

    def noted(sessions: list[TrialSession], host: Host, device: torch.device) -> tuple[float, int, int]:
        packs.append([session.plan.method for session in sessions])
        return rate(sessions, host, device)

    monkeypatch.setattr(measure, "_rate", noted)
    monkeypatch.setattr(measure, "LARGEST", 2)
    assert Crew(worker, silent).size(segments(plan, 0)[0]) in (1, 2)
    assert packs == [["lora"], ["lora", "prompt"], ["lora", "lora"]]


def test_sizes_are_measured_with_trials_that_leave_nothing_behind(plan: StudyPlan, tmp_path: Path) -> None:
    expected = new_worker(plan, tmp_path / "alone").do(segments(plan, 0)[0])
    worker = new_worker(plan, tmp_path / "packed")
    crew = Crew(worker, silent)
    size = crew.size(segments(plan, 0)[0])
    assert size is not None
    assert size >= 1
    assert size & (size - 1) == 0
    assert worker.held() == []
    assert not (tmp_path / "packed" / "trials").exists()
    assert worker.do(segments(plan, 0)[0]).loss == expected.loss


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        (0, {"targets": "elsewhere"}, "no linear layer named 'elsewhere'"),
        (2, {"tokens": 120}, "exceed the model's 128 positions"),
        (0, {"rank": "many"}, "TypeError"),
    ],
    ids=["no such layer", "a text that does not fit", "an error that nobody thought of"],
)
def test_what_is_wrong_with_a_trial_says_nothing_of_its_kind(
    kind: int, changes: dict[str, Any], sentence: str, plan: StudyPlan, tmp_path: Path
) -> None:
    worker = new_worker(plan, tmp_path)
    crew = Crew(worker, silent)
    wrong = segments(plan, 0, kind=kind, **changes)[0]
    assert crew.size(wrong) is None
    outcome = worker.do(wrong)
    assert isinstance(outcome, Failure)
    assert sentence in outcome.error
    assert crew.size(segments(plan, 1, kind=0)[0]) is not None
