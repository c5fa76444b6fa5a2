"""A study all of whose trials quantise their base never holds that base in full: it may not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from group_runs import GroupRun, run_group
from tiny_models import SAMPLES, tiny_encoder
from torch import nn
from writing_study import MODELS, plan_and_worker, study, topic_rows, train

from peftsearch.methods import BYTES_PER_WEIGHT
from peftsearch.search.estimate import frozen_bytes, model_shapes
from peftsearch.spec import StudyFile
from peftsearch.training.base_model import FrozenBase
from peftsearch.training.quantised import quantised_layers
from peftsearch.training.segment import Probe, ProbeResult, Segment, SegmentResult, TrialPlan
from peftsearch.training.sharding import matrices_in_layers

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow

KINDS = {**MODELS, "encoder": tiny_encoder}
ROWS = {"train": topic_rows(12), "validation": topic_rows(4)}
LABELLED = {split: [{"text": row["text"], "label": row["target"]} for row in rows] for split, rows in ROWS.items()}


def in_full(base: FrozenBase) -> set[str]:
    """Matrices of the layers that a worker holds unquantised."""
    found = set()
    for template in base._templates.values():
        layers = set(quantised_layers(template.model))
        found |= {
            name
            for name in matrices_in_layers(template.model)
            if isinstance(template.model.get_submodule(name.rpartition(".")[0]), nn.Linear)
            # `transformers` keeps some of T5's matrices as they are, whoever quantises it.
            and name.removesuffix(".weight") not in layers
            and not name.endswith(".wo.weight")
        }
    return found


def summaries(folder: Path, **more: Any) -> StudyFile:
    """A decoder that writes, over nf4 alone."""
    domain = {"task": "summarization", "options": {"target_length": 8}}
    methods = {"qlora": {"quantization": "nf4"}}
    return study(folder / "study", KINDS["decoder"](folder / "model"), domain, ROWS, methods=methods, **more)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_threads_baselines_and_trials_hold_the_quantised_base_alone(
    kind: str, quantization: str, tmp_path: Path
) -> None:
    file = study(
        tmp_path / "study",
        KINDS[kind](tmp_path / "model"),
        {"task": "classification"},
        LABELLED,
        methods={"qlora": {"quantization": quantization}},
        resources={"cpus_per_worker": 1, "slots": 1, "threads_per_worker": "auto"},
    )
    plan, worker = plan_and_worker(file, tmp_path)
    worker.warm_up()
    model = next(iter(plan.models))
    found = worker.do(Probe(model, "d"))
    assert isinstance(found, ProbeResult), found
    assert not found.failures
    of_model = {"linear_probe"} if kind == "encoder" else {"zero_shot", "few_shot"}
    assert set(found.details) == {"majority", *of_model}
    for name, detail in found.details.items():
        assert detail.endswith(f"; its base stored as {quantization}") == (name in of_model), detail
    train(plan, worker, "qlora", **{**SAMPLES["qlora"], "quantization": quantization})
    assert {form for *_, form in worker.base(model)._templates} == {quantization}
    assert not in_full(worker.base(model))


def test_summaries_and_forgetting_of_a_quantised_base(tmp_path: Path) -> None:
    (tmp_path / "general.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in ROWS["train"]))
    file = summaries(tmp_path, forgetting={"source": str(tmp_path / "general.jsonl")})
    plan, worker = plan_and_worker(file, tmp_path)
    found = worker.do(Probe(next(iter(plan.models)), "d"))
    assert isinstance(found, ProbeResult), found
    assert "rouge1" in found.scores["zero_shot"]
    final = train(plan, worker, "qlora", **{**SAMPLES["qlora"], "quantization": "nf4"})[-1]
    assert abs(final.scores["forgetting"]) > 0
    assert not in_full(worker.base(next(iter(plan.models))))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_two_workers_with_a_part_of_it_each_find_what_one_finds(kind: str, tmp_path: Path) -> None:
    file = study(
        tmp_path / "study",
        KINDS[kind](tmp_path / "model"),
        {"task": "classification"},
        LABELLED,
        methods={"qlora": {"quantization": "nf4"}},
    )
    plan, worker = plan_and_worker(file, tmp_path)
    model = next(iter(plan.models))
    what = TrialPlan(0, model, "d", "qlora", {**SAMPLES["qlora"], "quantization": "nf4"}, seed=0)
    work = [Probe(model, "d"), Segment(what, plan.budgets["d", "qlora"].total_steps, final=True)]
    alone, _ = (worker.do(piece) for piece in work)
    assert isinstance(alone, ProbeResult)
    for outcomes in run_group(GroupRun(plan.for_workers(tmp_path / "two", threads=1), [work], "fsdp")).outcomes:
        probed, trained = outcomes
        assert isinstance(probed, ProbeResult)
        assert not probed.failures
        assert probed.scores.keys() == alone.scores.keys()
        for name, scores in alone.scores.items():
            assert probed.scores[name] == pytest.approx(scores, abs=1e-4)
        assert isinstance(trained, SegmentResult), trained


@pytest.mark.parametrize(
    ("methods", "form"),
    [
        ({"qlora": {"quantization": "nf4"}}, "nf4"),
        ({"qlora": {"quantization": ["nf4", "int8"]}}, "int8"),
        ({"qlora": {}, "adapter": {"quantization": "int8"}}, "int8"),
        ({"qlora": {}, "adapter": {"quantization": ["none", "nf4"]}}, None),
        ({"qlora": {}, "lora": {}}, None),
    ],
)
def test_what_is_no_trial_takes_a_form_that_trials_need(methods: dict[str, Any], form: str, tmp_path: Path) -> None:
    file = study(
        tmp_path / "study", tiny_encoder(tmp_path / "model"), {"task": "classification"}, LABELLED, methods=methods
    )
    _, worker = plan_and_worker(file, tmp_path)
    assert {place.form for place in worker.plan.models.values()} == {form}


def test_a_head_of_its_own_is_estimated_as_it_is_loaded(tmp_path: Path) -> None:
    file = summaries(tmp_path)
    plan, worker = plan_and_worker(file, tmp_path)
    (shape,) = model_shapes(plan.models, plan.model_facts, plan.counter).values()
    assert not shape.tied
    ((key, template),) = _loaded(worker.base(next(iter(plan.models))), worker.domain(next(iter(plan.models)), "d"))
    held = sum(parameter.numel() * parameter.element_size() for parameter in template.model.parameters())
    packed = sum(
        layer.weight.numel() * layer.weight.element_size() for layer in quantised_layers(template.model).values()
    )
    # The estimate counts the scales of four-bit weights too, and vectors as if they were quantised.
    vectors = sum(parameter.numel() * 4 for parameter in template.model.parameters() if parameter.ndim == 1)
    found = frozen_bytes(shape, "nf4", with_head=True)
    assert held - vectors <= found <= held + packed * (BYTES_PER_WEIGHT["nf4"] - 0.5) * 2 + vectors
    assert key[-1] == "nf4"


def test_what_transformers_never_quantises_is_estimated_as_it_is(tmp_path: Path) -> None:
    file = study(
        tmp_path / "study",
        KINDS["encoder-decoder"](tmp_path / "model"),
        {"task": "classification"},
        LABELLED,
        methods={"qlora": {}},
    )
    plan, worker = plan_and_worker(file, tmp_path)
    ((path, shape),) = model_shapes(plan.models, plan.model_facts, plan.counter).items()
    ((_, template),) = _loaded(worker.base(path), worker.domain(path, "d"))
    parameters = dict(template.model.named_parameters())
    outputs = sum(parameter.numel() for name, parameter in parameters.items() if name.endswith(".wo.weight"))
    assert shape.never_quantised == outputs > 0
    whole = replace(shape, never_quantised=0)
    more = frozen_bytes(shape, "nf4") - frozen_bytes(whole, "nf4")
    assert more == pytest.approx(outputs * (4 - BYTES_PER_WEIGHT["nf4"]), abs=1)
    assert frozen_bytes(shape, None) == frozen_bytes(whole, None)


def _loaded(base: FrozenBase, domain: Any) -> list[Any]:
    base.common_model(domain)
    return list(base._templates.items())
