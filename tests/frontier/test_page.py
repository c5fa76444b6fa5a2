"""The Pareto page's file and its data: all of the ledger, nothing else, and commands that do what they say."""

from __future__ import annotations

import fnmatch
import json
import random
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from frontier_study import confirm_best, make_facts, make_record, make_study

from peftsearch.frontier import domain_fronts, front_html, hypervolume, pick
from peftsearch.frontier.history import hypervolume_history, seconds_spent
from peftsearch.frontier.page import page_data, policy
from peftsearch.frontier.page.data import batch_milliseconds
from peftsearch.frontier.page.document import script_json
from peftsearch.frontier.plots import method_colour
from peftsearch.spec import StudyError, StudyFacts, TrialRecord, TrialState

ROOT = Path(__file__).parents[2]


def embedded(page: str) -> dict[str, Any]:
    """The data inside a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_a_page_holds_every_trial_and_asks_nobody(facts: StudyFacts, records: list[TrialRecord]) -> None:
    page = front_html(records, facts, state="finished", planned=114)
    assert front_html(records, facts, state="finished", planned=114) == page
    assert not re.search(r"""(src|href)=["'](?!data:,|#)""", page)
    assert "connect-src" not in page
    assert "default-src 'none'" in page
    data = embedded(page)
    columns = data["trials"]
    assert sorted(columns["number"]) == [record.number for record in records]
    by_number = {record.number: record for record in records}
    for index, number in enumerate(columns["number"]):
        record = by_number[number]
        method = columns["method"][index]
        assert data["domains"][columns["domain"][index]]["name"] == record.domain
        assert data["methods"][method]["name"] == record.method
        assert columns["states"][columns["state"][index]] == record.state
        assert columns["value"][index] == record.value
        assert columns["trainable_parameters"][index] == record.trainable_parameters
        settings = zip(columns["names"][method], columns["hyperparameters"][index], strict=True)
        assert {name: value for name, value in settings if value is not None} == record.hyperparameters
        ladder, values, losses, _ = columns["rungs"][index]
        assert columns["ladders"][ladder][0] == [rung.step for rung in record.rungs]
        assert values == pytest.approx([rung.value for rung in record.rungs], rel=1e-5)
        assert losses == pytest.approx([rung.loss for rung in record.rungs], rel=1e-5)
    for found, front in zip(data["domains"], domain_fronts(records, facts).values(), strict=True):
        assert found["front"] == [record.number for record in front.front]
        assert found["hypervolume"] == front.hypervolume == found["history"][-1][1]
        assert found["picks"]["knee"] == pick(front.front, "knee")[0].number
        assert found["picks"]["smallest"] == front.front[0].number
    assert [method["colour"] for method in data["methods"]] == [method_colour(index) for index in range(4)]


def test_one_domain_and_an_unknown_one(facts: StudyFacts, records: list[TrialRecord]) -> None:
    data = embedded(front_html(records, facts, "legal"))
    assert [domain["name"] for domain in data["domains"]] == ["legal"]
    assert set(data["trials"]["number"]) == {record.number for record in records if record.domain == "legal"}
    with pytest.raises(StudyError, match="no domain"):
        front_html(records, facts, "medical")


def test_readers_without_scripts_get_the_fronts(facts: StudyFacts, records: list[TrialRecord]) -> None:
    page = front_html(records, facts)
    plain = page[page.index("<noscript>") : page.index("</noscript>")]
    for front in domain_fronts(records, facts).values():
        for record in front.front:
            assert f"<td>{record.trainable_parameters:,}</td>" in plain
    assert "No trial has reached the full budget yet." in front_html([], facts)


def test_the_policy_names_our_script_and_nothing_else(facts: StudyFacts) -> None:
    import base64
    import hashlib

    page = front_html([], facts)
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy()
    assert "unsafe" not in policy(live=True)
    assert "connect-src 'self'" in policy(live=True)


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "\u2028", "\ud83d", "🩺", "&lt;", "'\"\\", "\0"])
def test_data_cannot_leave_its_element(text: str) -> None:
    written = script_json({text: [text]})
    assert not set("<>&\u2028\0") & set(written)
    assert written.isascii()
    assert json.loads(written) == {text: [text]}


def test_each_export_command_exports_its_trial(facts: StudyFacts) -> None:
    records = make_study(60)
    fronts = domain_fronts(records, facts)
    seen = set()
    for name, found in zip(fronts, page_data(records, facts, storage="/data/my studies")["domains"], strict=True):
        for record in fronts[name].front:
            words = shlex.split(found["commands"][str(record.number)])
            assert words[:5] == ["peftsearch", "export", "example", "--to", "adapters"]
            options = dict(zip(words[5::2], words[6::2], strict=True))
            assert options["--domain"] == name
            assert options["--storage"] == "/data/my studies"
            limits = {
                "max_parameters": int(options["--max-parameters"]) if "--max-parameters" in options else None,
                "min_metric": float(options["--min-metric"]) if "--min-metric" in options else None,
            }
            assert pick(fronts[name].front, options.get("--pick", "frontier"), **limits) == [record]
            seen |= set(options)
            # What has a name is called by it.
            if record in (fronts[name].front[0], fronts[name].front[-1]):
                assert "--pick" in options
    assert seen == {"--domain", "--storage", "--pick", "--max-parameters", "--min-metric"}


