"""The documentation's commands, typed as they stand there, beside a finished study that has the names they use."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import CHROMIUM
from documented import BLOCKS, ROOT, VERBS, Block, examples, is_call, named_commands
from test_ui_hosts import free_port
from tracking_study import wait_for
from trained_study import CONFIGURATIONS, document, lively_base, train_study

from peftsearch.cli.app import run_app
from peftsearch.study import Study

pytestmark = pytest.mark.slow

RUN_ELSEWHERE = {
    "run": "needs Ray: below, with the README's study",
    "submit": "needs a cluster: tests/cluster/test_cluster_runs.py and tests/cli/test_submit.py submit to a real one",
    "ui": "serves until it is stopped: below, for pictures; tests/tracking/test_live_pages.py asks it for its pages",
}
"""Commands that no line of the documentation runs here, and where they are run."""
STORAGES = ("/shared/peftsearch", "s3://BUCKET/peftsearch", "/data/peftsearch")
"""Of the documentation; here the study is in the test's. tests/storage has studies in an object store."""
WRITING = {"--html", "--png", "--csv", "--parquet", "--to", "--output", ">"}
"""What stands before the name of a file or folder that is written; none of them is there before."""
STUDY = "quickstart"
SMALL = [
    *("search.trials=1", "training.epochs=0.3", "training.evaluations=2", "training.max_length=16", "confirm.seeds=1"),
    *("confirm.max_finalists=1", "resources.slots=1", "resources.cpus_per_worker=1", "tracking.mlflow=off"),
]
"""What makes the README's study one of a minute: fewer trials and seeds, shorter texts."""


