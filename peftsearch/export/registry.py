"""Exported folders in MLflow's model registry, under aliases that say for what they were picked: ``legal@best``.

Each is a model of the experiment (MLflow's `LoggedModel`: the folder as it is, no pickle, lineage from the trial's run)
and a version of the registered model. Whoever asks for ``models:/legal@best`` gets the folder::

    mlflow.artifacts.download_artifacts("models:/legal@best")
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsearch.export.folder import PROVENANCE
from peftsearch.frontier.front import PICKS, domain_fronts
from peftsearch.frontier.mlflow_report import picks_of
from peftsearch.spec import StudyError, StudyFacts, TrialRecord
from peftsearch.tracking.mlflow_runs import DOMAIN, NUMBER, PARAM_LENGTH, STUDY, STUDY_ID, texts
from peftsearch.tracking.mlflow_store import brief, prepare_environment, public_uri, relocate_artifacts
from peftsearch.tracking.names import run_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FORM = "peftsearch.form"
_WEIGHTS = "peftsearch.weights"


@dataclass(frozen=True)
class Registry:
    """Where to register.

    Attributes:
        tracking_uri: MLflow's server or store.
        artifacts: Where a store of this storage keeps its artifacts; None where the server has chosen.
        name: Name of the registered model; the domain's name where None.
    """

    tracking_uri: str
    artifacts: str | None = None
    name: str | None = None

    def name_for(self, domain: str) -> str:
        """The registered model of a domain."""
        return domain if self.name is None else self.name


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Attributes:
        name: Of the registered model.
        version: Counted by MLflow.
        aliases: That point to it now.
    """

    name: str
    version: str
    aliases: tuple[str, ...]

    @property
    def uris(self) -> tuple[str, ...]:
        """How MLflow is asked for it."""
        return tuple(f"models:/{self.name}@{alias}" for alias in self.aliases) or (
            f"models:/{self.name}/{self.version}",
        )

    def as_json(self) -> dict[str, Any]:
        """What ``export --json`` prints of it."""
        return {"name": self.name, "version": self.version, "aliases": list(self.aliases), "uris": list(self.uris)}


def aliases_of(records: Sequence[TrialRecord], facts: StudyFacts, ending: str = "") -> dict[int, tuple[str, ...]]:
    """By trial, the aliases that it has: for what it is picked where nothing else is asked for.

    Args:
        records: The ledger's trials.
        facts: The study.
        ending: Of the aliases of a form other than the adapter, such as ``-merged``.
    """
    found: dict[int, tuple[str, ...]] = {}
    for front in domain_fronts(records, facts).values():
        found |= {number: tuple(f"{how}{ending}" for how in picks.split()) for number, picks in picks_of(front).items()}
    return found


def check_registry(
    registry: Registry, study: str, records: Sequence[TrialRecord], *, study_id: str | None = None
) -> None:
    """See that the names are free or this study's, and that MLflow has the trials' runs.

    Raises:
        StudyError: A name is taken or no name, one name is for several domains, MLflow does not know a trial, or it
            cannot be reached.
    """
    domains = list(dict.fromkeys(record.domain for record in records))
    if registry.name is not None and len(domains) > 1:
        raise StudyError(
            f"one name in the registry is for one domain, and trials of {len(domains)} are picked "
            f"({', '.join(domains)}): choose one with --domain, or leave --register-as out"
        )
    for domain in domains:
        name = registry.name_for(domain)
        if not name.strip() or re.search(r"[/:'\"\x00-\x1f]", name) or name.strip(".") == "":
            raise StudyError(
                f"{name!r} is no name for MLflow's registry: use one without / : and quotes (--register-as)"
            )
    for record in records:
        if record.mlflow_run_id is None:
            raise StudyError(
                f"trial {record.number} ({record.method}) is not in MLflow yet, so it cannot be registered there: "
                f"run 'peftsearch sync {study}' first"
            )
    with _answering(registry) as client:
        for domain in domains:
            _check_name(client, registry.name_for(domain), study, study_id, domain)


