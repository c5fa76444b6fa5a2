"""Checkpoints that are cut short, altered, lost, or find no room: what is read is what was written, or nothing."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lone_worker import new_worker, numbers
from s3_server import S3Server
from small_disk import fill

from peftsearch import files
from peftsearch.files import Place, StorageError
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training import checkpoint
from peftsearch.training.checkpoint import (
    WEIGHTS,
    CorruptCheckpointError,
    read_checkpoint,
    saved_steps,
    sound_states,
    state_name,
    trial_folder,
    write_checkpoint,
    write_state,
)
from peftsearch.training.segment import Failure, Segment, TrialPlan

LORA = {
    "rank": 4,
    "alpha": 16.0,
    "dropout": 0.1,
    "variant": "lora",
    "targets": "attention",
    "learning_rate": 5e-3,
}
TENSORS = {"b": torch.arange(12.0).reshape(3, 4), "a": torch.tensor(7, dtype=torch.int64), "empty": torch.zeros(0)}
OF = "the trial's digest"
META = {"step": 4, "result": {"loss": 0.1, "scores": {"accuracy": 1 / 3}}, "best_value": None}


def same(found: tuple[dict[str, torch.Tensor], dict[str, Any]], tensors: Any = TENSORS, meta: Any = META) -> bool:
    return (
        found[1] == meta
        and found[0].keys() == tensors.keys()
        and all(
            found[0][name].dtype == tensor.dtype and torch.equal(found[0][name], tensor)
            for name, tensor in tensors.items()
        )
    )


def stored() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "x", TENSORS, META)
        return (Path(folder) / "x").read_bytes()


STORED = stored()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_happens_to_the_bytes_the_content_is_right_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(STORED)
    for _ in range(data.draw(st.integers(1, 4), "alterations")):
        where = data.draw(st.integers(0, len(content) - 1), "where") if content else 0
        match data.draw(st.sampled_from(["flip", "cut", "zero", "insert"]), "how"):
            case "flip" if content:
                content[where] ^= 1 << data.draw(st.integers(0, 7), "bit")
            case "cut":
                del content[where:]
            case "zero":
                content[where : where + 64] = bytes(len(content[where : where + 64]))
            case _:
                content[where:where] = data.draw(st.binary(min_size=1, max_size=9), "inserted")
    (tmp_path / "x").write_bytes(content)
    try:
        found = read_checkpoint(tmp_path / "x")
    except CorruptCheckpointError:
        return
    assert same(found)


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return tmp_path
    server: S3Server = request.getfixturevalue("s3_server")
    return files.place(server.storage(f"checkpoints/{tmp_path.name}"))


def test_of_a_trial_the_two_latest_states_are_kept_and_a_damaged_one_is_left_out(
    root: Place, caplog: pytest.LogCaptureFixture
) -> None:
    folder = trial_folder(root, "00003")
    for step in (4, 8, 12):
        write_state(folder, step, TENSORS, {**META, "step": step})
    assert saved_steps(folder) == [12, 8]
    assert [meta["step"] for _, meta in sound_states(folder, 12, OF)] == [12, 8]
    assert [meta["step"] for _, meta in sound_states(folder, 11, OF)] == [8]
    files.write_bytes(folder / state_name(12), STORED[: len(STORED) // 2])
    with caplog.at_level(logging.WARNING):
        tensors, meta = next(sound_states(folder, 12, OF))
    assert same((tensors, {**meta, "step": 4}))
    assert meta["step"] == 8
    assert "state-00000012.safetensors of trial folder 00003 is damaged" in caplog.text
    # Written again, it takes the place of the damaged one, and the sound one before it stays.
    write_state(folder, 12, TENSORS, {**META, "step": 12})
    assert [meta["step"] for _, meta in sound_states(folder, 12, OF)] == [12, 8]
    # A trial that began anew keeps nothing of the attempt before.
    write_state(folder, 4, TENSORS, META)
    assert saved_steps(folder) == [4]


def test_a_state_under_the_name_of_another_step_is_left_out(tmp_path: Path) -> None:
    write_state(tmp_path, 4, TENSORS, META)
    os.replace(tmp_path / state_name(4), tmp_path / state_name(8))
    assert list(sound_states(tmp_path, 8, OF)) == []


def test_checkpoints_without_the_second_checksum_are_still_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    payload = {"meta": META, "checksum": checkpoint._checksum(TENSORS)}
    save_file(TENSORS, tmp_path / "x", metadata={"peftsearch": json.dumps(payload)})
    assert same(read_checkpoint(tmp_path / "x"))


# --- trials ---


@pytest.fixture
def plan(write_study: Callable[..., Path], tmp_path: Path) -> StudyPlan:
    return plan_study(StudyFile.load(write_study(methods={"lora": {}})), tmp_path / "cache")


def trial(plan: StudyPlan) -> TrialPlan:
    return TrialPlan(0, next(iter(plan.models)), "topics", "lora", LORA, seed=0)


def steps_of(plan: StudyPlan) -> tuple[int, ...]:
    return tuple(plan.budgets["topics", "lora"].evaluation_steps)


def train(plan: StudyPlan, folder: Place, count: int | None = None, what: TrialPlan | None = None) -> list[Any]:
    """A trial's first segments, each by a worker of its own: every one resumes."""
    steps = steps_of(plan)
    return [
        numbers(new_worker(plan, folder).do(Segment(what or trial(plan), step, final=step == steps[-1])))
        for step in steps[:count]
    ]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def misstate(path: Path) -> None:
    """A digit of the metadata, which is not in the tensors."""
    path.write_bytes(path.read_bytes().replace(b'\\"best_step\\": -1', b'\\"best_step\\": -2'))


