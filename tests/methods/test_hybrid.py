"""LoRA and bottleneck adapters in one adapter: computed, trained, switched, saved and loaded as one PEFT method."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import MODELS, batch, load, logits, train
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny_models import HIDDEN, LAYERS, SAMPLES
from torch import Tensor, nn

from peftsearch.methods import METHODS
from peftsearch.methods.bottleneck import HybridConfig, HybridLayer
from peftsearch.training.base_model import count_exported, count_trainable

PLACEMENTS = ("pfeiffer", "houlsby", "parallel")
every_kind = pytest.mark.parametrize("kind", MODELS)


def attach(bases: dict[str, Path], kind: str, **values: Any) -> PeftModel:
    model, context = load(bases[kind], kind)
    attached = METHODS["hybrid"].attach(model, {**SAMPLES["hybrid"], **values}, context)
    assert isinstance(attached, PeftModel)
    return attached


def configure(kind: str, **fields: Any) -> HybridConfig:
    modules = ["bert.pooler", "classifier"] if kind == "encoder" else None
    return HybridConfig(task_type=MODELS[kind][2], modules_to_save=modules, **{"r": 3, "bottleneck_size": 5, **fields})


def layers(model: nn.Module) -> dict[str, HybridLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, HybridLayer)}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- what it computes ------------------------------------------------------------------------------------------------


def test_a_layer_with_both_adds_the_update_first_and_then_adapts() -> None:
    config = HybridConfig(r=2, lora_alpha=6.0, bottleneck_size=3, init_weights=False)
    layer = HybridLayer(nn.Linear(4, 6), "default", config, lora=True, bottleneck=True)
    x = torch.randn(5, 4)
    a, b = layer.bottleneck_lora_A["default"].weight, layer.bottleneck_lora_B["default"].weight
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    y = layer.base_layer(x) + 6 / 2 * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), y + up(nn.functional.gelu(down(y))))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_trains_the_sum_of_its_parts(placement: str, bases: dict[str, Path]) -> None:
    attached = attach(bases, "decoder", placement=placement, rank=3, bottleneck=5)
    # Query is 32 x 32, value 32 x 16: two heads of keys and values for four of queries.
    lora = LAYERS * 3 * (HIDDEN + HIDDEN + HIDDEN + HIDDEN // 2)
    adapters = LAYERS * {"pfeiffer": 1, "houlsby": 2, "parallel": 1}[placement]
    expected = lora + adapters * (2 * HIDDEN * 5 + 5 + HIDDEN)
    assert count_trainable(attached) == count_exported(attached) == expected
    model, context = load(bases["decoder"], "decoder")
    with torch.device("meta"):
        values = {**SAMPLES["hybrid"], "placement": placement, "rank": 3, "bottleneck": 5}
        assert count_trainable(METHODS["hybrid"].attach(model.to("meta"), values, context)) == expected


def test_both_parts_may_sit_on_one_layer(bases: dict[str, Path]) -> None:
    attached = attach(bases, "decoder", targets="o_proj,down_proj", placement="houlsby")
    assert len(layers(attached)) == 2 * LAYERS
    for layer in layers(attached).values():
        assert {"default"} == set(layer.bottleneck_lora_A) == set(layer.bottleneck_down)
    losses = train(attached, "decoder", steps=5, learning_rate=1e-2)
    assert losses[-1] < losses[0]


# --- training and saving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@every_kind
def test_learns_leaves_the_base_alone_and_survives_its_export(
    kind: str, placement: str, targets: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, context = load(bases[kind], kind)
    before, start = snapshot(base), logits(base, kind)
    values = {**SAMPLES["hybrid"], "placement": placement, "targets": targets}
    attached = METHODS["hybrid"].attach(base, values, context)
    assert isinstance(attached, PeftModel)
    assert torch.equal(logits(attached, kind), start)

    attached.train()
    attached(**batch(kind)).loss.backward()
    # A trainable parameter without a gradient would stop DistributedDataParallel.
    assert [name for name, p in attached.named_parameters() if p.requires_grad and p.grad is None] == []
    attached.zero_grad()
    losses = train(attached, kind, steps=8, learning_rate=1e-2)
    assert losses[-1] < losses[0]

    expected = logits(attached, kind)
    with attached.disable_adapter():
        assert torch.equal(logits(attached, kind), start)
    attached.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as saved:
        assert sum(saved.get_tensor(name).numel() for name in saved.keys()) == count_exported(attached)  # noqa: SIM118
    loaded = PeftModel.from_pretrained(load(bases[kind], kind)[0], tmp_path)
    assert torch.equal(logits(loaded, kind), expected)

    unloaded = attached.unload()
    after = snapshot(unloaded)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not any(module._forward_pre_hooks for module in unloaded.modules())


FRESH = """
import json, sys, torch, peftsearch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))
"""


def test_a_fresh_process_loads_it(bases: dict[str, Path], tmp_path: Path) -> None:
    attached = attach(bases, "decoder", placement="parallel")
    train(attached, "decoder", steps=3)
    expected = logits(attached, "decoder")
    attached.save_pretrained(tmp_path)
    ids = json.dumps(batch("decoder")["input_ids"].tolist())
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path), ids], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected)


# --- switching -------------------------------------------------------------------------------------------------------


def test_adapters_with_different_parts_side_by_side(bases: dict[str, Path], tmp_path: Path) -> None:
    base, _ = load(bases["decoder"], "decoder")
    start = logits(base, "decoder")
    model = get_peft_model(base, configure("decoder", init_weights=False), adapter_name="first")
    first = logits(model, "decoder")
    other = configure(
        "decoder", init_weights=False, placement="parallel", lora_target_modules=["gate_proj", "down_proj"]
    )
    model.add_adapter("second", other)
    assert torch.equal(logits(model, "decoder"), first)
    model.set_adapter("second")
    second = logits(model, "decoder")
    assert not torch.allclose(second, first)
    assert not torch.allclose(second, start)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(load(bases["decoder"], "decoder")[0], tmp_path / "first", adapter_name="left")
    loaded.load_adapter(tmp_path / "second", adapter_name="right")
    assert torch.equal(logits(loaded, "decoder"), first)
    loaded.set_adapter("right")
    assert torch.equal(logits(loaded, "decoder"), second)
    with pytest.warns(UserWarning, match="right was active which is now deleted"):
        loaded.delete_adapter("right")
    assert loaded.active_adapters == ["left"]
    assert torch.equal(logits(loaded, "decoder"), first)
    assert not any(".right." in name for name in loaded.state_dict())
    assert torch.equal(logits(loaded.unload(), "decoder"), start)


def test_merging_is_refused(bases: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        attach(bases, "decoder").merge_and_unload()


def test_generates(bases: dict[str, Path]) -> None:
    attached = attach(bases, "encoder-decoder", placement="parallel")
    ids = batch("encoder-decoder")["input_ids"][:2]
    assert attached.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[0] == 2


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, not 0"),
        ({"r": 1.5}, r"r must be a whole number of at least 1, not 1\.5"),
        ({"lora_alpha": 0.0}, r"lora_alpha must be a positive number, not 0\.0"),
        ({"bottleneck_size": 0}, "bottleneck_size must be at least 1"),
    ],
)
def test_a_wrong_configuration_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridConfig(**fields)


def test_the_configuration_survives_its_file(tmp_path: Path) -> None:
    config = HybridConfig(
        task_type="SEQ_CLS", r=3, lora_alpha=9.0, lora_target_modules={"b", "a"}, placement="parallel"
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    fields = HybridConfig.__dataclass_fields__
    assert [name for name in HybridConfig.__annotations__ if not fields[name].metadata.get("help")] == []