def register(
    registry: Registry,
    study: str,
    record: TrialRecord,
    folder: Path,
    form: str,
    aliases: Sequence[str],
    *,
    study_id: str | None = None,
) -> Registered:
    """Make an exported folder a version of its registered model, and have aliases point to it.

    The same weights of the same trial are registered once: exporting again moves the aliases and renews the measured
    speed, which stands in the version's tags, and no more.

    Args:
        registry: Where.
        study: The study's name.
        record: The trial.
        folder: The verified export, on this machine.
        form: ``adapter``, ``merged`` or ``lora``.
        aliases: Of the version; taken from those that have them.
        study_id: Tells the study from others of its name (`StudyFacts.id`).

    Raises:
        StudyError: As `check_registry`.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    name = registry.name_for(record.domain)
    known = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    weights = known["weights"]["sha256"]
    owner = {STUDY: study, DOMAIN: record.domain, **({STUDY_ID: study_id} if study_id else {})}
    # Versions that earlier versions of peftsearch have registered do not say the study's id.
    tags = {STUDY: study, DOMAIN: record.domain, NUMBER: str(record.number), _FORM: form, _WEIGHTS: weights}
    with _answering(registry) as client:
        if _check_name(client, name, study, study_id, record.domain):
            if study_id:
                client.set_registered_model_tag(name, STUDY_ID, study_id)  # which earlier versions did not know
        else:
            client.create_registered_model(
                name,
                owner,
                f"Adapters of the peftsearch study {study} for {record.domain}",
            )
        version = _version(client, name, tags)
        if version is None:
            assert record.mlflow_run_id is not None
            run = client.get_run(record.mlflow_run_id)
            about: dict[str, Any] = {"method": record.method, "model": record.model, "value": record.value}
            about |= {"trainable_parameters": record.trainable_parameters}
            model = client.create_logged_model(
                run.info.experiment_id,
                # No dots, slashes, quotes and the like in names of models.
                name=re.sub(r"[^\w-]+", "_", f"{record.domain}-{record.number}-{record.method}-{form}"),
                source_run_id=run.info.run_id,
                tags=tags | {key: str(value) for key, value in about.items()},
                params=texts(record.hyperparameters, PARAM_LENGTH),
                model_type="peft adapter" if form != "merged" else "transformers model",
            )
            client.log_model_artifacts(model.model_id, str(folder))
            client.finalize_logged_model(model.model_id, "READY")
            client.log_outputs(
                run.info.run_id, [LoggedModelOutput(model.model_id, record.rungs[-1].step if record.rungs else 0)]
            )
            created = client.create_model_version(
                name,
                model.artifact_location,
                run.info.run_id,
                tags | {key: str(value) for key, value in about.items()},
                description=f"{run_name(record)}: {record.value} with {record.trainable_parameters:,} parameters",
                model_id=model.model_id,
            )
            # A number or a text, as the store likes.
            version = str(created.version)
            # As mlflow.register_model does: the model's page shows its versions by this tag.
            versions = json.dumps([{"name": name, "version": version}])
            client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: versions})
        for key, value in _speed_tags(known.get("speed") or {}).items():
            client.set_model_version_tag(name, version, key, value)
        for alias in aliases:
            client.set_registered_model_alias(name, alias, version)
    return Registered(name, str(version), tuple(aliases))


def renew_aliases(
    registry: Registry,
    study: str,
    domain: str,
    picks: Mapping[int, Sequence[str]],
    form: str,
    ending: str = "",
    *,
    study_id: str | None = None,
) -> list[str]:
    """Take the picks' aliases from trials that are the picks no longer, as when a study has gone on since.

    Args:
        registry: Where.
        study: The study's name.
        domain: The domain, whose model may not be registered.
        picks: By trial, the aliases that it has now (`aliases_of`).
        form: ``adapter``, ``merged`` or ``lora``: the aliases of this form.
        ending: Theirs, as in `aliases_of`.
        study_id: Tells the study from others of its name.

    Returns:
        What was done, in sentences: an alias moves to the trial that is the pick now where that is registered in this
        form, and goes where it is not.

    Raises:
        StudyError: As `check_registry`.
    """
    name = registry.name_for(domain)
    now = {alias: number for number, aliases in picks.items() for alias in aliases}
    done = []
    with _answering(registry) as client:
        if not _check_name(client, name, study, study_id, domain):
            return []
        known: Mapping[str, Any] = client.get_registered_model(name).aliases
        for alias in (f"{how}{ending}" for how in PICKS):
            if alias not in known:
                continue
            tags = client.get_model_version(name, str(known[alias])).tags
            number = now.get(alias)
            # What somebody has made of the name by hand stays theirs.
            if (tags.get(STUDY), tags.get(DOMAIN)) != (study, domain) or tags.get(NUMBER) == str(number):
                continue
            wanted = {STUDY: study, DOMAIN: domain, NUMBER: str(number), _FORM: form}
            version = None if number is None else _version(client, name, wanted)
            was = f"models:/{name}@{alias} was trial {tags.get(NUMBER)}, which is not {alias.removesuffix(ending)} now"
            if version is not None:
                client.set_registered_model_alias(name, alias, version)
                done.append(f"{was}: it is trial {number} (version {version})")
            else:
                client.delete_registered_model_alias(name, alias)
                whose = "no trial is" if number is None else f"trial {number} is, and is not registered"
                done.append(f"{was}: the alias is gone ({whose})")
    return done


def _speed_tags(speed: Mapping[str, Any]) -> dict[str, str]:
    """What was measured after the export (`peftsearch.export.speed.Speed`), as tags of a version."""
    numbers = {key: f"{speed[key]:.4g}" for key in ("latency_ms", "latency_p95_ms", "examples_per_second") if speed}
    return numbers | {key: str(speed[key]) for key in ("batch_size", "unit", "hardware", "threads") if key in speed}


def _check_name(client: MlflowClient, name: str, study: str, study_id: str | None, domain: str) -> bool:
    """Whether the registered model is there, and this study's for this domain."""
    from mlflow.exceptions import MlflowException

    try:
        known: Mapping[str, str] = client.get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    found = (known.get(STUDY), known.get(DOMAIN))
    another = found == (study, domain) and study_id is not None and known.get(STUDY_ID, study_id) != study_id
    if another or found != (study, domain):
        what = f"the adapters of {'another' if another else 'the'} study {found[0]!r} for {found[1]!r}"
        what = what if all(found) else "something else"
        raise StudyError(
            f"the name {name!r} is taken in MLflow's registry: it holds {what}; choose another name with --register-as"
        )
    return True


def _version(client: MlflowClient, name: str, tags: Mapping[str, str]) -> str | None:
    """The latest version that has all these tags; None where there is none."""
    token, versions = None, []
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        versions += [int(found.version) for found in page if tags.items() <= found.tags.items()]
        token = page.token
        if not token:
            return str(max(versions)) if versions else None


@contextmanager
def _answering(registry: Registry) -> Iterator[MlflowClient]:
    """A client, whose errors are told in one sentence."""
    prepare_environment()
    try:
        if registry.artifacts is not None:
            relocate_artifacts(registry.tracking_uri, registry.artifacts)
        from mlflow import MlflowClient

        yield MlflowClient(registry.tracking_uri, registry.tracking_uri)
    except StudyError:
        raise
    except Exception as error:  # MLflow, requests and SQLAlchemy have no common base
        raise StudyError(f"MLflow's registry at {public_uri(registry.tracking_uri)} refuses: {brief(error)}") from error
