"""A baseline that fails leaves the others, and is recorded once with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_decoder, tiny_encoder
from writing_study import plan_and_worker, study, topic_rows

from peftsearch.baselines import Wanted, missing_baselines, record_baselines
from peftsearch.spec import ALL_BASELINES, StudyFacts
from peftsearch.training import probe, prompting
from peftsearch.training.segment import Failure, HandedBack, Probe, ProbeResult
from peftsearch.training.worker import Worker

EXHAUSTED = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def exhausted(*args: Any, **kwargs: Any) -> Any:
    raise EXHAUSTED


def broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a matrix is singular")


def labelled(count: int) -> list[dict[str, str]]:
    return [{"text": row["text"], "label": "good" if "dog" in row["text"] else "bad"} for row in topic_rows(count)]


@pytest.fixture
def decoder(tmp_path: Path) -> tuple[StudyFacts, Worker, str]:
    return known(tmp_path, tiny_decoder(tmp_path / "model"))


def known(folder: Path, model: Path) -> tuple[StudyFacts, Worker, str]:
    """What a run knows before its baselines, a worker that computes them, and the model's path."""
    rows = {"train": labelled(16), "validation": labelled(8), "test": labelled(12)}
    plan, worker = plan_and_worker(study(folder, model, {"task": "classification"}, rows), folder)
    facts = StudyFacts(
        study="s",
        trials_per_cell=1,
        methods=tuple(plan.spec.methods),
        domains={name: domain.facts() for name, domain in plan.domains.items()},
        models={},
        provenance={},
    )
    return facts, worker, next(iter(plan.models))


def run(facts: StudyFacts, worker: Worker, model: str, *, read_test: bool) -> int:
    """What a run of the study does about its baselines; returns how many probes it sent to its slots."""
    wanted = missing_baselines(facts, [model], read_test=read_test)
    for item in wanted:
        outcome = worker.do(Probe(item.model, item.domain, read_test, item.names))
        assert isinstance(outcome, ProbeResult | Failure)
        record_baselines(facts.domains[item.domain], item, outcome, read_test=read_test)
    return len(wanted)


def test_prompting_that_runs_out_of_memory_leaves_the_guesses(
    decoder: tuple[StudyFacts, Worker, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    facts, worker, model = decoder
    monkeypatch.setattr(prompting, "answer_scores", exhausted)
    assert run(facts, worker, model, read_test=False) == 1
    domain = facts.domains["d"]
    assert set(domain.baselines[model]) == {"majority"}
    failed = domain.failed_baselines[model]
    assert {name: item.split for name, item in failed.items()} == {"zero_shot": "validation", "few_shot": "validation"}
    assert failed["few_shot"].title == "few-shot prompting"
    assert "out of memory" in failed["few_shot"].error
    assert sum("few-shot prompting" in record.message for record in caplog.records) == 1
    # Not tried again; and on the test split only what has a score is asked for.
    assert run(facts, worker, model, read_test=False) == 0
    (wanted,) = missing_baselines(facts, [model], read_test=True)
    assert wanted.names == ("majority",)


def test_a_failure_on_the_test_split_does_not_make_the_others_read_it_again(
    decoder: tuple[StudyFacts, Worker, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, worker, model = decoder
    run(facts, worker, model, read_test=False)
    monkeypatch.setattr(prompting, "answer_scores", exhausted)
    assert run(facts, worker, model, read_test=True) == 1
    domain = facts.domains["d"]
    majority = domain.baselines[model]["majority"]
    assert majority.test_examples == 12
    assert majority.test_read_at is not None
    assert domain.baselines[model]["zero_shot"].test_value is None
    assert {item.split for item in domain.failed_baselines[model].values()} == {"test"}
    assert run(facts, worker, model, read_test=True) == 0


def test_a_probe_that_fails_is_named_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, worker, model = known(tmp_path, tiny_encoder(tmp_path / "model"))
    monkeypatch.setattr(probe, "_text_probe", broken)
    run(facts, worker, model, read_test=False)
    failed = facts.domains["d"].failed_baselines[model]
    assert failed["linear_probe"].error == "RuntimeError: a matrix is singular"
    assert run(facts, worker, model, read_test=True) == 1
    assert facts.domains["d"].baselines[model]["majority"].test_value is not None


def test_a_probe_that_breaks_its_slot_is_recorded_once(decoder: tuple[StudyFacts, Worker, str]) -> None:
    facts, _, model = decoder
    (wanted,) = missing_baselines(facts, [model])
    record_baselines(facts.domains["d"], wanted, Failure("the slot was lost 4 times"))
    assert facts.domains["d"].failed_baselines[model][ALL_BASELINES].error == "the slot was lost 4 times"
    assert missing_baselines(facts, [model]) == missing_baselines(facts, [model], read_test=True) == []


def test_a_full_storage_is_not_a_baselines_fault(decoder: tuple[StudyFacts, Worker, str]) -> None:
    facts, _, model = decoder
    (wanted,) = missing_baselines(facts, [model])
    record_baselines(facts.domains["d"], wanted, Failure("no space left", of_study=True))
    assert missing_baselines(facts, [model]) == [wanted]


def test_a_baseline_whose_score_is_undefined_leaves_the_others(decoder: tuple[StudyFacts, Worker, str]) -> None:
    """As where none of the questions that a model was prompted with is of the kind that the metric counts."""
    facts, _, model = decoder
    domain = facts.domains["d"]
    (wanted,) = missing_baselines(facts, [model])
    for read_test in (False, True):
        found = ProbeResult()
        found.add("majority", "majority class", "always", {"accuracy": 0.5}, 8)
        found.add("zero_shot", "zero-shot prompting", "asked", {} if not read_test else {"accuracy": 0.5}, 3)
        found.add("few_shot", "few-shot prompting", "asked", {} if read_test else {"accuracy": 0.5}, 3)
        asked = Wanted("d", model, ("majority", "few_shot")) if read_test else wanted
        record_baselines(domain, asked, found, read_test=read_test)
    assert domain.baselines[model]["majority"].test_value == 0.5
    assert domain.baselines[model]["few_shot"].test_value is None
    failed = domain.failed_baselines[model]
    assert {name: item.split for name, item in failed.items()} == {"zero_shot": "validation", "few_shot": "test"}
    assert failed["zero_shot"].error == "accuracy is undefined on the 3 examples that it was scored on"


def test_shots_that_do_not_fit_beside_the_texts_of_the_test_split_are_asked_for_once(
    decoder: tuple[StudyFacts, Worker, str],
) -> None:
    facts, worker, model = decoder
    run(facts, worker, model, read_test=False)
    wanted = Wanted("d", model, ("few_shot",))
    record_baselines(facts.domains["d"], wanted, ProbeResult(read_at="2026-01-01T00:00:00+00:00"), read_test=True)
    assert "no training example fits" in facts.domains["d"].failed_baselines[model]["few_shot"].error
    (left,) = missing_baselines(facts, [model], read_test=True)
    assert left.names == ("majority", "zero_shot")


def test_a_worker_that_has_to_leave_hands_its_baselines_back(decoder: tuple[StudyFacts, Worker, str]) -> None:
    facts, worker, model = decoder
    asked: list[int] = []

    def must_leave() -> bool:
        asked.append(1)
        return len(asked) > 5

    worker.must_leave = must_leave
    (wanted,) = missing_baselines(facts, [model])
    assert isinstance(worker.do(Probe(wanted.model, wanted.domain)), HandedBack)
    # Between two prompts, not at the end.
    assert len(asked) == 6
