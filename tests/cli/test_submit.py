"""`peftsearch submit` against a real Ray cluster with a job server and a token, over real connections that break."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftsearch.cli.app import run_app
from peftsearch.spec import StudyError, StudyFile
from peftsearch.study import Study
from peftsearch.submit import check_arrival, package
from peftsearch.submit.job_server import JobServer
from peftsearch.submit.jobs import job_command, job_environment, job_prefix
from peftsearch.submit.passwords import refuse_passwords
from peftsearch.submit.storage_mark import STORAGE_MARK, mark_storage
from peftsearch.tracking.provenance import SUBMITTED_COMMIT, provenance

TOKEN = "0123456789abcdef" * 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """A Ray head with a dashboard, on loopback."""

    port: int
    gcs: int
    home: Path
    environment: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *arguments: object, **settings: str | None) -> subprocess.Popen[str]:
        environment = {k: v for k, v in {**self.environment, **settings}.items() if v is not None}
        process = subprocess.Popen(
            [sys.executable, "-m", "peftsearch", *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: object, timeout: float = 900, **settings: str | None) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **settings)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def jobs(self) -> dict[str, str]:
        request = urllib.request.Request(f"{self.url}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return {item["submission_id"]: item["status"] for item in json.load(answer) if item["submission_id"]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("home")
    # Paths of sockets must be short.
    folder = tempfile.mkdtemp(prefix="ps-", dir="/tmp")
    found = Cluster(free_port(), free_port(), home)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH_", "RAY_ADDRESS"))}
    found.environment = {
        **kept,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", f"--port={found.gcs}", f"--temp-dir={folder}", "--num-cpus=2"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={found.port}"]
    command += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    log = (home / "ray.log").open("w")
    deadline = time.monotonic() + 600
    head = None
    try:
        while time.monotonic() < deadline:
            # A head that has not come up within Ray's 30 seconds, on a busy machine, gives up.
            if head is None or head.poll() is not None:
                head = subprocess.Popen(list(map(str, command)), env=found.environment, stdout=log, stderr=log)
            # The dashboard is up before the node is.
            with suppress(OSError):
                if "Ray runtime started" in (home / "ray.log").read_text():
                    found.jobs()
                    break
            time.sleep(0.5)
        else:
            raise AssertionError((home / "ray.log").read_text()[-3000:])
        yield found
    finally:
        for process in found.started:
            process.kill()
        if head is not None:
            head.terminate()
            head.wait(120)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


class Wire:
    """A connection to a port that can be cut, as a network is."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Nobody gets through, and those who are through are cut off."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def travelling_study(write_study: Callable[..., Path], topics_csv: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a study file in a folder of its own, with its data in a neighbouring folder."""

    def write(name: str, trials: int, **sections: Any) -> Path:
        (tmp_path / "data").mkdir(exist_ok=True)
        shutil.copy(topics_csv, tmp_path / "data")
        (tmp_path / "studies").mkdir(exist_ok=True)
        split = {"group": "document", "validation": 0.25, "test": 0.2}
        sections = {
            "domains": {"topics": {"data": {"source": "../data/topics.csv", "split": split}}},
            "methods": {"lora": {}},
            "search": {"trials": trials, "scheduler": "none", "seed": 0},
            **sections,
        }
        return write_study(name, **sections).rename(tmp_path / "studies" / f"{name}.yaml")

    return write


def wait_for_trials(name: str, storage: Path, count: int, *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        for process in processes:
            assert process.poll() is None, process.communicate()
        # Noted once the ledger is there: nobody else may open it while it is made.
        notes = storage / "studies" / name / "driver.json"
        if not (notes.exists() and '"state"' in notes.read_text()):
            time.sleep(0.3)
            continue
        with suppress(StudyError, OSError):
            if sum(record.state == "COMPLETE" for record in Study.open(name, storage).trials()) >= count:
                return
        time.sleep(0.3)
    raise AssertionError(f"{name} has no {count} trials")


def commit_all(folder: Path) -> str:
    """Make a folder a git repository; returns the commit."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), "-c", "user.name=me", "-c", "user.email=me@home", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "a study")
    return git("rev-parse", "HEAD")


def first_line(process: subprocess.Popen[str]) -> str:
    """What a follower prints first, which is the job's: it has been submitted by then."""
    assert process.stdout is not None
    return process.stdout.readline()


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_outlives_its_followers_and_is_found_again(
    cluster: Cluster, travelling_study: Callable[..., Path], tmp_path: Path
) -> None:
    path, storage = travelling_study("outlives", trials=7), tmp_path / "storage"
    commit = commit_all(path.parent)
    command = ("submit", path, "--storage", storage, "--address")

    first = cluster.start(*command, cluster.url)
    first_line(first)
    first.kill()
    first.communicate()

    # The second one, over a network that fails for a while.
    wire = Wire(cluster.port)
    second = cluster.start(*command, f"http://127.0.0.1:{wire.port}")
    begin = first_line(second)
    wire.cut()

    interrupted = cluster.start(*command, cluster.url)
    first_line(interrupted)
    interrupted.send_signal(signal.SIGINT)
    _, told = interrupted.communicate(timeout=300)
    assert interrupted.returncode == 130
    assert "which runs already" in told
    assert "The job goes on" in told
    assert "Traceback" not in told

    wire.mend()
    # Not `communicate`, which does not see what `readline` has read ahead.
    assert second.stdout is not None
    assert second.stderr is not None
    out, told = second.stdout.read(), second.stderr.read()
    second.wait(60)
    assert second.returncode == 0, told
    assert "does not answer" in told
    (job,) = [job for job in cluster.jobs() if job.startswith("peftsearch-outlives-")]
    assert cluster.jobs()[job] == "SUCCEEDED"
    # Nothing of the log is missing, and nothing is there twice.
    request = urllib.request.Request(f"{cluster.url}/api/jobs/{job}/logs", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert begin + out == json.load(answer)["logs"]

    assert Study.open("outlives", storage).facts().provenance["git_commit"] == commit
    front = cluster.run("frontier", "outlives", "--json", "--storage", storage)
    assert json.loads(front.stdout)["domains"]["topics"]["counts"]["complete"] == 7
    status = json.loads(cluster.run("status", "outlives", "--json", "--storage", storage).stdout)
    assert status["state"] == "finished"
    exported = cluster.run("export", "outlives", "--storage", storage, "--to", tmp_path / "adapters", "--pick", "best")
    assert exported.returncode == 0, exported.stderr

    # A study that has finished is continued by a new job, which has nothing to do.
    before = Study.open("outlives", storage).trials()
    again = cluster.run(*command, cluster.url)
    assert again.returncode == 0, again.stderr
    assert Study.open("outlives", storage).trials() == before
    assert len([job for job in cluster.jobs() if job.startswith("peftsearch-outlives-")]) == 2


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_is_stopped_cleanly_and_continued(
    cluster: Cluster, travelling_study: Callable[..., Path], tmp_path: Path
) -> None:
    path, storage = travelling_study("stopped", trials=8), tmp_path / "storage"
    command = ("submit", path, "--storage", storage, "--address", cluster.url)
    assert cluster.run(*command, "--no-follow").returncode == 0
    follower = cluster.start(*command)
    wait_for_trials("stopped", storage, 2)
    stopping = cluster.run(*command, "--stop")
    assert stopping.returncode == 0, stopping.stderr
    out, told = follower.communicate(timeout=300)
    assert follower.returncode == 130
    assert "was stopped" in told
    assert "Everything so far is recorded" in out
    assert json.loads(cluster.run("status", "stopped", "--json", "--storage", storage).stdout)["state"] == "interrupted"
    done = [record.number for record in Study.open("stopped", storage).trials() if record.state == "COMPLETE"]
    assert 2 <= len(done) < 8

    nothing = cluster.run(*command, "--stop")
    assert nothing.returncode == 2
    assert "no job of the study 'stopped' runs" in one_sentence(nothing)

    assert cluster.run(*command).returncode == 0
    records = Study.open("stopped", storage).trials()
    assert [record.number for record in records] == list(range(8))
    assert all(record.state == "COMPLETE" for record in records)


@pytest.mark.slow
@pytest.mark.ray
def test_what_is_wrong_ends_with_one_sentence_and_status_2(
    cluster: Cluster, travelling_study: Callable[..., Path], tmp_path: Path
) -> None:
    path, storage = travelling_study("refused", trials=1), tmp_path / "storage"
    command = ("submit", path, "--storage", storage, "--address")

    # Here: the study file, before anything is sent.
    done = cluster.run(*command, cluster.url, "--set", "search.trials=none")
    assert done.returncode == 2
    assert "search.trials" in one_sentence(done)
    # There: an absolute path is the cluster's, and the driver says what it finds.
    done = cluster.run(*command, cluster.url, "--set", "domains.topics.data.source=/nowhere/topics.csv")
    assert done.returncode == 2, done.stderr
    assert "/nowhere/topics.csv" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    # The token.
    done = cluster.run(*command, cluster.url, RAY_AUTH_TOKEN=None)
    assert done.returncode == 2
    assert "asks for a token and none was shown" in one_sentence(done)
    for address in (cluster.url, f"127.0.0.1:{cluster.gcs}"):
        done = cluster.run(*command, address, RAY_AUTH_TOKEN="f" * 64)
        assert done.returncode == 2
        assert "does not accept the token" in one_sentence(done)
    done = cluster.run("run", path, "--storage", storage, "--address", f"127.0.0.1:{cluster.gcs}", RAY_AUTH_MODE=None,
                       RAY_AUTH_TOKEN=None)  # fmt: skip
    assert done.returncode == 2
    assert "asks for a token and none was shown" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    # Nobody there.
    done = cluster.run(*command, f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert "cannot reach a Ray cluster" in one_sentence(done)
    done = cluster.run(*command, f"127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert "cannot reach a Ray cluster" in one_sentence(done)
    # A token in the user's home is found without being asked for.
    (cluster.home / ".ray").mkdir(exist_ok=True)
    (cluster.home / ".ray" / "auth_token").write_text(TOKEN)
    try:
        done = cluster.run(*command, cluster.url, "--stop", RAY_AUTH_MODE=None, RAY_AUTH_TOKEN=None)
        assert "no job of the study 'refused' runs" in one_sentence(done)
    finally:
        shutil.rmtree(cluster.home / ".ray")


# --- what travels, and what is asked of the cluster's shell ---


def load(folder: Path, **sections: Any) -> StudyFile:
    document = {
        "name": "tiny",
        "model": "./model",
        "domains": {"topics": {"data": {"source": "topics.csv"}}},
        "methods": {"lora": {}},
        **sections,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(document))
    return StudyFile.load(folder / "study.yaml")


def opened(folder: Path, storage: Path) -> Study:
    """The study ``tiny`` from its file, with its data beside it."""
    (folder / "topics.csv").touch()
    load(folder, model="some/hub-id")
    return Study.from_file(folder / "study.yaml", storage=storage)


def test_files_that_are_named_relative_to_the_study_travel_and_no_others(tmp_path: Path) -> None:
    studies = tmp_path / "work" / "studies"
    named = ("data/train.csv", "data/dev.csv", "data/general.csv", "studies/model/config.json", "other.csv")
    for name in (f"work/{name}" for name in named):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (studies / "model" / ".gitignore").write_text("*\n")
    (studies / "private.csv").write_text("secret")
    data = {
        "train": "../data/train.csv",
        "validation": "../data/../data/dev.csv",
        "test": "/absolute/test.csv",
    }
    joined = {"a": {"source": "hub:some/thing"}, "b": {"source": "~/topics.csv"}}
    domains = {"one": {"data": data}, "two": {"data": {"join": joined}}}
    file = load(studies, domains=domains, forgetting={"source": "../data/general.csv", "column": "text"})
    root, names = package.shipped_files(file)
    assert root == tmp_path / "work"
    assert names[0] == "studies/study.yaml"
    assert sorted(names[1:]) == [
        "data/dev.csv",
        "data/general.csv",
        "data/train.csv",
        "studies/model/.gitignore",
        "studies/model/config.json",
    ]
    packed, again = tmp_path / "a.zip", tmp_path / "b.zip"
    package.pack(root, names, packed)
    os.utime(tmp_path / "work" / "data" / "dev.csv", (1, 1))
    package.pack(root, names, again)
    assert packed.read_bytes() == again.read_bytes()
    with closing(zipfile.ZipFile(packed)) as archive:
        assert archive.namelist() == names
        assert archive.read("data/train.csv") == b"work/data/train.csv"


def test_a_file_that_is_missing_or_too_large_is_said_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = load(tmp_path, model="some/hub-id")
    with pytest.raises(StudyError, match=r"study.yaml, line \d+: domains.topics.data.source: .*topics.csv"):
        package.shipped_files(file)
    (tmp_path / "topics.csv").write_text("x" * 2**21)
    assert package.shipped_files(file) == (tmp_path, ["study.yaml", "topics.csv"])
    monkeypatch.setattr(package, "SHIPPED_BYTES", 2**20)
    with pytest.raises(StudyError, match=r"2 MiB .*topics.csv.* at most 1 MiB travel .*absolute path"):
        package.shipped_files(file)
    with pytest.raises(StudyError, match=r"line \d+: model: no model folder './model'"):
        package.shipped_files(load(tmp_path))


PASSWORD = "hunter2hunter2"
LOGIN = f"postgresql://me:{PASSWORD}@database/ledger"


@pytest.mark.parametrize(
    ("text", "settings", "where"),
    [
        (f"tracking: {{ledger: '{LOGIN}'}}", [], r"study.yaml, line 6: tracking.ledger"),
        (f"# once {LOGIN}", [], r"study.yaml, line 6"),
        ('tracking: {mlflow: "http://me:hunter\\x32hunter2\\x40tracking"}', [], r"study.yaml, line 6: tracking.mlflow"),
        ("", [f"tracking.ledger={LOGIN}"], r"--set tracking.ledger"),
        ("", ["search.trials=2", f"description=from https://{PASSWORD}hunter2hunter2@hub/"], r"--set description"),
        ("", [f"tracking.ledger=postgresql://me@database/ledger?password={PASSWORD}"], r"--set tracking.ledger"),
    ],
)
def test_a_password_does_not_reach_rays_list_of_jobs(
    text: str, settings: list[str], where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What travels with a job can be read by everybody who may see the cluster's jobs."""
    (tmp_path / "topics.csv").touch()
    path = tmp_path / "study.yaml"
    lines = ["name: tiny", "model: some/hub-id", "domains:", "  topics: {data: {source: topics.csv}}"]
    path.write_text("\n".join([*lines, "methods: {lora: {}}", text, ""]))
    # An address that would be tried for long: the cluster is not asked before.
    command = ["submit", str(path), "--storage", str(tmp_path / "storage"), "--address", "http://192.0.2.1:8265"]
    for setting in settings:
        command += ["--set", setting]
    assert run_app(command) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"Error: {where}: holds a password or token, .*PGPASSWORD .*MLFLOW_TRACKING_PASSWORD", told), told
    assert "hunter" not in told
    assert not (tmp_path / "storage").exists()


def test_the_login_of_a_clusters_address_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy in front of the dashboard may ask for one."""
    path = tmp_path / "study.yaml"
    opened(tmp_path, tmp_path / "storage")

    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    for ending, status in ((interrupted, 130), (lambda *_, **__: 0, 0)):
        monkeypatch.setattr("peftsearch.submit.run_as_job", ending)
        command = ["submit", str(path), "--storage", str(tmp_path / "storage"), "--no-follow"]
        command += ["--address", f"http://me:{PASSWORD}@127.0.0.1:8265", "--set", f"description=token={PASSWORD}"]
        assert run_app(command) == status
        told = capsys.readouterr().err
        assert PASSWORD not in told
        assert "--address 'http://me:***@127.0.0.1:8265'" in told


def test_a_cluster_that_is_open_is_named_without_the_login_of_its_address() -> None:
    import ray

    class Dashboard(http.server.BaseHTTPRequestHandler):
        """What Ray's dashboard answers a client at first."""

        def do_GET(self) -> None:
            jobs = self.path == "/api/jobs/"
            answer = json.dumps([] if jobs else {"ray_version": ray.__version__, "ray_commit": "", "version": "4"})
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None:
            pass

    told: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as dashboard:
        threading.Thread(target=dashboard.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{dashboard.server_port}"
        server = JobServer(f"http://me:{PASSWORD}@{place}", told.append)
        dashboard.shutdown()
    assert told[0].startswith(f"anybody who reaches the Ray cluster at http://me:***@{place} can run code on it")
    with pytest.raises(ConnectionError, match=re.escape(f"http://me:***@{place}' does not answer")) as caught:
        server.jobs("peftsearch-")
    assert PASSWORD not in str(caught.value) + "".join(told)


def test_a_study_without_passwords_travels(tmp_path: Path) -> None:
    tracking = {"ledger": "postgresql://me@database/ledger", "mlflow": "https://tracking:5000/a?b=c"}
    asking = "Which is best? See http://h/a? Or mail me@home.org & others?"
    file = load(tmp_path, model="some/hub-id", tracking=tracking, description=asking)
    refuse_passwords(file, ["search.seed=1", "description=Which one?"])


def test_a_job_records_the_commit_of_the_study_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs from a copy that is in no repository; what is recorded is what a run on the laptop would record."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "topics.csv").touch()
    copy = Path(tempfile.mkdtemp(dir=tmp_path))
    file = load(tmp_path / "work" / "studies", model="some/hub-id", domains={"a": {"data": {"source": "hub:a/b"}}})
    assert SUBMITTED_COMMIT not in job_environment(file, None)

    commit = commit_all(tmp_path / "work")
    for recorded in (commit, f"{commit} (with uncommitted changes)"):
        with monkeypatch.context() as job:
            assert provenance(file.folder)["git_commit"] == recorded
            assert "git_commit" not in provenance(copy)
            for name, value in job_environment(file, None).items():
                job.setenv(name, value)
            assert provenance(copy)["git_commit"] == recorded
        (tmp_path / "work" / "topics.csv").write_text("changed")


def test_the_cluster_must_see_the_same_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = opened(tmp_path, tmp_path / "storage")
    told: list[str] = []
    mark = mark_storage(study, told.append)
    assert mark is not None
    assert not told
    check_arrival(study)
    assert mark.exists()
    monkeypatch.setenv(STORAGE_MARK, str(mark))
    check_arrival(study)
    assert not mark.exists()
    # Another folder of the same name.
    monkeypatch.setenv("PEFTSEARCH_STORAGE", "/shared/peftsearch")
    with pytest.raises(StudyError, match=r"does not see the folder .*storage of the machine.*/shared/peftsearch"):
        check_arrival(study)
    assert run_app(["run", str(tmp_path / "study.yaml"), "--storage", str(tmp_path / "storage")]) == 2


def test_the_jobs_command_survives_the_clusters_shell(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "peftsearch").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (programs / "peftsearch").chmod(0o755)
    storage = tmp_path / "it's a storage"
    study = opened(tmp_path, storage)
    line = job_command(study, "it's/study.yaml", ["search.seed=1; touch /tmp/x"])
    done = subprocess.run(
        ["/bin/sh", "-c", line], capture_output=True, text=True, env={"PATH": f"{programs}:/usr/bin:/bin"}
    )
    words = ["run", "./it's/study.yaml", "--name", "tiny", "--address", "auto", "--storage", str(storage)]
    assert done.stdout.splitlines() == [*words, "--set", "search.seed=1; touch /tmp/x"]


def test_a_storage_that_only_the_cluster_has_is_taken_with_a_word(tmp_path: Path) -> None:
    told: list[str] = []
    study = opened(tmp_path, tmp_path / "not" / "mounted" / "here")
    assert mark_storage(study, told.append) is None
    assert "work where it is mounted" in told[0]
    assert not (tmp_path / "not").exists()


def test_studies_of_the_same_name_in_other_storages_are_other_jobs(tmp_path: Path) -> None:
    here, there = (job_prefix(opened(tmp_path, tmp_path / name)) for name in ("a", "b"))
    assert here != there
    assert here.startswith("peftsearch-tiny-")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("Request failed with status code 502: Bad Gateway.", ConnectionError),
        ("Request failed with status code 503: <html>", ConnectionError),
        ("Request failed with status code 404: Not Found.", StudyError),
        ("Request failed with status code 400: no such job", StudyError),
    ],
)
def test_a_job_server_that_is_away_is_asked_again_and_one_that_refuses_is_not(
    answer: str, kind: type[Exception]
) -> None:
    def fails() -> None:
        raise RuntimeError(answer)

    server = object.__new__(JobServer)
    server.address = "http://127.0.0.1:8265"
    with pytest.raises(kind, match=r"127\.0\.0\.1:8265"):
        server._asked(fails)
