"""The benchmark's contenders train the same thing as a trial of peftsearch does."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trial_list
import yaml
from bare_loop import BareLoop, Progress
from floor_contender import Lane, random_trials, run_lane
from peftsearch_contender import VARIANTS, document
from segment_records import read_records
from trial_list import Budget, Trial, Work, draw_trials, prepare

from peftsearch import Study

HERE = Path(__file__).parent
BUDGET = Budget(domain="topics", rows=96, validation=32, max_length=16, steps=18, evaluations=3, dropout=False)


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path, topics_csv: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list of two trials of a tiny model without dropout, whose checkpoint lacks the classifier alone."""
    import torch
    from transformers import BertModel

    base = shutil.copytree(tiny_base, tmp_path / "base")
    torch.manual_seed(0)
    BertModel.from_pretrained(tiny_base).save_pretrained(base)
    data = {"source": str(topics_csv), "split": {"group": "document", "validation": 0.25, "test": 0.2}}
    monkeypatch.setattr(trial_list, "MODEL", str(base))
    monkeypatch.setitem(trial_list.DOMAINS, "topics", data)
    prepare(tmp_path / "work", BUDGET, draw_trials(2, 1), cores=1)
    return tmp_path / "work"


def bare(folder: Path, trial: Trial) -> list[Progress]:
    found: list[Progress] = []

    def report(progress: Progress) -> bool:
        found.append(progress)
        return True

    BareLoop(folder, threads=1).train(trial, report)
    return found


def test_what_is_prepared_is_read_back(folder: Path) -> None:
    work = Work.read(folder)
    assert work.budget == BUDGET
    assert work.trials == draw_trials(2, 1)
    assert len(work.batches) == len(work.shuffled) == BUDGET.steps
    assert work.examples == BUDGET.steps * BUDGET.batch_size
    # Each pass holds every row once.
    for batches in (work.batches, work.shuffled):
        assert sorted(row for batch in batches[:6] for row in batch) == list(range(BUDGET.rows))
    assert work.batches != work.shuffled


def test_the_bare_loop_has_the_losses_of_a_trial(folder: Path, tmp_path: Path) -> None:
    import torch

    from peftsearch.training.distributed import WorkerGroup
    from peftsearch.training.segment import Segment, TrialPlan
    from peftsearch.training.worker import Worker

    work = Work.read(folder)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(document(work, "plain", None)))
    plan = Study.from_file(path, storage=tmp_path / "storage").validate()
    assert [plan.budgets["topics", "lora"].evaluation_steps] == [BUDGET.evaluation_steps]
    (tmp_path / "study").mkdir()
    worker = Worker(plan.for_workers(tmp_path / "study", 1), WorkerGroup(device=torch.device("cpu")))
    (cell,) = plan.cells
    for trial in work.trials:
        expected = bare(folder, trial)
        values = {**dict(cell.cell.space.space), "rank": trial.rank, "learning_rate": trial.learning_rate}
        told = TrialPlan(trial.number, work.model, "topics", "lora", values, work.budget.seed)
        for progress in expected:
            result = worker.do(Segment(told, progress.step, final=progress.step == BUDGET.steps))
            assert (result.step, result.train_loss, result.loss, result.scores["accuracy"]) == (
                progress.step,
                pytest.approx(progress.train_loss, rel=1e-4),
                pytest.approx(progress.loss, rel=1e-4),
                pytest.approx(progress.accuracy),
            )
        assert plan.count(cell.cell, values).trainable == expected[-1].parameters


@pytest.mark.slow
def test_lanes_share_the_list(folder: Path) -> None:
    records = folder / "records.jsonl"
    script = [str(HERE / "floor_contender.py"), str(folder), str(records), "--lanes", "2", "--threads", "1"]
    subprocess.run([sys.executable, *script], check=True, timeout=300)
    found = read_records(records)
    assert sorted((record.trial, record.step) for record in found) == [(t, s) for t in (0, 1) for s in (6, 12, 18)]
    assert [record.final for record in sorted(found, key=lambda record: record.step)] == [False] * 4 + [True] * 2


