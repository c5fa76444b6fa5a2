"""Frozen bases in four and eight bits: shared by trials, never changed, and the same for whoever loads the adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from method_models import MODELS, batch, load, logits, train
from peft import PeftModel
from tiny_models import SAMPLES, tiny_decoder, tiny_encoder
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peftsearch.domains import PreparedDomain
from peftsearch.methods import METHODS, Quantization
from peftsearch.spec import StudyError
from peftsearch.training import quantised
from peftsearch.training.base_model import FrozenBase, meta_model
from peftsearch.training.session import build_model

pytest.importorskip("bitsandbytes")

QUANTIZATIONS: tuple[Quantization, ...] = ("nf4", "int8")
every_quantization = pytest.mark.parametrize("quantization", QUANTIZATIONS)


def configuration(method: str, quantization: str, **values: Any) -> dict[str, Any]:
    return {**SAMPLES[method], "quantization": quantization, **values}


def domain(labels: tuple[str, ...] = ("a", "b", "c")) -> PreparedDomain:
    """Of a classification; its data is not looked at."""
    return PreparedDomain(
        name="topics",
        task_name="classification",
        options={},
        architecture="encoder",
        metric="accuracy",
        direction="maximize",
        labels=labels,
        parts=(),
        rows={"train": 1, "validation": 1},
        max_length=8,
        fingerprint="",
        source="",
        warnings=(),
        pad_token_id=0,
        folder=Path("unused"),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase(str(tiny_encoder(tmp_path_factory.mktemp("encoder"))))


# --- what is quantised -----------------------------------------------------------------------------------------------


@every_quantization
def test_everything_but_head_and_embeddings_is_quantised(base: FrozenBase, quantization: Quantization) -> None:
    template = base.template(domain(), quantization)
    layers = quantised.quantised_layers(template.model)
    assert len(layers) == 2 * 6
    assert set(template.modules_to_save) == {"bert.pooler", "classifier"}
    assert all(type(template.model.get_submodule(name)) is nn.Linear for name in ("bert.pooler.dense", "classifier"))
    weight = next(iter(layers.values())).weight
    assert weight.element_size() * weight.numel() == 32 * 32 * {"nf4": 0.5, "int8": 1}[quantization]


def test_nf4_is_quantised_twice(base: FrozenBase) -> None:
    for layer in quantised.quantised_layers(base.template(domain(), "nf4").model).values():
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested


# --- sharing ---------------------------------------------------------------------------------------------------------


@every_quantization
def test_trials_share_the_quantised_weights(base: FrozenBase, quantization: Quantization) -> None:
    models = [
        base.trial_model(domain(labels), seed=0, copy_weights=False, quantization=quantization)
        for labels in (("a", "b", "c"), ("a", "b", "c"), ("x", "y"))
    ]
    layers = [quantised.quantised_layers(model) for model in models]
    for name, first in layers[0].items():
        for others in layers[1:]:
            other = others[name]
            assert other is not first
            assert other.weight is first.weight
            assert [id(item) for item in quantised.shared_state(other)] == [
                id(item) for item in quantised.shared_state(first)
            ]
    plain = base.trial_model(domain(), seed=0, copy_weights=False)
    # What is not quantised is in memory once, too.
    assert plain.get_input_embeddings().weight is models[0].get_input_embeddings().weight


@every_quantization
@pytest.mark.parametrize("method", ["qlora", "adapter", "hybrid"])
def test_the_base_stays_bit_identical_and_trials_repeat_exactly(
    base: FrozenBase, method: str, quantization: Quantization
) -> None:
    values = configuration(method, quantization, learning_rate=1e-2)

    def trial() -> tuple[list[float], torch.Tensor]:
        model = build_model(base, domain(), method, values, seed=3)
        # As a session does it: training under autocast, the last evaluation without.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = train(model, "encoder", steps=4, learning_rate=1e-2)
            logits(model, "encoder")
        return losses, logits(model, "encoder")

    base.template(domain(), quantization)
    before = base.fingerprint()
    assert any("scale" in name for name in before)
    first = trial()
    assert base.fingerprint() == before
    second = trial()
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_the_fingerprint_notices_a_changed_scale(base: FrozenBase) -> None:
    model = base.trial_model(domain(), seed=0, copy_weights=False, quantization="int8")
    before = base.fingerprint()
    layer = next(iter(quantised.quantised_layers(model).values()))
    layer.state.SCB[0] += 1e-3
    changed = {name for name, value in base.fingerprint().items() if value != before[name]}
    layer.state.SCB[0] -= 1e-3
    assert len(changed) == 1
    assert "scale" in changed.pop()


@every_quantization
def test_training_goes_on_after_an_evaluation(base: FrozenBase, quantization: Quantization) -> None:
    # bitsandbytes repacks the weights in the first evaluation on some CPUs, and no gradient came through any more.
    model = build_model(base, domain(), "qlora", configuration("qlora", quantization), seed=0)
    logits(model, "encoder")
    model.train()
    model(**batch("encoder")).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    # B starts at zero, so the first gradients that have to pass the base's weights are those of B in the first layer.
    first = next(p.grad for name, p in model.named_parameters() if "layer.0" in name and "lora_B" in name)
    assert first is not None
    assert first.any()


# --- every architecture ----------------------------------------------------------------------------------------------


@every_quantization
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("qlora", {}),
        ("qlora", {"variant": "dora"}),
        ("adapter", {"placement": "houlsby"}),
        ("adapter", {"placement": "parallel"}),
        ("hybrid", {"targets": "all-linear"}),
    ],
)
def test_learns_and_survives_its_export(
    method: str, values: dict[str, Any], kind: str, quantization: Quantization, bases: dict[str, Path], tmp_path: Path
) -> None:
    model, context = load(bases[kind], kind, quantization)
    start = logits(model, kind)
    attached = METHODS[method].attach(model, configuration(method, quantization, **values), context)
    torch.testing.assert_close(logits(attached, kind), start)
    losses = train(attached, kind, steps=8, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    trained = logits(attached, kind)
    assert not torch.equal(trained, start)
    attached.save_pretrained(tmp_path)

    again, _ = load(bases[kind], kind, quantization)
    loaded = PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(logits(loaded, kind), trained)


FRESH = """
import json, sys, torch, peftsearch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapters, ids, compute = json.loads(sys.argv[1])
options = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=getattr(torch, compute),
)
for adapter in adapters:
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=options, device_map="cpu")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # The kernel behind it takes no layers narrower than 64, as those of the tiny model are.
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        print(json.dumps(model(torch.tensor(ids)).logits.tolist()))
"""


def test_a_fresh_process_gets_the_same_from_adapters_over_nf4(bases: dict[str, Path], tmp_path: Path) -> None:
    expected = []
    methods = {"adapter": {"placement": "parallel"}, "hybrid": {"targets": "all-linear"}}
    for method, values in methods.items():
        model, context = load(bases["decoder"], "decoder", "nf4")
        attached = METHODS[method].attach(model, configuration(method, "nf4", **values), context)
        train(attached, "decoder", steps=3, learning_rate=1e-2)
        expected.append(logits(attached, "decoder"))
        attached.save_pretrained(tmp_path / method)

    ids = batch("decoder")["input_ids"].tolist()
    compute = str(quantised.quantization_config("nf4", torch.device("cpu"), ()).bnb_4bit_compute_dtype)
    handed = json.dumps(
        [str(bases["decoder"]), [str(tmp_path / method) for method in methods], ids, compute.removeprefix("torch.")]
    )
    done = subprocess.run([sys.executable, "-c", FRESH, handed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [torch.tensor(json.loads(line)) for line in done.stdout.splitlines()[-2:]]
    assert [torch.equal(ours, theirs) for ours, theirs in zip(expected, found, strict=True)] == [True, True]


# --- what cannot work ------------------------------------------------------------------------------------------------


def test_a_machine_that_cannot_hold_the_base_says_so(base: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Full)
    with pytest.raises(ValueError, match=r"needs 0\.0 GB as nf4, and cpu has 0\.0 GB free: take a smaller model"):
        base.template(domain(("one", "two", "three", "four")), "nf4")


def test_a_base_that_is_stored_quantised_is_refused(tmp_path: Path) -> None:
    options = BitsAndBytesConfig(load_in_4bit=True)
    source = tiny_decoder(tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(source, quantization_config=options, device_map="cpu").save_pretrained(
        tmp_path / "stored"
    )
    base = FrozenBase(str(tmp_path / "stored"))
    for quantization in (None, "nf4"):
        with pytest.raises(ValueError, match=r"is stored quantised already \(bitsandbytes\): name the model"):
            base.template(domain(), quantization)
    with pytest.raises(StudyError, match="is stored quantised already"):
        meta_model(str(tmp_path / "stored"), None, domain().task, domain().head, ("a", "b"))
