"""Clinical texts: which chapter of ICD-10-CM does a diagnosis belong to?

Source: the tabular list of ICD-10-CM (a work of the US government, in the public domain) in the package
simple-icd-10-cm, whose code is not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa

from peftsearch.domains.recipes._package import package_folder
from peftsearch.spec.errors import StudyError

PACKAGE = "simple-icd-10-cm"

# A chapter needs categories for training, validation and test; "Codes for special purposes" has two of them.
MIN_CATEGORIES = 10

# Injuries are 13,000 of 47,000 codes because every fracture is spelt out per bone, side and kind. Beyond some
# two dozen texts a category repeats itself; the cap takes injuries from 28% of the rows to 15%.
MAX_TEXTS_PER_CATEGORY = 24

# The side of the body says nothing about the chapter: "... of right knee" and "... of left knee" count as one text.
_SIDE = re.compile(r"\b(right|left|bilateral|unspecified)\b")
_CODE_RANGE = re.compile(r"\s*\([A-Z]\w*-[A-Z]\w*\)$")
# What a chapter's name says beyond its subject: "Certain ...", "... and certain disorders involving ...".
_CHAPTER_LEAD = re.compile(r"^(Certain|Diseases of the) ")
_CHAPTER_TAIL = re.compile(r"( and certain |, not elsewhere classified).*$")


def icd10cm_chapters() -> pa.Table:
    """Descriptions and inclusion terms of ICD-10-CM codes, labelled with their chapter.

    Returns:
        A table with the string columns `text`, `label` (21 chapters, "Neoplasms") and `group` (the three-character
        category, "C50": the codes below it are variations of one description, so splits should be cut by group), in
        the order of the tabular list. The classes are imbalanced, as the classification is.

    Raises:
        StudyError: the package is not installed, or no longer contains the tabular list.
    """
    chapters_of: dict[str, set[str]] = {}
    categories_of: dict[str, set[str]] = {}
    first: dict[str, tuple[str, str, str]] = {}
    for text, chapter, category in _texts(_tabular_list()):
        key = " ".join(re.findall(r"\w+", _SIDE.sub(" ", text.lower())))
        chapters_of.setdefault(key, set()).add(chapter)
        categories_of.setdefault(chapter, set()).add(category)
        first.setdefault(key, (text, chapter, category))

    # A text of several chapters ("Viral pericarditis": infections, circulatory system) has no single right answer
    # and goes; one repeated within its chapter stays once, at its first code, so that no two groups share it.
    by_category: dict[str, list[tuple[str, str, str]]] = {}
    for key, row in first.items():
        if key and len(chapters_of[key]) == 1 and len(categories_of[row[1]]) >= MIN_CATEGORIES:
            by_category.setdefault(row[2], []).append(row)
    rows = [row for texts in by_category.values() for row in _spread(texts, MAX_TEXTS_PER_CATEGORY)]
    texts, labels, groups = zip(*rows, strict=True)
    return pa.table({"text": list(texts), "label": list(labels), "group": list(groups)})


def _tabular_list() -> Path:
    folder = package_folder("simple_icd_10_cm", "icd10cm_chapters", PACKAGE) / "data"
    # The file's name carries the release ("icd10c-tabular-April-1-2026.xml"), which a patch of the package may move.
    found = sorted(folder.glob("*tabular*.xml"))
    if not found:
        raise StudyError(
            f"recipe icd10cm_chapters finds no tabular list (*tabular*.xml) in {folder}: install {PACKAGE}==1.5.0"
        )
    return found[-1]


def _texts(path: Path) -> Iterator[tuple[str, str, str]]:
    """Every (text, chapter, category), in the order of the tabular list."""
    for chapter in ElementTree.parse(path).getroot().iter("chapter"):
        name = _chapter_name(chapter.findtext("desc", ""))
        for category in chapter.iterfind("section/diag"):
            code = category.findtext("name", "")
            for diagnosis in category.iter("diag"):
                for text in (diagnosis.find("desc"), *diagnosis.iterfind("inclusionTerm/note")):
                    if text is not None and text.text:
                        yield " ".join(text.text.split()), name, code


def _chapter_name(description: str) -> str:
    """ "Diseases of the nervous system (G00-G99)" becomes "Nervous system"."""
    name = _CODE_RANGE.sub("", " ".join(description.split()))
    name = _CHAPTER_TAIL.sub("", _CHAPTER_LEAD.sub("", name))
    return name[:1].upper() + name[1:]


def _spread(rows: list[tuple[str, str, str]], limit: int) -> list[tuple[str, str, str]]:
    """At most `limit` rows, evenly spaced: a category's first codes would all be about the same site."""
    if len(rows) <= limit:
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]