@pytest.mark.parametrize("values", [(31.75, 12.0004, 12.0001, 11.5), (3e300, 2.5e300, 1.5e25, 1.25e9, 123456789.5)])
def test_export_commands_where_less_is_better(values: tuple[float, ...], facts: StudyFacts) -> None:
    clinical = facts.domains["clinical"].model_copy(update={"metric": "perplexity", "direction": "minimize"})
    facts = facts.model_copy(update={"domains": {"clinical": clinical}})
    records = [make_record(number, value, 10 ** (number + 2)) for number, value in enumerate(values)]
    front = domain_fronts(records, facts)["clinical"].front
    assert len(front) == len(values)
    (found,) = page_data(records, facts)["domains"]
    for record in front:
        words = shlex.split(found["commands"][str(record.number)])
        options = dict(zip(words[5::2], words[6::2], strict=True))
        limits = {
            "max_parameters": int(options.get("--max-parameters", 10**9)),
            "min_metric": float(options.get("--min-metric", "inf")),
        }
        assert pick(front, options.get("--pick", "frontier"), "minimize", **limits) == [record]


def test_hypervolume_history_is_the_hypervolume_of_each_moment() -> None:
    generator = random.Random(3)
    records = [
        make_record(number, generator.random(), generator.randint(1, 10**6), state=generator.choice(list(TrialState)))
        for number in range(150)
    ]
    ended = [record for record in records if record.state is not TrialState.RUNNING]
    found = hypervolume_history(records, "maximize", 10**7)
    assert found[0] == (0, 0.0)
    assert found[-1] == (len(ended), hypervolume(records, "maximize", 10**7))
    for count, value in found:
        assert value == hypervolume(ended[:count], "maximize", 10**7)
    grown = dict(found)
    for count in range(1, len(ended) + 1):
        if hypervolume(ended[:count], "maximize", 10**7) != hypervolume(ended[: count - 1], "maximize", 10**7):
            assert count in grown
    assert hypervolume_history([], "maximize", 10**7) == [(0, 0.0)]
    assert len(hypervolume_history(records, "maximize", 10**7, points=10)) <= 12


def test_history_goes_by_the_end_of_trials() -> None:
    late = make_record(0, 0.9, 10, finished="2026-01-02T00:00:00+00:00")
    early = make_record(1, 0.5, 10, finished="2026-01-01T00:00:00+00:00")
    first = hypervolume([early], "maximize", 10**7)
    assert hypervolume_history([late, early], "maximize", 10**7)[1] == (1, first)


def test_time_is_what_the_ended_trials_took_in_the_order_of_their_ends() -> None:
    late = make_record(0, 0.9, 10, finished="2026-01-02T00:00:00+00:00", train_seconds=7.0, evaluation_seconds=1.0)
    early = make_record(1, 0.5, 10, finished="2026-01-01T00:00:00+00:00", train_seconds=2.0, evaluation_seconds=0.5)
    running = make_record(2, 0.5, 10, state=TrialState.RUNNING, train_seconds=100.0)
    assert seconds_spent([late, early, running], [0, 1, 2]) == [0.0, 2.5, 10.5]
    assert seconds_spent([], [0]) == [0.0]


def test_time_per_example_in_batches_is_that_of_the_readings(
    facts: StudyFacts, records: list[TrialRecord], tmp_path: Path
) -> None:
    confirmed = confirm_best(records, facts, tmp_path)
    found = next(record for record in confirmed if record.confirmed)
    assert batch_milliseconds(found) == pytest.approx(sum(1000 / (410 + seed) for seed in (1, 2, 3)) / 3)
    assert batch_milliseconds(records[0]) is None
    page = front_html(confirmed, facts)
    assert "time per example, in batches (ms)" in page
    assert "latency" not in page


@pytest.mark.parametrize("kind", ["none", "running", "pruned", "one", "nan", "nothing to compare"])
def test_sparse_and_odd_studies(kind: str, facts: StudyFacts) -> None:
    records = {
        "none": [],
        "running": [make_record(0, None, 10, state=TrialState.RUNNING)],
        "pruned": [make_record(0, 0.3, 10, state=TrialState.PRUNED)],
        "one": [make_record(0, 0.3, 0)],
        "nan": [make_record(0, float("nan"), 10), make_record(1, float("inf"), 10)],
        "nothing to compare": [
            make_record(0, 0.5, 10, model="unknown/model", method="new", hyperparameters={"a": [1]})
        ],
    }[kind]
    data = embedded(front_html(records, facts))
    assert len(data["trials"]["number"]) == len(records)


def test_the_pages_files_are_installed() -> None:
    """What stands beside the module is named in the package data, so that a wheel has it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["peftsearch.frontier.page"]
    folder = ROOT / "peftsearch" / "frontier" / "page"
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    data = [name for name in files if not name.endswith((".py", ".pyc"))]
    assert len(data) > 3
    for name in data:
        assert any(fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def test_a_page_of_ten_thousand_trials_is_written_in_seconds() -> None:
    import time

    records, facts = make_study(1250), make_facts()
    assert len(records) > 10_000
    start = time.process_time()
    page = front_html(records, facts)
    assert time.process_time() - start < 10
    assert len(page) < 8_000_000
    assert len(front_html([], facts)) < 150_000
