"""The documentation's commands, typed as they stand there, beside a finished study that has the names they use."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import CHROMIUM
from documented import BLOCKS, ROOT, VERBS, Block, examples, named_commands
from trained_study import CONFIGURATIONS, document, lively_base, train_study

from peftsearch.cli.app import run_app
from peftsearch.study import Study

pytestmark = pytest.mark.slow

RUN_ELSEWHERE = {
    "run": "needs Ray: below, with the README's study",
    "submit": "needs a cluster: tests/cluster/test_cluster_runs.py and tests/cli/test_submit.py submit to a real one",
    "ui": "serves until it is stopped: tests/tracking/test_live_pages.py asks it for its pages",
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
            if found:
                yield str(block), found
            done |= {re.sub(r"\bNAME\b", STUDY, " ".join(shlex.split(line, comments=True))) for line in found}
    for line in examples():
        if is_ours(line) and line not in done:
            done.add(line)
            yield f"--help of {line.split()[1]}", (line,)
    for where, line in named_commands():
        text = re.sub(r"\bNAME\b", STUDY, line)
        if is_ours(line) and text not in done and not re.search(r"\[|\.\.\.|STUDY|_DIR|\b(F|D|DIR|FILE)\b", line):
            done.add(text)
            yield where, (line,)


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
def test_python_runs_as_it_stands(block: Block, here: Path) -> None:
    # `run` needs Ray, and the study is finished: its fronts are there.
    code = block.text.replace("study.run()", "study.frontier()")
    exec(compile(ast.parse(code), str(block), "exec"), {})


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
