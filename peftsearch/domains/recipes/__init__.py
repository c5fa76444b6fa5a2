"""Recipes: labelled texts from the files of installed packages, for studies that need no network.

Each returns a table with the string columns `text`, `label` and `group`; rows of one group resemble one another and
belong in the same split.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from peftsearch.domains.recipes import icd10cm, spdx
from peftsearch.domains.recipes.icd10cm import icd10cm_chapters
from peftsearch.domains.recipes.spdx import spdx_licence_families

RECIPES: dict[str, Callable[[], pa.Table]] = {
    "icd10cm_chapters": icd10cm_chapters,
    "spdx_licence_families": spdx_licence_families,
}

# The package each recipe reads; all are in the extra `quickstart`.
PACKAGES: dict[str, str] = {
    "icd10cm_chapters": icd10cm.PACKAGE,
    "spdx_licence_families": spdx.PACKAGE,
}

__all__ = ["PACKAGES", "RECIPES", "icd10cm_chapters", "spdx_licence_families"]
