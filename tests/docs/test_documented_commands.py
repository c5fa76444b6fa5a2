"""Every command and every code block of the documentation: run here, or parsed by the program that it calls.

What cannot be run here is in the lists below, with the reason; a block that is in none of them fails.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documented import (
    BLOCKS,
    ROOT,
    VERBS,
    Block,
    alternatives,
    examples,
    is_call,
    named_commands,
    parsed,
    programs,
    spans,
)

from peftsearch.spec import StudyFile
from peftsearch.spec.yaml_file import parse_yaml

NOT_HERE = {
    "ray": "a cluster of several machines; tests/cluster checks the options, and runs two nodes in namespaces",
    "docker": "no Docker; tests/cluster checks the compose file and the Dockerfile",
    "kubectl": "no Kubernetes; tests/cluster checks the manifests against its schemas",
    "helm": "no Kubernetes",
    "aws": "no account",
    "gcloud": "no account",
    "sbatch": "no Slurm; tests/cluster runs the script with a stand-in for srun",
    "python3": "an installation, which needs the package index; .ci/run does the README's",
    "cluster/install.sh": "installs on all nodes; tests/cluster lints it",
    "cluster/passwords.sh": "writes cluster/.env; tests/cluster runs it on a copy",
}
OURS = {"peftsearch", "python", "ruff", "mypy"}
SHELL = {
    *("echo", "export", "umask", "chmod", "mkdir", "read", "kill", "od", "tr", "base64", "curl"),
    "random",
}
"""What the shell and every machine have; `random` is defined in its block. tests/cluster lints its blocks."""
SERVERS = {"prometheus", "optuna-dashboard"}
"""Of others; test_documented_runs.py starts them as it is written, where they are installed."""
DRAWINGS = {"driver: peftsearch run": "how the parts of a running study are nested"}
"""Blocks without a language, by their first line."""
PLACEHOLDERS = {
    **dict.fromkeys(("F", "FILE"), "mine.csv"),
    "N": "4",
    "X": "0.5",
    "MS": "20",
}
"""Values for what a synopsis leaves open, where its own word would not be one."""

BASH = [block for block in BLOCKS if block.language == "bash"]
PARTIAL = {"name": "part", "model": "m", "domains": {"d": {"data": {"source": "a.csv"}}}, "methods": {"lora": {}}}


def test_every_block_has_a_category() -> None:
    for block in BLOCKS:
        assert block.language in ("bash", "yaml", "json", "python", ""), f"{block}: nobody runs {block.language}"
        if block.language == "":
            first = block.text.splitlines()[0]
            assert first in DRAWINGS or is_tree(block), f"{block}: give it a language, or list it in DRAWINGS"


def is_synopsis(block: Block) -> bool:
    """A script's options in brackets; `test_our_scripts_understand_their_calls` reads it whole."""
    return block.text.startswith("python ") and "[" in block.text


@pytest.mark.parametrize("block", BASH, ids=str)
def test_every_line_calls_something_that_is_known(block: Block) -> None:
    if is_synopsis(block):
        return
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    if block.marker is not None:
        assert f"command_of {block.marker})" in (ROOT / ".ci" / "run").read_text(), f"{block}: CI does not run it"
        return
    for line in block.lines():
        for program in programs(line):
            name = Path(program).name if program.startswith(".venv/bin/") else program
            assert name in OURS | SHELL | SERVERS | set(NOT_HERE), f"{block}: {program}"


def test_the_lists_name_nothing_that_is_gone() -> None:
    shell = [block for block in BASH if not is_synopsis(block)]
    called = {program for block in shell for line in block.lines() for program in programs(line)}
    assert set(NOT_HERE) | SHELL | SERVERS <= called
    drawn = {block.text.splitlines()[0] for block in BLOCKS if block.language == ""}
    assert set(DRAWINGS) <= drawn