@pytest.fixture(scope="module")
def desk(tiny_base: Path, topics_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the documentation's commands name, and a storage with the study."""
    folder = tmp_path_factory.mktemp("desk") / "desk"
    (folder / "studies").mkdir(parents=True)
    base = roomy(lively_base(tiny_base, folder / "my-encoder"))
    shutil.copy(topics_csv, folder / "studies" / "topics.csv")
    small = document(STUDY, str(base), topics_csv, {"clinical": "adapter", "legal": "lora"})
    small["tracking"] = {"mlflow": "auto"}
    trials = {"clinical": ("adapter", CONFIGURATIONS["adapter"]), "legal": ("lora", CONFIGURATIONS["lora"])}
    storage = folder / "storage"
    study = train_study(small, folder / "studies", storage, trials)
    study.sync()
    # As the driver says when it ends.
    (study.folder.path / "driver.json").write_text(json.dumps({"state": "finished"}))
    (folder / "studies" / "quickstart.yaml").write_text(yaml.safe_dump(small))
    (folder / "study.yaml").write_text(yaml.safe_dump({**small, "name": "study", "domains": moved(small["domains"])}))
    contracts = next(block.text for block in BLOCKS if block.text.startswith("name: contracts"))
    (folder / "contracts.yaml").write_text(contracts)
    lines = topics_csv.read_text().splitlines()
    (folder / "clauses.csv").write_text("\n".join(["clause,category,contract", *lines[1:]]) + "\n")
    (folder / "mine.csv").write_text("text\nthe party and the agreement\nacute fever\n")
    (folder / "tests").symlink_to(ROOT / "tests")
    (folder / "dashboards" / "pictures").mkdir(parents=True)
    return folder


def roomy(base: Path) -> Path:
    """With positions for the longest texts and prompts that the README's study asks for."""
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    config = AutoConfig.from_pretrained(base)
    model = AutoModelForMaskedLM.from_pretrained(base)
    embeddings = model.bert.embeddings.position_embeddings.weight.data
    config.max_position_embeddings = 4 * len(embeddings)
    larger = AutoModelForMaskedLM.from_config(config)
    state = model.state_dict() | {"bert.embeddings.position_embeddings.weight": embeddings.repeat(4, 1)}
    larger.load_state_dict(state)
    larger.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(base)
    return base


def moved(domains: dict[str, Any]) -> dict[str, Any]:
    """Domains of a study file in ``studies/``, for one that is a folder above."""
    return {
        name: {**domain, "data": {**domain["data"], "source": f"studies/{domain['data']['source']}"}}
        for name, domain in domains.items()
    }


@pytest.fixture(scope="module")
def adapters(desk: Path) -> Path:
    """The study's adapters, exported once."""
    Study.open(STUDY, desk / "storage").export(desk / "exported")
    return desk / "exported"


@pytest.fixture
def here(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder to work in."""
    folder = tmp_path / "here"
    shutil.copytree(desk, folder, symlinks=True, ignore=shutil.ignore_patterns("exported"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PEFTSEARCH_STORAGE", str(folder / "storage"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


@pytest.fixture
def type_in(here: Path, adapters: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Types a line; returns what it prints."""

    def call(line: str) -> str:
        line = re.sub(r"\bNAME\b", STUDY, line)
        for storage in STORAGES:
            line = line.replace(storage, str(here / "storage"))
        if ">" in line:
            # The program is beside this Python, in an environment that need not be activated.
            line = re.sub(r"^peftsearch", shlex.join([sys.executable, "-m", "peftsearch"]), line)
            subprocess.run(["bash", "-euc", line], check=True)
            return ""
        words = shlex.split(line, comments=True)
        if {"predict", "evaluate"} & set(words) and not (here / "adapters").exists():
            shutil.copytree(adapters, here / "adapters")
        words = [exported(word, here) for word in words]
        if words[0] == "python":
            done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout
        capfd.readouterr()
        status = run_app(words[1:])
        out, err = capfd.readouterr()
        # The doctor may find that this machine lacks something.
        assert status == 0 or words[1] == "doctor", err
        assert "Traceback" not in err
        return out

    return call


def exported(word: str, here: Path) -> str:
    """An adapter's folder: the documentation's has the number that the trial had there."""
    if not re.fullmatch(r"adapters/\w+/\d{5}-\w+", word):
        return word
    (folder,) = (here / word).parent.iterdir()
    return str(folder.relative_to(here))


def lines() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where lines stand, and those that are run here; what stands alone is run once, wherever else it stands."""
    done: set[str] = set()
    for block in BLOCKS:
        if block.language == "bash" and block.marker is None and "[--" not in block.text:
            found = tuple(line for line in block.lines() if is_ours(line))
            if in_the_background(block):
                # A test below runs all of it.
                continue
            if found:
                yield str(block), found
            done |= {re.sub(r"\bNAME\b", STUDY, " ".join(shlex.split(line, comments=True))) for line in found}
    for line in examples():
        if is_ours(line) and line not in done:
            done.add(line)
            yield f"--help of {line.split()[1]}", (line,)
    for where, line in named_commands():
        text = re.sub(r"\bNAME\b", STUDY, line)
        if (
            is_ours(line)
            and is_call(line)
            and text not in done
            and not re.search(r"\[|\.\.\.|STUDY|_DIR|\b(F|D|DIR|FILE)\b", line)
        ):
            done.add(text)
            yield where, (line,)


def in_the_background(block: Block) -> bool:
    """Whether a server runs beside the block's other lines."""
    return any(line.endswith(" &") for line in block.lines())


def is_ours(line: str) -> bool:
    """Whether a line is run here: a command of peftsearch that ends by itself, or the script that makes pictures."""
    words = line.split()
    program = Path(words[0]).name
    if program == "python":
        return words[1] == "tests/screenshot.py"
    return program == "peftsearch" and words[1] in VERBS and words[1] not in RUN_ELSEWHERE


@pytest.mark.parametrize(("where", "typed"), [pytest.param(*item, id=item[0]) for item in lines()])
def test_the_lines_do_what_they_say(
    where: str, typed: tuple[str, ...], here: Path, type_in: Callable[[str], str]
) -> None:
    for line in typed:
        if line.startswith("python tests/screenshot.py") and CHROMIUM is None:
            continue
        words = shlex.split(line, comments=True)
        targets = [here / words[index + 1] for index, word in enumerate(words) if word in WRITING]
        shown = type_in(line.removeprefix(".venv/bin/"))
        assert all(target.exists() and target.stat().st_size for target in targets), f"{where}: {line}"
        if "--json" in words:
            json.loads(shown)


def test_every_command_is_run_somewhere() -> None:
    run = {line.split()[1] for _, typed in lines() for line in typed if not line.startswith("python")}
    assert set(VERBS) == run | set(RUN_ELSEWHERE)
    assert not run & set(RUN_ELSEWHERE)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_runs_as_it_stands(block: Block, here: Path, type_in: Callable[[str], str]) -> None:
    # `run` needs Ray, and the study is finished: its fronts are there.
    code = block.text.replace("study.run()", "study.frontier()")
    if "mlflow" not in code:
        exec(compile(ast.parse(code), str(block), "exec"), {})
        return
    import mlflow

    # As the sentences before the blocks say.
    told = json.loads(type_in("peftsearch status NAME --json"))
    if "models:/" in code:
        (registering,) = (line for _, line in named_commands() if line.endswith("--register"))
        type_in(registering)
    try:
        names = {"uri": told["mlflow_tracking_uri"], "experiment": told["mlflow_experiment"]}
        exec(compile(ast.parse(code), str(block), "exec"), names)
    finally:
        mlflow.set_tracking_uri(None)


def block_with(text: str) -> Block:
    (found,) = (block for block in BLOCKS if block.language == "bash" and text in block.text)
    return found


def on_port(port: int, text: str) -> str:
    """A block with its server at a free port: those of the documentation may be taken here."""
    text = re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{port}", text)
    return re.sub(r"^(peftsearch ui|optuna-dashboard \S+)", rf"\1 --port {port}", text, flags=re.MULTILINE)


@contextmanager
def in_bash(text: str, here: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Lines typed into a real bash, in a home with the default storage; what they have started ends with the block.

    Their output is in ``here / "bash.log"``.
    """
    programs = here / "programs"
    programs.mkdir(exist_ok=True)
    for name, arguments in {"peftsearch": "-m peftsearch", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    home = here / "home"
    if not home.exists():
        home.mkdir()
        (home / "peftsearch").symlink_to(here / "storage")
    # Other programs of pip packages are beside this Python, in an environment that need not be activated.
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    with (here / "bash.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", re.sub(r"\bNAME\b", STUDY, text)],
            env={**os.environ, "HOME": str(home), "PATH": path, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                # A group is there until its last member has been waited for.
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=60) as answer:
        return json.load(answer)


def need(program: str) -> None:
    if shutil.which(program, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])) is None:
        pytest.skip(f"{program} is not installed")


def test_optuna_dashboard_shows_the_ledger_when_called_as_it_is_written(here: Path) -> None:
    need("optuna-dashboard")
    address = f"http://127.0.0.1:{(port := free_port())}/api/studies"
    with in_bash(on_port(port, block_with("optuna-dashboard").text), here) as process:
        wait_for(address, process)
        shown = {item["study_name"] for item in get(address)["study_summaries"]}
    # STUDY/DOMAIN/METHOD/MODEL, where the model is a folder here.
    assert {"/".join(name.split("/")[:3]) for name in shown} >= {f"{STUDY}/legal/lora", f"{STUDY}/clinical/adapter"}


def test_prometheus_finds_what_studies_name_when_called_as_it_is_written(here: Path) -> None:
    need("prometheus")
    with in_bash(block_with("mkdir").text, here) as process:
        assert process.wait(60) == 0
    targets = here / "storage" / "prometheus"
    (targets / "quickstart.json").write_text('[{"targets": ["127.0.0.1:9"]}]')
    # As the sentence says: the folder in the place of the container's.
    config = (ROOT / "dashboards" / "prometheus" / "prometheus.yml").read_text()
    (here / "dashboards" / "prometheus").mkdir()
    (here / "dashboards" / "prometheus" / "prometheus.yml").write_text(config.replace("/targets", str(targets)))
    address = f"http://127.0.0.1:{(port := free_port())}"
    with in_bash(on_port(port, block_with("prometheus --config").text), here) as process:
        wait_for(f"{address}/-/ready", process)
        deadline = time.monotonic() + 60
        found: list[str] = []
        while not found and time.monotonic() < deadline:
            found = [item["labels"]["instance"] for item in get(f"{address}/api/v1/targets")["data"]["activeTargets"]]
            time.sleep(0.3)
    assert found == ["127.0.0.1:9"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_pictures_are_made_by_their_commands(here: Path) -> None:
    from mlflow import MlflowClient

    runs = MlflowClient(Study.open(STUDY, here / "storage").status()["mlflow_tracking_uri"]).search_runs(["1"])
    domain = next(run.info.run_id for run in runs if "peftsearch.number" not in run.data.tags)
    block = block_with("peftsearch ui &")
    text = on_port(port := free_port(), block.text)
    words = [word for line in block.lines() for word in shlex.split(line)]
    pictures = [here / after for word, after in itertools.pairwise(words) if word in ("--to", "--png")]
    assert len(pictures) == 4
    with in_bash(text, here, RUN=domain) as process:
        assert process.wait(580) == 0, (here / "bash.log").read_text()[-3000:]
        for picture in pictures:
            assert picture.read_bytes().startswith(b"\x89PNG"), picture
        # The last line has ended the server.
        deadline = time.monotonic() + 60
        with suppress(OSError):
            while time.monotonic() < deadline:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
                time.sleep(0.3)
            pytest.fail("the server is still there")


def test_the_readmes_study_can_be_planned(type_in: Callable[[str], str]) -> None:
    shown = type_in("peftsearch validate contracts.yaml")
    for method in ("lora", "adapter", "prompt", "hybrid", "full"):
        assert method in shown


@pytest.mark.ray
def test_the_readmes_study_runs(here: Path) -> None:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    command = [sys.executable, "-m", "peftsearch", "run", "contracts.yaml", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    study = Study.open("contracts", here / "storage")
    assert study.status()["state"] == "finished"
    states = {trial.method: trial.state.value for trial in study.trials()}
    assert states == dict.fromkeys(("lora", "adapter", "prompt", "hybrid", "full"), "COMPLETE")
    assert any(trial.confirmed for trial in study.trials())
