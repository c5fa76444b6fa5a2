"""The doctor looks at who can read the token with which code is run on a Ray cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cluster_files import installed

from peftsearch.cli.doctor import _ray_token


def test_no_token_is_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _ray_token() == []


def test_a_token_as_ray_writes_it_is_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = installed("ray")
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    environment.pop("RAY_AUTH_TOKEN_PATH", None)
    subprocess.run([ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True, umask=0o022)
    token = tmp_path / ".ray" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    (found,) = _ray_token()
    assert not found.ok
    assert found.optional
    assert f"chmod 600 {token}" in found.detail
    token.chmod(0o600)
    (found,) = _ray_token()
    assert found.ok
