"""The queries of dashboards/README.md, as they stand there, on a real store; and the saved views that they go with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tracking_study import study_facts, trial

from peftsearch.export.folder import PROVENANCE
from peftsearch.export.registry import Registry, register
from peftsearch.frontier import domain_report
from peftsearch.spec import Confirmed, Reading, StudyFacts, TrialRecord, TrialState
from peftsearch.tracking.mlflow_runs import NOTE
from peftsearch.tracking.mlflow_tracker import default_artifacts, default_tracking_uri, sync
from peftsearch.tracking.mlflow_views import FRONT, METHODS, TRIALS, VIEW, saved_views

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

README = Path(__file__).parents[2] / "dashboards" / "README.md"
CODE = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
STUDY = "queries"


def records() -> list[TrialRecord]:
    """Of the domain legal: 1 is dominated, 2 to 4 are a front with a knee, 5 was pruned; 6 is another domain's."""
    made = [
        ("prompt", 10_000, 0.40),
        ("prompt", 100, 0.50),
        ("lora", 1000, 0.79),
        ("lora", 200_000, 0.80),
    ]
    found = [
        trial(number, domain="legal", method=method, trainable_parameters=parameters, value=value)
        for number, (method, parameters, value) in enumerate(made, start=1)
    ]
    found.append(trial(5, 1, TrialState.PRUNED, domain="legal", trainable_parameters=10))
    found.append(trial(6, domain="clinical", trainable_parameters=10))
    readings = [Reading(seed=seed, value=0.79, loss=1.0, test=0.7, steps=90) for seed in (1, 2)]
    return [trial(0, domain="legal", trainable_parameters=9, value=0.1, confirmed=Confirmed.of(readings)), *found]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    import mlflow

    storage = tmp_path_factory.mktemp("storage")
    uri, facts, trials = default_tracking_uri(storage), study_facts(STUDY), records()
    reports = {domain: domain_report(trials, facts, domain) for domain in facts.domains}
    ids = sync(uri, trials, facts, reports, default_artifacts(storage))
    folder = storage / "adapter"
    folder.mkdir()
    (folder / PROVENANCE).write_text(json.dumps({"weights": {"sha256": "abc"}}))
    knee = trials[3].model_copy(update={"mlflow_run_id": ids[3]})
    register(Registry(uri, default_artifacts(storage)), STUDY, knee, folder, "adapter", ["knee"])
    yield mlflow.MlflowClient(uri, uri)
    mlflow.set_tracking_uri(None)


def test_the_queries_of_the_documentation_find_what_they_say(client: MlflowClient) -> None:
    names: dict[str, Any] = {"uri": client.tracking_uri, "experiment": STUDY}
    assert len(CODE) == 2
    for block in CODE:
        exec(block, names)

    def numbers(name: str) -> list[int]:
        return [int(number) for number in names[name]["tags.peftsearch.number"]]

    assert sorted(numbers("knees")) == [3, 6]
    assert set(names["knees"]["params.rank"]) == {"8"}
    assert numbers("front") == [0, 2, 3, 4]
    assert numbers("cheap") == [3, 2, 1]
    assert sorted(numbers("best")) == [2, 4, 6]
    assert sorted(names["seeds"]["metrics.test"]) == [0.7, 0.7]
    # Trials, re-trainings, and the domain's own run.
    assert len(names["facts"]) == 6 + 2 + 1
    assert (Path(names["folder"]) / PROVENANCE).is_file()


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ('tags.on_front = "true"', [0, 2, 3, 4, 6]),
        ('tags.pick LIKE "%best%"', [4, 6]),
        ('tags.pick LIKE "%smallest%"', [0, 6]),
        ('tags.state = "PRUNED"', [5]),
        ('tags.domain = "legal" and tags.method = "prompt"', [1, 2]),
        ('tags.method_best = "true"', [2, 4, 6]),
        ('tags.state = "COMPLETE" and metrics.value > 0.5 and metrics.trainable_parameters < 100000', [3, 6]),
    ],
)
def test_filters_of_the_documentation(client: MlflowClient, query: str, found: list[int]) -> None:
    experiment = client.get_experiment_by_name(STUDY)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], query)
    trials = [run for run in runs if "peftsearch.number" in run.data.tags]
    assert sorted(int(run.data.tags["peftsearch.number"]) for run in trials) == found


def test_the_views_name_what_the_runs_have(client: MlflowClient) -> None:
    """A column that no run has, or a filter that MLflow does not understand, would leave the reader with nothing."""
    experiment = client.get_experiment_by_name(STUDY)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    known = {f"metrics.`{name}`" for run in runs for name in run.data.metrics}
    known |= {f"params.`{name}`" for run in runs for name in run.data.params}
    known |= {f"tags.`{name}`" for run in runs for name in run.data.tags}
    counts = {}
    for view in (TRIALS, FRONT, METHODS):
        saved = json.loads(experiment.tags[f"{VIEW}{view}"])
        state = json.loads(saved["state"])
        assert set(state["selectedColumns"]) <= known | {"metrics.`confirmed_test_mean`"}
        assert state["orderByKey"] in known
        counts[saved["name"]] = len(client.search_runs([experiment.experiment_id], state["searchFilter"]))
    assert counts == {"Trials": 7, "Front": 5, "Methods": 3}


