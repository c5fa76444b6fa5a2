"""Exports in MLflow's registry: their aliases, their lineage, and names that are taken."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tracking_study import study_facts, trial

from peftsearch.export.folder import PROVENANCE
from peftsearch.export.noted import note_exports
from peftsearch.export.registry import Registered, Registry, aliases_of, check_registry, register, renew_aliases
from peftsearch.export.speed import Speed
from peftsearch.spec import StudyError, TrialRecord
from peftsearch.tracking.mlflow_tracker import default_artifacts, default_tracking_uri, sync

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass
class Place:
    """A store with a study in it, whose domain is called as nothing else in that store."""

    registry: Registry
    study: str
    domain: str
    records: list[TrialRecord]
    client: MlflowClient

    def sync(self) -> None:
        facts = study_facts(self.study)
        facts.domains[self.domain] = facts.domains["legal"]
        ids = sync(self.registry.tracking_uri, self.records, facts, {}, self.registry.artifacts)
        self.records = [record.model_copy(update={"mlflow_run_id": ids[record.number]}) for record in self.records]

    def register(self, record: TrialRecord, folder: Path, *aliases: str, form: str = "adapter") -> Registered:
        return register(self.registry, self.study, record, folder, form, aliases)


@pytest.fixture(params=["server", "sqlite"])
def place(request: pytest.FixtureRequest, sqlite_storage: Path) -> Place:
    from mlflow import MlflowClient

    if request.param == "server":
        registry = Registry(request.getfixturevalue("server").uri)
    else:
        registry = Registry(default_tracking_uri(sqlite_storage), default_artifacts(sqlite_storage))
    study = re.sub(r"[^\w-]+", "-", request.node.name)
    domain = f"domain.of-{study}"
    found = Place(
        registry,
        study,
        domain,
        [trial(number, domain=domain) for number in range(2)],
        MlflowClient(registry.tracking_uri, registry.tracking_uri),
    )
    found.sync()
    return found


SPEED = Speed(1.23456, 2.5, 812.345, 64, 50, "A processor", 2)


def adapter_folder(folder: Path, content: str = "weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_text(content)
    (folder / PROVENANCE).write_text(json.dumps({"weights": {"sha256": content}, "speed": SPEED.as_json()}))
    return folder


def test_an_export_is_found_by_its_alias_with_its_run(place: Place, tmp_path: Path) -> None:
    import mlflow

    first, second = place.records
    check_registry(place.registry, place.study, place.records)
    found = place.register(first, adapter_folder(tmp_path / "first"), "best", "knee")
    assert (found.version, found.uris) == ("1", (f"models:/{place.domain}@best", f"models:/{place.domain}@knee"))
    version = place.client.get_model_version_by_alias(place.domain, "best")
    assert version.run_id == first.mlflow_run_id
    assert {"method": "lora", "peftsearch.number": "0", "value": str(first.value)}.items() <= version.tags.items()
    # From the run to the model, and from the model to what is registered.
    run = place.client.get_run(version.run_id)
    (output,) = run.outputs.model_outputs
    model = place.client.get_logged_model(output.model_id)
    assert (model.source_run_id, model.params["rank"]) == (run.info.run_id, "8")
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": place.domain, "version": "1"}]
    assert version.source == model.artifact_location
    mlflow.set_tracking_uri(place.registry.tracking_uri)
    try:
        loaded = mlflow.artifacts.download_artifacts(f"models:/{place.domain}@best", dst_path=str(tmp_path / "loaded"))
    finally:
        mlflow.set_tracking_uri(None)
    assert (Path(loaded) / "adapter_model.safetensors").read_text() == "weights"
    # Better weights take the alias over; the same ones are not registered twice.
    again = place.register(second, adapter_folder(tmp_path / "second", "better"), "best")
    assert again.version == "2"
    assert place.register(first, tmp_path / "first").version == "1"
    assert str(place.client.get_model_version_by_alias(place.domain, "best").version) == "2"
    assert str(place.client.get_model_version_by_alias(place.domain, "knee").version) == "1"
    assert len(place.client.search_model_versions(f"name = '{place.domain}'")) == 2
    merged = place.register(first, tmp_path / "first", "best-merged", form="merged")
    assert merged.version == "3"


def test_a_version_says_how_fast_it_was_and_a_run_where_it_was_exported(place: Place, tmp_path: Path) -> None:
    first, _ = place.records
    place.register(first, adapter_folder(tmp_path / "first"), "best")
    tags = {"latency_ms": "1.235", "latency_p95_ms": "2.5", "examples_per_second": "812.3"}
    tags |= {"batch_size": "64", "unit": "example", "hardware": "A processor", "threads": "2"}
    version = place.client.get_model_version_by_alias(place.domain, "best")
    assert tags.items() <= version.tags.items()
    # Exported and timed again: the same version.
    known = json.loads((tmp_path / "first" / PROVENANCE).read_text())
    (tmp_path / "first" / PROVENANCE).write_text(json.dumps({**known, "speed": {**known["speed"], "latency_ms": 9.0}}))
    assert place.register(first, tmp_path / "first").version == str(version.version)
    assert place.client.get_model_version(place.domain, version.version).tags["latency_ms"] == "9"

    run = str(first.mlflow_run_id)
    where = {"exported": "/a/b/00000-lora", "pushed": "https://huggingface.co/me/legal"}
    assert note_exports(place.registry.tracking_uri, {run: where}) is None
    place.sync()
    assert where.items() <= place.client.get_run(run).data.tags.items()


def test_a_server_that_is_away_is_one_sentence(tmp_path: Path) -> None:
    assert note_exports(f"sqlite:///{tmp_path}/mlflow.db", {"a" * 32: {"exported": "x"}}) is None
    assert not list(tmp_path.iterdir()), "no store is made for it"
    said = note_exports("http://me:hunter2@127.0.0.1:9", {"a" * 32: {"exported": "x"}})
    assert said is not None
    assert said.startswith("MLflow at http://")
    assert "does not know of the exports" in said
    assert "hunter2" not in said
    assert "\n" not in said


def test_another_study_of_the_same_name_does_not_take_a_models_aliases(place: Place, tmp_path: Path) -> None:
    first, second = place.records
    place.register(first, adapter_folder(tmp_path / "first"), "best")
    # As an earlier version left it, it is whoever's asks first.
    register(place.registry, place.study, first, tmp_path / "first", "adapter", ["best"], study_id="ours")
    assert len(place.client.search_model_versions(f"name = '{place.domain}'")) == 1
    check_registry(place.registry, place.study, [second], study_id="ours")
    with pytest.raises(StudyError, match=r"it holds the adapters of another study '.*'; choose another name"):
        check_registry(place.registry, place.study, [second], study_id="theirs")


def test_an_alias_does_not_stay_on_a_trial_that_is_the_pick_no_longer(place: Place, tmp_path: Path) -> None:
    def renew(picks: dict[int, tuple[str, ...]]) -> list[str]:
        return renew_aliases(place.registry, place.study, place.domain, picks, "adapter")

    def aliases() -> dict[str, str]:
        found = place.client.get_registered_model(place.domain).aliases
        return {alias: str(version) for alias, version in found.items()}

    first, second = place.records
    assert renew({0: ("best",)}) == []
    place.register(first, adapter_folder(tmp_path / "first"), "best", "knee")
    place.register(second, adapter_folder(tmp_path / "second", "better"), "smallest")
    place.client.set_registered_model_alias(place.domain, "production", "1")
    assert renew({0: ("best", "knee"), 1: ("smallest",)}) == []
    # The study has gone on: another registered trial is the best, one that is not registered is the knee.
    moved, gone = renew({1: ("best", "smallest"), 9: ("knee",)})
    assert moved.startswith(
        f"models:/{place.domain}@best was trial 0, which is not best now: it is trial 1 (version 2)"
    )
    assert gone.endswith(
        "@knee was trial 0, which is not knee now: the alias is gone (trial 9 is, and is not registered)"
    )
    assert aliases() == {"best": "2", "smallest": "2", "production": "1"}
    # What somebody registers by hand under this name keeps what it has.
    place.client.delete_model_version_tag(place.domain, "2", "peftsearch.study")
    assert renew({9: ("best", "smallest")}) == []


def test_names_that_are_taken_are_refused(place: Place, tmp_path: Path) -> None:
    (first, _) = place.records
    place.client.create_registered_model(place.domain)
    with pytest.raises(StudyError, match=r"taken in MLflow's registry: it holds something else.*--register-as"):
        check_registry(place.registry, place.study, [first])
    named = Registry(place.registry.tracking_uri, place.registry.artifacts, f"mine-{place.domain}")
    check_registry(named, place.study, [first])
    register(named, place.study, first, adapter_folder(tmp_path / "a"), "adapter", ["best"])
    with pytest.raises(StudyError, match=f"it holds the adapters of the study '{place.study}'"):
        check_registry(named, "another-study", [first])
    with pytest.raises(StudyError, match="one name in the registry is for one domain"):
        check_registry(named, place.study, [first, trial(1)])
    for name in ("a/b", "a:b", " ", "..", "it's"):
        with pytest.raises(StudyError, match="is no name for MLflow's registry"):
            check_registry(Registry(place.registry.tracking_uri, name=name), place.study, [first])


def test_a_trial_that_mlflow_does_not_know_is_refused(place: Place) -> None:
    with pytest.raises(StudyError, match=f"trial 0 .* is not in MLflow yet.*peftsearch sync {place.study}"):
        check_registry(place.registry, place.study, [trial(0)])
    away = Registry("http://127.0.0.1:9")
    with pytest.raises(StudyError, match=r"MLflow's registry at http://127\.0\.0\.1:9 refuses"):
        check_registry(away, place.study, place.records)


def test_aliases_are_the_picks() -> None:
    values = [(100, 0.5), (1000, 0.79), (10_000, 0.8)]
    records = [
        trial(number, domain="legal", trainable_parameters=parameters, value=value)
        for number, (parameters, value) in enumerate(values)
    ]
    assert aliases_of(records, study_facts("aliases")) == {0: ("smallest",), 1: ("knee",), 2: ("best",)}
    alone = aliases_of(records[:1], study_facts("aliases"), "-merged")
    assert alone == {0: ("best-merged", "knee-merged", "smallest-merged")}
