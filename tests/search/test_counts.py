"""Parameters are counted before training; domains whose heads differ in size share what is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import SAMPLES

from peftsearch.domains import ExpectedDomain, expected_domain
from peftsearch.methods import METHODS, method_space
from peftsearch.search.counts import ParameterCounter
from peftsearch.search.unchecked import planned_place
from peftsearch.spec import StudySpec
from peftsearch.training.segment import ModelPlace

CONFIGS: dict[str, dict[str, Any]] = {
    "encoder": {
        "model_type": "bert",
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "encoder-decoder": {
        "model_type": "t5",
        "vocab_size": 50,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    },
    "decoder": {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    },
}


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_heads_of_other_sizes_are_counted_exactly(tmp_path: Path, architecture: Any, method: str) -> None:
    if method == "bitfit" and architecture != "encoder":
        pytest.skip("T5 and Llama have no biases")
    place = planned_place(CONFIGS[architecture], tmp_path, ())
    spec = StudySpec.model_validate(
        {
            "name": "heads",
            "model": "tiny",
            "methods": {method: {}},
            "domains": {
                name: {"data": {"source": "no.csv", "expected": {"train": 10, "labels": labels}}}
                for name, labels in (("two", 2), ("seven", 7))
            },
        }
    )
    domains = {name: expected_domain(name, spec, architecture, "tiny") for name in spec.domains}
    together = _count(place, domains, method)
    for name, domain in domains.items():
        assert _count(place, {name: domain}, method)[name] == together[name]
    assert together["seven"].trainable > together["two"].trainable


def _count(place: ModelPlace, domains: dict[str, ExpectedDomain], method: str) -> dict[str, Any]:
    counter = ParameterCounter({"tiny": place}, domains)
    space = method_space(method, {})
    return {name: counter.count("tiny", name, space, SAMPLES[method]) for name in domains}
