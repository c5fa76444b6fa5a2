"""cluster/README.md: its files exist, its shell parses, its commands have the options that it gives them."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import typer
from cluster_files import CLUSTER, ROOT, installed, shell_blocks

README = (CLUSTER / "README.md").read_text()
BLOCKS = shell_blocks(README)


def commands(program: str) -> list[list[str]]:
    """The README's calls of a program, also inside ``ray exec`` and ``kubectl exec``, as words."""
    code = "\n".join(BLOCKS).replace("\\\n", " ")
    found = re.findall(rf"(?:^|'|-- |&& |=token )\s*((?:{program}) [^'\")\n]*)", code, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


def test_there_are_blocks() -> None:
    assert len(BLOCKS) > 20


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_shell_parses(block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # SC2034: a block may set what a later one reads.
    done = subprocess.run(
        [installed("shellcheck"), "--shell=bash", "-e", "SC2034,SC2154,SC2088", "-"],
        input=block,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_files_that_are_named_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (CLUSTER / target).exists(), target
    for path in re.findall(r"\bcluster/[\w./-]*\w", "\n".join(BLOCKS)):
        # `.env` is made by a step; `ray rsync-up` copies the folder itself.
        assert (ROOT / path).exists() or path == "cluster/.env", path


def test_links_inside_the_page_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", README, re.M)
    }
    for anchor in re.findall(r"\]\(#([\w-]+)\)", README):
        assert anchor in headings, anchor


def test_every_file_is_mentioned() -> None:
    for path in CLUSTER.iterdir():
        if path.name not in ("README.md", ".gitignore", ".env", "env.example", "Dockerfile.dockerignore"):
            assert path.name in README, path.name


def test_peftsearch_has_the_options_that_are_named() -> None:
    from peftsearch.cli.app import app

    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    calls = commands("peftsearch")
    assert {call[1] for call in calls} >= {"submit", "status", "frontier", "export", "validate"}
    for call in calls:
        known = {option for parameter in verbs[call[1]].params for option in parameter.opts}
        assert {word for word in call[2:] if word.startswith("--")} <= known, call


def test_ray_has_the_options_that_are_named() -> None:
    from ray.scripts.scripts import cli

    calls = commands("ray")
    assert {call[1] for call in calls} >= {"up", "exec", "attach", "start", "rsync-up", "rsync-down", "get-auth-token"}
    for call in calls:
        if call[1] == "job":
            continue
        known = {option for parameter in cli.commands[call[1]].params for option in parameter.opts}
        given = {word.partition("=")[0] for word in call[2:] if word.startswith("-")}
        assert given <= known, call
