"""The study files of the published systems: every one is checked whole without a network, and plans what it should."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftsearch.search.plan import plan_study
from peftsearch.spec import StudyFile, UnreachableError

STUDIES = Path(__file__).parents[2] / "studies"
FILES = sorted(STUDIES.glob("*.yaml"))
PUBLISHED = [path for path in FILES if path.stem != "quickstart"]

# One process for all, because the libraries take longer to import than most files to check.
VALIDATE = """
import io, json, sys
from rich.console import Console
from peftsearch.cli.plan import print_plan
from peftsearch.study import Study

for path in sys.argv[2:]:
    study = Study.from_file(path, storage=sys.argv[1])
    plan = study.validate()
    out = io.StringIO()
    print_plan(Console(file=out, soft_wrap=True), study, plan)
    counts = {
        f"{item.cell.method} {item.cell.model}": [item.smallest.trainable, item.largest.trainable]
        for item in plan.cells
    }
    print(json.dumps({"path": path, "printed": out.getvalue(), "unchecked": plan.unchecked, "counts": counts}))
"""


def offline(**extra: str) -> dict[str, str]:
    """An environment in which nothing outside can be reached, whatever the machine can reach."""
    nowhere = "http://127.0.0.1:9"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), nowhere)
    return {**os.environ, **proxies, "no_proxy": "", "NO_PROXY": "", "OMP_NUM_THREADS": "1", **extra}


def validated(files: list[Path], storage: Path) -> dict[str, dict[str, Any]]:
    """What validate says of study files, by the file's name."""
    done = subprocess.run(
        [sys.executable, "-c", VALIDATE, str(storage), *map(str, files)],
        env=offline(HF_HUB_OFFLINE="1", HF_HOME=str(storage / "hub")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    return {Path(each["path"]).stem: each for each in said}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return validated(FILES, tmp_path_factory.mktemp("storage"))


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_validate_passes_without_a_network(plans: dict[str, dict[str, Any]], path: Path) -> None:
    said = plans[path.stem]
    assert f"{StudyFile.load(path).spec.name} is a valid study" in said["printed"]
    if path.stem == "quickstart":
        assert not said["unchecked"]
        return
    spec = StudyFile.load(path).spec
    # Which, why, and what it means: one sentence for each model, each domain and the general text.
    assert len(said["unchecked"]) == len(spec.models) + len(spec.domains) + (spec.forgetting is not None)
    assert all(sentence in said["printed"] for sentence in said["unchecked"])
    for model in spec.models:
        assert any(sentence.startswith(f"Model {model.path}: ") for sentence in said["unchecked"])
    # Everything is counted all the same, and memory and hours are estimated, saying on what.
    assert len(said["counts"]) == len(spec.models) * len(spec.methods)
    assert "of GPU memory per worker" in said["printed"]
    assert "GPU hours" in said["printed"] or "on this machine" in said["printed"]


@pytest.mark.slow
def test_measured_studies_are_valid_where_neither_their_data_nor_their_model_is(tmp_path: Path) -> None:
    files = sorted((STUDIES / "measured").glob("*.yaml"))
    assert len(files) == 13
    # Beside this copy there is no ../shared/data.
    copies = [Path(shutil.copy(path, tmp_path)) for path in files]
    for name, said in validated(copies, tmp_path / "storage").items():
        spec = StudyFile.load(tmp_path / f"{name}.yaml").spec
        assert spec.name == name
        assert any("is not here; planned with what 'expected' says" in sentence for sentence in said["unchecked"])
        assert len(said["counts"]) == len(spec.methods) >= 3
        assert spec.confirm.seeds == 3


@pytest.mark.slow
def test_parameters_of_flan_t5(plans: dict[str, dict[str, Any]]) -> None:
    # Ranks of 16 on query and value, cross-attention included; prompts of 20 tokens (arXiv 2603.21970; by formula).
    golden = {"small": (688_128, 20_480), "base": (1_769_472, 30_720), "large": (4_718_592, 40_960)}
    for size, (lora, prompt) in golden.items():
        counts = plans[f"flan-t5-pubmed-as-published-{size}"]["counts"]
        assert counts[f"lora google/flan-t5-{size}"] == [lora, lora]
        assert counts[f"prompt google/flan-t5-{size}"] == [prompt, prompt]
    # Rank 4 on q,v to rank 64 on q,k,v,o: a quarter of 1,769,472, and eight times as much.
    variants = plans["flan-t5-pubmed-variants"]["counts"]
    assert variants["lora google/flan-t5-base"] == [442_368, 14_155_776]
    # Encoder and decoder have soft tokens of their own.
    assert variants["prompt google/flan-t5-base"] == [2 * 8 * 768, 2 * 50 * 768]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_head_says_how_to_run_it_and_what_it_needs(path: Path) -> None:
    head = path.read_text().partition("\nname:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for words in (f"peftsearch run studies/{path.name}", "# Needs (estimated by", "# Data", "# Not checked where"):
        assert words in head
    spec = StudyFile.load(path).spec
    assert spec.name == path.stem
    assert spec.confirm.seeds >= 3
    for domain in spec.domains.values():
        parts = [domain.data] if domain.data.join is None else list(domain.data.join.values())
        assert all(part.expected is not None for part in parts)
    assert all(model.config is not None for model in spec.models)


def test_equal_budgets_where_methods_are_compared() -> None:
    for path in PUBLISHED:
        methods = StudyFile.load(path).spec.methods
        own = [name for name, method in methods.items() if method.training.model_dump(exclude_none=True)]
        assert bool(own) == path.stem.startswith(("flan-t5-pubmed-as-published", "flan-t5-pubmed-variants")), path.stem


def test_a_run_needs_what_validate_could_not_check(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "peftsearch", "run", str(STUDIES / "xlmr-mimic.yaml"), "--storage", str(tmp_path)],
        env=offline(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot load the model 'FacebookAI/xlm-roberta-base': the Hub cannot be reached from here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "studies" / "xlmr-mimic").exists()


def test_ones_own_data_may_be_missing_only_where_the_file_says_what_to_expect(tiny_base: Path, tmp_path: Path) -> None:
    def study(**data: Any) -> StudyFile:
        domains = {"own": {"data": {"source": "notes.csv", **data}}}
        return StudyFile({"name": "own", "model": str(tiny_base), "domains": domains, "methods": {"full": {}}})

    plan = plan_study(study(expected={"train": 100, "labels": 3}), tmp_path, partial=True)
    assert plan.domains["own"].rows == {"train": 70, "validation": 15, "test": 15}
    assert len(plan.domains["own"].labels) == 3
    assert plan.unchecked == (
        "Data of own: 'notes.csv' is not here; planned with what 'expected' says of it; its rows, columns and labels "
        "are unchecked.",
    )
    with pytest.raises(UnreachableError, match="no file or folder 'notes"):
        plan_study(study(expected={"train": 100}), tmp_path)
    with pytest.raises(ValueError, match="no file or folder 'notes") as refused:
        plan_study(study(), tmp_path, partial=True)
    assert not isinstance(refused.value, UnreachableError)


def test_a_configuration_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    def study(**config: Any) -> StudyFile:
        model = {"path": "./not-here", "config": config}
        domains = {"own": {"data": {"source": "notes.csv", "expected": {"train": 10}}}}
        return StudyFile({"name": "own", "model": model, "domains": domains, "methods": {"full": {}}})

    with pytest.raises(ValueError, match="no architecture 'bort'; did you mean 'bert'"):
        plan_study(study(model_type="bort"), tmp_path, partial=True)
    with pytest.raises(ValueError, match="a bert has no setting 'hiden_size'; did you mean 'hidden_size'"):
        plan_study(study(model_type="bert", hiden_size=8), tmp_path, partial=True)


def test_a_silent_network_is_noticed_once_and_soon(tmp_path: Path) -> None:
    # A proxy that takes the connection and never answers, which is what a firewall often looks like.
    script = """
import socket, time
server = socket.create_server(("127.0.0.1", 0))
import os
address = f"http://127.0.0.1:{server.getsockname()[1]}"
os.environ.update({name: address for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")})
from transformers import AutoConfig
from peftsearch.domains.models import model_config
from peftsearch.spec import UnreachableError
began = time.monotonic()
for name in ("google/flan-t5-small", "google/flan-t5-base"):
    try:
        model_config(name, None)
    except UnreachableError as error:
        assert error.why == "the Hub cannot be reached from here", error.why
    else:
        raise SystemExit("not noticed")
print(time.monotonic() - began)
"""
    environment = offline(HF_HOME=str(tmp_path))
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 15


# --- the commands in the heads that convert data ---


def run_head(path: Path, folder: Path) -> None:
    """Run the ``python -c`` command in the head of a study file, in a folder."""
    lines = [line.removeprefix("#") for line in path.read_text().partition("\nname:")[0].splitlines()]
    first = next(number for number, line in enumerate(lines) if line.rstrip().endswith('python -c "'))
    indent = len(lines[first]) - len(lines[first].lstrip())
    last = next(number for number in range(first + 1, len(lines)) if lines[number].strip() == '"')
    command = "\n".join(line[indent:] for line in lines[first : last + 1])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cuad(folder: Path) -> None:
    answers = [{"text": "ACME Inc.", "answer_start": 3}, {"text": "Bolt Ltd.", "answer_start": 20}]
    questions = [
        {"id": "Deal A__Parties", "question": "?", "answers": answers, "is_impossible": False},
        {"id": "Deal A__Exclusivity", "question": "?", "answers": [], "is_impossible": True},
    ]
    document = {"data": [{"title": "Deal A", "paragraphs": [{"context": "...", "qas": questions}]}]}
    (folder / "studies/data/cuad").mkdir(parents=True)
    for name in ("train_separate_questions.json", "test.json"):
        (folder / "studies/data/cuad" / name).write_text(json.dumps(document))
    run_head(STUDIES / "xlmr-cuad.yaml", folder)
    rows = read_lines(folder / "studies/data/cuad/clauses.jsonl")
    assert len(rows) == 4
    assert rows[0] == {"text": "ACME Inc.", "label": "Parties", "contract": "Deal A"}


def mimic(folder: Path) -> None:
    (folder / "studies/data/mimic-iii").mkdir(parents=True)
    with (folder / "NOTEEVENTS.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ROW_ID", "SUBJECT_ID", "CATEGORY", "ISERROR", "TEXT"])
        for patient in range(300):
            writer.writerow([patient, patient, "Nursing ", "", f"line one\nline two of {patient}"])
            writer.writerow([patient, patient, "Nursing ", "1", "written by mistake"])
    run_head(STUDIES / "xlmr-mimic.yaml", folder)
    with (folder / "studies/data/mimic-iii/notes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert 1 <= len(rows) <= 40
    assert {row["CATEGORY"] for row in rows} == {"Nursing"}
    assert all(row["TEXT"].startswith("line one\n") for row in rows)


def hoc(folder: Path) -> None:
    (folder / "studies/data/linkbert/data/seqcls/HoC_hf").mkdir(parents=True)
    on = [[0] * 10 for _ in range(3)]
    on[0][0] = on[1][0] = on[1][9] = 1
    rows = [
        {"id": "123_s0", "sentence": "One.", "label": on[0]},
        {"id": "123_s1", "sentence": "Two.", "label": on[1]},
        {"id": "456_s0", "sentence": "Three.", "label": on[2]},
    ]
    for split in ("train", "dev", "test"):
        path = folder / f"studies/data/linkbert/data/seqcls/HoC_hf/{split}.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_head(STUDIES / "blurb.yaml", folder)
    assert read_lines(folder / "studies/data/blurb/hoc/dev.jsonl") == [
        {"text": "One. Two.", "labels": ["activating invasion and metastasis", "tumor promoting inflammation"]},
        {"text": "Three.", "labels": []},
    ]


def phrasebank(folder: Path) -> None:
    (folder / "studies/data/finance").mkdir(parents=True)
    (folder / "Sentences_AllAgree.txt").write_bytes(
        "Café sales rose, to 5 @ 6 .@positive\r\nNo change.@neutral\n".encode("latin-1")
    )
    run_head(STUDIES / "finance.yaml", folder)
    with (folder / "studies/data/finance/phrasebank.csv").open(newline="") as file:
        assert [(row["text"], row["label"]) for row in csv.DictReader(file)] == [
            ("Café sales rose, to 5 @ 6 .", "positive"),
            ("No change.", "neutral"),
        ]


def tldr(folder: Path) -> None:
    (folder / "studies/data/scitldr/SciTLDR-Data/SciTLDR-A").mkdir(parents=True)
    row = {"source": ["We do it.", "It works."], "target": ["It works.", "Done."], "paper_id": "x"}
    for split in ("train", "dev", "test"):
        (folder / f"studies/data/scitldr/SciTLDR-Data/SciTLDR-A/{split}.jsonl").write_text(json.dumps(row) + "\n")
    run_head(STUDIES / "science-tldr.yaml", folder)
    assert read_lines(folder / "studies/data/scitldr/test.jsonl") == [
        {"document": "We do it. It works.", "summary": "It works."}
    ]


@pytest.mark.parametrize("conversion", [cuad, mimic, hoc, phrasebank, tldr], ids=lambda each: each.__name__)
def test_commands_that_convert_data(tmp_path: Path, conversion: Callable[[Path], None]) -> None:
    conversion(tmp_path)
