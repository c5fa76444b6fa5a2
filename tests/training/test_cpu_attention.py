"""Attention and dropout as the CPU computes them in training: torch's function, and its distribution."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_recompute import Kept
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftsearch.training import attention
from peftsearch.training.attention import attend, use_fast_attention
from peftsearch.training.dropout import Dropout, dropout, use_fast_dropout


def padding(batch: int, queries: int, keys: int) -> torch.Tensor:
    mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    mask[0, :, :, keys - 3 :] = False
    return mask


CASES: dict[str, dict[str, Any]] = {
    "no mask": {"is_causal": False},
    "padding": {"is_causal": False, "mask": padding(3, 9, 9)},
    "causal": {"is_causal": True},
    "causal, of the module": {},
    "causal and padding": {"is_causal": True, "mask": padding(3, 9, 9) & torch.ones(9, 9, dtype=torch.bool).tril()},
    "more keys than queries": {"is_causal": True, "keys": 12},
    "a prompt's keys": {"is_causal": False, "keys": 12, "mask": padding(3, 9, 12)},
    "a mask that is added": {"is_causal": False, "mask": torch.linspace(-3, 3, 81).reshape(1, 1, 9, 9)},
    "position bias": {"is_causal": False, "mask": padding(3, 9, 9), "bias": True},
    "position bias, causal": {"is_causal": True, "bias": True},
    "own scaling": {"is_causal": False, "scaling": 1.0},
    "grouped heads": {"is_causal": True, "groups": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_attention_of_transformers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"keys": 9, "groups": 1, "mask": None, "bias": False} | CASES[case]
    monkeypatch.setattr(attention, "_pays", lambda *_: True)
    torch.manual_seed(0)
    module: Any = SimpleNamespace(num_key_value_groups=given["groups"], is_causal=True)
    sizes = [(3, 4, 9, 8), *[(3, 4 // given["groups"], given["keys"], 8)] * 2]
    inputs = [torch.randn(size, requires_grad=True) for size in sizes]
    bias = torch.randn(1, 4, 9, given["keys"]) if given["bias"] else None
    options = {name: given[name] for name in ("is_causal", "scaling") if name in given}
    found = []
    for function in (attend, sdpa_attention_forward):
        output, _ = function(module, *inputs, given["mask"], position_bias=bias, **options)
        found.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_scored_outside_of_autocast_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_multiplies_tiles", lambda: False)
    query = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    pays = attention._pays
    assert pays(query, query, query, None, 0.0)
    assert not pays(query.float(), query.float(), query.float(), None, 0.0)
    assert pays(query.float(), query.float(), query.float(), None, 0.1)
    with torch.no_grad():
        assert not pays(query, query, query, None, 0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert pays(query, query, query, None, 0.0)
            # A step of generation, and scores that would take much memory.
            assert not pays(query[:, :, :1], query, query, None, 0.0)
            long = torch.empty(1, 1, 513, 8, dtype=torch.bfloat16)
            assert not pays(long, long, long, None, 0.0)


def test_models_find_it() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        use_fast_attention()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", before)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    values = torch.ones(1000, 1001, requires_grad=True)
    dropped = dropout(values, rate)
    assert (dropped == 0).float().mean().item() == pytest.approx(rate, abs=2e-3)
    assert dropped.mean().item() == pytest.approx(1.0, abs=1e-2)
    # The gradient passes where the value did, scaled as it was.
    (gradient,) = torch.autograd.grad(dropped.sum(), values)
    assert torch.equal(gradient, dropped.detach())
    # Neighbours, which share one draw of 64 bits, fall independently.
    kept = (dropped != 0).float().reshape(-1)[: 4 * 250_000].reshape(-1, 4)
    assert torch.corrcoef(kept.T).fill_diagonal_(0).abs().max() < 0.01


def dropped_by_a_mask(values: torch.Tensor, rate: float, seed: int) -> torch.Tensor:
    """The formula: one draw of 64 bits for four elements, a boolean mask, a scale."""
    threshold = round(rate * 2**16)
    bits = torch.empty(-(-values.numel() // 4), dtype=torch.int64)
    bits.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    keep = (bits.view(torch.int16)[: values.numel()] >= threshold - 2**15).view(values.shape)
    return torch.mul(values, keep).mul(2**16 / (2**16 - threshold))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (8, 48, 384), (1024, 1025)])
def test_dropout_is_the_same_to_the_bit_however_its_mask_is_kept(
    shape: tuple[int, ...], dtype: torch.dtype, recomputed: bool
) -> None:
    """Zeros keep the sign of what was dropped, as in a product with a boolean mask."""
    torch.manual_seed(0)
    values, gradient = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    mine, own = values.clone().requires_grad_(), values.clone().requires_grad_()
    expected = dropped_by_a_mask(own, 0.1, 7)

    def drops(tensor: torch.Tensor) -> torch.Tensor:
        return dropout(tensor, 0.1)

    torch.manual_seed(7)
    found = checkpoint(drops, mine, use_reentrant=False) if recomputed else drops(mine)
    # Nothing else is drawn, and recomputing restores what is.
    after = torch.rand(3)
    assert isinstance(found, torch.Tensor)
    found.backward(gradient)
    expected.backward(gradient)
    assert mine.grad is not None
    assert own.grad is not None
    assert (expected == 0).any()
    assert torch.equal(bits_of(found), bits_of(expected))
    assert torch.equal(bits_of(mine.grad), bits_of(own.grad))
    torch.manual_seed(7)
    torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize(("elements", "bytes_each"), [(2**20, 4), (2**20 + 4, 1)])
def test_masks_of_large_tensors_are_kept_in_a_byte(elements: int, bytes_each: int) -> None:
    with Kept() as kept:
        dropped = dropout(torch.ones(elements, requires_grad=True), 0.1)
    assert dropped.requires_grad
    assert kept.now == bytes_each * elements


def test_dropout_follows_the_seed_and_ends_with_training() -> None:
    values = torch.randn(5, 7)
    drawn = [dropout(values, 0.3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(dropout(values, 0.0), values)
    assert not dropout(values, 1.0).any()
    model = nn.Sequential(nn.Linear(7, 7), nn.Dropout(0.3))
    use_fast_dropout(model)
    assert type(model[1]) is Dropout
    assert not torch.equal(model(values), model[0](values))
    assert torch.equal(model.eval()(values), model[0](values))
