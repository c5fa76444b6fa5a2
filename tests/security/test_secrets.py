"""Passwords and tokens are used and then gone: no file, no database, no output holds them."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from security_files import Outcome

from peftsearch.preparing import check_unchanged, write_files
from peftsearch.spec import StudyError, hide_secrets, note_secrets, without_passwords
from peftsearch.study import Study
from peftsearch.study_ledger import driver_ledger

Cli = Callable[..., Outcome]

ENVIRONMENT = {
    "HF_TOKEN": "hf_canaryEnvironmentToken1",
    "MLFLOW_TRACKING_PASSWORD": "canaryMlflowPassword2",
    "PGPASSWORD": "canaryPostgresPassword3",
    "AWS_SECRET_ACCESS_KEY": "canary/AwsSecret+4",
    "SOME_SERVICE_API_KEY": "canary-api-key-5",
    "RAY_AUTH_TOKEN": "canaryRayToken6",
}
LEDGER, MLFLOW, OPTION, HUB = "canaryLedger7", "canary%2FMlflow8", "canaryOption9", "canaryDataset10"
CANARIES = [*ENVIRONMENT.values(), LEDGER, MLFLOW, "canary/Mlflow8", OPTION, HUB]


@pytest.mark.parametrize(
    ("url", "kept", "shown"),
    [
        ("postgresql://me:pa55word@h/db", "postgresql://me@h/db", "postgresql://me:***@h/db"),
        ("postgresql://me:pa/ss:w0rd@h:5/d?a=b", "postgresql://me@h:5/d?a=b", "postgresql://me:***@h:5/d?a=b"),
        ("postgresql://h/d?password=pa55word", "postgresql://h/d", "postgresql://h/d?password=***"),
        ("postgresql://h/d?password=pa55word&a=b", "postgresql://h/d?a=b", "postgresql://h/d?password=***&a=b"),
        ("https://me:pa55word@h:5000/x", "https://h:5000/x", "https://me:***@h:5000/x"),
        ("https://hf_abcdefghijklmnopqrst@h/x", "https://h/x", "https://***@h/x"),
        ("s3://AKIA:pa55word@bucket/x", "s3://AKIA@bucket/x", "s3://AKIA:***@bucket/x"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("postgresql://h/d?a=b&password=pa55word", "postgresql://h/d?a=b", "postgresql://h/d?a=b&password=***"),
        ("postgresql://h/d?token=pa55&password=word", "postgresql://h/d", "postgresql://h/d?token=***&password=***"),
        ("auto", "auto", "auto"),
        ("is it good? this & that", "is it good? this & that", None),
        ("methods.prompt.tokens: 4", "methods.prompt.tokens: 4", "methods.prompt.tokens: 4"),
        ("mail me@home.org: see http://h:80/a", "mail me@home.org: see http://h:80/a", None),
    ],
)
def test_urls(url: str, kept: str, shown: str | None) -> None:
    assert without_passwords(url) == kept
    assert hide_secrets(f"at {url}: no") == f"at {shown or url}: no"


@given(st.text(st.characters(exclude_characters="@", exclude_categories=["Cs"]), min_size=6, max_size=40))
def test_no_password_survives(word: str) -> None:
    password = f"Zq9{word}"
    url = f"postgresql://someone:{password}@host/base"
    assert without_passwords(url) == "postgresql://someone@host/base"
    note_secrets(url)
    assert password not in hide_secrets(f"could not log in with {password} to {url}")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("password: pa55word", "password: ***"),
        ("log in with password: pa55word, please", "log in with password: ***, please"),
        ("db.password : pa55word\nuser: me", "db.password : ***\nuser: me"),
        ("password=pa55word", "password=***"),
        ("password=pa55:word: refused", "password=***: refused"),
        ("password='two words' for me", "password='***' for me"),
        ('password = "it\'s \\"two\\" words" for me', 'password = "***" for me'),
        ("password='pa55word", "password=***"),
        ("password=b'pa55word'", "password='***'"),
        ("{'user': 'me', 'password': 'pa55word', 'port': 5}", "{'user': 'me', 'password': '***', 'port': 5}"),
        ('{"hf_token": "pa55 word", "a": 1}', '{"hf_token": "***", "a": 1}'),
        ('"{\\"api_key\\": \\"pa55 word\\", \\"a\\": 1}"', '"{\\"api_key\\": \\"***\\", \\"a\\": 1}"'),
        ("Server=h;Pwd=pa55word;Port=5", "Server=h;Pwd=***;Port=5"),
        ("Authorization: Bearer pa55word.x-y_z=", "Authorization: Bearer ***"),
        ("{'Authorization': 'Basic bWU6cGE1NXdvcmQ='}", "{'Authorization': 'Basic ***'}"),
        ("sent bearer abcdefghijklmnopqrst twice", "sent bearer *** twice"),
        ("with Bearer TOKEN", "with Bearer ***"),
        ("401 for hf_pa55wordabcdefghijkl: no", "401 for ***: no"),
        ("key AKIAIOSFODNN7EXAMPLE or ASIAIOSFODNN7EXAMPLE.", "key *** or ***."),
    ],
)
def test_secrets_that_are_known_by_what_is_around_them_or_by_their_looks(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown
    assert hide_secrets(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "wrong password: see the manual",
        "the token: is it set?",
        "methods.prompt.tokens: 4",
        "methods: {prompt: {tokens: {low: 4, high: 64}}}",
        "domains:\n  secret:\n    task: classification\n  token: {task: tagging}",
        "password:\n  see the manual",
        "asks for a token and none was shown: put the cluster's into RAY_AUTH_TOKEN, and set RAY_AUTH_MODE=token",
        "the tokenizer has no end token: the model could not learn where an answer ends",
        "the bearer of this letter, a bearer token, Basic authentication, bearer instruments",
        "hf_transfer and hf_hub_download of huggingface_hub, hf_tokenizers",
        "AKIA is how such a key begins",
        "KeyError: 'password'",
    ],
)
def test_sentences_without_secrets_are_left_as_they_are(text: str) -> None:
    assert hide_secrets(text) == text


def test_hiding_takes_no_long_time() -> None:
    began = time.process_time()
    for text in ("password" * 20_000, "token: '" * 20_000, 'secret=\\"' * 20_000, "Bearer " * 20_000, "a.b-" * 5_000):
        hide_secrets(text)
    assert time.process_time() - began < 10


def test_an_error_cannot_quote_a_password() -> None:
    for error in (StudyError("bad mysql://a:hunter2@h/d"), StudyError("x").at(("a",))):
        assert "hunter2" not in str(error) + error.message + repr(error)


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_what_a_variable_holds_whose_name_says_so_is_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, ENVIRONMENT[name])
    assert ENVIRONMENT[name] not in hide_secrets(f"cannot sign in with {ENVIRONMENT[name]} there")


@pytest.fixture
def secretive(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def document(base: Path, project: Path, tmp_path: Path) -> dict[str, Any]:
    """A study that holds a secret wherever a study file can hold one."""
    from cli_study import small_study

    study = small_study(base)
    study["description"] = f"uses {ENVIRONMENT['HF_TOKEN']} of https://me:{HUB}@example.org/data"
    study["tracking"] = {
        "ledger": f"sqlite:///{tmp_path}/ledger.db?password={LEDGER}",
        "mlflow": f"http://me:{MLFLOW}@127.0.0.1:1",
    }
    return study


def written(folder: Path, without: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and path != without:
            yield path, path.read_bytes()


def assert_clean(where: str, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    found = [canary for canary in CANARIES if canary.encode() in data or json.dumps(canary)[1:-1].encode() in data]
    assert not found, f"{where} holds {found}"


@pytest.mark.slow
@pytest.mark.usefixtures("secretive")
def test_no_trace_of_a_secret(
    document: dict[str, Any],
    project: Path,
    storage: Path,
    tmp_path: Path,
    peftsearch: Cli,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From validate over a run that breaks to what is written afterwards; then every file and every output is read."""
    import trained_study

    from peftsearch.frontier import domain_report
    from peftsearch.tracking.mlflow_tracker import sync

    caplog.set_level(logging.INFO)
    path = project / "study.yaml"
    path.write_text(yaml.safe_dump(document))
    setting = f"description=see http://me:{OPTION}@example.org/"
    outputs: list[Outcome] = []

    def call(*arguments: object, status: int = 0) -> None:
        outputs.append(peftsearch(*arguments, "--storage", storage))
        assert outputs[-1].status == status, outputs[-1]

    call("validate", path)
    call("validate", path, "--set", setting)
    for wrong in (
        f"tracking.ledger=[{LEDGER}@h, a://b:{OPTION}@c]",
        f"trackin.ledger=a://b:{OPTION}@c",
        f"a://b:{OPTION}@c",
    ):
        if "[" not in wrong:
            call("validate", path, "--set", wrong, status=2)

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError(f"cannot reach postgresql://me:{OPTION}@h/d: wrong password {LEDGER}")

    monkeypatch.setattr("peftsearch.driver.run_study", breaks)
    tracked = document["tracking"]["mlflow"]
    path.write_text(yaml.safe_dump(document | {"tracking": document["tracking"] | {"mlflow": "off"}}))
    call("run", path, status=1)
    path.write_text(yaml.safe_dump(document))
    assert json.loads((storage / "studies" / "small" / "study.json").read_text())["study"]["tracking"]["ledger"]

    chosen = {"legal": ("lora", trained_study.CONFIGURATIONS["lora"]), "clinical": ("full", {"learning_rate": 5e-3})}
    study = trained_study.train_study(document, project, storage, chosen)
    assert study.mlflow_tracking_uri == tracked
    from contextlib import closing

    with closing(driver_ledger(study, study.validate())) as ledger:
        record = ledger.records[0].model_copy(update={"number": 99})
        with pytest.raises(KeyError):
            ledger.fail(99, f"no https://me:{OPTION}@h/")
    assert record.number == 99
    for command in ("status", "trials", "frontier"):
        call(command, "small")
        call(command, "small", "--json")
    call("list", "--json")
    call("trials", "small", "--csv", tmp_path / "t.csv")
    call("frontier", "small", "--html", tmp_path / "f.html")
    call("report", "small", "--to", tmp_path / "report")
    call("export", "small", "--to", tmp_path / "adapters", "--pick", "best")

    opened = Study.open("small", storage)
    records, facts = opened.trials(), opened.facts()
    assert len(records) == 2
    reports = {name: domain_report(records, facts, name) for name in facts.domains}
    kept = f"sqlite:///{tmp_path}/mlflow.db"
    sync(kept, records, facts, reports, str(tmp_path / "artifacts"))

    for outcome in outputs:
        assert_clean("the output", outcome.out + outcome.err)
    assert_clean("the log", caplog.text)
    files = list(written(tmp_path, without=path))
    assert len(files) > 40
    for file, data in files:
        assert_clean(str(file), data)


