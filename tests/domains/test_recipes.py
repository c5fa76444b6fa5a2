"""The data recipes, on the real packages."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import pyarrow as pa
import pytest

from peftsearch.domains.recipes import PACKAGES, RECIPES
from peftsearch.domains.recipes.icd10cm import MAX_TEXTS_PER_CATEGORY
from peftsearch.domains.recipes.spdx import FAMILIES, licence_family, licence_group
from peftsearch.spec.errors import StudyError


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="module", params=sorted(RECIPES))
def table(request: pytest.FixtureRequest) -> pa.Table:
    return _table(request.param)


def _table(recipe: str) -> pa.Table:
    if not _installed(PACKAGES[recipe]):
        pytest.skip(f"the package {PACKAGES[recipe]} is not installed")
    return RECIPES[recipe]()


def test_every_recipe_names_its_package() -> None:
    assert PACKAGES.keys() == RECIPES.keys()


def test_columns_are_strings_without_nulls_or_blanks(table: pa.Table) -> None:
    assert table.schema.names == ["text", "label", "group"]
    for column in table.itercolumns():
        assert column.type == pa.string()
        assert column.null_count == 0
        assert all(value and value == " ".join(value.split()) for value in column.to_pylist())


def test_no_text_occurs_twice(table: pa.Table) -> None:
    texts = [text.casefold() for text in table["text"].to_pylist()]
    assert len(set(texts)) == len(texts)


def test_a_group_has_one_label(table: pa.Table) -> None:
    labels = defaultdict(set)
    for row in table.to_pylist():
        labels[row["group"]].add(row["label"])
    assert all(len(of_group) == 1 for of_group in labels.values())


def test_every_label_has_groups_for_three_splits(table: pa.Table) -> None:
    groups = defaultdict(set)
    for row in table.to_pylist():
        groups[row["label"]].add(row["group"])
    assert min(map(len, groups.values())) >= 6


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_rows_and_their_order_are_the_same_every_time(recipe: str) -> None:
    assert _table(recipe).equals(_table(recipe))


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_missing_package_is_named(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(name: str, *_: Any) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
    build: Callable[[], pa.Table] = RECIPES[recipe]
    with pytest.raises(StudyError) as raised:
        build()
    assert str(raised.value) == (
        f"recipe {recipe} needs the package {PACKAGES[recipe]}: pip install 'peftsearch[quickstart]'"
    )


def test_icd10cm_labels_are_the_chapters_and_groups_their_categories() -> None:
    table = _table("icd10cm_chapters")
    rows = {row["text"]: (row["label"], row["group"]) for row in table.to_pylist()}
    assert rows["Classical cholera"] == ("Infectious and parasitic diseases", "A00")
    assert rows["Crohn's disease, unspecified"] == ("Digestive system", "K50")
    labels = set(table["label"].to_pylist())
    assert len(labels) == 21
    assert {"Neoplasms", "Nervous system", "Injury, poisoning"} <= labels
    # A right answer must exist: this one is in the chapters of infections and of the circulatory system.
    assert "Viral pericarditis" not in rows


def test_icd10cm_categories_are_capped() -> None:
    counts = _table("icd10cm_chapters")["group"].value_counts().to_pylist()
    assert {len(count["values"]) for count in counts} == {3}
    assert max(count["counts"] for count in counts) == MAX_TEXTS_PER_CATEGORY


def test_spdx_labels_are_the_families_and_editions_share_a_group() -> None:
    table = _table("spdx_licence_families")
    assert set(table["label"].to_pylist()) == set(FAMILIES)
    groups = set(table["group"].to_pylist())
    assert {"GPL-2.0", "GPL-3.0", "CC-3.0", "CC0-1.0", "MPL-2.0"} <= groups
    assert not [group for group in groups if group.endswith(("+", "-only", "-or-later", "-invariants"))]


@pytest.mark.parametrize(
    ("identifier", "family", "group"),
    [
        ("GPL-2.0-with-classpath-exception", "GNU", "GPL-2.0"),
        ("LGPL-2.1+", "GNU", "LGPL-2.1"),
        ("GFDL-1.3-no-invariants-or-later", "GNU", "GFDL-1.3"),
        ("CC-BY-NC-SA-2.0-DE", "Creative Commons", "CC-2.0"),
        ("CC0-1.0", "Creative Commons", "CC0-1.0"),
        ("MPL-2.0-no-copyleft-exception", "Mozilla", "MPL-2.0"),
        ("BSD-3-Clause-Clear", "BSD", "BSD-3-Clause-Clear"),
        ("CAL-1.0-Combined-Work-Exception", "Source available", "CAL-1.0"),
        ("OGL-UK-3.0", "Government", "OGL-UK-3.0"),
        ("MITNFA", None, "MITNFA"),
        ("CERN-OHL-W-2.0", "Open hardware", "CERN-OHL-W-2.0"),
    ],
)
def test_licence_family_and_group_of_an_identifier(identifier: str, family: str | None, group: str) -> None:
    assert licence_family(identifier) == family
    assert licence_group(identifier) == group