@pytest.mark.parametrize(
    ("states", "damage"), [(1, flip), (1, cut), (1, empty), (1, misstate), (1, Path.unlink), (2, cut)]
)
def test_a_trial_goes_on_from_the_state_before_a_damaged_one_with_the_same_numbers(
    states: int, damage: Callable[[Path], None], plan: StudyPlan, tmp_path: Path
) -> None:
    undisturbed = train(plan, tmp_path / "a")
    folder = trial_folder(tmp_path / "b", "00000")
    train(plan, tmp_path / "b", 2)
    before = [path.read_bytes() for path in sorted(folder.iterdir())]
    for step in saved_steps(folder)[:states]:
        damage(folder / state_name(step))
    assert [path.read_bytes() for path in sorted(folder.iterdir())] != before
    steps = steps_of(plan)
    worker = new_worker(plan, tmp_path / "b")
    found = [numbers(worker.do(Segment(trial(plan), step, final=step == steps[-1]))) for step in steps[2:]]
    assert found == undisturbed[2:]
    assert (
        read_checkpoint(folder / WEIGHTS)[0].keys() == read_checkpoint(tmp_path / "a/trials/00000" / WEIGHTS)[0].keys()
    )


@pytest.mark.parametrize("trained", [2, None])
def test_the_files_of_another_trial_under_the_same_number_are_not_taken_for_its_own(
    trained: int | None, plan: StudyPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The ledger was restored from a copy, and its sampler proposes something else now.
    other = replace(trial(plan), hyperparameters=LORA | {"learning_rate": 1e-3})
    undisturbed = train(plan, tmp_path / "a", what=other)
    train(plan, tmp_path / "b", trained)
    with caplog.at_level(logging.WARNING):
        assert train(plan, tmp_path / "b", what=other) == undisturbed
    assert "of another trial" in caplog.text
    _, meta = read_checkpoint(trial_folder(tmp_path / "b", "00000") / WEIGHTS)
    assert meta["trial"] == other.digest


def test_a_trial_goes_on_from_a_state_of_an_earlier_version(plan: StudyPlan, tmp_path: Path) -> None:
    undisturbed = train(plan, tmp_path / "a")
    folder = trial_folder(tmp_path / "b", "00000")
    train(plan, tmp_path / "b", 2)
    for step in saved_steps(folder):
        tensors, meta = read_checkpoint(folder / state_name(step))
        # Results named the worker once.
        meta["result"]["worker"] = "slot 0, some host, process 1"
        write_checkpoint(folder / state_name(step), tensors, meta)
    steps = steps_of(plan)
    worker = new_worker(plan, tmp_path / "b")
    assert [
        numbers(worker.do(Segment(trial(plan), step, final=step == steps[-1]))) for step in steps[2:]
    ] == undisturbed[2:]
    weights = folder / WEIGHTS
    tensors, meta = read_checkpoint(weights)
    meta["result"]["worker"] = "the same"
    write_checkpoint(weights, tensors, meta)
    again = new_worker(plan, tmp_path / "b").do(Segment(trial(plan), steps[-1], final=True))
    assert numbers(again) == undisturbed[-1]


def test_a_segment_before_the_latest_state_begins_at_the_state_before_it(plan: StudyPlan, tmp_path: Path) -> None:
    undisturbed = train(plan, tmp_path, 3)
    steps = steps_of(plan)
    # The driver died before it recorded the third answer and the second: it asks for both again.
    worker = new_worker(plan, tmp_path)
    assert [numbers(worker.do(Segment(trial(plan), step))) for step in steps[1:3]] == undisturbed[1:3]


def test_a_trial_in_an_object_store_is_trained_and_resumed_as_in_a_folder(
    plan: StudyPlan,
    tmp_path: Path,
    s3_server: S3Server,
) -> None:
    where = files.place(s3_server.storage("trial"))
    assert train(plan, where) == train(plan, tmp_path / "local")
    assert files.names(trial_folder(where, "00000")) == [WEIGHTS]


# --- a full disk ---


def test_a_full_disk_leaves_the_earlier_state_and_no_part_of_the_new_one(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PAUSES", (0.01,))
    folder = small_disk / "trials" / "00000"
    write_state(folder, 4, TENSORS, META)
    fill(small_disk)
    before = sorted(folder.iterdir())
    large = {"weight": torch.zeros(200_000)}
    with pytest.raises(StorageError, match=f"cannot write {folder / state_name(8)}: No space left on device$"):
        write_state(folder, 8, large, {"step": 8})
    assert sorted(folder.iterdir()) == before
    assert same(next(sound_states(folder, 8, OF)))


def test_a_segment_waits_for_room_on_a_full_disk(plan: StudyPlan, small_disk: Path, tmp_path: Path) -> None:
    undisturbed = train(plan, tmp_path / "a")
    steps = steps_of(plan)
    worker = new_worker(plan, small_disk)
    worker.do(Segment(trial(plan), steps[0]))
    filler = fill(small_disk)

    def make_room() -> None:
        time.sleep(0.5)
        filler.unlink()

    helper = threading.Thread(target=make_room)
    helper.start()
    found = [numbers(worker.do(Segment(trial(plan), step, final=step == steps[-1]))) for step in steps[1:]]
    helper.join()
    assert found == undisturbed[1:]


def test_a_disk_that_stays_full_is_the_study_s_fault_and_the_trial_goes_on_later(
    plan: StudyPlan, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PAUSES", (0.01,))
    undisturbed = train(plan, tmp_path / "a")
    steps = steps_of(plan)
    worker = new_worker(plan, small_disk)
    worker.do(Segment(trial(plan), steps[0]))
    filler = fill(small_disk)
    outcome = worker.do(Segment(trial(plan), steps[1]))
    assert isinstance(outcome, Failure)
    assert outcome.of_study
    assert "No space left on device: mend that" in outcome.error
    filler.unlink()
    assert [numbers(worker.do(Segment(trial(plan), step))) for step in steps[1:3]] == undisturbed[1:3]