@pytest.mark.usefixtures("secretive")
def test_a_study_with_a_password_opens_without_it(
    document: dict[str, Any], project: Path, storage: Path, tmp_path: Path
) -> None:
    """What is kept connects again once the environment brings the password; and the file may still hold it."""
    path = project / "study.yaml"
    path.write_text(yaml.safe_dump(document))
    study = Study.from_file(path, storage=storage)
    study.folder.create()
    write_files(study)
    opened = Study.open("small", storage)
    assert opened.spec.tracking.ledger == f"sqlite:///{tmp_path}/ledger.db"
    assert opened.spec.tracking.mlflow == "http://127.0.0.1:1"
    check_unchanged(study)
    copy = yaml.safe_load(study.folder.study_file.read_text())
    assert copy["tracking"] == {"ledger": f"sqlite:///{tmp_path}/ledger.db", "mlflow": "http://127.0.0.1:1"}


@pytest.mark.usefixtures("secretive")
def test_mlflow_that_cannot_be_reached_is_named_without_its_login(
    document: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import frontier_study

    from peftsearch.tracking.mlflow_tracker import sync

    caplog.set_level(logging.INFO)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    note_secrets(document["tracking"]["mlflow"])
    with pytest.raises(StudyError) as caught:
        sync(document["tracking"]["mlflow"], [], frontier_study.make_facts())
    assert "MLflow at http://127.0.0.1:1 could not be brought up to date" in str(caught.value)
    assert_clean("the error", str(caught.value))
    assert_clean("the log", caplog.text)


def test_a_failed_trial_keeps_no_password(tmp_path: Path) -> None:
    from optuna.samplers import RandomSampler

    from peftsearch.tracking.ledger import Ledger, LedgerCell

    cell = LedgerCell("d/lora/m", "m", "d", "lora", "accuracy", "maximize")
    ledger = Ledger(f"sqlite:///{tmp_path}/x.db", "s", [cell])
    fields = {"seed": 0, "total_steps": 1, "trainable_parameters": 1}
    record = ledger.ask(cell.key, RandomSampler(), lambda _: {}, lambda *_: fields)
    assert record is not None
    failed = ledger.fail(record.number, f"OSError: s3://key:{OPTION}@bucket/x is gone")
    assert failed.error == "OSError: s3://key:***@bucket/x is gone"
    ledger.close()
    for file, data in written(tmp_path, without=tmp_path):
        assert_clean(str(file), data)


def test_a_fresh_process_says_no_secret(document: dict[str, Any], project: Path, storage: Path) -> None:
    import subprocess

    document["tracking"]["ledger"] = f"nosuchdatabase://me:{LEDGER}@host/db"
    path = project / "study.yaml"
    path.write_text(yaml.safe_dump(document))
    done = subprocess.run(
        [sys.executable, "-m", "peftsearch", "run", str(path), "--storage", str(storage)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **ENVIRONMENT},
    )
    assert done.returncode == 2, done.stderr
    assert_clean("the output", done.stdout + done.stderr)
    assert "nosuchdatabase" in done.stderr
