"""The report: what it says of a study in any state, that its numbers follow from the records, and that it is safe."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from frontier_study import confirm, confirm_best, make_facts, make_record, make_spec, make_study, write_predictions
from tiny_models import tiny_encoder

from peftsearch.domains import get_task, prepare_domain
from peftsearch.frontier.report import write_report
from peftsearch.frontier.report.comparisons import compare_domain, scorer
from peftsearch.frontier.report.results import macro_average, results, score_by_task, task_type
from peftsearch.frontier.report.sensitivity import bins, importance, sensitivities
from peftsearch.frontier.report.significance import Predicted, compare, holm, read_predictions
from peftsearch.spec import (
    Baseline,
    Confirmed,
    FailedBaseline,
    Reading,
    StudyError,
    StudyFacts,
    StudyFile,
    StudySpec,
    TrialRecord,
    TrialState,
)
from peftsearch.training.evaluate import evaluate

NASTY = "</script><script>alert('x')</script> \"quoted\" | & `code` _it_ 🩺"


class Page(HTMLParser):
    """What a browser would load, how its tags close, and the text of the cells."""

    VOID = {"meta", "link", "br", "img", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.pairs: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.loaded += [named[key] or "" for key in ("src", "href", "srcset", "data", "xlink:href") if key in named]
        self.ids += [named["id"] or ""] if "id" in named else []
        if (named.get("class") or "").split()[:1] == ["pair"]:
            self.pairs.append([])
        if self.pairs:
            self.pairs[-1].append(tag)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrialRecord], StudyFacts, StudySpec, Path]:
    """A confirmed study of two domains and its report."""
    folder, to = tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("report")
    facts = make_facts()
    spec = make_spec(facts)
    records = [
        record.model_copy(
            update={"estimated_memory_bytes": 2 * 2**30, "estimated_seconds": 5.0, "peak_memory_bytes": 2**30}
        )
        for record in confirm_best(make_study(), facts, folder)
    ]
    write_report(to, records, facts, spec, folder, "finished")
    return to, records, facts, spec, folder


Report = tuple[Path, list[TrialRecord], StudyFacts, StudySpec, Path]


# --- the whole ---


def test_the_page_is_self_contained_and_well_formed(study: Report) -> None:
    text = (study[0] / "report.html").read_text()
    page = Page(text)
    assert all(link.startswith(("#", "data:")) for link in page.loaded)
    assert "script" not in page.tags
    assert "default-src 'none'" in text
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.loaded if link.startswith("#")} <= set(page.ids)
    # Addresses appear as names of XML only.
    assert set(re.findall(r"https?://[^\"\s<)]+", text)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_a_table_stands_beside_every_plot(study: Report) -> None:
    page = Page((study[0] / "report.html").read_text())
    assert page.tags.count("figure") == page.tags.count("svg") == len(page.pairs) > 8
    assert all("table" in tags for tags in page.pairs)
    pictures = re.findall(r"\]\(([^)]+\.png)\)", (study[0] / "report.md").read_text())
    assert sorted(pictures) == sorted(path.name for path in study[0].glob("*.png"))
    for path in study[0].glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_equal_studies_give_equal_reports(study: Report, tmp_path: Path) -> None:
    _, records, facts, spec, folder = study
    some = [record for record in records if record.confirmed and record.domain == "legal"]
    one = write_report(tmp_path / "one", some, facts, spec, folder, "finished")
    other = write_report(tmp_path / "other", reversed(some), facts, spec, folder, "finished")
    assert [path.name for path in one[:2]] == ["report.html", "report.md"]
    assert sorted(one) == sorted((tmp_path / "one").iterdir())
    assert [(path.name, path.read_bytes()) for path in one] == [(path.name, path.read_bytes()) for path in other]


# --- methods and domains ---


def test_means_and_deviations_are_those_of_the_readings(study: Report) -> None:
    to, records, facts, _, _ = study
    table = {(row["domain"], row["method"]): row for row in rows(to / "results.csv")}
    assert len(table) == len(facts.domains) * len(facts.methods)
    text = (to / "report.md").read_text()
    for record in records:
        if record.confirmed is None:
            continue
        row = table[record.domain, record.method]
        values = [reading.test for reading in record.confirmed.readings if reading.test is not None]
        assert float(row["test_mean"]) == pytest.approx(fmean(values))
        assert float(row["test_std"]) == pytest.approx(stdev(values))
        assert (row["test_seeds"], row["trial"]) == ("3", str(record.number))
        assert float(row["trainable_share"]) == pytest.approx(record.trainable_parameters / 22_713_216)
        assert float(row["examples_per_second"]) == pytest.approx(412.0)
        assert float(row["train_seconds"]) == pytest.approx(9.0)
        assert f"{fmean(values):.3f} ± {stdev(values):.3f} (3)" in text


def test_unconfirmed_values_and_baselines_are_marked(tmp_path: Path) -> None:
    facts = make_facts()
    records = [
        confirm(make_record(0, 0.8, 1000), facts, tmp_path, 0.8),
        make_record(1, 0.9, 2000, method="adapter", hyperparameters={"bottleneck": 8, "learning_rate": 1e-3}),
    ]
    write_report(tmp_path / "report", records, facts, make_spec(facts), tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| adapter") and "0.900†" in line)
    (majority,) = (line for line in text.splitlines() if line.startswith("| majority class"))
    assert "0.210†" in majority
    assert "† On the validation split" in text
    # A value on validation does not compete with values on test, however high.
    assert "**clinical**: lora is" in text
    assert "**" not in line
    assert rows(tmp_path / "report" / "significance.csv")[0]["note"] == "not confirmed"


@pytest.mark.parametrize(
    ("probe", "sentence"),
    [
        (0.60, r"Tuning paid: 0\.\d+ better than the logistic regression on frozen embeddings on the test split"),
        (0.85, "Tuning did not pay: nothing beats the logistic regression on frozen embeddings on the test split"),
    ],
)
def test_baselines_of_the_test_split_stand_beside_the_methods(probe: float, sentence: str, tmp_path: Path) -> None:
    facts = make_facts()
    for name, value in (("majority", 0.2), ("linear_probe", probe)):
        known = facts.domains["clinical"].baselines["package:tiny/model"]
        known[name] = known[name].model_copy(update={"test_value": value, "test_scores": {"accuracy": value}})
    records = [confirm(make_record(0, 0.8, 1000), facts, tmp_path, 0.8)]
    write_report(tmp_path / "report", records, facts, make_spec(facts), tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| logistic regression"))
    # One domain on the test split, the other still on validation.
    assert f"{probe:.3f} |" in line
    assert "0.860†" in line
    assert re.search(sentence, text)
    assert rows(tmp_path / "report" / "baselines.csv")[1]["test"] == str(probe)


def test_a_gain_on_a_handful_of_test_examples_is_open(tmp_path: Path) -> None:
    """However equal the seeds are."""
    facts = make_facts()
    facts.domains["clinical"].rows["test"] = 20
    known = facts.domains["clinical"].baselines["package:tiny/model"]
    for name, value in (("majority", 0.2), ("linear_probe", 0.7)):
        known[name] = known[name].model_copy(update={"test_value": value, "test_scores": {"accuracy": value}})
    (record,) = [confirm(make_record(0, 0.8, 1000), facts, tmp_path, 0.8)]
    assert record.confirmed is not None
    same = [reading.model_copy(update={"test": 0.75}) for reading in record.confirmed.readings]
    write_report(
        tmp_path / "report",
        [record.model_copy(update={"confirmed": Confirmed.of(same)})],
        facts,
        make_spec(facts),
        tmp_path,
    )
    text = (tmp_path / "report" / "report.md").read_text()
    assert re.search(r"open whether tuning paid: the gain of 0.050 .* noise of 3 seeds and 20 test examples", text)


def test_retrainings_that_failed_are_counted_and_do_not_make_the_best(tmp_path: Path) -> None:
    facts = make_facts()
    lost = {1: "the training loss became nan", 2: "the training loss became nan"}
    lucky = confirm(make_record(0, 0.9, 1000), facts, tmp_path, 0.95, seeds=1)
    records = [
        lucky.model_copy(update={"failed_confirmations": lost}),
        confirm(make_record(1, 0.85, 2000), facts, tmp_path, 0.8),
    ]
    (own,) = (r for r in results(records, facts, make_spec(facts))["clinical"] if r.method == "lora" and r.chosen)
    assert own.chosen is not None
    assert own.chosen.number == 1
    # It stands for its method where there is no other.
    write_report(tmp_path / "report", records[:1], facts, make_spec(facts), tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "2 of its 3 re-trainings failed" in text
    assert "(seed 1: the training loss became nan; seed 2: the training loss became nan)" in text
    row = next(row for row in rows(tmp_path / "report" / "results.csv") if row["trial"] == "0")
    assert (row["confirmation_seeds"], row["failed_confirmations"]) == ("1", "2")


def test_without_a_test_split_seeds_compare_on_validation(tmp_path: Path) -> None:
    facts = make_facts()
    facts.domains["clinical"].rows["test"] = 0

    def untested(number: int, method: str, accuracy: float) -> TrialRecord:
        record = confirm(
            make_record(number, accuracy, 1000, method=method, hyperparameters={}), facts, tmp_path, accuracy
        )
        assert record.confirmed is not None
        update = {"test": None, "test_loss": None, "test_scores": {}, "predictions": None}
        readings = [
            reading.model_copy(update=update | {"value": accuracy + 0.001 * reading.seed})
            for reading in record.confirmed.readings
        ]
        return record.model_copy(update={"confirmed": Confirmed.of(readings)})

    records = [untested(0, "lora", 0.8), untested(1, "adapter", 0.799), untested(2, "prompt", 0.6)]
    found = results(records, facts, make_spec(facts))["clinical"]
    compared = compare_domain(found, facts.domains["clinical"], tmp_path)
    noise = {
        other.result.method: (other.within_noise, other.why_not) for other in compared.others if other.result.chosen
    }
    assert noise == {"adapter": (True, "no test split"), "prompt": (False, "no test split")}
    write_report(tmp_path / "report", records, facts, make_spec(facts), tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "3 configurations were trained again with further seeds and scored on the validation split" in text
    assert "The difference to adapter is within the noise." in text


def test_readings_of_baselines_and_failed_baselines_are_reported(tmp_path: Path) -> None:
    facts = make_facts()
    domain = facts.domains["clinical"]
    known = domain.baselines["package:tiny/model"]
    tested = {"test_value": 0.2, "test_scores": {"accuracy": 0.2}, "test_read_at": "2026-01-01T12:00:00.000+00:00"}
    known["majority"] = known["majority"].model_copy(update={**tested, "test_examples": domain.rows["test"]})
    known["zero_shot"] = Baseline(title="zero-shot prompting", value=0.41, examples=200, **tested, test_examples=50)
    known["few_shot"] = Baseline(title="few-shot prompting (4)", value=0.42, examples=200)
    del known["linear_probe"]
    error = FailedBaseline(title="few-shot prompting (4)", split="test", error="out of memory")
    domain.failed_baselines["package:tiny/model"] = {"few_shot": error}
    records = [confirm(make_record(0, 0.8, 1000), facts, tmp_path, 0.8)]
    write_report(tmp_path / "report", records, facts, make_spec(facts), tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    (zero,) = (line for line in text.splitlines() if line.startswith("| zero-shot prompting"))
    (few,) = (line for line in text.splitlines() if line.startswith("| few-shot prompting"))
    assert f"0.200 (on 50 of {domain.rows['test']:,})" in zero
    assert f"0.420† (on 200 of {domain.rows['validation']:,})" in few
    assert "Not computed on the test split: few-shot prompting (4) (clinical). out of memory" in text
    assert "5 readings, 2 of them by baselines." in text
    assert "Tuning paid" in text
    readings = [row for row in rows(tmp_path / "report" / "readings.csv") if row["method"] == "baseline zero_shot"]
    assert [(row["test_examples"], row["read_at"]) for row in readings] == [("50", tested["test_read_at"])]
    assert rows(tmp_path / "report" / "failed_baselines.csv")[0]["error"] == "out of memory"


def test_a_method_is_represented_by_what_validation_chose(tmp_path: Path) -> None:
    """Never by the test split, which would make a lucky configuration look like a good one."""

    def confirmed(validation: float, test: float) -> Confirmed:
        return Confirmed.of([Reading(seed=s, value=validation, loss=1.0, test=test, test_examples=9) for s in (1, 2)])

    facts = make_facts()
    records = [
        make_record(0, 0.70, 1000, confirmed=confirmed(0.80, 0.6)),
        make_record(1, 0.90, 1000, confirmed=confirmed(0.75, 0.9)),
        make_record(2, 0.95, 1000),
    ]
    found = results(records, facts, make_spec(facts))["clinical"][0]
    assert found.chosen is not None
    assert found.chosen.number == 0
    assert found.test == (0.6, 0.0, 2)


def test_smaller_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    facts = make_facts()
    clinical = facts.domains["clinical"].model_copy(
        update={"metric": "perplexity", "direction": "minimize", "task": "language_modelling", "baselines": {}}
    )
    facts = facts.model_copy(update={"domains": {**facts.domains, "clinical": clinical}})
    records = [
        make_record(0, 31.25, 1000, method="adapter", hyperparameters={"bottleneck": 8}),
        make_record(1, 12.5, 2000, hyperparameters={"rank": 8}),
        make_record(2, 90_000.0, 3000, hyperparameters={"rank": 16}),
    ]
    spec = make_spec(make_facts())
    write_report(tmp_path, records, facts, spec, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "lora is best with perplexity 12.5 on the validation split" in text
    # An average over perplexities and accuracies would say nothing.
    assert "macro average" not in text


def test_averages_need_every_domain() -> None:
    assert macro_average([0.5, 0.7]) == pytest.approx(0.6)
    assert macro_average([0.5, None]) is None
    # BLURB: within each task type first, then over the types.
    assert score_by_task([0.8, 0.6, 0.1], ["ner", "ner", "qa"]) == pytest.approx((0.7 + 0.1) / 2)
    assert score_by_task([0.8, None, 0.1], ["ner", "ner", "qa"]) is None


def test_blurb_has_six_task_types() -> None:
    """Gu et al. 2021, table 1: entities, PICO, relations, similarity, document classification, questions."""
    domains = StudyFile.load(Path(__file__).parents[2] / "studies" / "blurb.yaml").spec.domains
    kinds = [task_type(domain.task, str(domain.metric)) for domain in domains.values()]
    assert [kinds.count(kind) for kind in dict.fromkeys(kinds)] == [5, 1, 3, 1, 1, 2]


def test_averages_stand_in_the_table(study: Report) -> None:
    to, _, facts, _, _ = study
    by_method: dict[str, list[float]] = {}
    for row in rows(to / "results.csv"):
        by_method.setdefault(row["method"], []).append(float(row["test_mean"]))
    for row in rows(to / "averages.csv"):
        assert row["split"] == "test"
        assert float(row["macro_average"]) == pytest.approx(fmean(by_method[row["method"]]))
    assert len(by_method["lora"]) == len(facts.domains)


def test_joined_data_sets_are_scored_by_themselves(tmp_path: Path) -> None:
    facts = make_facts()
    spec = make_spec(
        facts,
        domains={
            "clinical": {"data": {"join": {"notes": {"source": "a.csv"}, "letters": {"source": "b.csv"}}}},
            "legal": {"data": {"source": "c.csv"}},
        },
    )
    readings = [
        Reading(seed=s, value=0.8, loss=1.0, test=0.8, test_scores={"notes/accuracy": 0.7 + s / 100, "accuracy": 0.8})
        for s in (1, 2, 3)
    ]
    record = make_record(0, 0.8, 1000, confirmed=Confirmed.of(readings))
    write_report(tmp_path / "report", [record], facts, spec, tmp_path)
    table = {(row["part"], row["method"]): row for row in rows(tmp_path / "report" / "parts.csv")}
    assert float(table["notes", "lora"]["mean"]) == pytest.approx(0.72)
    assert float(table["notes", "lora"]["std"]) == pytest.approx(0.01)
    assert table["letters", "lora"]["mean"] == table["notes", "full"]["mean"] == ""
    assert "0.720 ± 0.010 (3)" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize("metric", ["macro_f1", "f1/b"])
def test_joined_data_sets_are_scored_by_the_objective_whatever_it_is(metric: str, tmp_path: Path) -> None:
    """That of a single label, too: what is shown is what an evaluation says of each part."""
    parts = {"notes": "aabbba" * 10, "letters": "abaaaa" * 10}
    for part, labels in parts.items():
        records = [{"text": f"{part} {number}", "label": label} for number, label in enumerate(labels)]
        (tmp_path / f"{part}.json").write_text(json.dumps(records))
    model = tiny_encoder(tmp_path / "model")
    document = {
        "name": "s",
        "model": str(model),
        "domains": {"clinical": {"metric": metric, "data": {"join": {p: {"source": f"{p}.json"} for p in parts}}}},
        "methods": {"lora": {}},
        "training": {"max_length": 16},
    }
    spec = StudyFile.parse(json.dumps(document), "s.json", folder=tmp_path).spec
    prepared = prepare_domain(
        "clinical", spec, folder=tmp_path, model_location=str(model), revision=None, cache=tmp_path / "cache"
    )

    class Second(torch.nn.Module):
        """Answers the second label, always."""

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.tensor([[0.0, 1.0]]).expand(len(input_ids), 2))

    scores = evaluate(Second(), prepared, "test", 8).scores
    facts = make_facts(domains={"clinical": prepared.facts()})
    reading = Reading(seed=1, value=0.5, loss=1.0, test=scores[metric], test_scores=scores)
    record = make_record(0, 0.5, 1000, confirmed=Confirmed.of([reading]))
    write_report(tmp_path / "report", [record], facts, make_spec(facts, domains=document["domains"]), tmp_path)
    shown = {row["part"]: row for row in rows(tmp_path / "report" / "parts.csv") if row["method"] == "lora"}
    split = prepared.split("test")
    for number, part in enumerate(prepared.parts):
        own = [label for label, of in zip(split["labels"], split["part"], strict=True) if of == number]
        share = own.count(1) / len(own)
        of_label = 2 * share / (1 + share)
        assert float(shown[part]["mean"]) == pytest.approx(of_label if metric == "f1/b" else of_label / 2)


def test_forgetting_is_told_where_it_was_measured(tmp_path: Path) -> None:
    facts = make_facts()
    last = {"step": 90, "epoch": 3.0, "value": 0.8, "loss": 1.0, "train_loss": 1.0, "scores": {"forgetting": 0.125}}
    records = [make_record(0, 0.8, 1000, rungs=[last]), make_record(1, 0.8, 1000, method="full", hyperparameters={})]
    write_report(tmp_path, records, facts, make_spec(facts), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| +0.125 |" in text
    # The domain that measured none has no such column.
    assert text.count("| forgetting |") == 1
    table = {(row["domain"], row["method"]): row["forgetting"] for row in rows(tmp_path / "results.csv")}
    assert (table["clinical", "lora"], table["clinical", "full"], table["legal", "lora"]) == ("0.125", "", "")


# --- budgets ---


def test_a_cell_that_got_less_is_marked_everywhere(tmp_path: Path) -> None:
    facts = make_facts(methods=("lora", "full"), trials_per_cell=2)
    records = [
        make_record(number, 0.8, 1000, domain=domain, method=method, hyperparameters={"learning_rate": 1e-3})
        for number, (domain, method) in enumerate(
            (d, m) for d in ("clinical", "legal") for m in ("lora", "full") for _ in range(2)
        )
    ]
    write_report(tmp_path / "equal", records, facts, make_spec(facts), tmp_path)
    equal = (tmp_path / "equal" / "report.md").read_text()
    assert "‡" not in equal
    assert "every cell got them, with the same training settings" in equal
    write_report(tmp_path / "less", records[:-1], facts, make_spec(facts), tmp_path)
    less = (tmp_path / "less" / "report.md").read_text()
    assert "1 of 4 cells got less" in less
    line = next(line for line in less.splitlines() if line.startswith("| full |"))
    assert line.count("‡") == 1
    assert [row["less"] for row in rows(tmp_path / "less" / "budgets.csv")].count("1 of 2 trials") == 1


def test_training_of_a_methods_own_is_told(tmp_path: Path) -> None:
    facts = make_facts()
    spec = make_spec(facts, methods={"lora": {}, "adapter": {}, "prompt": {"training": {"epochs": 9}}, "full": {}})
    write_report(tmp_path, [], facts, spec, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "prompt had training settings of its own: epochs 9" in text


# --- significance ---


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    return fmean(float(p == r) for p, r in zip(predictions, references, strict=True))


def answers(wrong: Sequence[int], size: int = 200) -> Predicted:
    return Predicted([1 if index in wrong else 0 for index in range(size)], [0] * size)


def test_a_clear_difference_is_significant_and_a_tie_is_not() -> None:
    runs = {
        "best": [answers(range(10)), answers(range(12))],
        "worse": [answers(range(60)), answers(range(58))],
        "twin": [answers(range(9, 19)), answers(range(9, 21))],
    }
    found = compare("best", runs, accuracy, labels=("a", "b"))
    worse, twin = found["worse"], found["twin"]
    assert worse.difference == pytest.approx((59 - 11) / 200)
    assert worse.low > 0
    assert worse.p == pytest.approx(2 / 1001)
    assert twin.low <= 0 <= twin.high
    assert twin.p > 0.5
    # The exact spread of a paired difference that is 1 on 48.. examples: binomial.
    share = 48 / 200
    expected = 1.96 * math.sqrt(share * (1 - share) / 200)
    assert (worse.high - worse.low) / 2 == pytest.approx(expected, rel=0.15)
    assert compare("best", runs, accuracy, labels=("a", "b")) == found


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "f1/b"])
def test_shortcuts_give_what_scoring_every_resample_gives(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftsearch.frontier.report import significance

    task, labels, draw = get_task("classification"), ("a", "b", "c", "d"), random.Random(3)
    references = [draw.choice([0, 0, 0, 1, 1, 2]) for _ in range(60)]

    def run(right: float) -> Predicted:
        return Predicted([r if draw.random() < right else draw.randrange(4) for r in references], references)

    def score(predictions: Sequence[Any], truth: Sequence[Any]) -> float:
        return task.score(list(predictions), list(truth), labels)[metric]

    runs = {"best": [run(0.9), run(0.8)], "other": [run(0.6), run(0.7)]}
    fast = compare("best", runs, score, labels=labels, resamples=50)["other"]
    monkeypatch.setattr(significance, "additive", lambda *_: None)
    slow = compare("best", runs, score, labels=labels, resamples=50)["other"]
    assert (fast.difference, fast.low, fast.high, fast.p) == pytest.approx(
        (slow.difference, slow.low, slow.high, slow.p), abs=1e-12
    )


ENTITY_TAGS = ("O", "B-x", "I-x", "B-y", "I-y")


def _tags(draw: random.Random, noise: float) -> Predicted:
    fixed = random.Random(0)
    references = [[fixed.choice([0, 0, 1, 2, 3, 4]) for _ in range(8)] for _ in range(30)]
    predictions = [[draw.randrange(5) if draw.random() < noise else tag for tag in row] for row in references]
    return Predicted(predictions, references)


def _classes(draw: random.Random, noise: float) -> Predicted:
    references = [index % 3 for index in range(60)]
    return Predicted([draw.randrange(3) if draw.random() < noise else label for label in references], references)


def _sets(draw: random.Random, noise: float) -> Predicted:
    fixed = random.Random(0)
    references = [[fixed.randrange(2) for _ in range(3)] for _ in range(60)]
    return Predicted([[1 - v if draw.random() < noise else v for v in row] for row in references], references)


def _numbers(draw: random.Random, noise: float) -> Predicted:
    fixed = random.Random(0)
    references = [4 * fixed.random() for _ in range(60)]
    return Predicted([value + noise * draw.gauss(0, 3) for value in references], references)


def _texts(draw: random.Random, noise: float) -> Predicted:
    words = ["the", "tenant", "pays", "rent", "when", "a", "month", "has", "come", "to", "its", "end"]
    references = [" ".join(random.Random(index).sample(words, 7)) for index in range(30)]
    return Predicted([" ".join(w for w in r.split() if draw.random() > noise) for r in references], references)


def _answers(draw: random.Random, noise: float) -> Predicted:
    texts = _texts(draw, noise)
    return Predicted(texts.predictions, [[text] for text in texts.references])


def _nats(draw: random.Random, noise: float) -> Predicted:
    rows = [(10 + index % 5, 50 + index % 7) for index in range(40)]
    return Predicted([[(2 + noise + draw.random()) * n, n, size] for n, size in rows], [""] * 40)


@pytest.mark.parametrize(
    ("task", "metric", "labels", "make", "options"),
    [
        *(
            ("token_classification", metric, ENTITY_TAGS, _tags, {})
            for metric in ("entity_f1", "precision", "entity_macro_f1", "strict_f1", "word_macro_f1", "token_accuracy")
        ),
        *(
            ("classification", metric, ("a", "b", "c"), _classes, {})
            for metric in ("accuracy", "micro_f1", "weighted_f1", "balanced_accuracy", "mcc", "recall/b")
        ),
        ("relation", "micro_f1", ("a", "b", "none"), _classes, {"negative": "none"}),
        *(
            ("multi_label", metric, ("a", "b", "c"), _sets, {})
            for metric in ("micro_f1", "macro_f1", "subset_accuracy")
        ),
        *(("similarity", metric, (), _numbers, {}) for metric in ("pearson", "mse", "rmse")),
        *(("summarization", metric, (), _texts, {}) for metric in ("rouge1", "rougeL")),
        *(("question_answering", metric, (), _answers, {}) for metric in ("f1", "exact_match")),
        *(("language_modeling", metric, (), _nats, {}) for metric in ("perplexity", "bits_per_byte")),
    ],
)
def test_no_metric_is_too_slow_for_a_thousand_resamples(
    task: str,
    metric: str,
    labels: tuple[str, ...],
    make: Callable[[random.Random, float], Predicted],
    options: dict[str, Any],
) -> None:
    chosen, draw = get_task(task, options=options), random.Random(5)
    runs = {"one": [make(draw, 0.1)], "other": [make(draw, 0.4)]}
    calls = []

    def score(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        calls.append(len(predictions))
        return float(chosen.score(list(predictions), list(references), labels)[metric])

    found = compare("one", runs, score, labels=labels)["other"]
    assert found.resamples == 1000
    whole = {name: chosen.score(own[0].predictions, own[0].references, labels)[metric] for name, own in runs.items()}
    assert found.difference == pytest.approx(whole["one"] - whole["other"])
    assert found.low <= found.difference <= found.high
    # The whole split a few times, to try formulas out; never for a resample.
    assert sum(count > 1 for count in calls) < 12


def test_a_metric_without_a_formula_is_scored_on_every_resample() -> None:
    from scipy.stats import spearmanr

    draw = random.Random(1)
    truth = [draw.random() for _ in range(80)]
    runs = {
        "one": [Predicted([value + 0.1 * draw.random() for value in truth], truth)],
        "other": [Predicted([draw.random() for _ in truth], truth)],
    }
    found = compare("one", runs, lambda p, r: float(spearmanr(p, r)[0]), resamples=200)["other"]
    assert found.resamples == 200
    assert found.p == pytest.approx(2 / 201)
    assert 0.5 < found.difference < 1.3


def test_resamples_that_lack_what_a_metric_counts_are_left_out() -> None:
    """Of a hundred questions three have no answer: about one resample in twenty has none of them."""
    facts = (
        make_facts()
        .domains["clinical"]
        .model_copy(update={"task": "question_answering", "metric": "no_answer_f1", "labels": ()})
    )
    references = [[] if index < 3 else ["a red house"] for index in range(100)]

    def run(right: int) -> Predicted:
        return Predicted(["" if index < right else "a house" for index in range(100)], references)

    found = compare("one", {"one": [run(3)], "other": [run(1)]}, scorer(facts))["other"]
    assert found.difference == pytest.approx(2 / 3)
    assert 900 < found.resamples < 1000


def test_too_slow_a_metric_is_said_to_be_so() -> None:
    import time

    def slow(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        time.sleep(0.002)
        return max(predictions) * 0.7 + len(set(predictions)) ** 2

    runs = {"one": [Predicted(list(range(9)), [0] * 9)], "other": [Predicted(list(range(1, 10)), [0] * 9)]}
    with pytest.raises(ValueError, match="too slow"):
        compare("one", runs, slow, budget=0.01)


def test_holm_is_the_textbooks() -> None:
    # Holm 1979: sorted p values times 4, 3, 2, 1, never falling.
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_the_best_of_many_equals_is_seldom_called_better() -> None:
    """Of eight methods that are one and the same, the best on the test split is held against the others: the one it was
    chosen by. At 0.05 it may be called better than any of them in one study of twenty."""
    generator = np.random.default_rng(0)
    methods, examples, studies = 8, 200, 60
    called = {"all pairs": 0, "the best's alone": 0}
    for _ in range(studies):
        right = (generator.random((methods, examples)) < 0.8).astype(float)
        order = np.argsort(-right.mean(axis=1))
        best, rest = right[order[0]], right[order[1:]]
        weights = generator.multinomial(examples, np.full(examples, 1 / examples), size=2000) / examples
        drawn = (best - rest) @ weights.T
        p = {number: 2 * (1 + float((row <= 0).sum())) / 2001 for number, row in enumerate(drawn)}
        called["all pairs"] += min(holm(p, methods * (methods - 1) // 2).values()) < 0.05
        called["the best's alone"] += min(holm(p).values()) < 0.05
    assert called["all pairs"] <= 0.05 * studies
    assert called["the best's alone"] > 0.05 * studies


def test_the_clear_winner_of_many_is_said_to_be_better(tmp_path: Path) -> None:
    """Twelve are held against each other in 66 pairs; so many resamples are drawn that this can be seen at all."""
    facts, count = make_facts(), 12
    records = [
        confirm(make_record(n, 0.8, 1000, model=f"m{n}"), facts, tmp_path, 0.6 if n else 0.9) for n in range(count)
    ]
    compared = compare_domain(
        results(records, facts, make_spec(facts))["clinical"], facts.domains["clinical"], tmp_path
    )
    assert compared.best is not None
    assert compared.best.model == "m0"
    assert len(compared.others) == count - 1
    for other in compared.others:
        assert other.within_noise is False
        found = other.comparison
        assert found is not None
        assert found.adjusted is not None
        # The smallest p that there can be, times the pairs that are left of all.
        assert found.p == pytest.approx(2 / (found.resamples + 1))
        assert (66 - count + 2) * found.p <= found.adjusted <= 66 * found.p
    assert compared.cheapest is not None
    assert compared.cheapest.record.model == "m0"


def test_missing_broken_and_foreign_predictions_are_said(tmp_path: Path) -> None:
    facts = make_facts()
    methods = ("lora", "adapter", "prompt", "full")
    records = [
        confirm(make_record(number, 0.8, 1000 + number, method=method, hyperparameters={}), facts, tmp_path, accuracy)
        for number, (method, accuracy) in enumerate(zip(methods, (0.9, 0.7, 0.6, 0.5), strict=True))
    ]
    (tmp_path / "trials/00001-2/test.jsonl").unlink()
    (tmp_path / "trials/00002-1/test.jsonl").write_text("{broken")
    write_predictions(tmp_path / "trials/00003-3/test.jsonl", [0, 1, 2], [0, 1, 1])
    last = records[3].confirmed
    assert last is not None
    records[3] = records[3].model_copy(
        update={
            "confirmed": Confirmed.of(
                [*last.readings[:2], last.readings[2].model_copy(update={"test": 2 / 3})],
            )
        }
    )
    # One whose predictions are not those that were scored.
    records.append(confirm(make_record(4, 0.8, 1004, model="other"), facts, tmp_path, 0.4))
    write_predictions(tmp_path / "trials/00004-2/test.jsonl", [0, 1], [0, 1])
    found = results(records, facts, make_spec(facts))["clinical"]
    compared = compare_domain(found, facts.domains["clinical"], tmp_path)
    why = {other.result.method: other.why_not or "" for other in compared.others if other.result.model != "other"}
    assert "ledger holds" in next(o.why_not or "" for o in compared.others if o.result.model == "other")
    assert "gone" in why["adapter"]
    assert "cannot be read" in why["prompt"]
    assert "other test examples" in why["full"]
    # The seeds still tell them apart.
    assert all(other.within_noise is False for other in compared.others)


def test_predictions_come_back_as_they_were_written(tmp_path: Path) -> None:
    texts = ["line\u2028separator", "next\x85line", "two\nlines", "", "naïve 🩺"]
    path = tmp_path / "trials" / "00000" / "test.jsonl"
    path.parent.mkdir(parents=True)
    lines = (json.dumps({"prediction": text, "reference": [text]}, ensure_ascii=False) for text in texts)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    found = read_predictions(path)
    assert found.predictions == texts
    assert found.references == [[text] for text in texts]


def test_the_cheapest_within_the_noise(tmp_path: Path) -> None:
    """Among all confirmed trials, not only those that stand for their method."""
    facts = make_facts()
    records = [
        confirm(make_record(0, 0.81, 9000), facts, tmp_path, 0.801),
        confirm(make_record(1, 0.80, 300), facts, tmp_path, 0.80),
        confirm(make_record(2, 0.60, 100), facts, tmp_path, 0.60),
        confirm(make_record(3, 0.79, 5000, method="adapter", hyperparameters={}), facts, tmp_path, 0.79),
    ]
    found = results(records, facts, make_spec(facts))["clinical"]
    cheapest = compare_domain(found, facts.domains["clinical"], tmp_path).cheapest
    assert cheapest is not None
    assert cheapest.record.number == 1


def test_what_diverges_with_some_seeds_is_not_the_cheapest_within_the_noise(tmp_path: Path) -> None:
    facts = make_facts()
    steady = confirm(make_record(0, 0.8, 9000, method="full", hyperparameters={}), facts, tmp_path, 0.8)
    # A third of its seeds learns, somewhat.
    readings = []
    for number, accuracy in ((1, 0.70), (2, 0.1), (3, 0.1)):
        found = confirm(make_record(number, 0.7, 300), facts, tmp_path, accuracy).confirmed
        assert found is not None
        readings.append(found.readings[0].model_copy(update={"seed": number}))
    wild = make_record(5, 0.7, 300).model_copy(update={"confirmed": Confirmed.of(readings)})
    compared = compare_domain(
        results([steady, wild], facts, make_spec(facts))["clinical"], facts.domains["clinical"], tmp_path
    )
    (other,) = [other for other in compared.others if other.result.chosen is not None]
    assert other.within_noise is True, "Welch's interval reaches anything"
    assert compared.cheapest is not None
    assert compared.cheapest.record.number == 0


# --- sensitivity and importance ---


def test_bins_hold_all_points_and_tear_no_value_apart() -> None:
    draw = random.Random(0)
    points = [(float(draw.choice([1, 2, 3, 4, 5, 6, 7, 8, 64])), draw.random()) for _ in range(40)]
    found = bins(points, log=True)
    assert sum(item.trials for item in found) == 40
    assert all(one.high < other.low for one, other in pairwise(found))
    assert 2 <= len(found) <= 5
    few = bins([(8.0, 0.5), (8.0, 0.7), (16.0, 0.9)], log=False)
    assert [(item.low, item.high, item.trials) for item in few] == [(8.0, 8.0, 2), (16.0, 16.0, 1)]
    assert few[0].quartiles == pytest.approx((0.55, 0.6, 0.65))


def test_every_numeric_hyperparameter_has_its_panel(records: list[TrialRecord], facts: StudyFacts) -> None:
    mine = [record for record in records if record.domain == "clinical" and record.method == "lora"]
    found = {item.name: item for item in sensitivities(mine, "lora", make_spec(facts))}
    # Alpha was the same in all of them.
    assert set(found) == {"rank", "learning_rate"}
    assert found["rank"].log
    assert len(found["rank"].points) == sum(record.state is TrialState.COMPLETE for record in mine)
    assert len(found["rank"].pruned) == sum(record.state is TrialState.PRUNED for record in mine)


def test_a_list_with_a_zero_that_only_pruned_trials_had_is_drawn(facts: StudyFacts, tmp_path: Path) -> None:
    trials = [make_record(n, 0.5, 1000, hyperparameters={"dropout": rate}) for n, rate in enumerate((0.01, 0.1) * 3)]
    given_up = make_record(9, 0.4, 1000, hyperparameters={"dropout": 0.0}).model_copy(
        update={"state": TrialState.PRUNED}
    )
    (found,) = sensitivities([*trials, given_up], "lora", make_spec(facts))
    assert not found.log
    assert found.pruned == [(0.0, 0.4)]
    assert sensitivities(trials, "lora", make_spec(facts))[0].log


def test_importance_finds_what_decides_and_admits_what_it_cannot_know(facts: StudyFacts) -> None:
    draw, spec = random.Random(0), make_spec(facts)
    trials = []
    for number in range(40):
        rate, rank = 10 ** draw.uniform(-4, -2), round(2 ** draw.uniform(0, 6))
        score = 0.8 - 0.2 * abs(math.log10(rate) + 3) + 0.001 * draw.random()
        hyperparameters = {"rank": rank, "learning_rate": rate, "targets": draw.choice(["attention", "all-linear"])}
        trials.append(make_record(number, score, 1000, hyperparameters=hyperparameters))
    found = importance(trials, "lora", spec, "maximize")
    assert next(iter(found.shares)) == "learning_rate"
    assert found.shares["learning_rate"] > 0.8
    assert sum(found.shares.values()) == pytest.approx(1)
    assert "too few trials (7 of at least 8)" in (importance(trials[:7], "lora", spec, "maximize").why_not or "")
    same = [trial.model_copy(update={"value": 0.5}) for trial in trials]
    assert importance(same, "lora", spec, "maximize").why_not == "all trials scored the same"


# --- few-shot curves, estimates, readings ---


def test_few_shot_domains_are_one_curve(tmp_path: Path) -> None:
    facts = make_facts()
    clinical = facts.domains["clinical"]
    sizes = (8, 32, 128)
    domains = {f"clinical-{n}": clinical.model_copy(update={"rows": {"train": n, "test": 300}}) for n in sizes}
    facts = facts.model_copy(update={"domains": {**domains, "legal": facts.domains["legal"]}})
    spec = make_spec(
        facts,
        domains={
            "clinical": {"data": {"source": "a.csv", "limit": {"train": list(sizes)}}},
            "legal": {"data": {"source": "b.csv"}},
        },
    )
    records = [
        confirm(make_record(i, 0.5 + 0.1 * i, 1000, domain=f"clinical-{n}"), facts, tmp_path, 0.5 + 0.1 * i)
        for i, n in enumerate(sizes)
    ]
    write_report(tmp_path / "report", records, facts, spec, tmp_path)
    table = rows(tmp_path / "report" / "few_shot.csv")
    assert [(row["domain"], row["method"], row["examples"], row["split"], row["seeds"]) for row in table] == [
        ("clinical", "lora", str(size), "test", "3") for size in sizes
    ]
    assert (tmp_path / "report" / "few_shot-clinical.png").exists()


def test_estimates_are_held_against_measurements(study: Report) -> None:
    table = {row["method"]: row for row in rows(study[0] / "estimates.csv")}
    assert float(table["lora"]["memory_median_ratio"]) == pytest.approx(0.5)
    # Nine evaluations of 0.8 s of training and 0.1 s of scoring, 5 s expected.
    assert float(table["lora"]["seconds_median_ratio"]) == pytest.approx(8.1 / 5)


def test_every_reading_of_the_test_split_is_listed(study: Report, tmp_path: Path) -> None:
    to, records, facts, spec, folder = study
    table = rows(to / "readings.csv")
    confirmed = [record for record in records if record.confirmed]
    assert len(table) == 3 * len(confirmed) == 24
    assert {(row["trial"], row["seed"]) for row in table} == {
        (str(r.number), str(s)) for r in confirmed for s in (1, 2, 3)
    }
    assert "has read it once" in (to / "report.md").read_text()
    first = confirmed[0]
    assert first.confirmed is not None
    again = Confirmed.of([*first.confirmed.readings, first.confirmed.readings[0]])
    write_report(tmp_path, [first.model_copy(update={"confirmed": again})], facts, spec, folder)
    assert f"Read more than once: trial {first.number} with seed 1" in (tmp_path / "report.md").read_text()


# --- studies that are not finished, and hostile names ---


@pytest.mark.parametrize(
    "records",
    [
        [],
        [make_record(0, None, 1000, state=TrialState.RUNNING)],
        [make_record(0, None, 1000, state=TrialState.FAILED, error="broken")],
        [make_record(0, 0.4, 1000, state=TrialState.PRUNED)],
        [make_record(0, math.nan, 1000)],
        make_study(3)[:9],
    ],
    ids=["empty", "running", "failed", "pruned", "nan", "unconfirmed"],
)
def test_any_study_has_a_report(records: list[TrialRecord], tmp_path: Path) -> None:
    facts = make_facts()
    write_report(tmp_path / "report", records, facts, make_spec(facts), tmp_path, "running")
    text = (tmp_path / "report" / "report.md").read_text()
    Page((tmp_path / "report" / "report.html").read_text())
    assert "The study is running" in text
    assert "The test split has not been read" in text
    assert "No trial has reached the full budget yet." in text or len(records) == 9


def test_confirmations_without_a_test_split(tmp_path: Path) -> None:
    facts = make_facts()
    confirmed = Confirmed.of([Reading(seed=s, value=0.8 + 0.01 * s, loss=1.0) for s in (1, 2, 3)])
    record = make_record(0, 0.8, 1000, confirmed=confirmed)
    write_report(tmp_path / "report", [record], facts, make_spec(facts), tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "0.820 ± 0.010 (3)†" in text
    assert "The test split has not been read" in text


def test_several_models_are_told_apart(tmp_path: Path) -> None:
    facts = make_facts()
    tiny = facts.models["package:tiny/model"]
    facts = facts.model_copy(update={"models": {"org/one": tiny, "org/two": tiny}})
    records = [
        make_record(number, 0.7 + 0.001 * number, 1000, model=model, hyperparameters={"rank": 1 + number})
        for number, model in enumerate(["org/one", "org/two"] * 5)
    ]
    write_report(tmp_path / "report", records, facts, make_spec(facts), tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "lora on org/two is best" in text
    assert len(rows(tmp_path / "report" / "results.csv")) == 16
    assert (tmp_path / "report" / "sensitivity-clinical-lora-org_one.png").exists()


def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    facts = make_facts(description=NASTY)
    clinical = facts.domains["clinical"].model_copy(
        update={
            "source": NASTY,
            "warnings": (NASTY,),
            "labels": (NASTY, "b", "c"),
            "baselines": {"package:tiny/model": {"majority": Baseline(title=NASTY, value=0.2)}},
        }
    )
    facts = facts.model_copy(
        update={"domains": {**facts.domains, "clinical": clinical}, "provenance": {NASTY: NASTY, "sum": "=1+1"}}
    )
    record = make_record(0, 0.8, 1000, method="lora", hyperparameters={"targets": NASTY, "rank": 2})
    other = make_record(1, 0.7, 2000, method="lora", hyperparameters={"targets": "b", "rank": 4})
    write_report(tmp_path / "report", [record, other], facts, make_spec(make_facts()), tmp_path)
    page = (tmp_path / "report" / "report.html").read_text()
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "alert('x')" in "".join(parsed.text)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "<script>" not in text
    for line in text.splitlines():
        assert "`code`" not in line or "\\`code" in line
    # A spreadsheet would compute a text that begins so.
    assert [row["value"] for row in rows(tmp_path / "report" / "provenance.csv") if row["what"] == "sum"] == ["'=1+1"]


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    facts = make_facts()
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(StudyError, match="it is a file"):
        write_report(tmp_path / "taken", [], facts, make_spec(facts), tmp_path)
    assert (tmp_path / "taken").read_text() == "mine"
