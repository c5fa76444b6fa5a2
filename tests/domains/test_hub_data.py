"""Which commit of a Hub data set was read is recorded; a pinned one is what is read, with and without a network.

The Hub is a server on loopback; what `datasets` downloads and keeps is real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_hub import SmallHub

ROWS = "".join(f"text {number},{'ab'[number % 2]}\n" for number in range(20))
CARD = "---\nlicense: mit\n---\n"
# The client's address and caches are settled when it is imported.
SCRIPT = """
import json, sys
from pathlib import Path
from peftsearch.domains import load_domain
from peftsearch.spec import StudyFile, StudyError, UnreachableError
for data in json.loads(sys.argv[1]):
    study = {"name": "s", "model": "m", "domains": {"d": {"data": data}}, "methods": {"lora": {}}}
    try:
        found = load_domain("d", StudyFile(study).spec, Path())
        answer = [found.source, sum(table.num_rows for table in found.splits.values())]
    except StudyError as error:
        answer = [type(error).__name__, error.message]
    print(json.dumps(answer))
"""

Load = Callable[..., list[list[Any]]]


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    hub = SmallHub()
    yield hub
    hub.close()


@pytest.fixture
def load(hub: SmallHub, tmp_path: Path) -> Load:
    """Reads domains in a fresh process; returns each one's source and rows, or its error."""

    def call(*data: dict[str, Any]) -> list[list[Any]]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(data)],
            env={**environment, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return call


def test_the_commit_is_recorded_and_a_pinned_one_is_read_without_a_network_too(hub: SmallHub, load: Load) -> None:
    first = hub.push("org/topics", {"README.md": CARD, "train.csv": "text,label\n" + ROWS}, "v1")
    second = hub.push("org/topics", {"README.md": CARD, "train.csv": "text,label\n" + ROWS + "more,a\n"})
    bare = hub.push("org/bare", {"train.csv": "text,label\n" + ROWS})
    topics = {"source": "hub:org/topics"}
    asked = [
        {**topics, "revision": "v1"},
        topics,
        {**topics, "revision": first},
        {"join": {"one": {"source": "hub:org/bare"}, "two": {**topics, "revision": "v1"}}},
    ]
    expected = [
        [f"hub:org/topics @ v1, commit {first}", 20],
        [f"hub:org/topics, commit {second}", 21],
        [f"hub:org/topics @ {first}", 20],
        [f"one: hub:org/bare, commit {bare}; two: hub:org/topics @ v1, commit {first}", 40],
    ]
    assert load(*asked) == expected

    hub.close()
    # What was loaded last is the second commit; `datasets` alone would take that for whatever is asked.
    assert load(topics) == [expected[1]]
    assert load(*asked[2:], *asked[:1]) == [*expected[2:], expected[0]]
    for unknown in ("v7", "0" * 40):
        ((kind, message),) = load({**topics, "revision": unknown})
        assert kind == "UnreachableError"
        assert "the Hub cannot be reached from here, and what this machine has downloaded of it is not known" in message
        assert repr(unknown) in message


def test_a_revision_that_there_is_not_is_wrong(hub: SmallHub, load: Load) -> None:
    hub.push("org/topics", {"train.csv": "text,label\n" + ROWS})
    assert load({"source": "hub:org/topics"})[0][1] == 20
    ((kind, message),) = load({"source": "hub:org/topics", "revision": "v7"})
    assert kind == "StudyError"
    assert "cannot load 'org/topics' from the Hub: Revision 'v7' doesn't exist" in message
