"""What can be run here of cluster/ is run: Ray on two nodes, databases, MLflow's host check, installation, Slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_files import CLUSTER, ROOT, compose, kubernetes, launched, of_kind, project_version, shell_blocks
from postgres_server import PostgresServer, free_port, remove, start_server

README = (CLUSTER / "README.md").read_text()


def readme_block(*words: str) -> str:
    """The README's shell block with these words."""
    (block,) = [block for block in shell_blocks(README) if all(word in block for word in words)]
    return block


# Ray


def namespaces() -> list[str]:
    """A command prefix that gives a process network, mounts and process numbers of its own.

    The latter because Ray stops processes by their names: all of a machine's, whoever started them. And nothing of what
    runs inside outlives the command.
    """
    command = [
        "unshare",
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--propagation",
        "private",
    ]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make network namespaces")
    return command


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PEFTSEARCH_"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "5",
        **more,
    }


def in_the_table(port: int, row: str) -> bool:
    """Whether a row of the README's table of ports, such as ``6380 to 6385``, has a port."""
    first, _, last = row.partition(" to ")
    return int(first) <= port <= int(last) if last else port in {int(item) for item in row.split(", ")}


@pytest.mark.ray
@pytest.mark.slow
def test_the_launcher_files_commands_start_a_head_and_a_worker_that_ask_for_the_token() -> None:
    config = launched("on-premises.yaml")

    def start(part: str) -> str:
        (command,) = [command for command in config[part] if "ray start" in command]
        # The file is Ray's own copy of the launcher file, which only `ray up` writes.
        return command.replace("~/peftsearch-env/bin/", "").replace(
            "--autoscaling-config=~/ray_bootstrap_config.yaml", ""
        )

    for name in ("aws.yaml", "gcp.yaml"):
        for part in ("head_start_ray_commands", "worker_start_ray_commands"):
            assert launched(name)[part] == config[part], "the one run below stands for all three"
    done = subprocess.run(
        [*namespaces(), "bash", str(Path(__file__).parent / "two_nodes.sh")],
        env=environment(
            HEAD_COMMAND=f"{start('head_start_ray_commands')} --num-cpus=1",
            WORKER_COMMAND=f"{start('worker_start_ray_commands')} --num-cpus=1",
            TOKEN_COMMANDS=readme_block("get-auth-token"),
            ASK_COMMANDS=readme_block("request_resources"),
        ),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line and "-listens" not in line)
    assert {key: said.get(key) for key in ("token-mode", "nodes", "driver-without-token", "asked")} == {
        "token-mode": "600",
        "nodes": "2",
        "driver-without-token": "refused",
        "asked": "yes",
    }, done.stdout + done.stderr
    assert (said["http-without-token"], said["http-wrong-token"], said["http-with-token"]) == ("401", "403", "200")
    assert said["http-from-worker"] == "000", "the dashboard is reachable from another machine"

    rows = re.findall(r"^\| ([\d, to]+) \| (\w+)", README, re.MULTILINE)
    listening = re.findall(r"^(head|worker)-listens (\S+):(\d+)$", done.stdout, re.MULTILINE)
    assert len(listening) > 10
    for node, address, number in listening:
        port = int(number)
        assert any(in_the_table(port, row) for row, where in rows if where == "every" or (where == node and row)), (
            f"{node} listens on {address}:{port}, which the README's table lacks"
        )
        if port == 8265:
            assert address == "127.0.0.1"