def calls() -> list[tuple[str, str]]:
    """Every call of peftsearch that is written anywhere, with where."""
    found = [(f"--help of {line.split()[1]}", line) for line in examples()]
    found += named_commands()
    for block in BASH:
        if block.marker is None:
            ours = [line for line in block.lines() if Path(line.split()[0]).name == "peftsearch"]
            found += [(str(block), line.removesuffix(" &")) for line in ours]
            # What `ray exec` and `kubectl exec` run over there.
            found += [(str(block), inside) for inside in re.findall(r"(?:'|-- )(peftsearch [^'\n]+)", block.text)]
    return found


@pytest.mark.parametrize(("where", "line"), calls())
def test_peftsearch_understands_every_call(where: str, line: str) -> None:
    if not is_call(line):
        # A command's name, and no call of it.
        assert line.split()[1] in VERBS or parsed(line)
        return
    for text in alternatives(line) if "[" in line else [line]:
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(text, comments=True)]
        words = words[: words.index(">")] if ">" in words else words
        parsed(shlex.join(words))


EVERYWHERE = {"--storage": "a sentence below the table says it of every command"}
"""Options that a command's row need not name, and why."""


@pytest.mark.parametrize("verb", VERBS)
def test_a_commands_row_names_its_options(verb: str) -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    synopses = [span for row in rows for span in re.findall(r"`([^`]+)`", re.split(r"(?<!\\)\|", row)[1])]
    (synopsis,) = (text for text in synopses if text.split()[0] == verb)
    named = set(re.findall(r"--[a-z-]+", synopsis))
    for parameter in VERBS[verb].params:
        words = {word for word in (*parameter.opts, *parameter.secondary_opts) if word.startswith("--")}
        assert not words or words & (named | set(EVERYWHERE)), f"{verb}: {' or '.join(sorted(words))}"


def test_every_picture_is_shown() -> None:
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "dashboards/README.md"))
    for picture in (ROOT / "dashboards" / "pictures").iterdir():
        assert f"pictures/{picture.name})" in pages, f"no page shows {picture.name}"


class _Parsed(Exception):
    pass


def scripts() -> list[tuple[str, str]]:
    found = []
    for block in BASH:
        lines = [" ".join(block.text.split())] if is_synopsis(block) else block.lines()
        found += [(str(block), line) for line in lines if line.startswith("python ")]
    return found


@pytest.mark.parametrize(("where", "line"), scripts())
def test_our_scripts_understand_their_calls(where: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each script is started with the arguments, and stopped when it has understood them."""
    understand = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *arguments: Any) -> None:
        understand(self, *arguments)
        raise _Parsed

    for text in alternatives(line):
        _, script, *arguments = shlex.split(text, comments=True)
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", [script, *arguments])
            patch.syspath_prepend(str((ROOT / script).parent))
            with pytest.raises(_Parsed):
                runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_yaml_is_a_study_file_or_part_of_one(block: Block) -> None:
    document, _ = parse_yaml(block.text, str(block))
    StudyFile({**PARTIAL, **document} if "name" not in document else document)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "json"], ids=str)
def test_json_is_settings_of_an_editor(block: Block) -> None:
    for schema, files in json.loads(block.text)["yaml.schemas"].items():
        assert (ROOT / schema).is_file()
        assert list(ROOT.glob(files))


def is_tree(block: Block) -> bool:
    return re.match(r"[\w-]+/ ", block.text) is not None


def test_the_tree_is_the_one_that_is_there() -> None:
    (tree,) = (block for block in BLOCKS if block.language == "" and is_tree(block))
    named = re.findall(r"^([\w-]+)/ ", tree.text, re.MULTILINE)
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not found:
        pytest.skip("not a git checkout")
    assert set(named) == {path.split("/")[0] for path in found if "/" in path and not path.startswith(".")}
    parts = re.search(r"^peftsearch/ +(.+)$", tree.text, re.MULTILINE)
    assert parts is not None
    assert all((ROOT / "peftsearch" / part).is_dir() for part in parts[1].split())


def test_other_programs_in_sentences_are_there() -> None:
    """Files that a sentence tells to run or to test."""
    for document, span in spans():
        words = [word for word in span.split() if not re.match(r"\w+=", word)]
        if words and words[0] in ("python", "pytest") and len(words) > 1 and not words[1].startswith("-"):
            assert (ROOT / words[1]).exists(), f"{document}: {span}"
