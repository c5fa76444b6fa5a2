"""What importing PEFT costs a process that compiles nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from peftsearch.deferred_compile import deferred_compile

SCRIPT = """
import sys
import torch

compile_now = torch.compile
import peftsearch
from peft import LoraConfig, get_peft_model

get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
assert torch.compile is compile_now
assert "bitsandbytes" in sys.modules
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_lora_needs_no_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr


def test_what_is_decorated_is_compiled_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, object]] = []

    def compile_now(model: object, **options: object) -> object:
        compiled.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compile_now)
    with deferred_compile():

        @torch.compile
        def twice(number: int) -> int:
            return 2 * number

        @torch.compile(dynamic=False)
        def more(number: int, *, by: int) -> int:
            return number + by

        module = torch.compile(torch.nn.Identity(), fullgraph=True)
        assert compiled == [{"fullgraph": True}]
    assert torch.compile is compile_now
    assert isinstance(module, torch.nn.Identity)
    assert [twice(2), twice(3), more(2, by=3)] == [4, 6, 5]
    assert compiled == [{"fullgraph": True}, {}, {"dynamic": False}]
    assert twice.__name__ == "twice"


def test_an_error_puts_the_compiler_back() -> None:
    compile_now = torch.compile
    with pytest.raises(RuntimeError, match="broken"), deferred_compile():
        raise RuntimeError("broken")
    assert torch.compile is compile_now
