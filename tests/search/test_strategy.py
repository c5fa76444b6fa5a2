"""What FSDP2 cannot train is refused with its place and the way out, before anything is read or started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftsearch.search.cells import study_cells
from peftsearch.search.estimate import ModelShape, frozen_bytes, trial_bytes
from peftsearch.search.strategy import check_strategy
from peftsearch.spec import StudyError, StudyFile


def check(write_study: Callable[..., Path], workers: int = 2, **sections: Any) -> None:
    resources = {"workers_per_trial": workers, "strategy": "fsdp"}
    spec = StudyFile.load(write_study(resources=resources, **sections)).spec
    check_strategy(spec, study_cells(spec))


def test_one_worker_has_nobody_to_share_with(write_study: Callable[..., Path]) -> None:
    with pytest.raises(StudyError, match="workers_per_trial: 2 or more"):
        check(write_study, workers=1)


def test_int8_is_refused_and_nf4_is_not(write_study: Callable[..., Path]) -> None:
    check(write_study, methods={"qlora": {"quantization": "nf4"}, "lora": {}})
    with pytest.raises(StudyError, match="int8 base cannot be divided") as refused:
        check(write_study, methods={"lora": {}, "qlora": {"quantization": ["nf4", "int8"]}})
    assert refused.value.loc == ("methods", "qlora", "quantization")


def test_eight_bit_moments_are_refused_for_what_is_divided_only(write_study: Callable[..., Path]) -> None:
    training = {"optimizer": "adamw_8bit", "epochs": 1, "evaluations": 1, "max_length": 16}
    check(write_study, methods={"lora": {}}, training=training)
    check(write_study, methods={"lora": {}, "full": {"training": {"optimizer": "adamw"}}}, training=training)
    with pytest.raises(StudyError, match="write optimizer: adamw for that method"):
        check(write_study, methods={"lora": {}, "full": {}}, training=training)


def test_memory_of_a_base_in_parts() -> None:
    """Of 32 layers with 1 GB each and 2 GB of embeddings, one of eight workers holds 2 + 32 / 8 + 2 layers."""
    shape = ModelShape(parameters=17 * 10**9, embeddings=10**9, layers=32, hidden=4096, weight_bytes=2)
    assert frozen_bytes(shape, None) == 34 * 10**9
    assert frozen_bytes(shape, None, parts=8) == 8 * 10**9
    assert trial_bytes(shape, 8 * 10**6, False, 0, parts=8) == trial_bytes(shape, 8 * 10**6, False, 0)
    assert trial_bytes(shape, shape.parameters, True, 0, parts=8) == trial_bytes(shape, shape.parameters, True, 0) // 8
