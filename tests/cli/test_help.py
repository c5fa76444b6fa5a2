"""What the command line says of itself, and that saying so takes no time."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from cli_study import Result

from peftsearch.cli.app import app, run_app
from peftsearch.study import Study

Cli = Callable[..., Result]
COMMANDS = tuple(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_every_command_has_one_line(peftsearch: Cli) -> None:
    result = peftsearch("--help")
    assert result.status == 0
    assert result.err == ""
    for command in COMMANDS:
        (line,) = (line for line in result.out.splitlines() if line.startswith(f"│ {command} "))
        # The sentence ends on its line: it is not wrapped.
        assert line.rstrip("│ ").endswith(".")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command: str, peftsearch: Cli) -> None:
    result = peftsearch(command, "--help")
    assert (result.status, result.err) == (0, "")
    assert f"Example: peftsearch {command}" in result.out


def test_without_a_command_the_help_is_shown(peftsearch: Cli) -> None:
    result = peftsearch()
    assert result.status == 2
    assert "Usage: peftsearch" in result.out
    assert result.err == ""


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "mlflow", "transformers", "peft", "datasets", "optuna", "pandas", "pyarrow")
    program = f"""
import sys
from peftsearch.cli import main
sys.argv = ["peftsearch", "--help"]
try:
    main()
except SystemExit as end:
    assert end.code == 0
print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip() == "[]"
    # Processor time, not wall time: a busy machine must not fail this.
    assert after.ru_utime - before.ru_utime < 1.0


def test_json_is_all_there_is_on_standard_output(peftsearch: Cli, storage: Path, started: Study) -> None:
    for command in (["list"], ["status", "small"], ["trials", "small"], ["frontier", "small"]):
        result = peftsearch(*command, "--json", "--storage", storage)
        assert (result.status, result.err) == (0, ""), command
        assert json.loads(result.out)
    found = json.loads(peftsearch("trials", "small", "--json", "--storage", storage).out)
    assert [trial["state"] for trial in found["trials"]] == ["COMPLETE", "FAILED"]
    found = json.loads(peftsearch("frontier", "small", "--domain", "legal", "--json", "--storage", storage).out)
    assert list(found["domains"]) == ["legal"]


def test_tables_in_a_file_are_as_wide_as_they_want(peftsearch: Cli, storage: Path, started: Study) -> None:
    result = peftsearch("trials", "small", "--storage", storage)
    (failed,) = (line for line in result.out.splitlines() if "FAILED" in line)
    assert "the loss became NaN" in failed
    assert "learning_rate" in failed or "lr=" in failed


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What the program tells a shell; it ends there, as typer has it."""

    def call(*arguments: str, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            run_app(list(arguments))
        out, err = capfd.readouterr()
        assert (end.value.code, err) == (0, "")
        return out

    return call


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completion_can_be_installed_in_every_shell(shell: str, ask: Callable[..., str]) -> None:
    script = ask("--show-completion", shell)
    assert "_PEFTSEARCH_COMPLETE" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("peftsearch fr", ["frontier"]),
        ("peftsearch frontier --ht", ["--html"]),
        ("peftsearch export small --pick k", ["knee"]),
        ("peftsearch status sm", ["small"]),
        ("peftsearch status x", []),
    ],
)
def test_bash_completes(
    words: str, expected: list[str], ask: Callable[..., str], started: Study, storage: Path
) -> None:
    """As bash asks: commands, options, choices, and the studies of the storage."""
    request = {"_PEFTSEARCH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert ask(PEFTSEARCH_STORAGE=str(storage), **request).split() == expected


def test_completion_is_silent_where_there_is_no_storage(ask: Callable[..., str], tmp_path: Path) -> None:
    request = {"_PEFTSEARCH_COMPLETE": "complete_bash", "COMP_WORDS": "peftsearch status x", "COMP_CWORD": "2"}
    for storage in (str(tmp_path / "missing"), "s3://", "nowhere://x"):
        assert ask(PEFTSEARCH_STORAGE=storage, **request).strip() == ""
