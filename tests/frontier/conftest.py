"""The made-up study, once for all tests."""

from __future__ import annotations

import pytest
from frontier_study import make_facts, make_study

from peftsearch.spec import StudyFacts, TrialRecord


@pytest.fixture(scope="session")
def facts() -> StudyFacts:
    return make_facts()


@pytest.fixture(scope="session")
def records() -> list[TrialRecord]:
    return make_study()