@pytest.mark.slow
def test_hyperparameter_search_has_the_same_losses(folder: Path) -> None:
    records = folder / "records.jsonl"
    script = [str(HERE / "trainer_contender.py"), str(folder), str(records), "--threads", "1"]
    subprocess.run([sys.executable, *script], check=True, timeout=300, capture_output=True)
    ends = {(record.rank, record.learning_rate): record for record in read_records(records) if record.final}
    for trial in Work.read(folder).trials:
        end = ends[trial.rank, trial.learning_rate]
        expected = bare(folder, trial)[-1]
        assert end.train_loss == pytest.approx(expected.train_loss, rel=1e-4)
        assert end.accuracy == pytest.approx(expected.accuracy)
        assert (end.step, end.examples) == (expected.step, expected.examples)


def test_a_random_search_ends_at_its_deadline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    records = folder / "records.jsonl"
    lane = Lane(folder, records, threads=1, shuffled=False, search_seed=0, deadline=time.time() + 5)
    run_lane(lane, multiprocessing.get_context("spawn").Value("q", 0))
    found = read_records(records)
    assert found
    # What is under way at the deadline goes on to its next evaluation, and nothing comes after that.
    assert [record.ended for record in found if record.ended >= lane.deadline] in ([], [found[-1].ended])
    drawn = list(itertools.islice(random_trials(0), found[-1].trial + 1))
    assert all(record.rank == drawn[record.trial].rank for record in found)


@pytest.mark.slow
def test_hyperparameter_search_ends_after_its_deadline(folder: Path) -> None:
    records = folder / "records.jsonl"
    script = [str(HERE / "trainer_contender.py"), str(folder), str(records), "--threads", "1"]
    script += ["--search-seed", "0", "--deadline", str(time.time())]
    subprocess.run([sys.executable, *script], check=True, timeout=300, capture_output=True)
    assert any(record.final for record in read_records(records))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("search_seed", [None, 3])
def test_each_variant_is_a_study(folder: Path, tmp_path: Path, variant: str, search_seed: int | None) -> None:
    work = Work.read(folder)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(document(work, variant, search_seed)))
    spec = Study.from_file(path, storage=tmp_path / "storage").spec
    assert spec.training.precision == ("bf16" if variant == "bf16" else "fp32")
    assert spec.search.sampler == ("grid" if search_seed is None else "tpe")
    assert spec.search.scheduler == ("none" if search_seed is None else "pareto_asha")
    resources = spec.resources
    if variant == "plain":
        assert (resources.slots, resources.cpus_per_worker, resources.pack) == (work.cores, 1, 1)
    if variant in ("on", "bf16"):
        # Nothing that peftsearch could choose is said.
        assert (resources.slots, resources.cpus_per_worker, resources.pack) == ("auto", None, "auto")
        assert resources.threads_per_worker == "auto"


def test_a_budget_larger_than_the_data_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows to train on"):
        prepare(tmp_path / "more", replace(BUDGET, rows=10_000), draw_trials(1, 1), cores=1)


@pytest.mark.slow
@pytest.mark.ray
def test_the_smallest_comparison_comes_to_its_table(tmp_path: Path) -> None:
    # Of each kind of contender one, with one trial of the quickstart's model.
    kinds = ("floor, process per core", "2 at a time", "hyperparameter_search", "peftsearch, plain")
    sizes = {"ranks": 1, "rates": 1, "rows": 32, "validation": 16, "steps": 2, "evaluations": 1, "repeats": 1}
    script = [str(HERE / "same_trials.py"), "--json", str(tmp_path / "out.json"), "--no-dropout"]
    script += [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    script += [text for kind in kinds for text in ("--only", kind)]
    done = subprocess.run([sys.executable, *script], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())["medians"]
    # The floor's words are the shuffled floor's, too.
    assert [next(kind for kind in kinds if kind in name) for name in found] == [kinds[0], *kinds]
    for name, figures in found.items():
        assert 0 < figures["warm_up_seconds"] < figures["first_result_seconds"] <= figures["wall_seconds"], name
        assert 0 < figures["training_seconds"] < figures["wall_seconds"], name
        assert figures["examples_per_second"] == pytest.approx(32 / figures["wall_seconds"]), name
        assert figures["peak_rss_gib"] > 0.2, name
        assert name in done.stdout