SRUN = """#!/bin/bash
# Stands in for Slurm's: one node, this one.
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_finishes_as_a_slurm_job(tmp_path: Path, write_study: Any) -> None:
    study = write_study(methods={"lora": {}}, search={"trials": 2, "seed": 0})
    programs, home = tmp_path / "programs", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho localhost\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    storage = tmp_path / "storage"
    arguments = ["bash", str(CLUSTER / "slurm.sh"), str(study), str(storage), "--set", "search.trials=1"]
    # What pytest made is in /tmp; Ray's sockets, whose paths must be short, get a place that no other Ray knows.
    script = "ip link set lo up; mount -t tmpfs tmpfs /run; exec " + " ".join(arguments)

    def submit() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*namespaces(), "bash", "-c", script],
            env=environment(
                HOME=str(home),
                PATH=f"{programs}:{os.environ['PATH']}",
                SLURM_JOB_ID="4711",
                SLURM_JOB_NODELIST="localhost",
                SLURM_JOB_NUM_NODES="1",
                PEFTSEARCH_ENVIRONMENT=str(Path(sys.executable).parents[1]),
                RAY_TMPDIR="/run/ray",
            ),
            capture_output=True,
            text=True,
            timeout=500,
        )

    # Ray gives a node 30 seconds to start, which on two busy cores is not always enough: the same line again.
    for _ in range(4):
        done = submit()
        if "Ray did not start" not in done.stderr:
            break
        assert done.returncode == 1
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    command = ["peftsearch", "status", "tiny", "--json", "--storage", str(storage)]
    shown = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr + done.stdout[-3000:]
    status = json.loads(shown.stdout)
    assert status["state"] == "finished"
    assert status["counts"]["complete"] == 1
    assert not list((home / ".peftsearch").iterdir()), "the job's token is left behind"


# In place of Ray: runs what follows "--", as symmetric-run does on the first node.
RAY = """#!/bin/bash
while [[ $1 != -- ]]; do shift; done
shift
"$@"
"""
# In place of a study: asked to stop, it takes a second for its states; or had nothing left to do.
PEFTSEARCH = """#!/bin/bash
trap 'sleep 1; echo states >>{events}; exit {status}' TERM
echo running >>{events}
while true; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
if [ $1 = requeue ]; then echo "requeued $2" >>{events}; fi
echo localhost
"""


@pytest.mark.parametrize(
    ("driver", "does"),
    [
        (PEFTSEARCH.replace("{status}", "130"), ["states", "requeued 7"]),
        (PEFTSEARCH.replace("{status}", "0"), ["states"]),
        (None, ["requeued 7"]),
    ],
    ids=["stops", "ends", "Ray still starts"],
)
def test_a_slurm_job_that_runs_out_of_time_stops_the_study_and_goes_back_into_the_queue(
    driver: str | None, does: list[str], tmp_path: Path
) -> None:
    home, programs, events = tmp_path / "home", tmp_path / "bin", tmp_path / "events"
    (home / ".peftsearch").mkdir(parents=True)
    # What the same job left when it lost its node: a process of that number is another's.
    (home / ".peftsearch/token-7-driver").write_text("1")
    (home / ".peftsearch/token-7-ended").touch()
    programs.mkdir()
    waits = "#!/bin/bash\necho running >>{events}\nexec sleep 2\n"
    scripts = {"srun": SRUN, "scontrol": SCONTROL, "ray": RAY if driver else waits, "peftsearch": driver or waits}
    for name, text in scripts.items():
        (programs / name).write_text(text.replace("{events}", str(events)))
        (programs / name).chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    process = subprocess.Popen(
        ["bash", str(CLUSTER / "slurm.sh"), "study.yaml", str(tmp_path)],
        env=environment(
            HOME=str(home),
            PATH=f"{programs}:{os.environ['PATH']}",
            SLURM_JOB_ID="7",
            SLURM_JOB_NODELIST="localhost",
            SLURM_JOB_NUM_NODES="1",
            PEFTSEARCH_ENVIRONMENT=str(tmp_path),
        ),
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not (events.exists() and (driver is None or any(map(Path.read_text, home.glob(".peftsearch/*-driver"))))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    status = process.wait(30)
    assert events.read_text().splitlines() == ["running", *does]
    assert "requeued 7" in does or status == 0
    assert re.search(r"^#SBATCH --signal=B:USR1@\d+$", (CLUSTER / "slurm.sh").read_text(), re.MULTILINE)
    assert not list((home / ".peftsearch").iterdir()), "the job's token is left behind"


# Passwords, databases, MLflow


def test_passwords_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    command = [str(CLUSTER / "passwords.sh"), str(file)]
    subprocess.run(command, check=True, capture_output=True)
    assert file.stat().st_mode & 0o777 == 0o600
    values = dict(line.split("=") for line in file.read_text().splitlines())
    assert list(values) == re.findall(r"^(\w+)=$", (CLUSTER / "env.example").read_text(), re.MULTILINE)
    assert len({value for value in values.values() if re.fullmatch("[0-9a-f]{32}", value)}) == len(values)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "is there already" in again.stderr
    assert dict(line.split("=") for line in file.read_text().splitlines()) == values


@pytest.fixture(scope="module")
def databases() -> Iterator[PostgresServer]:
    """A PostgreSQL server on which databases.sh was run, as its image would."""
    server = start_server()
    try:
        subprocess.run(
            ["bash", str(CLUSTER / "kubernetes" / "databases.sh")],
            env=environment(
                PGHOST="127.0.0.1",
                PGPORT=str(server.port),
                PGPASSWORD=server.password,
                POSTGRES_USER="peftsearch",
                LEDGER_PASSWORD="led'ger $1",
                MLFLOW_PASSWORD='ml"flow',
            ),
            check=True,
            capture_output=True,
        )
        yield server
    finally:
        remove(server)


def test_ledger_and_mlflow_have_databases_of_their_own(databases: PostgresServer) -> None:
    import psycopg

    def connect(role: str, password: str, database: str) -> None:
        with psycopg.connect(
            host="127.0.0.1", port=databases.port, user=role, password=password, dbname=database
        ) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS t (x int)")

    connect("ledger", "led'ger $1", "ledger")
    connect("mlflow", 'ml"flow', "mlflow")
    for role, password, database in (
        ("ledger", "led'ger $1", "mlflow"),
        ("mlflow", 'ml"flow', "ledger"),
        ("ledger", "led'ger $1", "postgres"),
        ("ledger", 'ml"flow', "ledger"),
    ):
        with pytest.raises(psycopg.OperationalError):
            connect(role, password, database)


def test_a_study_keeps_its_ledger_in_that_database(databases: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftsearch.tracking import Ledger
    from peftsearch.tracking.ledger import LedgerCell

    # The README's URL: the password comes from libpq's own places.
    (url,) = set(re.findall(r"^ *ledger: (postgresql://\S+)$", README, re.MULTILINE))
    monkeypatch.setenv("PGPASSWORD", "led'ger $1")
    url = url.replace("127.0.0.1/", f"127.0.0.1:{databases.port}/")
    cell = LedgerCell("law/lora/tiny", "tiny", "law", "lora", "accuracy", "maximize")
    Ledger(url, "contracts", [cell])
    assert Ledger(url, "contracts").records == []


def ask(port: int, host: str, path: str = "/api/2.0/mlflow/experiments/search?max_results=1") -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def mlflow_arguments(source: str) -> list[str]:
    if source == "compose":
        return list(compose()["services"]["mlflow"]["command"])
    (deployment,) = of_kind(kubernetes(), "Deployment")
    return list(deployment["spec"]["template"]["spec"]["containers"][0]["args"])


@pytest.mark.slow
def test_the_mlflow_server_answers_under_its_own_names_only(databases: PostgresServer, tmp_path: Path) -> None:
    port = free_port()
    own = {item.partition("=")[0]: item.partition("=")[2] for item in mlflow_arguments("kubernetes")}
    # Compose's names are among those of Kubernetes; the rest of the two commands is the same (test_cluster_rules.py).
    (names,) = [item.partition("=")[2] for item in mlflow_arguments("compose") if "allowed-hosts" in item]
    assert set(names.split(",")) <= set(own["--allowed-hosts"].split(","))
    own |= {
        "--backend-store-uri": own["--backend-store-uri"].replace("postgres:5432", f"127.0.0.1:{databases.port}"),
        "--artifacts-destination": str(tmp_path / "artifacts"),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *(f"{key}={value}" for key, value in own.items())],
        env=environment(
            PGPASSWORD='ml"flow', MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true"
        ),
        stdout=(tmp_path / "log").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                # The kubelet asks by the pod's address.
                assert ask(port, "10.1.2.3:5000", "/health") == 200
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.5)
        for host in ("mlflow:5000", "mlflow.peftsearch.svc.cluster.local:5000", f"localhost:{port}", "127.0.0.1:15000"):
            assert ask(port, host) == 200, host
        for host in (
            "evil.example",
            "evil.example:5000",
            "10.1.2.3:5000",
            "mlflow:80",
            "mlflow",
            "mlflow.evil.example:5000",
        ):
            assert ask(port, host) == 403, host
        import mlflow

        client = mlflow.MlflowClient(f"http://127.0.0.1:{port}")
        run = client.create_run(client.create_experiment("contracts"))
        client.log_text(run.info.run_id, "a front", "front.txt")
        assert list((tmp_path / "artifacts").rglob("front.txt"))
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.kill()
        process.wait()


# Installation


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from just the files that the container file copies."""
    source = tmp_path_factory.mktemp("source")
    (stage,) = re.findall(r"AS wheel\n(.*?)\nRUN", (CLUSTER / "Dockerfile").read_text(), re.DOTALL)
    copied = [word for line in re.findall(r"^COPY (.*)$", stage, re.MULTILINE) for word in line.split()[:-1]]
    included = {
        line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().split("\n") if line.startswith("!")
    }
    assert included == set(copied)
    for name in copied:
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(place, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, source / name)
    command = readme_block("pip wheel").strip().replace("python3", sys.executable)
    subprocess.run(["bash", "-c", command], cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").iterdir()
    assert built.name == f"peftsearch-{project_version()}-py3-none-any.whl"
    return built


@pytest.mark.slow
def test_every_node_installs_the_same_and_only_once(wheel: Path, tmp_path: Path) -> None:
    home, constraints = tmp_path / "home", tmp_path / "shared" / "constraints.txt"
    home.mkdir()
    (home / ".bashrc").write_text("case $- in *i*) ;; *) return ;; esac\n")

    def install(**more: str) -> subprocess.CompletedProcess[str]:
        # Without dependencies: they are gigabytes. The rest is as on a node.
        return subprocess.run(
            ["bash", str(CLUSTER / "install.sh"), str(wheel), str(constraints)],
            env=environment(HOME=str(home), PIP_NO_DEPS="1", **more),
            capture_output=True,
            text=True,
        )

    first = install()
    assert first.returncode == 0, first.stderr
    assert f"Version: {project_version()}" in first.stdout
    assert (home / "peftsearch-env" / "bin" / "peftsearch").exists()
    # As if it had installed dependencies, of which it writes down the versions.
    (packages,) = (home / "peftsearch-env" / "lib").glob("python3*/site-packages")
    (packages / "demo-1.2.dist-info").mkdir()
    (packages / "demo-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: demo\nVersion: 1.2\n")
    assert install().returncode == 0
    assert constraints.read_text() == "demo==1.2\n"
    written = (home / ".bashrc").read_text()
    assert install().returncode == 0
    assert (home / ".bashrc").read_text() == written
    lines = written.splitlines()
    assert lines[:2] == [f'export PATH="{home}/peftsearch-env/bin:$PATH"', "export RAY_AUTH_MODE=token"]
    assert len(lines) == 3
    constraints.write_text("peftsearch==9.9\n")
    refused = install(PIP_FORCE_REINSTALL="1")
    assert refused.returncode != 0
    assert "No matching distribution found for peftsearch" in refused.stderr
