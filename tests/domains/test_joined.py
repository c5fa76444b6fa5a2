"""Several data sets in one domain, learned by one adapter and scored one by one too; and few-shot curves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from domain_files import rows, write_json_lines

from peftsearch.domains import expected_domain, load_domain, prepare_domain
from peftsearch.spec import StudyError, StudyFile
from peftsearch.training.evaluate import evaluate

Make = Callable[..., StudyFile]


def two_parts(folder: Path, **second: Any) -> dict[str, Any]:
    write_json_lines(folder / "a.jsonl", rows(20))
    records = [{"sentence": f"patient {n}", "kind": f"c{n % 3}", "doc": n // 4} for n in range(24)]
    write_json_lines(folder / "b.jsonl", records)
    return {
        "join": {
            "legal": {"source": "a.jsonl"},
            "clinical": {
                "source": "b.jsonl",
                "columns": {"text": "sentence", "label": "kind"},
                "split": {"group": "doc"},
                **second,
            },
        }
    }


def test_parts_are_read_with_their_own_columns_and_cut_by_their_own_groups(tmp_path: Path, study: Make) -> None:
    file = study(two_parts(tmp_path))
    raw = load_domain("d", file.spec, file.folder)
    assert raw.parts == ("legal", "clinical")
    assert raw.labels == ("c0", "c1", "c2"), "the labels of all parts"
    sizes = {split: table.num_rows for split, table in raw.splits.items()}
    assert sum(sizes.values()) == 44
    for table in raw.splits.values():
        assert set(table.column("part").to_pylist()) == {"legal", "clinical"}
    assert raw.source == "legal: a.jsonl; clinical: b.jsonl"


def test_a_part_has_limits_of_its_own(tmp_path: Path, study: Make) -> None:
    file = study(two_parts(tmp_path, limit=5))
    train = load_domain("d", file.spec, file.folder).splits["train"].column("part").to_pylist()
    assert train.count("clinical") == 5
    assert train.count("legal") > 5


def test_a_plan_without_the_data_limits_parts_and_whole(tmp_path: Path, study: Make) -> None:
    """As reading the data does: first each part by its own limit, then all of them by theirs."""
    for part in ("a", "b"):
        write_json_lines(tmp_path / f"{part}.jsonl", rows(40))
    expected = {"train": 40, "labels": 2}
    data = {
        "join": {
            "a": {"source": "a.jsonl", "expected": expected, "limit": 20},
            "b": {"source": "b.jsonl", "expected": expected},
        },
        "limit": {"train": 30, "test": 5},
    }
    file = study(data)
    planned = expected_domain("d", file.spec, "encoder", "m")
    assert planned.rows == {"train": 30, "validation": 12, "test": 5}
    read = load_domain("d", file.spec, file.folder).splits
    assert {split: table.num_rows for split, table in read.items()} == planned.rows
    del data["limit"]
    assert expected_domain("d", study(data).spec, "encoder", "m").rows["train"] == 48


def test_each_part_is_scored_by_itself(tmp_path: Path, study: Make, tokenizer: str) -> None:
    file = study(two_parts(tmp_path))
    prepared = prepare_domain(
        "d", file.spec, folder=file.folder, model_location=tokenizer, revision=None, cache=tmp_path / "cache"
    )

    class Fixed(torch.nn.Module):
        """Answers the second label, always."""

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(logits=torch.tensor([[0.0, 1.0, 0.0]]).expand(len(input_ids), 3))

    found = evaluate(Fixed(), prepared, "validation", 4)
    split = prepared.split("validation")
    for number, part in enumerate(prepared.parts):
        own = [label for label, of in zip(split["labels"], split["part"], strict=True) if of == number]
        assert found.scores[f"{part}/accuracy"] == pytest.approx(own.count(1) / len(own))
    assert found.scores["accuracy"] == pytest.approx(split["labels"][:].count(1) / len(split))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"join": {"a": {"source": "a.jsonl"}}}, "domains.d.data: 'join' needs at least two parts"),
        ({"source": "x", "join": {"a": {"source": "x"}, "b": {"source": "y"}}}, "'join' names the data of each part"),
        (
            {"join": {"a": {"source": "a.jsonl"}, "b": {"source": "gone.jsonl"}}},
            "domains.d.data.join.b.source: no file or folder 'gone.jsonl'",
        ),
        (
            {"join": {"a": {"source": "a.jsonl"}, "b": {"source": "a.jsonl", "columns": {"label": "lable"}}}},
            "domains.d.data.join.b.columns.label: a.jsonl has no column 'lable'",
        ),
        (
            {"join": {"a": {"source": "a.jsonl"}, "b": {"train": "a.jsonl", "split": {"test": 0}}}},
            "domains.d.data.join: a part of the joined data has no test split while another has one",
        ),
    ],
)
def test_bad_joins(tmp_path: Path, study: Make, data: dict[str, Any], sentence: str) -> None:
    write_json_lines(tmp_path / "a.jsonl", rows(20))
    assert sentence in complaint(study, data)


def complaint(study: Make, data: dict[str, Any]) -> str:
    """What is said about such data, by the study file or by the reader."""
    try:
        file = study(data)
    except StudyError as error:
        return str(error)
    with pytest.raises(StudyError) as caught:
        load_domain("d", file.spec, file.folder)
    return file.explain(caught.value)


def test_a_few_shot_curve_is_a_domain_for_each_size_of_the_same_data(tmp_path: Path, study: Make) -> None:
    write_json_lines(tmp_path / "a.jsonl", rows(60))
    file = study({"source": "a.jsonl", "limit": {"train": [4, 8, 16]}})
    assert list(file.spec.domains) == ["d-4", "d-8", "d-16"]
    loaded = {name: load_domain(name, file.spec, file.folder) for name in file.spec.domains}
    texts = {name: set(raw.splits["train"].column("text").to_pylist()) for name, raw in loaded.items()}
    assert [len(found) for found in texts.values()] == [4, 8, 16]
    assert texts["d-4"] < texts["d-8"] < texts["d-16"], "more examples are added to fewer"
    tests = {tuple(raw.splits["test"].column("text").to_pylist()) for raw in loaded.values()}
    assert len(tests) == 1
