"""Which changes of a study file extend its study, which are refused, and which cells stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from peftsearch.spec import StudyError, StudySpec
from peftsearch.spec.changes import compare, unchanged_cells

FILE: dict[str, Any] = {
    "name": "s",
    "models": ["m", "n"],
    "domains": {"legal": {"data": {"source": "a.csv"}}, "clinical": {"data": {"source": "b.csv"}}},
    "methods": {"lora": {"rank": [2, 4]}, "full": {}},
    "search": {"trials": 4},
    "confirm": {"seeds": 2},
}

Edit = Callable[[dict[str, Any]], None]


def dump(edit: Edit = lambda file: None) -> dict[str, Any]:
    file = copy.deepcopy(FILE)
    edit(file)
    return StudySpec.model_validate(file).model_dump(mode="json")


def put(place: str, value: Any) -> Edit:
    def edit(file: dict[str, Any]) -> None:
        *sections, key = place.split(".")
        for section in sections:
            file = file.setdefault(section, {})
        file[key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "extending"),
    [
        (put("name", "other"), ()),
        (put("description", "what for"), ()),
        (put("resources.slots", 3), ()),
        (put("tracking.mlflow", "off"), ()),
        (put("confirm.prompted_examples", 20), ()),
        # The same batches, in less memory.
        (put("training.evaluation_batch_size", 8), ()),
        (put("training.gradient_accumulation", 4), ()),
        (put("training.gradient_checkpointing", True), ()),
        (put("methods.full.training", {"gradient_accumulation": 2, "gradient_checkpointing": True}), ()),
        (put("search.trials", 5), ("trials per cell: 5 instead of 4",)),
        (put("confirm.seeds", 3), ("seeds to confirm with: 3 instead of 2",)),
        (put("confirm.finalists", "all"), ("finalists: all instead of both",)),
        (put("domains.news", {"data": {"source": "c.csv"}}), ("the domain news",)),
        (put("methods.ia3", {}), ("the method ia3",)),
        (put("models", ["n", "o", "m"]), ("the model o",)),
        # What stands there as a default was there before.
        (put("training.epochs", 3), ()),
    ],
)
def test_more_of_the_same_and_other_ways_to_run_it_are_safe(edit: Edit, extending: tuple[str, ...]) -> None:
    changes = compare(dump(), dump(edit))
    changes.check("s")
    assert changes.extending == extending


@pytest.mark.parametrize(
    ("edit", "lines"),
    [
        (put("training.epochs", 5), ["- training.epochs: 3.0", "+ training.epochs: 5.0"]),
        (put("methods.lora.rank", [2, 8]), ["- methods.lora.rank: [2, 4]", "+ methods.lora.rank: [2, 8]"]),
        (put("methods.full.training", {"epochs": 1}), ["- methods.full.training.epochs: null"]),
        (put("domains.legal.data.source", "x.csv"), ["- domains.legal.data.source: ", "+ domains.legal.data.source: "]),
        (put("search.seed", 1), ["- search.seed: 0", "+ search.seed: 1"]),
        (put("search.sampler", "random"), ["- search.sampler: ", "+ search.sampler: "]),
        (put("models", ["m"]), ["- models.n."]),
        (put("methods", {"lora": {"rank": [2, 4]}}), ["- methods.full"]),
        (put("tracking.ledger", "sqlite:///x.db"), ["- tracking.ledger: ", "+ tracking.ledger: "]),
        (
            put("search.trials", 3),
            ["- search.trials: 4", "+ search.trials: 3", "search.trials can grow but not shrink"],
        ),
        (put("confirm.seeds", 0), ["confirm.seeds can grow but not shrink"]),
        (put("confirm.finalists", "front"), ["- confirm.finalists: "]),
        (put("domains.legal.options", {"names": {"a": "b"}}), ["+ domains.legal.options.names.a: "]),
    ],
)
def test_another_question_is_refused_with_a_diff(edit: Edit, lines: list[str]) -> None:
    with pytest.raises(StudyError, match=r"^the study 's' was begun with other settings") as caught:
        compare(dump(), dump(edit)).check("s")
    for line in lines:
        assert line in caught.value.message
    assert caught.value.message.splitlines()[-1].startswith("Put them back, or start a new study with --name NEW; ")
    assert "--name NEW --fork s" in caught.value.message


def test_all_changes_are_shown_together() -> None:
    def edit(file: dict[str, Any]) -> None:
        put("training.epochs", 5)(file)
        put("search.trials", 1)(file)
        put("methods.ia3", {})(file)

    changes = compare(dump(), dump(edit))
    with pytest.raises(StudyError) as caught:
        changes.check("s")
    shown = [line for line in caught.value.message.splitlines() if line.startswith("  ")]
    assert shown == [
        "  - training.epochs: 3.0",
        "  + training.epochs: 5.0",
        "  - search.trials: 4",
        "  + search.trials: 1",
    ]
    assert changes.extending == ("the method ia3",)


@pytest.mark.parametrize(
    ("edit", "left"),
    [
        (put("methods.lora.rank", [2, 8]), {(m, d, "full") for m in "mn" for d in ("legal", "clinical")}),
        (
            put("domains.legal.metric", "macro_f1"),
            {(m, "clinical", method) for m in "mn" for method in ("lora", "full")},
        ),
        (put("models", ["m"]), {("m", d, method) for d in ("legal", "clinical") for method in ("lora", "full")}),
        (put("training.epochs", 5), set()),
        (put("search.scheduler", "none"), set()),
        (put("search.seed", 5), set()),
    ],
)
def test_a_cell_is_the_same_where_nothing_that_shapes_its_trials_has_changed(edit: Edit, left: set[Any]) -> None:
    assert unchanged_cells(dump(), dump(edit)) == left


@pytest.mark.parametrize(
    "edit",
    [
        put("search.trials", 1),
        put("confirm.seeds", 0),
        put("confirm.finalists", "front"),
        put("resources.slots", 2),
        put("methods.ia3", {}),
        # Read by prompts alone.
        put("domains.legal.options", {"names": {"a": "b"}}),
    ],
)
def test_a_cell_does_not_change_with_what_is_beside_it(edit: Edit) -> None:
    everything = {(m, d, method) for m in "mn" for d in ("legal", "clinical") for method in ("lora", "full")}
    assert unchanged_cells(dump(), dump(edit)) == everything