def test_the_methods_compared_are_trials_that_were_trained(client: MlflowClient, tmp_path: Path) -> None:
    """Of a metric of which less is better, too, and for each model."""
    facts = study_facts("compared")
    legal = facts.domains["legal"].model_copy(update={"metric": "perplexity", "direction": "minimize"})
    (model,) = facts.models
    facts = facts.model_copy(
        update={
            "domains": {**facts.domains, "legal": legal},
            "models": {model: facts.models[model], "other": facts.models[model]},
        }
    )
    made = [
        ("lora", 9.0, 100, TrialState.COMPLETE, model),
        ("lora", 5.0, 900, TrialState.COMPLETE, model),
        ("lora", 7.0, 300, TrialState.COMPLETE, "other"),
        ("lora", 2.0, 500, TrialState.PRUNED, model),
        ("prompt", 20.0, 10, TrialState.COMPLETE, model),
        ("prompt", 30.0, 70, TrialState.COMPLETE, model),
    ]
    records = [
        trial(n, 1, state, domain="legal", method=method, value=value, trainable_parameters=parameters, model=name)
        for n, (method, value, parameters, state, name) in enumerate(made)
    ]

    def write() -> None:
        reports = {"legal": domain_report(records, facts, "legal")}
        sync(client.tracking_uri, records, facts, reports, default_artifacts(tmp_path))

    write()
    experiment = client.get_experiment_by_name("compared")
    assert experiment is not None
    view = json.loads(json.loads(experiment.tags[f"{VIEW}{METHODS}"])["state"])
    assert "groupBy" not in view
    runs = client.search_runs([experiment.experiment_id], view["searchFilter"])
    assert {int(run.data.tags["peftsearch.number"]) for run in runs} == {1, 2, 4}
    # One that is beaten later is no longer its method's best.
    records.append(trial(6, domain="legal", method="prompt", value=10.0))
    write()
    runs = client.search_runs([experiment.experiment_id], view["searchFilter"])
    assert {int(run.data.tags["peftsearch.number"]) for run in runs} == {1, 2, 6}


def test_the_table_of_trials_says_how_each_ended() -> None:
    views = {key: json.loads(json.loads(text)["state"]) for key, text in saved_views(study_facts(STUDY)).items()}
    assert "tags.`state`" in views[f"{VIEW}{TRIALS}"]["selectedColumns"]


def test_views_leave_out_what_is_the_same_for_all() -> None:
    def columns(facts: StudyFacts) -> list[str]:
        state = json.loads(json.loads(saved_views(facts)[f"{VIEW}{TRIALS}"])["state"])
        return [str(name) for name in state["selectedColumns"]]

    several = study_facts(STUDY)
    assert "tags.`domain`" in columns(several)
    assert "tags.`model`" not in columns(several)
    alone = several.model_copy(update={"domains": {"legal": several.domains["legal"]}})
    assert columns(alone) == [name for name in columns(several) if name != "tags.`domain`"]


def test_a_view_that_a_reader_has_changed_stays(client: MlflowClient) -> None:
    experiment = client.get_experiment_by_name(STUDY)
    assert experiment is not None
    client.set_experiment_tag(experiment.experiment_id, f"{VIEW}{FRONT}", "mine")
    sync(client.tracking_uri, [], study_facts(STUDY))
    again = client.get_experiment_by_name(STUDY)
    assert again is not None
    assert again.tags[f"{VIEW}{FRONT}"] == "mine"
    assert again.tags[f"{VIEW}{TRIALS}"] == saved_views(study_facts(STUDY))[f"{VIEW}{TRIALS}"]


def test_description_and_views_follow_a_study_that_grows_until_a_reader_changes_them(client: MlflowClient) -> None:
    def written(facts: StudyFacts) -> Experiment:
        sync(client.tracking_uri, [], facts)
        found = client.get_experiment_by_name("grown")
        assert found is not None
        return found

    whole = study_facts("grown", description="Two domains")
    one = {"legal": whole.domains["legal"]}
    before = written(whole.model_copy(update={"description": "One domain", "domains": one}))
    assert "One domain" in before.tags[NOTE]
    client.set_experiment_tag(before.experiment_id, f"{VIEW}{FRONT}", "mine")
    after = written(whole)
    assert "Two domains" in after.tags[NOTE]
    assert after.tags[f"{VIEW}{TRIALS}"] == saved_views(whole)[f"{VIEW}{TRIALS}"] != before.tags[f"{VIEW}{TRIALS}"]
    assert after.tags[f"{VIEW}{FRONT}"] == "mine"
    client.set_experiment_tag(after.experiment_id, NOTE, "What we found")
    assert written(whole.model_copy(update={"description": "Three"})).tags[NOTE] == "What we found"


def test_a_description_that_somebody_wrote_before_the_study_stays(client: MlflowClient) -> None:
    client.set_experiment_tag(client.create_experiment("prepared"), NOTE, "Our plan")
    sync(client.tracking_uri, [], study_facts("prepared"))
    found = client.get_experiment_by_name("prepared")
    assert found is not None
    assert found.tags[NOTE] == "Our plan"
    assert f"{VIEW}{TRIALS}" in found.tags
